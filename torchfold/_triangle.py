"""``ops.triangle_multiplication`` by Triton kernels: custom operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foldcore.kernels import (
    triangle,
    triangle_backward,
    triangle_fold,
    triangle_output_backward,
)
from torchfold._rows import sum_columns
from torchfold._triton import architecture, call, dtype_name


def triangle_multiplication(
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> Tensor:
    """The update of the pair, with ``residual`` added to it."""
    return _forward(pair, mask, factor, list(parameters), outgoing, residual)[0]


def _multiply(left: Tensor, right: Tensor, outgoing: bool) -> Tensor:
    """[b h i j] from two of [b h i k], or of [b h k j] and [b h k i]."""
    return left @ right.mT if outgoing else right.mT @ left


def _multiply_backward(
    left: Tensor, right: Tensor, grad: Tensor, outgoing: bool
) -> tuple[Tensor, Tensor]:
    if outgoing:
        return grad @ right, grad.mT @ left
    return right @ grad, left @ grad.mT


@torch.library.custom_op("twinfold::triangle_multiplication", mutates_args=())
def _forward(
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> list[Tensor]:
    """The result; what the backward pass needs besides: left, right, their product [b h i j], 1 /
    standard deviation of the pair, mean and 1 / standard deviation of the product [b p], folded
    weights and biases."""
    b, i, j, c = pair.shape
    h = parameters[2].shape[1]
    kind = dtype_name(pair), architecture(pair.device)
    *folded, rstd = call(triangle_fold.forward(b, i * j, c, h, kind[0]), pair, *parameters)
    launch = triangle.project(b, i * j, c, h, *kind)
    left, right = call(launch, pair, mask.float(), rstd, *folded[:2])
    left, right = left.view(b, h, i, j), right.view(b, h, i, j)
    product = _multiply(left, right, outgoing)
    launch = triangle.output(b, (i, j), c, h, *kind, factor is not None, residual)
    inputs = (product, pair, mask if factor is None else factor, rstd, *folded)
    out, *center = call(launch, *inputs)
    return [out.view(pair.shape), left, right, product, rstd, *center, *folded]


@_forward.register_fake
def _(
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> list[Tensor]:
    b, i, j, c = pair.shape
    h = parameters[2].shape[1]
    inner = [pair.new_empty((b, h, i, j)) for _ in range(3)]
    numbers = [pair.new_empty((b, i * j), dtype=torch.float32) for _ in range(3)]
    folded = [
        pair.new_empty((c, 4 * h + c)),
        pair.new_empty(4 * h + c, dtype=torch.float32),
        pair.new_empty((h, c)),
        pair.new_empty(c, dtype=torch.float32),
    ]
    return [pair.new_empty(pair.shape), *inner, *numbers, *folded]


@torch.library.custom_op("twinfold::triangle_multiplication_backward", mutates_args=())
def _backward(
    grad: Tensor,
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> list[Tensor]:
    """Gradients by pair; by the weights, in their order; by the vectors, end to end."""
    left, right, product, rstd, center_mean, center_rstd, *folded = saved
    b, i, j, c = pair.shape
    h, n = parameters[2].shape[1], b * i * j
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
    totals = sum_columns(sums, rstd), sum_columns(output_sums, rstd)
    without_biases = [parameters[i] for i in triangle_fold.WITHOUT_BIASES]
    launch = triangle_fold.backward(c, h, dtype_name(parameters[0]))
    return [pair_grad.view(pair.shape), *call(launch, *moments, *totals, *without_biases)]


@_backward.register_fake
def _(
    grad: Tensor,
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> list[Tensor]:
    w = parameters
    weights = [w[i].new_empty(w[i].shape) for i in triangle_fold.WEIGHTS]
    size = sum(w[i].shape[0] for i in triangle_fold.VECTORS)
    return [pair.new_empty(pair.shape), *weights, w[0].new_empty(size)]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else zeros for what is returned to be saved
    pair, mask, factor, parameters, ctx.outgoing, ctx.residual = inputs
    ctx.count = len(parameters)
    ctx.save_for_backward(pair, mask, factor, *parameters, *output[1:])


def _gradients(ctx, grads):  # type: ignore[no-untyped-def]
    pair, mask, factor, *rest = ctx.saved_tensors
    parameters, saved = rest[: ctx.count], rest[ctx.count :]
    pair_grad, *weights, vectors = _backward(
        grads[0], pair, mask, factor, parameters, saved, ctx.outgoing, ctx.residual
    )
    sizes = [parameters[i].shape[0] for i in triangle_fold.VECTORS]
    return pair_grad, None, None, triangle_fold.in_order(weights, vectors.split(sizes)), None, None


_forward.register_autograd(_gradients, setup_context=_save)
