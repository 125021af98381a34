"""``ops.triangle_multiplication`` by Triton kernels: custom operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foldcore.kernels import layer_norm, triangle, triangle_backward
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by pair; by the weights of projections side by side, of the gate, of the output; by
    vectors end to end: of projections; of output, gate and central norm; of the first norm."""
    b, i, j, c = pair.shape
    h = parameters[2].shape[1]
    kind = dtype_name(pair), architecture(pair.device)
    launch = triangle_backward.output_backward(b, (i, j), c, h, *kind, factor is not None)
    inputs = (grad, product, pair, mask if factor is None else factor)
    product_grad, update_grad, gate_grad, center, output_sums = call(
        launch, *inputs, *parameters[10:14], *parameters[:2], *parameters[14:]
    )
    grads = _multiply_backward(left, right, product_grad.view(b, h, i, j), outgoing)
    launch = triangle_backward.project_backward(b, i * j, c, h, *kind)
    normalized, projected_grad, sums = call(launch, pair, mask.float(), *grads, *parameters[:10])
    rows, projected_grad = normalized.view(-1, c), projected_grad.view(-1, 4 * h)
    gate_grad = gate_grad.view(-1, c)
    weights = (
        rows.T @ projected_grad,
        rows.T @ gate_grad,
        center.view(-1, h).T @ update_grad.view(-1, c),
    )
    together = torch.cat(list(parameters[2:10:2]), dim=1)
    rows_grad = (gate_grad @ parameters[14].T).addmm_(projected_grad, together.T)
    launch = layer_norm.backward(len(rows), c, *kind, residual)
    pair_grad, norm_sums = call(launch, pair, parameters[0], rows_grad, grad)
    bias = parameters[3]
    vectors = sum_columns(sums, bias), sum_columns(output_sums, bias), sum_columns(norm_sums, bias)
    return pair_grad.view(pair.shape), *weights, *vectors


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    c, h = parameters[2].shape
    shapes = ((c, 4 * h), (c, c), (h, c), (4 * h,), (2 * (c + h),), (2 * c,))
    projections, gating, output, first, second, norm = (
        parameters[2].new_empty(shape) for shape in shapes
    )
    return pair.new_empty(pair.shape), projections, gating, output, first, second, norm


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else zeros for what is returned to be saved
    pair, mask, factor, parameters, ctx.outgoing, ctx.residual = inputs
    ctx.count = len(parameters)
    ctx.save_for_backward(pair, mask, factor, *parameters, *output[1:])


def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    pair, mask, factor, *rest = ctx.saved_tensors
    parameters, products = rest[: ctx.count], rest[ctx.count :]
    c, h = parameters[2].shape
    pair_grad, projections, gating, output, first, second, norm = _backward(
        grad, pair, mask, factor, parameters, *products, ctx.outgoing, ctx.residual
    )
    pairs = zip(projections.chunk(4, dim=1), first.chunk(4), strict=True)
    flat = [x for both in pairs for x in both]
    output_bias, gating_bias, center_scale, center_offset = second.split((c, c, h, h))
    center = (center_scale, center_offset, output, output_bias)
    grads = [*norm.chunk(2), *flat, *center, gating, gating_bias]
    return pair_grad, None, None, grads, None, None


_forward.register_autograd(_gradients, setup_context=_save)
