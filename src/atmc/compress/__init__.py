"""Make it small: projections, constraints, factorization, the ADMM step, budgets."""
