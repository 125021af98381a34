"""``ops.global_attention`` and what goes before it by Triton kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import global_attention as kernels
from foldcore.kernels import global_attention_backward, group_mean
from jaxfold._rows import sum_columns
from jaxfold._triton import architecture, call, dtype_name

# Projection, and the mean of each group -----------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def project_with_mean(x: Array, mask: Array, weights: Array, axis: int) -> tuple[Array, Array]:
    """``x @ weights`` [b s r n] and the means of groups [b g c]."""
    return _project(x, mask, weights, axis)[0]


def _project(x: Array, mask: Array, weights: Array, axis: int) -> tuple[Any, tuple[Array, ...]]:
    """The results, and what the backward pass needs."""
    b, s, r, c = x.shape
    launch = group_mean.forward((b, s, r), c, axis, dtype_name(x), architecture())
    mean, count = call(launch, x, mask)
    return (x @ weights, mean), (x, mask, weights, count)


def _project_backward(
    axis: int, saved: tuple[Array, ...], grads: tuple[Array, Array]
) -> tuple[Array, ...]:
    """Gradients by x and the weights; the mask has none."""
    x, mask, weights, count = saved
    b, s, r, c = x.shape
    kind = dtype_name(x), architecture()
    launch = group_mean.backward((b, s, r), c, weights.shape[1], axis, *kind)
    (x_grad,) = call(launch, grads[0], weights, mask, count, grads[1])
    weights_grad = jnp.einsum("bsrc,bsrn->cn", x, grads[0])
    return x_grad, jnp.zeros_like(mask), weights_grad


project_with_mean.defvjp(_project, _project_backward)


# Attention ----------------------------------------------------------------------------------------


def _problem(query: Array, projected: Array, axis: int, scale: float) -> kernels.Problem:
    kind = dtype_name(projected), architecture()
    return kernels.Problem.of(query.shape, projected.shape, axis, scale, *kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def global_attention(
    query: Array, projected: Array, gate_bias: Array, mask: Array, axis: int, scale: float
) -> Array:
    """``ops.global_attention`` by kernels, forward and backward."""
    return _forward(query, projected, gate_bias, mask, axis, scale)[0]


def _forward(
    query: Array, projected: Array, gate_bias: Array, mask: Array, axis: int, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    launch = kernels.forward(_problem(query, projected, axis, scale))
    output, *statistics = call(launch, query, projected, gate_bias, mask)
    return output, (query, projected, gate_bias, mask, *statistics)


def _backward(axis: int, scale: float, saved: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
    """Gradients of query, projections and gate bias; the mask has none."""
    query, projected, gate_bias, mask, *_ = saved
    launch = global_attention_backward.backward(_problem(query, projected, axis, scale))
    query_grad, projected_grad, sums = call(launch, *saved, grad)
    gate_bias_grad = sum_columns(sums, gate_bias).reshape(gate_bias.shape)
    return query_grad, projected_grad, gate_bias_grad, jnp.zeros_like(mask)


global_attention.defvjp(_forward, _backward)
