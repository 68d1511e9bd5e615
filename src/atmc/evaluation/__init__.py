"""Measure a model: attacks by name, accuracies, statistics, and checks of the evaluation itself."""
