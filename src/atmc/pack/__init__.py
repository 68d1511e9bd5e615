"""Write a model to a file and read it back: the format and its entropy coder."""
