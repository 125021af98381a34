"""``ops.gated_attention`` by Triton kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import attention, attention_backward, attention_long
from foldcore.kernels.attention_tiles import Problem
from jaxfold._rows import sum_columns
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def gated_attention(
    projected: Array, gate_bias: Array, mask: Array, bias: Array | None, axis: int, scale: float
) -> Array:
    """``ops.gated_attention`` by kernels, forward and backward."""
    return _forward(projected, gate_bias, mask, bias, axis, scale)[0]


def _forward(
    projected: Array, gate_bias: Array, mask: Array, bias: Array | None, axis: int, scale: float
) -> tuple[Array, tuple[Array | None, ...]]:
    launch = attention.forward(_problem(projected, bias, axis, scale))
    output, logsumexp = call(launch, projected, gate_bias, mask, mask if bias is None else bias)
    return output, (projected, gate_bias, mask, bias, output, logsumexp)


def _backward(axis: int, scale: float, saved: tuple[Any, ...], grad: Array) -> tuple[Any, ...]:
    """Gradients of projections and both biases; the mask has none."""
    projected, gate_bias, mask, bias, output, logsumexp = saved
    problem = _problem(projected, bias, axis, scale)
    scores = projected, mask, mask if bias is None else bias
    given = projected, gate_bias, *scores[1:], output, logsumexp, grad
    if problem.whole:
        launch = attention_backward.whole_grad(problem)
        projected_grad, delta, sums, inner_grad = call(launch, *given)
    else:
        query_grad, delta, sums, inner_grad = call(attention_long.query_grad(problem), *given)
        launch = attention_long.key_value_grad(problem)
        (projected_grad,) = call(launch, *scores, logsumexp, delta, inner_grad, query_grad)
    gate_bias_grad = sum_columns(sums, gate_bias).reshape(gate_bias.shape)
    gradients = projected_grad, gate_bias_grad, jnp.zeros_like(mask)
    if bias is None:
        return *gradients, None
    launch = attention_backward.bias_grad(problem)
    (parts,) = call(launch, *scores, logsumexp, delta, inner_grad)
    return *gradients, jnp.sum(parts, axis=0).astype(bias.dtype)


gated_attention.defvjp(_forward, _backward)
