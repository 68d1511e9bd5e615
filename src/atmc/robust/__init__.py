"""Make it hard to fool: perturbation balls, attacks, training objectives."""
