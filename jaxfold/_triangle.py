"""``ops.triangle_multiplication`` by Triton kernels."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import (
    rows,
    triangle,
    triangle_backward,
    triangle_fold,
    triangle_output_backward,
    triangle_pipelined,
    triangle_product,
)
from jaxfold._triton import architecture, call, dtype_name

FOLDED = 4  # arrays that ``fold`` makes of 16 parameters


def _product(a: Array, b: Array, turned: tuple[bool, bool]) -> Array:
    """[b h i j] from two of [b h n n], of either as it lies or transposed.

    By einsum: a transposed array would be written out, for two batch axes come between it and the
    product.
    """
    m, n = math.prod(a.shape[:2]), a.shape[-1]
    if triangle_product.fits(m, n, dtype_name(a), architecture()):
        return call(triangle_product.product(m, n, turned), a, b)[0].reshape(a.shape)
    first, second = "bhki" if turned[0] else "bhik", "bhjk" if turned[1] else "bhkj"
    return jnp.einsum(f"{first},{second}->bhij", a, b)


def _multiply(left: Array, right: Array, outgoing: bool) -> Array:
    """[b h i j] from two of [b h i k], or of [b h k j] and [b h k i]."""
    if outgoing:
        return _product(left, right, (False, True))
    return _product(right, left, (True, False))


def _multiply_backward(
    left: Array, right: Array, grad: Array, outgoing: bool
) -> tuple[Array, Array]:
    if outgoing:
        return _product(grad, right, (False, False)), _product(grad, left, (True, False))
    return _product(right, grad, (False, False)), _product(left, grad, (False, True))


def triangle_multiplication(
    pair: Array,
    mask: Array,
    factor: Array | None,
    parameters: tuple[Array, ...],
    outgoing: bool,
    residual: bool,
) -> Array:
    """The update of the pair, with ``residual`` added to it; parameters may be folded already."""
    folded = parameters if len(parameters) == FOLDED else fold(parameters)
    return _multiplication(pair, mask, factor, folded, outgoing, residual)


# Norms as a part of weights -----------------------------------------------------------------------


@jax.custom_vjp
def fold(parameters: tuple[Array, ...]) -> tuple[Array, ...]:
    """Weights [l c w] and bias [l w] of the projections, those of the output; or all without l."""
    layers, c, h = _layers(parameters)
    launch = triangle_fold.forward(math.prod(layers), c, h, dtype_name(parameters[0]))
    return tuple(x.reshape(*layers, *x.shape[1:]) for x in call(launch, *parameters))


def _layers(parameters: tuple[Array, ...]) -> tuple[tuple[int, ...], int, int]:
    """The leading axis, if there is one; channels of pairs and of the product."""
    *layers, c, h = parameters[2].shape
    return tuple(layers), c, h


def _fold(parameters: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    return fold(parameters), tuple(parameters[i] for i in triangle_fold.WITHOUT_BIASES)


def _fold_backward(
    parameters: tuple[Array, ...], grads: tuple[Array, ...]
) -> tuple[tuple[Array, ...]]:
    """Gradients by all parameters, of which those but biases are given."""
    layers, c, h = _layers(parameters)
    launch = triangle_fold.backward(math.prod(layers), c, h, dtype_name(parameters[0]))
    found = call(launch, *grads, *parameters)
    return (tuple(x.reshape(*layers, *x.shape[1:]) for x in found),)


fold.defvjp(_fold, _fold_backward)


# The multiplication -------------------------------------------------------------------------------


def _project(pair: Array, mask: Array, folded: tuple[Array, ...]) -> tuple[Array, ...]:
    """Left and right [b h p], 1 / standard deviation of the pair [b p]."""
    b, i, j, c = pair.shape
    sizes = b, i * j, c, folded[2].shape[0]
    kind, mask = (dtype_name(pair), architecture()), mask.astype(jnp.float32)
    if triangle_pipelined.fits(*sizes, *kind):
        return call(triangle_pipelined.project(*sizes), pair, mask, *folded[:2])
    (rstd,) = call(triangle_fold.rstd(b, i * j, c, kind[0]), pair)
    return *call(triangle.project(*sizes, *kind), pair, mask, rstd, *folded[:2]), rstd


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _multiplication(
    pair: Array,
    mask: Array,
    factor: Array | None,
    folded: tuple[Array, ...],
    outgoing: bool,
    residual: bool,
) -> Array:
    return _forward(pair, mask, factor, folded, outgoing, residual)[0]


def _forward(
    pair: Array,
    mask: Array,
    factor: Array | None,
    folded: tuple[Array, ...],
    outgoing: bool,
    residual: bool,
) -> tuple[Array, Any]:
    """The result, and what the backward pass needs: its inputs; left, right and product [b h i j];
    1 / standard deviation of the pair, mean and 1 / standard deviation of the product [b p]."""
    b, i, j, c = pair.shape
    h = folded[2].shape[0]
    kind = dtype_name(pair), architecture()
    left, right, rstd = _project(pair, mask, folded)
    left, right = left.reshape(b, h, i, j), right.reshape(b, h, i, j)
    product = _multiply(left, right, outgoing)
    launch = triangle.output(b, (i, j), c, h, *kind, factor is not None, residual)
    inputs = (product, pair, mask if factor is None else factor, rstd, *folded)
    out, *center = call(launch, *inputs)
    saved = (pair, mask, factor, folded, left, right, product, rstd, *center)
    return out.reshape(pair.shape), saved


def _backward(outgoing: bool, residual: bool, saved: Any, grad: Array) -> tuple[Any, ...]:
    """Gradients of pair and folded parameters; mask and factor have none."""
    pair, mask, factor, folded, left, right, product, rstd, center_mean, center_rstd = saved
    b, i, j, c = pair.shape
    h, n = folded[2].shape[0], b * i * j
    kind = dtype_name(pair), architecture()
    launch = triangle_output_backward.output(b, (i, j), c, h, *kind, factor is not None)
    inputs = (grad, product, pair, mask if factor is None else factor)
    update_grad, slopes, projected_grad, output_sums = call(
        launch, *inputs, rstd, center_rstd, *folded
    )
    launch = triangle_output_backward.center(b, i * j, c, h, *kind, len(slopes))
    product_grad, center = call(
        launch, update_grad, product, slopes, center_mean, center_rstd, folded[2]
    )
    grads = _multiply_backward(left, right, product_grad.reshape(b, h, i, j), outgoing)
    launch = triangle_backward.project(b, i * j, c, h, *kind)
    projected_grad, sums = call(
        launch, pair, mask.astype(jnp.float32), rstd, *grads, *folded[:2], projected_grad
    )
    normal_grad = jnp.einsum("wn,cw->nc", projected_grad, folded[0])
    launch = triangle_backward.norm(n, c, *kind, residual)
    pair_grad, normal = call(launch, pair, normal_grad, grad)
    moments = jnp.einsum("nc,wn->cw", normal, projected_grad)
    output_moments = center @ update_grad
    launch = rows.two_column_sums(sums.shape, output_sums.shape, "float32")
    bias, output_bias = jnp.split(call(launch, sums, output_sums)[0], folded[1].shape)
    folded_grads = (moments, bias, output_moments, output_bias)
    factor_grad = None if factor is None else jnp.zeros_like(factor)
    pair_grad = pair_grad.reshape(pair.shape)
    return pair_grad, jnp.zeros_like(mask), factor_grad, folded_grads


_multiplication.defvjp(_forward, _backward)
