"""AlphaFold 2 in JAX."""
