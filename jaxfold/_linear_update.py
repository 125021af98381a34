"""``ops.linear_update`` by Triton kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import linear_update as kernels
from jaxfold._rows import sum_columns
from jaxfold._triton import architecture, call, dtype_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def linear_update(
    x: Array,
    y: Array,
    weights: Array,
    bias: Array,
    factor: Array | None,
    residual: bool,
    transposed: bool,
) -> Array:
    """The projection of y times the factor, with ``residual`` added to x."""
    k, c = weights.shape
    kind = dtype_name(x), architecture()
    launch = kernels.forward(_shape(x, factor, transposed), k, c, *kind, residual)
    (out,) = call(launch, y, weights, bias, x, bias if factor is None else factor)
    return out.reshape(x.shape)


def _shape(x: Array, factor: Array | None, transposed: bool) -> kernels.Shape:
    return kernels.Shape.of(x.shape, None if factor is None else factor.shape, transposed)


def _forward(x: Array, *inputs: Any) -> tuple[Array, tuple[Array | None, ...]]:
    return linear_update(x, *inputs), inputs[:4]


def _backward(
    residual: bool, transposed: bool, saved: Any, grad: Array
) -> tuple[Array | None, ...]:
    """Gradients of all but the factor, which has none."""
    y, weights, bias, factor = saved
    k, c = weights.shape
    kind = dtype_name(grad), architecture()
    launch = kernels.backward(_shape(grad, factor, transposed), k, c, *kind)
    y_grad, update_grad, sums = call(launch, grad, weights, bias if factor is None else factor)
    if factor is None and not transposed:
        update_grad = grad.reshape(-1, c)
    weights_grad = jnp.einsum("nk,nc->kc", y.reshape(y_grad.shape), update_grad)
    x_grad = grad if residual else jnp.zeros_like(grad)
    factor_grad = None if factor is None else jnp.zeros_like(factor)
    return x_grad, y_grad.reshape(y.shape), weights_grad, sum_columns(sums, bias), factor_grad


linear_update.defvjp(_forward, _backward)
