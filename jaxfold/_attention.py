"""``ops.gated_attention`` by Triton kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import attention, attention_backward, attention_long
from foldcore.kernels.attention_tiles import Problem
from jaxfold._triton import architecture, call, dtype_name


def _problem(projected: Array, bias: Array | None, axis: int, scale: float) -> Problem:
    return Problem(
        shape=projected.shape,
        axis=axis,
        scale=scale,
        dtype=dtype_name(projected),
        has_bias=bias is not None,
        architecture=architecture(),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gated_attention(
    projected: Array, mask: Array, bias: Array | None, axis: int, scale: float
) -> Array:
    """``ops.gated_attention`` by kernels, forward and backward."""
    return _forward(projected, mask, bias, axis, scale)[0]


def _forward(
    projected: Array, mask: Array, bias: Array | None, axis: int, scale: float
) -> tuple[Array, tuple[Array | None, ...]]:
    launch = attention.forward(_problem(projected, bias, axis, scale))
    output, logsumexp = call(launch, projected, mask, mask if bias is None else bias)
    return output, (projected, mask, bias, output, logsumexp)


def _backward(axis: int, scale: float, saved: tuple[Any, ...], grad: Array) -> tuple[Any, ...]:
    """Gradients of projections and bias; the mask has none."""
    projected, mask, bias, output, logsumexp = saved
    problem = _problem(projected, bias, axis, scale)
    inputs = (projected, mask, mask if bias is None else bias)
    if problem.whole:
        launch = attention_backward.whole_grad(problem)
        projected_grad, delta = call(launch, *inputs, output, logsumexp, grad)
    else:
        launch = attention_long.query_grad(problem)
        first, delta = call(launch, *inputs, output, logsumexp, grad)
        launch = attention_long.key_value_grad(problem)
        (second,) = call(launch, *inputs, logsumexp, delta, grad)
        projected_grad = jnp.concatenate([first, second], axis=3)
    if bias is None:
        return projected_grad, jnp.zeros_like(mask), None
    (parts,) = call(attention_backward.bias_grad(problem), *inputs, logsumexp, delta, grad)
    return projected_grad, jnp.zeros_like(mask), jnp.sum(parts, axis=0).astype(bias.dtype)


gated_attention.defvjp(_forward, _backward)
