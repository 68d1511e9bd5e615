"""Proofs that no image of a threat changes the answer, and verdicts per image: certified, broken or undecided."""
