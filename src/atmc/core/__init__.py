"""Provide what all other parts use: files, numerics, random numbers, arguments, errors, the version."""
