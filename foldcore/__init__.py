"""What both tracks share: data, configuration, checkpoints, metrics. Imports neither jax nor torch."""
