"""A network as a list of operations, and the rewrites that simplify it."""
