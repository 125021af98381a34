"""The expensive operations of the network, each in a plain version that is its specification.

``use(name)`` chooses for the process which implementation runs, ``implementation=`` for one call.
Statistics and sums are taken in at least float32; results have the dtype of the first argument.

Legend: g groups that attend independently (rows, columns), q queries, k keys, h heads, d width.
"""

from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LAYER_NORM_EPS = 1e-5
OUTER_PRODUCT_EPS = 1e-3  # added to the number of sequences
MASKED_MEAN_EPS = 1e-10  # added to the number of positions
MASKED_LOGIT = -1e9  # finite, so that a query without keys attends to all of them alike

IMPLEMENTATIONS = ("reference", "triton")
KERNEL_DTYPES = ("bfloat16", "float32")
_chosen = "reference"


class UnsupportedOp(NotImplementedError):
    """The chosen implementation cannot run this operation; the message says why."""


def use(name: str) -> None:
    """Run this implementation from now on, in the whole process."""
    global _chosen
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; one of {IMPLEMENTATIONS}")
    _chosen = name


def self_test() -> None:
    """Run every kernel on this device; raise WrongKernel, with its name, if one is wrong."""
    from torchfold import _self_test

    _self_test.run(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _kernel_runs(op: str, implementation: str | None, *arrays: Tensor) -> bool:
    """Whether a Triton kernel is chosen for this operation; it takes the types of KERNEL_DTYPES."""
    name = implementation or _chosen
    if name == "reference":
        return False
    if name not in IMPLEMENTATIONS:
        _refuse(op, implementation, f"not one of {IMPLEMENTATIONS}", *arrays)
    dtype = str(arrays[0].dtype).removeprefix("torch.")
    if dtype not in KERNEL_DTYPES:
        _refuse(op, implementation, f"the kernel computes in {KERNEL_DTYPES}", *arrays)
    return True


def _refuse(op: str, implementation: str | None, reason: str, *arrays: Tensor) -> NoReturn:
    name = implementation or _chosen
    shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in arrays)
    raise UnsupportedOp(f"{op}({shapes}) with implementation {name!r}: {reason}")


def at_least_float32(dtype: Any) -> Any:
    """The dtype of statistics and sums: float64 stays, everything else becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def _sum_product(equation: str, *operands: Tensor) -> Tensor:
    """Einsum whose sums are taken and returned in at least float32."""
    wide = at_least_float32(operands[0].dtype)
    return torch.einsum(equation, *[operand.to(wide) for operand in operands])


def layer_norm(
    x: Float[Tensor, "*batch c"],
    scale: Float[Tensor, " c"],
    offset: Float[Tensor, " c"],
    *,
    implementation: str | None = None,
) -> Float[Tensor, "*batch c"]:
    """Normalise the last axis to mean 0 and (biased) variance 1, in two passes."""
    if _kernel_runs("layer_norm", implementation, x):
        from torchfold import _rows

        return _rows.layer_norm(x, scale, offset)
    wide = x.to(at_least_float32(x.dtype))
    centred = wide - torch.mean(wide, dim=-1, keepdim=True)
    variance = torch.mean(torch.square(centred), dim=-1, keepdim=True)
    normal = centred * torch.rsqrt(variance + LAYER_NORM_EPS)
    return (normal * scale.to(wide.dtype) + offset.to(wide.dtype)).to(x.dtype)


def layer_norm_residual(
    x: Float[Tensor, "*batch c"],
    scale: Float[Tensor, " c"],
    offset: Float[Tensor, " c"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "*batch c"], Float[Tensor, "*batch c"]]:
    """``layer_norm`` of x, and x: what goes around the norm, so that gradients are added in it."""
    if _kernel_runs("layer_norm_residual", implementation, x):
        from torchfold import _rows

        return _rows.layer_norm_residual(x, scale, offset)
    return layer_norm(x, scale, offset, implementation=implementation), x


def gated_attention(
    projected: Float[Tensor, "b s r 4 h d"],
    gate_bias: Float[Tensor, "h d"],
    mask: Float[Tensor, "b s r"],
    bias: Float[Tensor, "b h n n"] | None = None,
    *,
    axis: int = 2,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Tensor, "b s r h d"]:
    """Attention within rows (axis 2) or columns (axis 1), then a gate (Suppl. Alg. 7, 8, 13, 14).

    ``projected`` holds query, gate, key and value of each position; a sigmoid is applied to the sum
    of gate and ``gate_bias``, taken in at least float32. ``scale`` multiplies the queries.
    """
    if _kernel_runs("gated_attention", implementation, projected):
        from torchfold import _attention

        return _attention.gated_attention(projected, gate_bias, mask, bias, axis, scale)
    if axis == 1:
        projected, mask = projected.transpose(1, 2), mask.transpose(1, 2)
    query, gate, key, value = projected.unbind(3)
    gathered = _gather(query, key, value, mask, bias, scale)
    wide = gathered.dtype
    opened = torch.sigmoid(gate.to(wide) + gate_bias.to(wide))
    output = (gathered * opened).to(projected.dtype)
    return output.transpose(1, 2) if axis == 1 else output


def _gather(
    query: Float[Tensor, "b g q h d"],
    key: Float[Tensor, "b g k h d"],
    value: Float[Tensor, "b g k h d"],
    mask: Float[Tensor, "b g k"],
    bias: Float[Tensor, "b h q k"] | None,
    scale: float,
) -> Float[Tensor, "b g q h d"]:
    """Weighted means of the values, in at least float32."""
    logits = _sum_product("bgqhd,bgkhd->bghqk", query, key) * scale
    if bias is not None:
        logits = logits + bias[:, None].to(logits.dtype)
    logits = torch.where(mask[:, :, None, None, :] > 0, logits, MASKED_LOGIT)
    weights = torch.softmax(logits, dim=-1).to(value.dtype)
    return _sum_product("bghqk,bgkhd->bgqhd", weights, value)


def project_with_mean(
    x: Float[Tensor, "b s r c"],
    mask: Float[Tensor, "b s r"],
    weights: Float[Tensor, "c n"],
    *,
    axis: int = 2,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b s r n"], Float[Tensor, "b g c"]]:
    """``x @ weights``, and the means of x over rows (axis 2) or columns (axis 1).

    Only unmasked positions count (Suppl. Alg. 19, line 2); without any, the mean is 0.
    """
    if _kernel_runs("project_with_mean", implementation, x):
        from torchfold import _global_attention

        return _global_attention.project_with_mean(x, mask, weights, axis)
    wide = at_least_float32(x.dtype)
    counted = mask.to(wide)[..., None]
    total = torch.sum(x.to(wide) * counted, dim=axis)
    mean = total / (torch.sum(counted, dim=axis) + MASKED_MEAN_EPS)
    return x @ weights, mean.to(x.dtype)


def global_attention(
    query: Float[Tensor, "b g h d"],
    projected: Float[Tensor, "b s r n"],
    gate_bias: Float[Tensor, "h d"],
    mask: Float[Tensor, "b s r"],
    *,
    axis: int = 2,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Tensor, "b s r h d"]:
    """One query a row (axis 2) or column (axis 1) and head, then a gate (Suppl. Alg. 19).

    ``projected`` holds of each position key and value, which all heads share, and the gates of all
    heads: n = 2 d + h d channels. A sigmoid is applied to the sum of gate and ``gate_bias``, taken
    in at least float32. ``scale`` multiplies the queries.
    """
    if _kernel_runs("global_attention", implementation, projected):
        from torchfold import _global_attention

        return _global_attention.global_attention(query, projected, gate_bias, mask, axis, scale)
    if axis == 1:
        projected, mask = projected.transpose(1, 2), mask.transpose(1, 2)
    h, d = gate_bias.shape
    key, value, gate = projected.split((d, d, h * d), dim=-1)
    logits = _sum_product("bghd,bgkd->bghk", query, key) * scale
    logits = torch.where(mask[:, :, None, :] > 0, logits, MASKED_LOGIT)
    weights = torch.softmax(logits, dim=-1).to(value.dtype)
    gathered = _sum_product("bghk,bgkd->bghd", weights, value)
    wide = gathered.dtype
    opened = torch.sigmoid(gate.unflatten(-1, (h, d)).to(wide) + gate_bias.to(wide))
    output = (gathered[:, :, None] * opened).to(projected.dtype)
    return output.transpose(1, 2) if axis == 1 else output


def template_attention(
    query: Float[Tensor, "b i j h d"],
    projected: Float[Tensor, "b t i j 2 h d"],
    mask: Float[Tensor, "b t"],
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Tensor, "b i j h d"]:
    """From each pair to the same pair of every template (Suppl. Alg. 17).

    ``projected`` holds key and value of each pair and template, of which there is at least one.
    ``scale`` multiplies the queries.
    """
    if _kernel_runs("template_attention", implementation, projected):
        if projected.shape[1] == 0:
            _refuse("template_attention", implementation, "there is no template", projected)
        from torchfold import _template_attention

        return _template_attention.template_attention(query, projected, mask, scale)
    wide = at_least_float32(query.dtype)
    key, value = projected.unbind(4)
    logits = torch.sum(query[:, None].to(wide) * key.to(wide), dim=-1) * scale
    logits = torch.where(mask[:, :, None, None, None] > 0, logits, MASKED_LOGIT)
    weights = torch.softmax(logits, dim=1).to(value.dtype)
    return torch.sum(weights[..., None].to(wide) * value.to(wide), dim=1).to(query.dtype)


class TriangleParameters(NamedTuple):
    """Arrays of a triangle multiplication: norm, projections with their gates, norm, output."""

    norm_scale: Float[Tensor, " c_z"]
    norm_offset: Float[Tensor, " c_z"]
    left: Float[Tensor, "c_z c"]
    left_bias: Float[Tensor, " c"]
    left_gate: Float[Tensor, "c_z c"]
    left_gate_bias: Float[Tensor, " c"]
    right: Float[Tensor, "c_z c"]
    right_bias: Float[Tensor, " c"]
    right_gate: Float[Tensor, "c_z c"]
    right_gate_bias: Float[Tensor, " c"]
    center_scale: Float[Tensor, " c"]
    center_offset: Float[Tensor, " c"]
    output: Float[Tensor, "c c_z"]
    output_bias: Float[Tensor, " c_z"]
    gating: Float[Tensor, "c_z c_z"]
    gating_bias: Float[Tensor, " c_z"]


def triangle_multiplication(
    pair: Float[Tensor, "b i j c_z"],
    pair_mask: Float[Tensor, "b i j"],
    factor: Float[Tensor, "b 1 j c_z"] | None,
    *parameters: Float[Tensor, "..."],
    outgoing: bool,
    residual: bool = False,
    implementation: str | None = None,
) -> Float[Tensor, "b i j c_z"]:
    """Update of each edge from the triangles it is part of (Suppl. Alg. 11 and 12).

    With ``factor`` the update is multiplied by it (dropout), with ``residual`` added to ``pair``.
    ``parameters`` are TriangleParameters in order; for kernels also ``projections.FoldedTriangle``.
    """
    if _kernel_runs("triangle_multiplication", implementation, pair):
        from torchfold import _triangle

        return _triangle.triangle_multiplication(
            pair, pair_mask, factor, parameters, outgoing, residual
        )
    w, plain = TriangleParameters(*parameters), "reference"
    x = layer_norm(pair, w.norm_scale, w.norm_offset, implementation=plain)
    mask = pair_mask[..., None].to(x.dtype)
    left = mask * (x @ w.left + w.left_bias) * torch.sigmoid(x @ w.left_gate + w.left_gate_bias)
    gate = torch.sigmoid(x @ w.right_gate + w.right_gate_bias)
    right = mask * (x @ w.right + w.right_bias) * gate
    product = triangle_product(left, right, outgoing, implementation=plain)
    center = layer_norm(product, w.center_scale, w.center_offset, implementation=plain)
    update = center @ w.output + w.output_bias
    update = update * torch.sigmoid(x @ w.gating + w.gating_bias)
    return apply_update(pair, update, factor, residual)


def apply_update(
    x: Float[Tensor, "*batch c"],
    update: Float[Tensor, "*batch c"],
    factor: Float[Tensor, "..."] | None,
    residual: bool,
) -> Float[Tensor, "*batch c"]:
    """The update times ``factor`` (dropout), with ``residual`` added to ``x``."""
    if factor is not None:
        update = (update * factor).to(x.dtype)
    return x + update if residual else update


def linear_update(
    x: Float[Tensor, "b i j c"],
    y: Float[Tensor, "b p q k"],
    weights: Float[Tensor, "k c"],
    bias: Float[Tensor, " c"],
    factor: Float[Tensor, "b ..."] | None = None,
    *,
    residual: bool = False,
    transposed: bool = False,
    implementation: str | None = None,
) -> Float[Tensor, "b i j c"]:
    """A projection of ``y``, of the same table or with ``transposed`` of [b j i], to update ``x``.

    With ``factor`` the update is multiplied by it (dropout, the same along axis 1 or 2), with
    ``residual`` added to ``x``.
    """
    if _kernel_runs("linear_update", implementation, x):
        from torchfold import _linear_update

        return _linear_update.linear_update(x, y, weights, bias, factor, residual, transposed)
    y = y.transpose(1, 2) if transposed else y
    return apply_update(x, F.linear(y, weights.T, bias), factor, residual)


def transition(
    x: Float[Tensor, "*batch c"],
    scale: Float[Tensor, " c"],
    offset: Float[Tensor, " c"],
    weights1: Float[Tensor, "c f"],
    bias1: Float[Tensor, " f"],
    weights2: Float[Tensor, "f c"],
    bias2: Float[Tensor, " c"],
    *,
    residual: bool = False,
    implementation: str | None = None,
) -> Float[Tensor, "*batch c"]:
    """LayerNorm and a two-layer perceptron (Suppl. Alg. 9, 15), with ``residual`` added to x."""
    if _kernel_runs("transition", implementation, x):
        from torchfold import _rows

        return _rows.transition(x, scale, offset, weights1, bias1, weights2, bias2, residual)
    normal = layer_norm(x, scale, offset, implementation="reference")
    update = torch.relu(normal @ weights1 + bias1) @ weights2 + bias2
    return x + update if residual else update


def triangle_product(
    left: Float[Tensor, "b i j c"],
    right: Float[Tensor, "b i j c"],
    outgoing: bool,
    *,
    implementation: str | None = None,
) -> Float[Tensor, "b i j c"]:
    """Sum over the third corner k of a triangle of edges (Suppl. Alg. 11 and 12, line 4).

    Outgoing: left_ik right_jk. Incoming: left_kj right_ki (in this order, as the published weights
    need it).
    """
    if _kernel_runs("triangle_product", implementation, left, right):
        _refuse("triangle_product", implementation, "there is no such kernel yet", left, right)
    equation = "bikc,bjkc->bijc" if outgoing else "bkjc,bkic->bijc"
    return _sum_product(equation, left, right).to(left.dtype)


def outer_product_mean(
    left: Float[Tensor, "b s i c"],
    right: Float[Tensor, "b s j e"],
    mask: Float[Tensor, "b s r"],
    weights: Float[Tensor, "c e c_z"],
    bias: Float[Tensor, " c_z"],
    pair: Float[Tensor, "b i j c_z"] | None = None,
    count: Float[Tensor, "b i j"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Tensor, "b i j c_z"]:
    """Mean over sequences of the outer product, projected (Suppl. Alg. 10, lines 3-4).

    ``left`` and ``right`` are zero where masked. The bias is divided by the count too, of the
    sequences that have both residues, which the mask says unless given. Added to ``pair``, if any.
    """
    count = _sum_product("bsi,bsj->bij", mask, mask) if count is None else count
    if _kernel_runs("outer_product_mean", implementation, left, right):
        from torchfold import _outer_product

        return _outer_product.outer_product_mean(left, right, count, weights, bias, pair)
    outer = _sum_product("bsic,bsje->bijce", left, right).to(left.dtype)
    projected = _sum_product("bijce,cez->bijz", outer, weights)
    total = projected + bias.to(projected.dtype)
    update = (total / (OUTER_PRODUCT_EPS + count.to(total.dtype))[..., None]).to(left.dtype)
    return update if pair is None else pair + update
