"""Make a model small: projections, constraints, factorization, the ADMM step, budgets."""
