"""Make it a file: the coder and the format."""
