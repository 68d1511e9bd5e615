"""What every other part rests on: files, numerics, random numbers, errors, the version."""
