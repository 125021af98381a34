"""``ops.layer_norm`` and ``ops.transition`` by Triton kernels: custom operators."""

import torch
from torch import Tensor

from foldcore.kernels import layer_norm as norm_kernels
from foldcore.kernels import transition as transition_kernels
from foldcore.kernels import (
    transition_backward,
    transition_layers,
    transition_pipelined,
    transition_pipelined_backward,
)
from foldcore.kernels.rows import column_sums, two_column_sums
from torchfold._triton import architecture, call, dtype_name


def sum_columns(sums: Tensor, like: Tensor) -> Tensor:
    """The last step of the gradients of vectors, in the dtype of ``like``."""
    n, m = sums.shape
    return call(column_sums(n, m, dtype_name(like), architecture(sums.device)), sums)[0]


# Layer normalisation ------------------------------------------------------------------------------


@torch.library.custom_op("twinfold::layer_norm", mutates_args=())
def layer_norm(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Layer normalisation of the last axis."""
    c = x.shape[-1]
    launch = norm_kernels.forward(x.numel() // c, c, dtype_name(x), architecture(x.device))
    return call(launch, x, scale, offset)[0].view(x.shape)


@layer_norm.register_fake
def _(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("twinfold::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    x: Tensor, scale: Tensor, grad: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients by x, ``residual`` added, and by scale and offset end to end."""
    n, c = x.numel() // x.shape[-1], x.shape[-1]
    kind = dtype_name(x), architecture(x.device)
    launch = norm_kernels.backward(n, c, *kind, residual is not None)
    x_grad, sums = call(launch, x, scale, grad, grad if residual is None else residual)
    return x_grad.view(x.shape), sum_columns(sums, scale)


@_layer_norm_backward.register_fake
def _(x: Tensor, scale: Tensor, grad: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(2 * scale.shape[0])


def _save_norm(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])


def _norm_gradients(ctx, grad, residual=None):  # type: ignore[no-untyped-def]
    x_grad, vectors = _layer_norm_backward(*ctx.saved_tensors, grad, residual)
    return x_grad, *vectors.chunk(2)


layer_norm.register_autograd(_norm_gradients, setup_context=_save_norm)


def layer_norm_residual(x: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Layer normalisation and x itself; one kernel sums the gradients by both."""
    if not torch.is_grad_enabled():
        return layer_norm(x, scale, offset), x
    return _NormResidual.apply(x, scale, offset)  # type: ignore[no-untyped-call]


class _NormResidual(torch.autograd.Function):
    """Not an operator of its own: those may not return what they are given."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, offset: Tensor):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)  # x may go nowhere else
        ctx.save_for_backward(x, scale)
        return layer_norm(x, scale, offset), x

    backward = staticmethod(_norm_gradients)


# Transition ---------------------------------------------------------------------------------------


def transition(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights1: Tensor,
    bias1: Tensor,
    weights2: Tensor,
    bias2: Tensor,
    residual: bool,
) -> Tensor:
    """The update of a transition, with ``residual`` added to x."""
    inputs = x, scale, offset, weights1, bias1, weights2, bias2
    if torch.is_grad_enabled() and any(array.requires_grad for array in inputs):
        return _transition_saving(*inputs, residual)[0]
    return _transition(*inputs, residual)


@torch.library.custom_op("twinfold::transition", mutates_args=())
def _transition(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights1: Tensor,
    bias1: Tensor,
    weights2: Tensor,
    bias2: Tensor,
    residual: bool,
) -> Tensor:
    """In one pass: nothing is saved."""
    c, f = weights1.shape
    n, arch = x.numel() // c, architecture(x.device)
    launch = transition_kernels.forward(n, c, f, dtype_name(x), arch, residual)
    (y,) = call(launch, x, scale, offset, weights1, bias1, weights2, bias2)
    return y.view(x.shape)


@_transition.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights1: Tensor,
    bias1: Tensor,
    weights2: Tensor,
    bias2: Tensor,
    residual: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("twinfold::transition_saving", mutates_args=())
def _transition_saving(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights1: Tensor,
    bias1: Tensor,
    weights2: Tensor,
    bias2: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """In one pass or layer by layer; the hidden layer [n, f] is returned to be saved, and of one
    pass its signs."""
    c, f = weights1.shape
    n, kind = x.numel() // c, (dtype_name(x), architecture(x.device))
    if transition_pipelined.fits(n, c, f, *kind):
        launch = transition_pipelined.forward(n, c, f, residual, save=True)
        y, hidden, signs = call(launch, x, scale, offset, weights1, bias1, weights2, bias2)
        return y.view(x.shape), hidden, signs
    normalized = layer_norm(x, scale, offset)
    (hidden,) = call(transition_layers.hidden(n, c, f, *kind), normalized, weights1, bias1)
    launch = transition_layers.second(n, c, f, *kind, residual)
    (y,) = call(launch, hidden, weights2, bias2, x)
    return y.view(x.shape), hidden, x.new_empty(0, dtype=torch.int32)


@_transition_saving.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights1: Tensor,
    bias1: Tensor,
    weights2: Tensor,
    bias2: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    c, f = map(int, weights1.shape)  # numbers also where shapes are not known: which kernel fits
    n, kind = x.numel() // c, (dtype_name(x), architecture(x.device))
    words = n * f // 32 if transition_pipelined.fits(n, c, f, *kind) else 0
    return x.new_empty(x.shape), x.new_empty((n, f)), x.new_empty(words, dtype=torch.int32)


@torch.library.custom_op("twinfold::transition_backward", mutates_args=())
def _transition_backward(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights1: Tensor,
    weights2: Tensor,
    hidden: Tensor,
    signs: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, the weights, and all vectors end to end: biases, scale, offset."""
    c, f = weights1.shape
    n, kind = x.numel() // c, (dtype_name(x), architecture(x.device))
    if transition_pipelined.fits(n, c, f, *kind):
        launch = transition_pipelined_backward.backward(n, c, f, residual)
        found = call(launch, x, scale, offset, weights1, weights2, signs, grad)
        x_grad, hidden_grad, normalized, sums, norm_sums = found
    else:
        hidden_grad, sums = call(transition_backward.mask(n, c, f, *kind), grad, hidden, weights2)
        launch = transition_backward.norm(n, c, *kind, residual)
        normal_grad = hidden_grad @ weights1.T
        x_grad, normalized, norm_sums = call(launch, x, scale, offset, normal_grad, grad)
    weights = normalized.T @ hidden_grad, hidden.T @ grad.reshape(n, c)
    launch = two_column_sums(sums.shape, norm_sums.shape, dtype_name(scale))
    (vectors,) = call(launch, sums, norm_sums)
    return x_grad.view(x.shape), *weights, vectors


@_transition_backward.register_fake
def _(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights1: Tensor,
    weights2: Tensor,
    hidden: Tensor,
    signs: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c, f = weights1.shape
    weights = weights1.new_empty((c, f)), weights1.new_empty((f, c))
    return x.new_empty(x.shape), *weights, scale.new_empty(f + 3 * c)


def _save_transition(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, offset, weights1, _, weights2, _, ctx.residual = inputs
    ctx.set_materialize_grads(False)  # of what is saved, which has none
    ctx.save_for_backward(x, scale, offset, weights1, weights2, *output[1:])


def _transition_gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    x, *saved = ctx.saved_tensors
    c, f = saved[2].shape
    x_grad, weights1, weights2, vectors = _transition_backward(x, grad, *saved, ctx.residual)
    bias1, bias2, *norm = vectors.split((f, c, c, c))
    return x_grad, *norm, weights1, bias1, weights2, bias2, None


_transition_saving.register_autograd(_transition_gradients, setup_context=_save_transition)
