"""``ops.gated_attention`` by Triton kernels: custom operators, as torch.compile can carry them."""

import torch
from torch import Tensor

from foldcore.kernels import attention
from foldcore.kernels.attention_gradients import gradients
from foldcore.kernels.attention_tiles import Problem
from torchfold._rows import sum_columns
from torchfold._triton import architecture, call, dtype_name


def gated_attention(
    projected: Tensor,
    gate_bias: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    axis: int,
    scale: float,
) -> Tensor:
    """``ops.gated_attention`` by kernels, forward and backward."""
    # a transposed mask is written out once, not by each kernel's call
    return _forward(projected, gate_bias, mask.contiguous(), bias, axis, scale)[0]


def _problem(projected: Tensor, bias: Tensor | None, axis: int, scale: float) -> Problem:
    return Problem(
        shape=tuple(projected.shape),
        axis=axis,
        scale=scale,
        dtype=dtype_name(projected),
        has_bias=bias is not None,
        architecture=architecture(projected.device),
    )


@torch.library.custom_op("twinfold::gated_attention", mutates_args=())
def _forward(
    projected: Tensor,
    gate_bias: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    axis: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    launch = attention.forward(_problem(projected, bias, axis, scale))
    output, logsumexp = call(launch, projected, gate_bias, mask, mask if bias is None else bias)
    return output, logsumexp


@_forward.register_fake
def _(
    projected: Tensor,
    gate_bias: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    axis: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    b, s, r, _, h, d = projected.shape
    groups, length = (s, r) if axis == 2 else (r, s)
    statistics = projected.new_empty((b, groups, h, length), dtype=torch.float32)
    return projected.new_empty((b, s, r, h, d)), statistics


@torch.library.custom_op("twinfold::gated_attention_backward", mutates_args=())
def _backward(
    projected: Tensor,
    gate_bias: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    axis: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of projections, gate bias and bias; the last is empty without a bias."""
    problem = _problem(projected, bias, axis, scale)
    biases = mask if bias is None else bias
    projected_grad, sums, parts = gradients(
        call, problem, projected, gate_bias, mask, biases, output, logsumexp, grad
    )
    gate_bias_grad = sum_columns(sums, gate_bias).view(gate_bias.shape)
    if bias is None:
        return projected_grad, gate_bias_grad, projected.new_empty(0)
    return projected_grad, gate_bias_grad, parts.sum(0).to(bias.dtype)


@_backward.register_fake
def _(
    projected: Tensor,
    gate_bias: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    axis: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_grad = projected.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return projected.new_empty(projected.shape), gate_bias.new_empty(gate_bias.shape), bias_grad


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    projected, gate_bias, mask, bias, ctx.axis, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # of the sums of exponentials, which have none
    ctx.save_for_backward(projected, gate_bias, mask, bias, *output)


def _gradients(ctx, grad, _):  # type: ignore[no-untyped-def]
    *saved, bias, output, logsumexp = ctx.saved_tensors
    projected_grad, gate_bias_grad, bias_grad = _backward(
        *saved, bias, output, logsumexp, grad, ctx.axis, ctx.scale
    )
    bias_grad = None if bias is None else bias_grad
    return projected_grad, gate_bias_grad, None, bias_grad, None, None


_forward.register_autograd(_gradients, setup_context=_save)
