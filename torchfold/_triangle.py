"""``ops.triangle_multiplication`` by Triton kernels: custom operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foldcore.kernels import triangle, triangle_backward
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; left, right and their product as [b h i j]."""
    b, i, j, c = pair.shape
    h = parameters[2].shape[1]
    kind = dtype_name(pair), architecture(pair.device)
    launch = triangle.project(b, i * j, c, h, *kind)
    left, right = (x.view(b, h, i, j) for x in call(launch, pair, mask.float(), *parameters[:10]))
    product = _multiply(left, right, outgoing)
    launch = triangle.output(b, (i, j), c, h, *kind, factor is not None, residual)
    inputs = (product, pair, mask if factor is None else factor)
    (out,) = call(launch, *inputs, *parameters[10:14], *parameters[:2], *parameters[14:])
    return out.view(pair.shape), left, right, product


@_forward.register_fake
def _(
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    outgoing: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, i, j, _ = pair.shape
    inner = [pair.new_empty((b, parameters[2].shape[1], i, j)) for _ in range(3)]
    return pair.new_empty(pair.shape), inner[0], inner[1], inner[2]


@torch.library.custom_op("twinfold::triangle_multiplication_backward", mutates_args=())
def _backward(
    grad: Tensor,
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    product: Tensor,
    outgoing: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by pair; by the weights of projections and gate side by side, by the output's; by
    vectors end to end: of projections, gate, first norm; of output and central norm."""
    b, i, j, c = pair.shape
    h = parameters[2].shape[1]
    kind = dtype_name(pair), architecture(pair.device)
    launch = triangle_backward.output_backward(b, (i, j), c, h, *kind, factor is not None)
    inputs = (grad, product, pair, mask if factor is None else factor)
    product_grad, update_grad, gate_grad, center, output_sums = call(
        launch, *inputs, *parameters[10:14], *parameters[:2], *parameters[14:]
    )
    output_weights = center.view(-1, h).T @ update_grad.view(-1, c)
    grads = _multiply_backward(left, right, product_grad.view(b, h, i, j), outgoing)
    launch = triangle_backward.project_backward(b, i * j, c, h, *kind, residual)
    weights = (*parameters[:10], parameters[14])
    pair_grad, normalized, projected_grad, sums = call(
        launch, pair, mask.float(), *grads, gate_grad, grad, *weights
    )
    projections = normalized.view(-1, c).T @ projected_grad.view(-1, 4 * h + c)
    bias = parameters[3]
    vectors = sum_columns(sums, bias), sum_columns(output_sums, bias)
    return pair_grad.view(pair.shape), projections, output_weights, *vectors


@_backward.register_fake
def _(
    grad: Tensor,
    pair: Tensor,
    mask: Tensor,
    factor: Tensor | None,
    parameters: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    product: Tensor,
    outgoing: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    c, h = parameters[2].shape
    shapes = ((c, 4 * h + c), (h, c), (4 * h + 3 * c,), (c + 2 * h,))
    weights, output_weights, first, second = (parameters[2].new_empty(s) for s in shapes)
    return pair.new_empty(pair.shape), weights, output_weights, first, second


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    pair, mask, factor, parameters, ctx.outgoing, ctx.residual = inputs
    ctx.count = len(parameters)
    ctx.save_for_backward(pair, mask, factor, *parameters, *output[1:])


def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    pair, mask, factor, *rest = ctx.saved_tensors
    parameters, products = rest[: ctx.count], rest[ctx.count :]
    c, h = parameters[2].shape
    pair_grad, weights, output, first, second = _backward(
        grad, pair, mask, factor, parameters, *products, ctx.outgoing, ctx.residual
    )
    widths = (h, h, h, h, c)
    *biases, scale, offset = first.split((*widths, c, c))
    pairs = zip(weights.split(widths, dim=1), biases, strict=True)
    *flat, gating, gating_bias = (x for both in pairs for x in both)
    output_bias, center_scale, center_offset = second.split((c, h, h))
    center = (center_scale, center_offset, output, output_bias)
    grads = [scale, offset, *flat, *center, gating, gating_bias]
    return pair_grad, None, None, grads, None, None


_forward.register_autograd(_gradients, setup_context=_save)
