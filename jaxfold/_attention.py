"""``ops.gated_attention`` by Triton kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import attention
from foldcore.kernels.attention_gradients import gradients
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
    biases = mask if bias is None else bias
    projected_grad, sums, parts = gradients(
        call, problem, projected, gate_bias, mask, biases, output, logsumexp, grad
    )
    gate_bias_grad = sum_columns(sums, gate_bias).reshape(gate_bias.shape)
    bias_grad = None if bias is None else jnp.sum(parts, axis=0).astype(bias.dtype)
    return projected_grad, gate_bias_grad, jnp.zeros_like(mask), bias_grad


gated_attention.defvjp(_forward, _backward)
