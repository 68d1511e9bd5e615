"""Provide what all other parts use: files, torch's state, modules, random numbers, arguments, errors, the version."""
