"""Train a model: settings, methods, the loop, and what is decided after the last epoch."""
