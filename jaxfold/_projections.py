"""``projections`` by Triton kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import norm_project as kernels
from foldcore.kernels import norm_project_backward as backward
from jaxfold._rows import sum_columns
from jaxfold._triton import architecture, call, dtype_name

# Bias of pairs ------------------------------------------------------------------------------------


@jax.custom_vjp
def pair_bias(pair: Array, scale: Array, offset: Array, weights: Array) -> tuple[Array, Array]:
    """The bias [b h i j], and the pairs."""
    return _pair_bias(pair, scale, offset, weights, 2, False)[0], pair


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def layer_norm_pair_bias(
    pair: Array, scale: Array, offset: Array, weights: Array, axis: int
) -> tuple[Array, Array, Array]:
    """Normalised pairs and bias, transposed along axis 1, and the pairs."""
    bias, normal = _pair_bias(pair, scale, offset, weights, axis, True)
    b, _, q, k = bias.shape
    return normal.reshape(b, q, k, -1), bias, pair


def _pair_bias(
    pair: Array, scale: Array, offset: Array, weights: Array, axis: int, normal: bool
) -> tuple[Array, Array]:
    """The bias, and with ``normal`` the normalised pairs, else a placeholder."""
    shape = kernels.Pairs.of(pair.shape, weights.shape[1], axis)
    launch = kernels.pair_bias(shape, dtype_name(pair), architecture(), normal)
    bias, normalized = call(launch, pair, scale, offset, weights)
    b, i, j, _ = pair.shape
    return bias.reshape(b, -1, *((i, j) if axis == 2 else (j, i))), normalized


def _pair_bias_backward(
    axis: int, saved: tuple[Array, ...], normal: Array | None, bias: Array, residual: Array
) -> tuple[Array, ...]:
    """Gradients by the pairs, ``residual`` added, by scale, offset and weights."""
    pair, scale, offset, weights = saved
    shape = kernels.Pairs.of(pair.shape, weights.shape[1], axis)
    launch = backward.pair_bias(shape, dtype_name(pair), architecture(), normal is not None, True)
    others = (bias if normal is None else normal, residual)
    pair_grad, sums = call(launch, *saved, bias, *others)
    ends = (weights.size, weights.size + len(scale))
    weights_grad, *norm = jnp.split(sum_columns(sums, scale), ends)
    return pair_grad.reshape(pair.shape), *norm, weights_grad.reshape(weights.shape)


pair_bias.defvjp(
    lambda *inputs: (pair_bias(*inputs), inputs),
    lambda saved, grads: _pair_bias_backward(2, saved, None, *grads),
)
layer_norm_pair_bias.defvjp(
    lambda *inputs: (layer_norm_pair_bias(*inputs), inputs[:4]),
    lambda axis, saved, grads: _pair_bias_backward(axis, saved, *grads),
)


# Sides of an outer product ------------------------------------------------------------------------


@jax.custom_vjp
def outer_product_sides(
    msa: Array,
    mask: Array,
    scale: Array,
    offset: Array,
    left_weights: Array,
    left_bias: Array,
    right_weights: Array,
    right_bias: Array,
) -> tuple[Array, Array, Array]:
    """The left and the right side, and the MSA."""
    c, e = left_weights.shape
    n, kind = msa.size // c, (dtype_name(msa), architecture())
    vectors = scale, offset, left_weights, left_bias, right_weights, right_bias
    inputs = msa, mask.astype(jnp.float32), *vectors
    left, right = call(kernels.outer_product_sides(n, c, e, *kind), *inputs)
    return left.reshape(*msa.shape[:3], e), right.reshape(*msa.shape[:3], e), msa


def _sides_forward(*inputs: Any) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    msa, mask, scale, offset, left_weights, _, right_weights, _ = inputs
    saved = msa, mask, scale, offset, left_weights, right_weights
    return outer_product_sides(*inputs), saved


def _sides_backward(saved: tuple[Array, ...], grads: tuple[Array, ...]) -> tuple[Array, ...]:
    """Gradients of all; the mask has none."""
    msa, mask, *arrays = saved
    c, e = arrays[2].shape
    n, kind = msa.size // c, (dtype_name(msa), architecture())
    launch = backward.outer_product_sides(n, c, e, *kind, True)
    msa_grad, sums = call(launch, msa, mask.astype(jnp.float32), *arrays, *grads)
    first = 2 * c * e
    ends = (c * e, first, first + c, first + 2 * c, first + 2 * c + e)
    left, right, *norm, left_bias, right_bias = jnp.split(sum_columns(sums, arrays[0]), ends)
    sides = left.reshape(c, e), left_bias, right.reshape(c, e), right_bias
    return msa_grad.reshape(msa.shape), jnp.zeros_like(mask), *norm, *sides


outer_product_sides.defvjp(_sides_forward, _sides_backward)
