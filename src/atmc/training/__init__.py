"""Train a model: settings, methods, the loop, and what is chosen after the last epoch."""
