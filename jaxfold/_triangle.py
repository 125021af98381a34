"""``ops.triangle_multiplication`` by Triton kernels."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import (
    triangle,
    triangle_backward,
    triangle_fold,
    triangle_output_backward,
)
from jaxfold._rows import sum_columns
from jaxfold._triton import architecture, call, dtype_name


def _multiply(left: Array, right: Array, outgoing: bool) -> Array:
    """[b h i j] from two of [b h i k], or of [b h k j] and [b h k i].

    By einsum: a transposed array would be written out, for two batch axes come between it and the
    product.
    """
    if outgoing:
        return jnp.einsum("bhik,bhjk->bhij", left, right)
    return jnp.einsum("bhki,bhkj->bhij", right, left)


def _multiply_backward(
    left: Array, right: Array, grad: Array, outgoing: bool
) -> tuple[Array, Array]:
    if outgoing:
        return grad @ right, jnp.einsum("bhij,bhik->bhjk", grad, left)
    return right @ grad, jnp.einsum("bhkj,bhij->bhki", left, grad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def triangle_multiplication(
    pair: Array,
    mask: Array,
    factor: Array | None,
    parameters: tuple[Array, ...],
    outgoing: bool,
    residual: bool,
) -> Array:
    """The update of the pair, with ``residual`` added to it."""
    return _forward(pair, mask, factor, parameters, outgoing, residual)[0]


def _forward(
    pair: Array,
    mask: Array,
    factor: Array | None,
    parameters: tuple[Array, ...],
    outgoing: bool,
    residual: bool,
) -> tuple[Array, Any]:
    """The result, and what the backward pass needs: its inputs; left, right and product [b h i j];
    1 / standard deviation of the pair, mean and 1 / standard deviation of the product [b p]; folded
    weights and biases."""
    b, i, j, c = pair.shape
    h = parameters[2].shape[1]
    kind = dtype_name(pair), architecture()
    *folded, rstd = call(triangle_fold.forward(b, i * j, c, h, kind[0]), pair, *parameters)
    launch = triangle.project(b, i * j, c, h, *kind)
    left, right = call(launch, pair, mask.astype(jnp.float32), rstd, *folded[:2])
    left, right = left.reshape(b, h, i, j), right.reshape(b, h, i, j)
    product = _multiply(left, right, outgoing)
    launch = triangle.output(b, (i, j), c, h, *kind, factor is not None, residual)
    inputs = (product, pair, mask if factor is None else factor, rstd, *folded)
    out, *center = call(launch, *inputs)
    saved = (pair, mask, factor, parameters, left, right, product, rstd, *center, *folded)
    return out.reshape(pair.shape), saved


def _backward(outgoing: bool, residual: bool, saved: Any, grad: Array) -> tuple[Any, ...]:
    """Gradients of pair and parameters; mask and factor have none."""
    pair, mask, factor, parameters, left, right, product, rstd, *rest = saved
    center_mean, center_rstd, *folded = rest
    b, i, j, c = pair.shape
    h, n = parameters[2].shape[1], b * i * j
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
    moments = jnp.einsum("nc,wn->cw", normal, projected_grad), center @ update_grad
    totals = sum_columns(sums, rstd), sum_columns(output_sums, rstd)
    without_biases = [parameters[i] for i in triangle_fold.WITHOUT_BIASES]
    launch = triangle_fold.backward(c, h, dtype_name(parameters[0]))
    *weights, vectors = call(launch, *moments, *totals, *without_biases)
    ends = itertools.accumulate(parameters[i].shape[0] for i in triangle_fold.VECTORS[:-1])
    parameter_grads = triangle_fold.in_order(weights, jnp.split(vectors, list(ends)))
    factor_grad = None if factor is None else jnp.zeros_like(factor)
    pair_grad = pair_grad.reshape(pair.shape)
    return pair_grad, jnp.zeros_like(mask), factor_grad, tuple(parameter_grads)


triangle_multiplication.defvjp(_forward, _backward)
