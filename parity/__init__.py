"""Proof that the two tracks are equal to each other and to the original code."""
