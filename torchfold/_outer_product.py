"""``ops.outer_product_mean`` by Triton kernels: custom operators."""

import torch
from torch import Tensor

from foldcore.kernels import outer_product as kernels
from torchfold._rows import sum_columns
from torchfold._triton import architecture, call, dtype_name


def outer_product_mean(
    left: Tensor, right: Tensor, count: Tensor, weights: Tensor, bias: Tensor, pair: Tensor | None
) -> Tensor:
    """The projected mean [b i j z] over sequences of outer products, added to ``pair``."""
    return _forward(left, right, count, weights, bias, pair)


def _shape(left: Tensor, right: Tensor, weights: Tensor) -> kernels.Shape:
    b, _, i, _ = left.shape
    return kernels.Shape(b * i, right.shape[2], *weights.shape)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Outer products summed over sequences, [b, i c, j e]."""
    return left.flatten(2).mT @ right.flatten(2)


@torch.library.custom_op("twinfold::outer_product_mean", mutates_args=())
def _forward(
    left: Tensor, right: Tensor, count: Tensor, weights: Tensor, bias: Tensor, pair: Tensor | None
) -> Tensor:
    """The result; ``count`` holds the number of sequences of each pair."""
    shape = _shape(left, right, weights)
    kind, residual = (dtype_name(left), architecture(left.device)), pair is not None
    past = pair if pair is not None else bias
    inputs = (_outer(left, right), weights, bias, count.float(), past)
    (out,) = call(kernels.project(shape, *kind, residual), *inputs)
    return out.view(*count.shape, shape.z)


@_forward.register_fake
def _(
    left: Tensor, right: Tensor, count: Tensor, weights: Tensor, bias: Tensor, pair: Tensor | None
) -> Tensor:
    return left.new_empty((*count.shape, weights.shape[2]))


@torch.library.custom_op("twinfold::outer_product_mean_backward", mutates_args=())
def _backward(
    grad: Tensor, left: Tensor, right: Tensor, weights: Tensor, bias: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by left, right, weights and bias."""
    shape, kind = _shape(left, right, weights), (dtype_name(left), architecture(left.device))
    sum_grad, outer_grad, sums = call(kernels.gradient(shape, *kind), grad, weights, count.float())
    outer = _outer(left, right)
    outer_grad = outer_grad.view(outer.shape)
    (parts,) = call(kernels.weights(shape, *kind), outer, sum_grad)
    weights_grad = sum_columns(parts, weights).view(weights.shape)
    left_grad = right.flatten(2) @ outer_grad.mT
    right_grad = left.flatten(2) @ outer_grad
    vectors = sum_columns(sums, bias)
    return left_grad.view(left.shape), right_grad.view(right.shape), weights_grad, vectors


@_backward.register_fake
def _(
    grad: Tensor, left: Tensor, right: Tensor, weights: Tensor, bias: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left_grad, right_grad, weights_grad, bias_grad = (
        x.new_empty(x.shape) for x in (left, right, weights, bias)
    )
    return left_grad, right_grad, weights_grad, bias_grad


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    left, right, count, weights, bias, pair = inputs
    ctx.residual = pair is not None
    ctx.save_for_backward(left, right, weights, bias, count)


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    left, right, weights, bias = _backward(grad, *ctx.saved_tensors)
    return left, right, None, weights, bias, grad if ctx.residual else None


_forward.register_autograd(_gradients, setup_context=_save)
