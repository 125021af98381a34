"""``ops.triangle_multiplication`` by Triton kernels: custom operators."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foldcore.kernels import (
    rows,
    triangle,
    triangle_backward,
    triangle_fold,
    triangle_output_backward,
    triangle_pipelined,
    triangle_product,
)
from torchfold._triton import architecture, call, dtype_name

FOLDED = 4  # arrays that ``fold`` makes of 16 parameters


def triangle_multiplication(
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> Tensor:
    """The update of the pair, with ``residual`` added to it; parameters may be folded already."""
    folded = list(parameters) if len(parameters) == FOLDED else fold(parameters)
    return _forward(pair, mask, factor, folded, outgoing, residual)[0]


# Norms as a part of weights -----------------------------------------------------------------------


def fold(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Weights [l c w] and bias [l w] of the projections, those of the output; or all without l."""
    return _fold(list(parameters))


def _layers(parameters: Sequence[Tensor]) -> tuple[tuple[int, ...], int, int]:
    """The leading axis, if there is one; channels of pairs and of the product."""
    *layers, c, h = parameters[2].shape
    return tuple(layers), c, h


@torch.library.custom_op("twinfold::triangle_fold", mutates_args=())
def _fold(parameters: Sequence[Tensor]) -> list[Tensor]:
    layers, c, h = _layers(parameters)
    launch = triangle_fold.forward(math.prod(layers), c, h, dtype_name(parameters[0]))
    return [x.view(*layers, *x.shape[1:]) for x in call(launch, *parameters)]


@_fold.register_fake
def _(parameters: Sequence[Tensor]) -> list[Tensor]:
    layers, c, h = _layers(parameters)
    like = parameters[0]
    return [
        like.new_empty((*layers, c, 4 * h + c)),
        like.new_empty((*layers, 4 * h + c), dtype=torch.float32),
        like.new_empty((*layers, h, c)),
        like.new_empty((*layers, c), dtype=torch.float32),
    ]


@torch.library.custom_op("twinfold::triangle_fold_backward", mutates_args=())
def _fold_backward(grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by all parameters, of which those but biases are given."""
    layers, c, h = _layers(parameters)
    launch = triangle_fold.backward(math.prod(layers), c, h, dtype_name(parameters[0]))
    return [x.view(*layers, *x.shape[1:]) for x in call(launch, *grads, *parameters)]


@_fold_backward.register_fake
def _(grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    layers, c, h = _layers(parameters)
    launch = triangle_fold.backward(math.prod(layers), c, h, dtype_name(parameters[0]))
    return [parameters[0].new_empty((*layers, *x.shape[1:])) for x in launch.outputs]


def _save_fold(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*(inputs[0][i] for i in triangle_fold.WITHOUT_BIASES))


def _fold_gradients(ctx, grads):  # type: ignore[no-untyped-def]
    return _fold_backward(grads, ctx.saved_tensors)


_fold.register_autograd(_fold_gradients, setup_context=_save_fold)


# The multiplication -------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, turned: tuple[bool, bool]) -> Tensor:
    """[b h i j] from two of [b h n n], of either as it lies or transposed."""
    m, n = a.shape[:2].numel(), a.shape[-1]
    if triangle_product.fits(m, n, dtype_name(a), architecture(a.device)):
        return call(triangle_product.product(m, n, turned), a, b)[0].view(a.shape)
    return (a.mT if turned[0] else a) @ (b.mT if turned[1] else b)


def _multiply(left: Tensor, right: Tensor, outgoing: bool) -> Tensor:
    """[b h i j] from two of [b h i k], or of [b h k j] and [b h k i]."""
    if outgoing:
        return _product(left, right, (False, True))
    return _product(right, left, (True, False))


def _multiply_backward(
    left: Tensor, right: Tensor, grad: Tensor, outgoing: bool
) -> tuple[Tensor, Tensor]:
    if outgoing:
        return _product(grad, right, (False, False)), _product(grad, left, (True, False))
    return _product(right, grad, (False, False)), _product(left, grad, (False, True))


def _project(pair: Tensor, mask: Tensor, folded: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Left and right [b h p], 1 / standard deviation of the pair [b p]."""
    b, i, j, c = pair.shape
    sizes = b, i * j, c, folded[2].shape[0]
    kind, mask = (dtype_name(pair), architecture(pair.device)), mask.float()
    if triangle_pipelined.fits(*sizes, *kind):
        return call(triangle_pipelined.project(*sizes), pair, mask, *folded[:2])
    (rstd,) = call(triangle_fold.rstd(b, i * j, c, kind[0]), pair)
    return *call(triangle.project(*sizes, *kind), pair, mask, rstd, *folded[:2]), rstd


@torch.library.custom_op("twinfold::triangle_multiplication", mutates_args=())
def _forward(
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    folded: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> list[Tensor]:
    """The result; what the backward pass needs besides: left, right, their product [b h i j], 1 /
    standard deviation of the pair, mean and 1 / standard deviation of the product [b p]."""
    b, i, j, c = pair.shape
    h = folded[2].shape[0]
    kind = dtype_name(pair), architecture(pair.device)
    left, right, rstd = _project(pair, mask, folded)
    left, right = left.view(b, h, i, j), right.view(b, h, i, j)
    product = _multiply(left, right, outgoing)
    launch = triangle.output(b, (i, j), c, h, *kind, factor is not None, residual)
    inputs = (product, pair, mask if factor is None else factor, rstd, *folded)
    out, *center = call(launch, *inputs)
    return [out.view(pair.shape), left, right, product, rstd, *center]


@_forward.register_fake
def _(
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    folded: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> list[Tensor]:
    b, i, j, c = pair.shape
    h = folded[2].shape[0]
    inner = [pair.new_empty((b, h, i, j)) for _ in range(3)]
    numbers = [pair.new_empty((b, i * j), dtype=torch.float32) for _ in range(3)]
    return [pair.new_empty(pair.shape), *inner, *numbers]


@torch.library.custom_op("twinfold::triangle_multiplication_backward", mutates_args=())
def _backward(
    grad: Tensor,
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    folded: Sequence[Tensor],
    saved: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> list[Tensor]:
    """Gradients by pair; by the folded weights; by both biases, end to end."""
    left, right, product, rstd, center_mean, center_rstd = saved
    b, i, j, c = pair.shape
    h, n = folded[2].shape[0], b * i * j
    kind = dtype_name(pair), architecture(pair.device)
    launch = triangle_output_backward.output(b, (i, j), c, h, *kind, factor is not None)
    inputs = (grad, product, pair, mask if factor is None else factor)
    update_grad, slopes, projected_grad, output_sums = call(
        launch, *inputs, rstd, center_rstd, *folded
    )
    launch = triangle_output_backward.center(b, i * j, c, h, *kind, len(slopes))
    product_grad, center = call(
        launch, update_grad, product, slopes, center_mean, center_rstd, folded[2]
    )
    grads = _multiply_backward(left, right, product_grad.view(b, h, i, j), outgoing)
    launch = triangle_backward.project(b, i * j, c, h, *kind)
    projected_grad, sums = call(
        launch, pair, mask.float(), rstd, *grads, *folded[:2], projected_grad
    )
    normal_grad = projected_grad.T @ folded[0].T
    launch = triangle_backward.norm(n, c, *kind, residual)
    pair_grad, normal = call(launch, pair, normal_grad, grad)
    moments = normal.T @ projected_grad.T, center @ update_grad
    (totals,) = call(
        rows.two_column_sums(sums.shape, output_sums.shape, "float32"), sums, output_sums
    )
    return [pair_grad.view(pair.shape), *moments, totals]


@_backward.register_fake
def _(
    grad: Tensor,
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    folded: Sequence[Tensor],
    saved: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> list[Tensor]:
    weights = [folded[i].new_empty(folded[i].shape) for i in (0, 2)]
    totals = folded[1].new_empty(len(folded[1]) + len(folded[3]))
    return [pair.new_empty(pair.shape), *weights, totals]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else zeros for what is returned to be saved
    pair, mask, factor, folded, ctx.outgoing, ctx.residual = inputs
    ctx.save_for_backward(pair, mask, factor, *folded, *output[1:])


def _gradients(ctx, grads):  # type: ignore[no-untyped-def]
    pair, mask, factor, *rest = ctx.saved_tensors
    folded, saved = rest[:FOLDED], rest[FOLDED:]
    pair_grad, moments, output_moments, totals = _backward(
        grads[0], pair, mask, factor, folded, saved, ctx.outgoing, ctx.residual
    )
    bias, output_bias = totals.split((len(folded[1]), len(folded[3])))
    folded_grads = [moments, bias, output_moments, output_bias]
    return pair_grad, None, None, folded_grads, None, None


_forward.register_autograd(_gradients, setup_context=_save)
