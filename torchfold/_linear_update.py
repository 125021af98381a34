"""``ops.linear_update`` by Triton kernels: custom operators."""

import torch
from torch import Tensor

from foldcore.kernels import linear_update as kernels
from torchfold._rows import sum_columns
from torchfold._triton import architecture, call, dtype_name


@torch.library.custom_op("twinfold::linear_update", mutates_args=())
def linear_update(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    bias: Tensor,
    factor: Tensor | None,
    residual: bool,
    transposed: bool,
) -> Tensor:
    """The projection of y times the factor, with ``residual`` added to x."""
    k, c = weights.shape
    kind = dtype_name(x), architecture(x.device)
    launch = kernels.forward(_shape(x, factor, transposed), k, c, *kind, residual)
    (out,) = call(launch, y, weights, bias, x, bias if factor is None else factor)
    return out.view(x.shape)


@linear_update.register_fake
def _(
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    bias: Tensor,
    factor: Tensor | None,
    residual: bool,
    transposed: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def _shape(x: Tensor, factor: Tensor | None, transposed: bool) -> kernels.Shape:
    return kernels.Shape.of(x.shape, None if factor is None else factor.shape, transposed)


@torch.library.custom_op("twinfold::linear_update_backward", mutates_args=())
def _backward(
    grad: Tensor,
    y: Tensor,
    weights: Tensor,
    bias: Tensor,
    factor: Tensor | None,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by y, weights and bias."""
    k, c = weights.shape
    kind = dtype_name(grad), architecture(grad.device)
    launch = kernels.backward(_shape(grad, factor, transposed), k, c, *kind)
    y_grad, update_grad, sums = call(launch, grad, weights, bias if factor is None else factor)
    if factor is None and not transposed:
        update_grad = grad.reshape(-1, c)
    weights_grad = y.view(y_grad.shape).T @ update_grad
    return y_grad.view(y.shape), weights_grad, sum_columns(sums, bias)


@_backward.register_fake
def _(
    grad: Tensor,
    y: Tensor,
    weights: Tensor,
    bias: Tensor,
    factor: Tensor | None,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y_grad, weights_grad, bias_grad = (x.new_empty(x.shape) for x in (y, weights, bias))
    return y_grad, weights_grad, bias_grad


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, *saved, ctx.residual, ctx.transposed = inputs
    ctx.save_for_backward(*saved)


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    y, weights, bias = _backward(grad, *ctx.saved_tensors, ctx.transposed)
    return grad if ctx.residual else None, y, weights, bias, None, None, None


linear_update.register_autograd(_gradients, setup_context=_save)
