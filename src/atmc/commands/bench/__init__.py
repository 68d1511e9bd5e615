"""Measure latency and memory of a model file beside the dense engines installed here."""
