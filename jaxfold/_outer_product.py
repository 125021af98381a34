"""``ops.outer_product_mean`` by Triton kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import outer_product as kernels
from foldcore.kernels import outer_product_on_chip as on_chip
from foldcore.kernels import outer_product_on_chip_backward as on_chip_backward
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


def _problem(left: Array, right: Array, weights: Array) -> on_chip.Shape:
    b, s, i, _ = left.shape
    return on_chip.Shape(b, s, i, right.shape[2], *weights.shape)


def _turned(left: Array) -> Array:
    """[b, s, c, i]"""
    b, s, i, c = left.shape
    return call(on_chip.turned(b * s, i, c, dtype_name(left)), left)[0]


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
    problem, kind = _problem(left, right, weights), (dtype_name(left), architecture())
    inputs = (weights, bias, count.astype(jnp.float32), bias if pair is None else pair)
    if on_chip.fits(problem, *kind):
        launch = on_chip.project(problem, *kind, pair is not None)
        (out,) = call(launch, _turned(left), right, *inputs)
    else:
        launch = kernels.project(_shape(left, right, weights), *kind, pair is not None)
        (out,) = call(launch, _outer(left, right), *inputs)
    # whether there is a pair is known from the structure: an array of it would be kept
    saved = (left, right, count, weights, bias, None if pair is None else ())
    return out.reshape(*count.shape, problem.z), saved


def _backward(saved: tuple[Any, ...], grad: Array) -> tuple[Array | None, ...]:
    """Gradients by left, right, weights, bias and pair; the count has none."""
    left, right, count, weights, bias, residual = saved
    past = None if residual is None else grad
    shape, kind = _shape(left, right, weights), (dtype_name(left), architecture())
    if on_chip.fits(_problem(left, right, weights), *kind):
        sides, parameters = _backward_on_chip(grad, left, right, count, weights, bias)
        return *sides, jnp.zeros_like(count), *parameters, past
    counted = grad, weights, count.astype(jnp.float32)
    sum_grad, outer_grad, sums = call(kernels.gradient(shape, *kind), *counted)
    outer = _outer(left, right)
    outer_grad = outer_grad.reshape(outer.shape)
    (parts,) = call(kernels.weights(shape, *kind), outer, sum_grad)
    weights_grad = sum_columns(parts, weights).reshape(weights.shape)
    left_grad = (_flat(right) @ outer_grad.mT).reshape(left.shape)
    right_grad = (_flat(left) @ outer_grad).reshape(right.shape)
    parameters = weights_grad, sum_columns(sums, bias)
    return left_grad, right_grad, jnp.zeros_like(count), *parameters, past


def _backward_on_chip(
    grad: Array, left: Array, right: Array, count: Array, weights: Array, bias: Array
) -> tuple[list[Array], tuple[Array, Array]]:
    """Gradients by both sides, and by weights and bias."""
    problem, kind = _problem(left, right, weights), (dtype_name(left), architecture())
    launch = on_chip_backward.divide(count.size, problem.z, kind[0])
    sum_grad, sums = call(launch, grad, count.astype(jnp.float32))
    sides: list[Array] = []
    for other, is_left in ((right, True), (left, False)):
        launch = on_chip_backward.side_gradient(problem, kind[1], is_left)
        (parts,) = call(launch, sum_grad, weights, other)
        sides += call(on_chip_backward.side_sum(parts.shape, kind[0]), parts)
    launch = on_chip_backward.weights_gradient(problem, kind[1])
    (parts,) = call(launch, right, _turned(left), sum_grad)
    weights_grad = sum_columns(parts, weights).reshape(weights.shape)
    return sides, (weights_grad, sum_columns(sums, bias))


outer_product_mean.defvjp(_forward, _backward)
