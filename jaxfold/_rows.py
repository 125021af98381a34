"""``ops.layer_norm`` and ``ops.transition`` by Triton kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from foldcore.kernels import layer_norm as norm_kernels
from foldcore.kernels import transition as transition_kernels
from foldcore.kernels import (
    transition_backward,
    transition_layers,
    transition_pipelined,
    transition_pipelined_backward,
)
from foldcore.kernels.rows import column_sums, two_column_sums
from jaxfold._triton import architecture, call, dtype_name


def sum_columns(sums: Array, like: Array) -> Array:
    """The last step of the gradients of vectors, in the dtype of ``like``."""
    n, m = sums.shape
    return call(column_sums(n, m, dtype_name(like), architecture()), sums)[0]


# Layer normalisation ------------------------------------------------------------------------------


@jax.custom_vjp
def layer_norm(x: Array, scale: Array, offset: Array) -> Array:
    """Layer normalisation of the last axis."""
    c = x.shape[-1]
    launch = norm_kernels.forward(x.size // c, c, dtype_name(x), architecture())
    return call(launch, x.reshape(-1, c), scale, offset)[0].reshape(x.shape)


def _norm_forward(x: Array, scale: Array, offset: Array) -> tuple[Array, tuple[Array, Array]]:
    return layer_norm(x, scale, offset), (x, scale)


def _norm_backward(
    saved: tuple[Array, Array], grad: Array, residual: Array | None = None
) -> tuple[Array, Array, Array]:
    """Gradients by x, ``residual`` added, by scale and by offset."""
    x, scale = saved
    c = x.shape[-1]
    kind = dtype_name(x), architecture()
    launch = norm_kernels.backward(x.size // c, c, *kind, residual is not None)
    rows = [array.reshape(-1, c) for array in (x, grad, grad if residual is None else residual)]
    x_grad, sums = call(launch, rows[0], scale, *rows[1:])
    vectors = sum_columns(sums, scale)
    return x_grad.reshape(x.shape), vectors[:c], vectors[c:]


layer_norm.defvjp(_norm_forward, _norm_backward)


@jax.custom_vjp
def layer_norm_residual(x: Array, scale: Array, offset: Array) -> tuple[Array, Array]:
    """Layer normalisation and x itself; one kernel sums the gradients by both."""
    return layer_norm(x, scale, offset), x


layer_norm_residual.defvjp(
    lambda x, scale, offset: (layer_norm_residual(x, scale, offset), (x, scale)),
    lambda saved, grads: _norm_backward(saved, *grads),
)


# Transition ---------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def transition(
    x: Array,
    scale: Array,
    offset: Array,
    weights1: Array,
    bias1: Array,
    weights2: Array,
    bias2: Array,
    residual: bool,
) -> Array:
    """The update of a transition, with ``residual`` added to x."""
    c, f = weights1.shape
    n = x.size // c
    launch = transition_kernels.forward(n, c, f, dtype_name(x), architecture(), residual)
    (y,) = call(launch, x.reshape(n, c), scale, offset, weights1, bias1, weights2, bias2)
    return y.reshape(x.shape)


def _transition_forward(*inputs: Any) -> tuple[Array, tuple[Array, ...]]:
    """In one pass or layer by layer; the hidden layer is saved, and of one pass its signs."""
    x, scale, offset, weights1, bias1, weights2, bias2, residual = inputs
    c, f = weights1.shape
    n, kind = x.size // c, (dtype_name(x), architecture())
    rows = x.reshape(n, c)
    saved = x, scale, offset, weights1, weights2
    if transition_pipelined.fits(n, c, f, *kind):
        launch = transition_pipelined.forward(n, c, f, residual, save=True)
        y, *kept = call(launch, rows, scale, offset, weights1, bias1, weights2, bias2)
        return y.reshape(x.shape), (*saved, *kept)
    normalized = layer_norm(rows, scale, offset)
    (hidden,) = call(transition_layers.hidden(n, c, f, *kind), normalized, weights1, bias1)
    launch = transition_layers.second(n, c, f, *kind, residual)
    (y,) = call(launch, hidden, weights2, bias2, rows)
    return y.reshape(x.shape), (*saved, hidden)


def _transition_backward(
    residual: bool, saved: tuple[Array, ...], grad: Array
) -> tuple[Array, ...]:
    x, scale, offset, weights1, weights2, hidden, *signs = saved
    c, f = weights1.shape
    n, kind = x.size // c, (dtype_name(x), architecture())
    rows, rows_grad = x.reshape(n, c), grad.reshape(n, c)
    if transition_pipelined.fits(n, c, f, *kind):
        launch = transition_pipelined_backward.backward(n, c, f, residual)
        found = call(launch, rows, scale, offset, weights1, weights2, *signs, rows_grad)
        x_grad, hidden_grad, normalized, sums, norm_sums = found
    else:
        launch = transition_backward.mask(n, c, f, *kind)
        hidden_grad, sums = call(launch, rows_grad, hidden, weights2)
        launch = transition_backward.norm(n, c, *kind, residual)
        normal_grad = hidden_grad @ weights1.T
        x_grad, normalized, norm_sums = call(launch, rows, scale, offset, normal_grad, rows_grad)
    weights1_grad = jnp.einsum("nc,nf->cf", normalized, hidden_grad)
    weights2_grad = jnp.einsum("nf,nc->fc", hidden, rows_grad)
    launch = two_column_sums(sums.shape, norm_sums.shape, dtype_name(scale))
    (vectors,) = call(launch, sums, norm_sums)
    bias1, bias2, *norm = jnp.split(vectors, (f, f + c, f + 2 * c))
    return x_grad.reshape(x.shape), *norm, weights1_grad, bias1, weights2_grad, bias2


transition.defvjp(_transition_forward, _transition_backward)
