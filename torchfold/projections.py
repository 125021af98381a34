"""Operations that normalise rows of channels and project them to a few numbers.

As those of ``ops``, each is a plain version, its specification, which a kernel may run instead.
They return what they normalise as well, for an update to be added to it: so the kernels of the
backward pass add the gradients that come around the norm.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from torchfold import ops


class FoldedTriangle(NamedTuple):
    """What kernels of a triangle multiplication take: norms as a part of weights and biases."""

    folded: Float[Tensor, "*l c_z w"]
    folded_bias: Float[Tensor, "*l w"]
    output_folded: Float[Tensor, "*l c c_z"]
    output_folded_bias: Float[Tensor, "*l c_z"]


def fold_triangle(
    *parameters: Float[Tensor, "..."], implementation: str | None = None
) -> FoldedTriangle | None:
    """Of TriangleParameters in their order, what ``ops.triangle_multiplication`` takes instead.

    A leading axis may count layers. None for plain operations, which take the parameters.
    """
    if not ops._kernel_runs("fold_triangle", implementation, *parameters):
        return None
    from torchfold import _triangle

    return FoldedTriangle(*_triangle.fold(parameters))


def pair_bias(
    pair: Float[Tensor, "b i j c"],
    scale: Float[Tensor, " c"],
    offset: Float[Tensor, " c"],
    weights: Float[Tensor, "c h"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b h i j"], Float[Tensor, "b i j c"]]:
    """Bias of an attention from normalised pairs (Suppl. Alg. 7, line 3); and the pairs.

    Raises UnsupportedOp where kernels are chosen that cannot hold so many channels and weights.
    """
    if _kernel_runs("pair_bias", implementation, pair, weights, more=2):
        from torchfold import _projections

        return _projections.pair_bias(pair, scale, offset, weights)
    normal = ops.layer_norm(pair, scale, offset, implementation="reference")
    return _move_heads(normal @ weights), pair


def layer_norm_pair_bias(
    pair: Float[Tensor, "b i j c"],
    scale: Float[Tensor, " c"],
    offset: Float[Tensor, " c"],
    weights: Float[Tensor, "c h"],
    *,
    axis: int = 2,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b q k c"], Float[Tensor, "b h q k"], Float[Tensor, "b i j c"]]:
    """Normalised pairs, bias of an attention among them along ``axis``, and the pairs.

    (Suppl. Alg. 13 and 14, lines 1-3.) For axis 2 the query is i and the key j, for axis 1 it is
    the other way round: attention is along rows of what is normalised, which is transposed. Raises
    UnsupportedOp as ``pair_bias`` does.
    """
    if _kernel_runs("layer_norm_pair_bias", implementation, pair, weights, more=2):
        from torchfold import _projections

        return _projections.layer_norm_pair_bias(pair, scale, offset, weights, axis)
    normal = ops.layer_norm(pair, scale, offset, implementation="reference")
    if axis == 1:
        normal = normal.transpose(1, 2)
    return normal, _move_heads(normal @ weights), pair


def outer_product_sides(
    msa: Float[Tensor, "b s r c"],
    mask: Float[Tensor, "b s r"],
    scale: Float[Tensor, " c"],
    offset: Float[Tensor, " c"],
    left_weights: Float[Tensor, "c e"],
    left_bias: Float[Tensor, " e"],
    right_weights: Float[Tensor, "c e"],
    right_bias: Float[Tensor, " e"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b s r e"], Float[Tensor, "b s r e"], Float[Tensor, "b s r c"]]:
    """Both sides of an outer product, zero where masked (Suppl. Alg. 10, lines 1-2); and the MSA.

    Raises UnsupportedOp as ``pair_bias`` does.
    """
    both = (left_weights, left_bias), (right_weights, right_bias)
    if _kernel_runs("outer_product_sides", implementation, msa, left_weights, right_weights):
        from torchfold import _projections

        return _projections.outer_product_sides(msa, mask, scale, offset, *both[0], *both[1])
    normal = ops.layer_norm(msa, scale, offset, implementation="reference")
    kept = mask[..., None].to(msa.dtype)
    left, right = (kept * F.linear(normal, weights.T, bias) for weights, bias in both)
    return left, right, msa


def _move_heads(bias: Float[Tensor, "b q k h"]) -> Float[Tensor, "b h q k"]:
    """As attention reads it."""
    return torch.movedim(bias, -1, 1).contiguous()


def _kernel_runs(
    op: str, implementation: str | None, x: Tensor, *weights: Tensor, more: int = 0
) -> bool:
    """Whether a kernel is chosen, which holds all weights and so many columns more at once."""
    if not ops._kernel_runs(op, implementation, x, *weights):
        return False
    from foldcore.kernels.norm_project import fits

    if not fits(x.shape[-1], sum(w.shape[1] for w in weights) + more):
        ops._refuse(
            op, implementation, "the kernel cannot hold so many channels and weights", x, *weights
        )
    return True
