"""``ops.triangle_multiplication`` by Triton kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import layer_norm, triangle, triangle_backward
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
    """The result, and what the backward pass needs; left, right and product are [b h i j]."""
    b, i, j, c = pair.shape
    h = parameters[2].shape[1]
    kind = dtype_name(pair), architecture()
    launch = triangle.project(b, i * j, c, h, *kind)
    inputs = (pair, mask.astype(jnp.float32), *parameters[:10])
    left, right = (x.reshape(b, h, i, j) for x in call(launch, *inputs))
    product = _multiply(left, right, outgoing)
    launch = triangle.output(b, (i, j), c, h, *kind, factor is not None, residual)
    arrays = (product, pair, mask if factor is None else factor)
    (out,) = call(launch, *arrays, *parameters[10:14], *parameters[:2], *parameters[14:])
    saved = (pair, mask, factor, parameters, left, right, product)
    return out.reshape(pair.shape), saved


def _backward(outgoing: bool, residual: bool, saved: Any, grad: Array) -> tuple[Any, ...]:
    """Gradients of pair and parameters; mask and factor have none."""
    pair, mask, factor, parameters, left, right, product = saved
    b, i, j, c = pair.shape
    h = parameters[2].shape[1]
    kind = dtype_name(pair), architecture()
    launch = triangle_backward.output_backward(b, (i, j), c, h, *kind, factor is not None)
    inputs = (grad, product, pair, mask if factor is None else factor)
    product_grad, update_grad, gate_grad, center, output_sums = call(
        launch, *inputs, *parameters[10:14], *parameters[:2], *parameters[14:]
    )
    grads = _multiply_backward(left, right, product_grad.reshape(b, h, i, j), outgoing)
    launch = triangle_backward.project_backward(b, i * j, c, h, *kind)
    normalized, projected_grad, sums = call(
        launch, pair, mask.astype(jnp.float32), *grads, *parameters[:10]
    )
    projections = jnp.einsum("bpc,bpw->cw", normalized, projected_grad)
    # the barrier keeps XLA from copying both gradients side by side for one product instead of two
    gating = jnp.einsum("bpc,bpd->cd", jax.lax.optimization_barrier(normalized), gate_grad)
    output = jnp.einsum("bph,bpc->hc", center, update_grad)
    together = jnp.concatenate(parameters[2:10:2], axis=1)
    rows_grad = projected_grad @ together.T + gate_grad @ parameters[14].T
    launch = layer_norm.backward(b * i * j, c, *kind, residual)
    pair_grad, norm_sums = call(launch, pair, parameters[0], rows_grad, grad)
    first, second, norm = (sum_columns(x, parameters[3]) for x in (sums, output_sums, norm_sums))
    pairs = zip(jnp.split(projections, 4, axis=1), jnp.split(first, 4), strict=True)
    flat = [x for both in pairs for x in both]
    output_bias, gating_bias, center_scale, center_offset = jnp.split(second, (c, 2 * c, 2 * c + h))
    middle = (center_scale, center_offset, output, output_bias)
    parameter_grads = (norm[:c], norm[c:], *flat, *middle, gating, gating_bias)
    factor_grad = None if factor is None else jnp.zeros_like(factor)
    return pair_grad.reshape(pair.shape), jnp.zeros_like(mask), factor_grad, parameter_grads


triangle_multiplication.defvjp(_forward, _backward)
