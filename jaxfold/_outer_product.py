"""``ops.outer_product_mean`` by Triton kernels."""

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import outer_product as kernels
from jaxfold._rows import sum_columns
from jaxfold._triton import architecture, call, dtype_name


@jax.custom_vjp
def outer_product_mean(
    left: Array, right: Array, mask: Array, weights: Array, bias: Array
) -> Array:
    """The projected mean [b i j z] over sequences of outer products."""
    return _forward(left, right, mask, weights, bias)[0]


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
    left: Array, right: Array, mask: Array, weights: Array, bias: Array
) -> tuple[Array, tuple[Array, ...]]:
    """The result, and what the backward pass needs, with the number of sequences of each pair."""
    wide_mask = mask.astype(jnp.float32)
    count = wide_mask.mT @ wide_mask
    shape = _shape(left, right, weights)
    launch = kernels.project(shape, dtype_name(left), architecture())
    (out,) = call(launch, _outer(left, right), weights, bias, count)
    return out.reshape(*count.shape, shape.z), (left, right, mask, weights, bias, count)


def _backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
    """Gradients by left, right, weights and bias; the mask has none."""
    left, right, mask, weights, bias, count = saved
    shape, kind = _shape(left, right, weights), (dtype_name(left), architecture())
    sum_grad, outer_grad, sums = call(kernels.gradient(shape, *kind), grad, weights, count)
    outer = _outer(left, right)
    outer_grad = outer_grad.reshape(outer.shape)
    (parts,) = call(kernels.weights(shape, *kind), outer, sum_grad)
    weights_grad = sum_columns(parts, weights).reshape(weights.shape)
    left_grad = (_flat(right) @ outer_grad.mT).reshape(left.shape)
    right_grad = (_flat(left) @ outer_grad).reshape(right.shape)
    return left_grad, right_grad, jnp.zeros_like(mask), weights_grad, sum_columns(sums, bias)


outer_product_mean.defvjp(_forward, _backward)
