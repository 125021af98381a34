"""Clipping and the update by Triton kernels."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from foldcore.config import OptimizerConfig
from foldcore.kernels import optimizer as kernels
from jaxfold._rows import sum_columns
from jaxfold._triton import architecture, call


def norm(x: Array) -> Array:
    """The norm of a vector in float32."""
    (sums,) = call(kernels.squares(x.size, architecture()), x)
    return jnp.sqrt(sum_columns(sums, x))[0]


def update(
    gradient: Array,
    old: Sequence[Array],
    rounded: Array | None,
    coefficients: Sequence[Array],
    config: OptimizerConfig,
) -> tuple[list[Array], Array | None, tuple[Array, Array]]:
    """The new buffers, and norms of the parameters and of Adam's direction.

    Between them the rounded parameters, where they were given.
    """
    launch = kernels.update(gradient.size, config, architecture(), rounded is not None)
    written = jnp.zeros(1, jnp.bfloat16) if rounded is None else rounded
    vector = jnp.stack([jnp.asarray(x).astype(jnp.float32) for x in coefficients])
    *new, narrow, sums = call(launch, gradient, *old, written, vector)
    norms = jnp.sqrt(sum_columns(sums, gradient))
    return new, None if rounded is None else narrow, (norms[0], norms[1])
