"""Run a model elsewhere: a graph of operations, the sparse engine, and exports."""
