"""``projections`` by Triton kernels: operators with gradients."""

import torch
from torch import Tensor

from foldcore.kernels import norm_project as kernels
from foldcore.kernels import norm_project_backward as backward
from torchfold._rows import sum_columns
from torchfold._triton import architecture, call, dtype_name

# Bias of pairs ------------------------------------------------------------------------------------


def pair_bias(
    pair: Tensor, scale: Tensor, offset: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The bias [b h i j], and the pairs."""
    if not torch.is_grad_enabled():
        return _pair_bias(pair, scale, offset, weights, 2, False)[0], pair
    return _PairBias.apply(pair, scale, offset, weights, 2, False)  # type: ignore[no-untyped-call]


def layer_norm_pair_bias(
    pair: Tensor, scale: Tensor, offset: Tensor, weights: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised pairs and bias, transposed along axis 1, and the pairs."""
    if not torch.is_grad_enabled():
        bias, normal = _pair_bias(pair, scale, offset, weights, axis, True)
        return normal, bias, pair
    inputs = pair, scale, offset, weights, axis, True
    bias, pair, normal = _PairBias.apply(*inputs)  # type: ignore[no-untyped-call]
    return normal, bias, pair


@torch.library.custom_op("twinfold::pair_bias", mutates_args=())
def _pair_bias(
    pair: Tensor, scale: Tensor, offset: Tensor, weights: Tensor, axis: int, normal: bool
) -> tuple[Tensor, Tensor]:
    """The bias, and with ``normal`` the normalised pairs, else a placeholder."""
    shape = kernels.Pairs.of(pair.shape, weights.shape[1], axis)
    launch = kernels.pair_bias(shape, dtype_name(pair), architecture(pair.device), normal)
    bias, normalized = call(launch, pair, scale, offset, weights)
    bias = bias.view(_bias_shape(pair, weights, axis))
    return bias, normalized.view(_normal_shape(pair, axis)) if normal else normalized


@_pair_bias.register_fake
def _(
    pair: Tensor, scale: Tensor, offset: Tensor, weights: Tensor, axis: int, normal: bool
) -> tuple[Tensor, Tensor]:
    bias = pair.new_empty(_bias_shape(pair, weights, axis))
    return bias, pair.new_empty(_normal_shape(pair, axis) if normal else (1,))


def _bias_shape(pair: Tensor, weights: Tensor, axis: int) -> tuple[int, int, int, int]:
    b, q, k, _ = _normal_shape(pair, axis)
    return b, weights.shape[1], q, k


def _normal_shape(pair: Tensor, axis: int) -> tuple[int, int, int, int]:
    b, i, j, c = pair.shape
    return (b, i, j, c) if axis == 2 else (b, j, i, c)


@torch.library.custom_op("twinfold::pair_bias_backward", mutates_args=())
def _pair_bias_backward(
    pair: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights: Tensor,
    bias_grad: Tensor,
    normal_grad: Tensor | None,
    residual: Tensor | None,
    axis: int,
) -> tuple[Tensor, Tensor]:
    """Gradients by the pairs, ``residual`` added, and by weights, scale and offset end to end."""
    shape = kernels.Pairs.of(pair.shape, weights.shape[1], axis)
    given = normal_grad is not None, residual is not None
    launch = backward.pair_bias(shape, dtype_name(pair), architecture(pair.device), *given)
    others = (bias_grad if grad is None else grad for grad in (normal_grad, residual))
    pair_grad, sums = call(launch, pair, scale, offset, weights, bias_grad, *others)
    return pair_grad.view(pair.shape), sum_columns(sums, scale)


@_pair_bias_backward.register_fake
def _(
    pair: Tensor,
    scale: Tensor,
    offset: Tensor,
    weights: Tensor,
    bias_grad: Tensor,
    normal_grad: Tensor | None,
    residual: Tensor | None,
    axis: int,
) -> tuple[Tensor, Tensor]:
    return pair.new_empty(pair.shape), scale.new_empty(weights.numel() + 2 * scale.shape[0])


class _PairBias(torch.autograd.Function):
    """Not an operator of its own: those may not return what they are given."""

    @staticmethod
    def forward(ctx, pair, scale, offset, weights, axis, normal):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)  # the pairs may go nowhere else
        ctx.save_for_backward(pair, scale, offset, weights)
        ctx.axis = axis
        bias, normalized = _pair_bias(pair, scale, offset, weights, axis, normal)
        return (bias, pair, normalized) if normal else (bias, pair)

    @staticmethod
    def backward(ctx, bias, residual, normal=None):  # type: ignore[no-untyped-def]
        inputs = ctx.saved_tensors  # read once: a recomputed block gives them no second time
        pair, scale, _, weights = inputs
        used, c = bias is not None, scale.shape[0]
        if not used:
            bias = pair.new_zeros(_bias_shape(pair, weights, ctx.axis))
        grads = bias, normal, residual
        pair_grad, vectors = _pair_bias_backward(*inputs, *grads, ctx.axis)
        weights_grad, *norm = vectors.split((weights.numel(), c, c))
        return pair_grad, *norm, weights_grad.view(weights.shape) if used else None, None, None


# Sides of an outer product ------------------------------------------------------------------------


def outer_product_sides(
    msa: Tensor,
    mask: Tensor,
    scale: Tensor,
    offset: Tensor,
    left_weights: Tensor,
    left_bias: Tensor,
    right_weights: Tensor,
    right_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The left and the right side, and the MSA."""
    inputs = msa, mask, scale, offset, left_weights, left_bias, right_weights, right_bias
    if not torch.is_grad_enabled():
        return *_sides(*inputs), msa
    return _Sides.apply(*inputs)  # type: ignore[no-untyped-call]


@torch.library.custom_op("twinfold::outer_product_sides", mutates_args=())
def _sides(
    msa: Tensor,
    mask: Tensor,
    scale: Tensor,
    offset: Tensor,
    left_weights: Tensor,
    left_bias: Tensor,
    right_weights: Tensor,
    right_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The left and the right side [b s r e]."""
    c, e = left_weights.shape
    n, kind = msa.numel() // c, (dtype_name(msa), architecture(msa.device))
    vectors = scale, offset, left_weights, left_bias, right_weights, right_bias
    left, right = call(kernels.outer_product_sides(n, c, e, *kind), msa, mask.float(), *vectors)
    return left.view(*msa.shape[:3], e), right.view(*msa.shape[:3], e)


@_sides.register_fake
def _(
    msa: Tensor,
    mask: Tensor,
    scale: Tensor,
    offset: Tensor,
    left_weights: Tensor,
    left_bias: Tensor,
    right_weights: Tensor,
    right_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    shape = *msa.shape[:3], left_weights.shape[1]
    return msa.new_empty(shape), msa.new_empty(shape)


@torch.library.custom_op("twinfold::outer_product_sides_backward", mutates_args=())
def _sides_backward(
    msa: Tensor,
    mask: Tensor,
    scale: Tensor,
    offset: Tensor,
    left_weights: Tensor,
    right_weights: Tensor,
    left: Tensor,
    right: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients by the MSA, ``residual`` added, and by the parameters end to end: both weights,
    scale, offset, both biases."""
    c, e = left_weights.shape
    n, kind = msa.numel() // c, (dtype_name(msa), architecture(msa.device))
    launch = backward.outer_product_sides(n, c, e, *kind, residual is not None)
    weights, past = (left_weights, right_weights), left if residual is None else residual
    given = msa, mask.float(), scale, offset, *weights, left, right, past
    msa_grad, sums = call(launch, *given)
    return msa_grad.view(msa.shape), sum_columns(sums, scale)


@_sides_backward.register_fake
def _(
    msa: Tensor,
    mask: Tensor,
    scale: Tensor,
    offset: Tensor,
    left_weights: Tensor,
    right_weights: Tensor,
    left: Tensor,
    right: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    c, e = left_weights.shape
    return msa.new_empty(msa.shape), scale.new_empty(2 * (c * e + c + e))


class _Sides(torch.autograd.Function):
    """Not an operator of its own: those may not return what they are given."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        msa, mask, scale, offset, left_weights, _, right_weights, _ = inputs
        ctx.set_materialize_grads(False)  # the MSA may go nowhere else
        ctx.save_for_backward(msa, mask, scale, offset, left_weights, right_weights)
        return *_sides(*inputs), msa

    @staticmethod
    def backward(ctx, left, right, residual):  # type: ignore[no-untyped-def]
        inputs = ctx.saved_tensors  # read once: a recomputed block gives them no second time
        msa, _, _, _, weights, _ = inputs
        c, e = weights.shape
        shape = *msa.shape[:3], e
        left, right = (msa.new_zeros(shape) if x is None else x for x in (left, right))
        msa_grad, vectors = _sides_backward(*inputs, left, right, residual)
        left, right, *norm, left_bias, right_bias = vectors.split((c * e, c * e, c, c, e, e))
        return (
            *(msa_grad, None, *norm),
            *(left.view(c, e), left_bias, right.view(c, e), right_bias),
        )
