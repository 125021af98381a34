"""What both tracks share: data, configuration, checkpoints, metrics; neither jax nor torch."""

__version__ = "0.1.0"
