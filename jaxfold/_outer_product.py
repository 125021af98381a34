"""``ops.outer_product_mean`` by Triton kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import outer_product as kernels
from jaxfold._rows import sum_columns
from jaxfold._triton import architecture, call, dtype_name


@jax.custom_vjp
def outer_product_mean(
    left: Array, right: Array, count: Array, weights: Array, bias: Array, pair: Array | None
) -> Array:
    """The projected mean [b i j z] over sequences of outer products, added to ``pair``."""
    return _forward(left, right, count, weights, bias, pair)[0]


def _shape(left: Array, right: Array, weights: Array) -> kernels.Shape:
    b, _, i, _ = left.shape
    return kernels.Shape(b * i, right.shape[2], *weights.shape)


def _flat(x: Array) -> Array:
    """[b, s, i c] from [b, s, i, c]."""
    return x.reshape(*x.shape[:2], -1)


def _outer(left: Array, right: Array) -> Array:
    """Outer products summed over sequences, [b, i c, j e]."""
    return _flat(left).mT @ _flat(right)


def _forward(
    left: Array, right: Array, count: Array, weights: Array, bias: Array, pair: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    """The result, and what the backward pass needs; ``count`` holds each pair's sequences."""
    shape = _shape(left, right, weights)
    launch = kernels.project(shape, dtype_name(left), architecture(), pair is not None)
    base = bias if pair is None else pair.reshape(-1, shape.z)
    (out,) = call(launch, _outer(left, right), weights, bias, count.astype(jnp.float32), base)
    # whether there is a pair is known from the structure: an array of it would be kept
    saved = (left, right, count, weights, bias, None if pair is None else ())
    return out.reshape(*count.shape, shape.z), saved


def _backward(saved: tuple[Any, ...], grad: Array) -> tuple[Array | None, ...]:
    """Gradients by left, right, weights, bias and pair; the count has none."""
    left, right, count, weights, bias, residual = saved
    shape, kind = _shape(left, right, weights), (dtype_name(left), architecture())
    counted = grad, weights, count.astype(jnp.float32)
    sum_grad, outer_grad, sums = call(kernels.gradient(shape, *kind), *counted)
    outer = _outer(left, right)
    outer_grad = outer_grad.reshape(outer.shape)
    (parts,) = call(kernels.weights(shape, *kind), outer, sum_grad)
    weights_grad = sum_columns(parts, weights).reshape(weights.shape)
    left_grad = (_flat(right) @ outer_grad.mT).reshape(left.shape)
    right_grad = (_flat(left) @ outer_grad).reshape(right.shape)
    parameters = weights_grad, sum_columns(sums, bias)
    return (
        left_grad,
        right_grad,
        jnp.zeros_like(count),
        *parameters,
        None if residual is None else grad,
    )


outer_product_mean.defvjp(_forward, _backward)
