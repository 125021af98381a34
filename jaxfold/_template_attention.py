"""``ops.template_attention`` by Triton kernels."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import template_attention as kernels
from jaxfold._triton import architecture, call, dtype_name


def _problem(query: Array, projected: Array, scale: float) -> kernels.Problem:
    b, i, j, heads, width = query.shape
    kind = dtype_name(projected), architecture()
    return kernels.Problem(b, projected.shape[1], i * j, heads, width, scale, *kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def template_attention(query: Array, projected: Array, mask: Array, scale: float) -> Array:
    """``ops.template_attention`` by kernels, forward and backward."""
    return _forward(query, projected, mask, scale)[0]


def _forward(
    query: Array, projected: Array, mask: Array, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    launch = kernels.forward(_problem(query, projected, scale))
    output, logsumexp = call(launch, query, projected, mask)
    output = output.reshape(query.shape)
    return output, (query, projected, mask, logsumexp)


def _backward(scale: float, saved: tuple[Array, ...], grad: Array) -> tuple[Array, ...]:
    """Gradients of query and projections; the mask has none."""
    query, projected, mask, *_ = saved
    launch = kernels.backward(_problem(query, projected, scale))
    query_grad, projected_grad = call(launch, *saved, grad)
    gradients = query_grad.reshape(query.shape), projected_grad.reshape(projected.shape)
    return *gradients, jnp.zeros_like(mask)


template_attention.defvjp(_forward, _backward)
