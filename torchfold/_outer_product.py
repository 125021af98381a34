"""``ops.outer_product_mean`` by Triton kernels: custom operators."""

import torch
from torch import Tensor

from foldcore.kernels import outer_product as kernels
from foldcore.kernels import outer_product_on_chip as on_chip
from foldcore.kernels import outer_product_on_chip_backward as on_chip_backward
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


def _problem(left: Tensor, right: Tensor, weights: Tensor) -> on_chip.Shape:
    b, s, i, _ = left.shape
    return on_chip.Shape(b, s, i, right.shape[2], *weights.shape)


def _turned(left: Tensor) -> Tensor:
    """[b, s, c, i]"""
    b, s, i, c = left.shape
    return call(on_chip.turned(b * s, i, c, dtype_name(left)), left)[0]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Outer products summed over sequences, [b, i c, j e]."""
    return left.flatten(2).mT @ right.flatten(2)


@torch.library.custom_op("twinfold::outer_product_mean", mutates_args=())
def _forward(
    left: Tensor, right: Tensor, count: Tensor, weights: Tensor, bias: Tensor, pair: Tensor | None
) -> Tensor:
    """The result; ``count`` holds the number of sequences of each pair."""
    problem = _problem(left, right, weights)
    kind, residual = (dtype_name(left), architecture(left.device)), pair is not None
    inputs = (weights, bias, count.float(), pair if pair is not None else bias)
    if on_chip.fits(problem, *kind):
        launch = on_chip.project(problem, *kind, residual)
        (out,) = call(launch, _turned(left), right, *inputs)
    else:
        launch = kernels.project(_shape(left, right, weights), *kind, residual)
        (out,) = call(launch, _outer(left, right), *inputs)
    return out.view(*count.shape, problem.z)


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
    if on_chip.fits(_problem(left, right, weights), *kind):
        return _backward_on_chip(grad, left, right, weights, bias, count)
    sum_grad, outer_grad, sums = call(kernels.gradient(shape, *kind), grad, weights, count.float())
    outer = _outer(left, right)
    outer_grad = outer_grad.view(outer.shape)
    (parts,) = call(kernels.weights(shape, *kind), outer, sum_grad)
    weights_grad = sum_columns(parts, weights).view(weights.shape)
    left_grad = right.flatten(2) @ outer_grad.mT
    right_grad = left.flatten(2) @ outer_grad
    vectors = sum_columns(sums, bias)
    return left_grad.view(left.shape), right_grad.view(right.shape), weights_grad, vectors


def _backward_on_chip(
    grad: Tensor, left: Tensor, right: Tensor, weights: Tensor, bias: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, kind = _problem(left, right, weights), (dtype_name(left), architecture(left.device))
    launch = on_chip_backward.divide(count.numel(), problem.z, kind[0])
    sum_grad, sums = call(launch, grad, count.float())
    sides: list[Tensor] = []
    for other, is_left in ((right, True), (left, False)):
        launch = on_chip_backward.side_gradient(problem, kind[1], is_left)
        (parts,) = call(launch, sum_grad, weights, other)
        sides += call(on_chip_backward.side_sum(tuple(parts.shape), kind[0]), parts)
    launch = on_chip_backward.weights_gradient(problem, kind[1])
    (parts,) = call(launch, right, _turned(left), sum_grad)
    weights_grad = sum_columns(parts, weights).view(weights.shape)
    return sides[0], sides[1], weights_grad, sum_columns(sums, bias)


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
