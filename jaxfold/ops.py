"""The expensive operations of the network, each in a plain version that is its specification.

``use(name)`` chooses for the process which implementation runs, ``implementation=`` for one call.
Statistics and sums are taken in at least float32; results have the dtype of the first argument.

Legend: g groups that attend independently (rows, columns), q queries, k keys, h heads, d width.
"""

from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    from jaxfold import _self_test

    _self_test.run()


def _kernel_runs(op: str, implementation: str | None, *arrays: Array) -> bool:
    """Whether a Triton kernel is chosen for this operation; it takes the types of KERNEL_DTYPES."""
    name = implementation or _chosen
    if name == "reference":
        return False
    if name not in IMPLEMENTATIONS:
        _refuse(op, implementation, f"not one of {IMPLEMENTATIONS}", *arrays)
    if arrays[0].dtype.name not in KERNEL_DTYPES:
        _refuse(op, implementation, f"the kernel computes in {KERNEL_DTYPES}", *arrays)
    return True


def _refuse(op: str, implementation: str | None, reason: str, *arrays: Array) -> NoReturn:
    name = implementation or _chosen
    shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in arrays)
    raise UnsupportedOp(f"{op}({shapes}) with implementation {name!r}: {reason}")


def at_least_float32(dtype: Any) -> Any:
    """The dtype of statistics and sums: float64 stays, everything else becomes float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _plus(x: Array, bias: Array) -> Array:
    """``x + bias``, where JAX would sum the bias's gradient over all positions in bfloat16."""
    wide = at_least_float32(x.dtype)
    return (x.astype(wide) + bias.astype(wide)).astype(x.dtype)


def _sum_product(equation: str, *operands: Array) -> Array:
    """Einsum whose sums are taken and returned in at least float32."""
    wide = at_least_float32(operands[0].dtype)
    return jnp.einsum(equation, *operands, preferred_element_type=wide)


def layer_norm(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch c"]:
    """Normalise the last axis to mean 0 and (biased) variance 1, in two passes."""
    if _kernel_runs("layer_norm", implementation, x):
        from jaxfold import _rows

        return _rows.layer_norm(x, scale, offset)
    wide = x.astype(at_least_float32(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPS)
    return (normal * scale.astype(wide.dtype) + offset.astype(wide.dtype)).astype(x.dtype)


def layer_norm_residual(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch c"], Float[Array, "*batch c"]]:
    """``layer_norm`` of x, and x: what goes around the norm, so that gradients are added in it."""
    if _kernel_runs("layer_norm_residual", implementation, x):
        from jaxfold import _rows

        return _rows.layer_norm_residual(x, scale, offset)
    return layer_norm(x, scale, offset, implementation=implementation), x


def gated_attention(
    projected: Float[Array, "b s r 4 h d"],
    gate_bias: Float[Array, "h d"],
    mask: Float[Array, "b s r"],
    bias: Float[Array, "b h n n"] | None = None,
    *,
    axis: int = 2,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Array, "b s r h d"]:
    """Attention within rows (axis 2) or columns (axis 1), then a gate (Suppl. Alg. 7, 8, 13, 14).

    ``projected`` holds query, gate, key and value of each position; a sigmoid is applied to the sum
    of gate and ``gate_bias``, taken in at least float32. ``scale`` multiplies the queries.
    """
    if _kernel_runs("gated_attention", implementation, projected):
        from jaxfold import _attention

        return _attention.gated_attention(projected, gate_bias, mask, bias, axis, scale)
    if axis == 1:
        projected, mask = jnp.swapaxes(projected, 1, 2), jnp.swapaxes(mask, 1, 2)
    query, gate, key, value = jnp.unstack(projected, axis=3)
    gathered = _gather(query, key, value, mask, bias, scale)
    wide = gathered.dtype
    opened = jax.nn.sigmoid(gate.astype(wide) + gate_bias.astype(wide))
    output = (gathered * opened).astype(projected.dtype)
    return jnp.swapaxes(output, 1, 2) if axis == 1 else output


def _gather(
    query: Float[Array, "b g q h d"],
    key: Float[Array, "b g k h d"],
    value: Float[Array, "b g k h d"],
    mask: Float[Array, "b g k"],
    bias: Float[Array, "b h q k"] | None,
    scale: float,
) -> Float[Array, "b g q h d"]:
    """Weighted means of the values, in at least float32."""
    logits = _sum_product("bgqhd,bgkhd->bghqk", query, key) * scale
    if bias is not None:
        logits = logits + bias[:, None].astype(logits.dtype)
    logits = jnp.where(mask[:, :, None, None, :] > 0, logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return _sum_product("bghqk,bgkhd->bgqhd", weights, value)


def project_with_mean(
    x: Float[Array, "b s r c"],
    mask: Float[Array, "b s r"],
    weights: Float[Array, "c n"],
    *,
    axis: int = 2,
    implementation: str | None = None,
) -> tuple[Float[Array, "b s r n"], Float[Array, "b g c"]]:
    """``x @ weights``, and the means of x over rows (axis 2) or columns (axis 1).

    Only unmasked positions count (Suppl. Alg. 19, line 2); without any, the mean is 0.
    """
    if _kernel_runs("project_with_mean", implementation, x):
        from jaxfold import _global_attention

        return _global_attention.project_with_mean(x, mask, weights, axis)
    wide = at_least_float32(x.dtype)
    counted = mask.astype(wide)[..., None]
    total = jnp.sum(x.astype(wide) * counted, axis=axis)
    mean = total / (jnp.sum(counted, axis=axis) + MASKED_MEAN_EPS)
    return x @ weights, mean.astype(x.dtype)


def global_attention(
    query: Float[Array, "b g h d"],
    projected: Float[Array, "b s r n"],
    gate_bias: Float[Array, "h d"],
    mask: Float[Array, "b s r"],
    *,
    axis: int = 2,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Array, "b s r h d"]:
    """One query a row (axis 2) or column (axis 1) and head, then a gate (Suppl. Alg. 19).

    ``projected`` holds of each position key and value, which all heads share, and the gates of all
    heads: n = 2 d + h d channels. A sigmoid is applied to the sum of gate and ``gate_bias``, taken
    in at least float32. ``scale`` multiplies the queries.
    """
    if _kernel_runs("global_attention", implementation, projected):
        from jaxfold import _global_attention

        return _global_attention.global_attention(query, projected, gate_bias, mask, axis, scale)
    if axis == 1:
        projected, mask = jnp.swapaxes(projected, 1, 2), jnp.swapaxes(mask, 1, 2)
    h, d = gate_bias.shape
    key, value, gate = jnp.split(projected, (d, 2 * d), axis=-1)
    logits = _sum_product("bghd,bgkd->bghk", query, key) * scale
    logits = jnp.where(mask[:, :, None, :] > 0, logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    gathered = _sum_product("bghk,bgkd->bghd", weights, value)
    wide = gathered.dtype
    gate = gate.reshape(*gate.shape[:3], h, d).astype(wide)
    opened = jax.nn.sigmoid(gate + gate_bias.astype(wide))
    output = (gathered[:, :, None] * opened).astype(projected.dtype)
    return jnp.swapaxes(output, 1, 2) if axis == 1 else output


def template_attention(
    query: Float[Array, "b i j h d"],
    projected: Float[Array, "b t i j 2 h d"],
    mask: Float[Array, "b t"],
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Array, "b i j h d"]:
    """From each pair to the same pair of every template (Suppl. Alg. 17).

    ``projected`` holds key and value of each pair and template, of which there is at least one.
    ``scale`` multiplies the queries.
    """
    if _kernel_runs("template_attention", implementation, projected):
        if projected.shape[1] == 0:
            _refuse("template_attention", implementation, "there is no template", projected)
        from jaxfold import _template_attention

        return _template_attention.template_attention(query, projected, mask, scale)
    wide = at_least_float32(query.dtype)
    key, value = jnp.unstack(projected, axis=4)
    logits = jnp.sum(query[:, None].astype(wide) * key.astype(wide), axis=-1) * scale
    logits = jnp.where(mask[:, :, None, None, None] > 0, logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=1).astype(value.dtype)
    return jnp.sum(weights[..., None].astype(wide) * value.astype(wide), axis=1).astype(query.dtype)


class TriangleParameters(NamedTuple):
    """Arrays of a triangle multiplication: norm, projections with their gates, norm, output."""

    norm_scale: Float[Array, " c_z"]
    norm_offset: Float[Array, " c_z"]
    left: Float[Array, "c_z c"]
    left_bias: Float[Array, " c"]
    left_gate: Float[Array, "c_z c"]
    left_gate_bias: Float[Array, " c"]
    right: Float[Array, "c_z c"]
    right_bias: Float[Array, " c"]
    right_gate: Float[Array, "c_z c"]
    right_gate_bias: Float[Array, " c"]
    center_scale: Float[Array, " c"]
    center_offset: Float[Array, " c"]
    output: Float[Array, "c c_z"]
    output_bias: Float[Array, " c_z"]
    gating: Float[Array, "c_z c_z"]
    gating_bias: Float[Array, " c_z"]


def triangle_multiplication(
    pair: Float[Array, "b i j c_z"],
    pair_mask: Float[Array, "b i j"],
    factor: Float[Array, "b 1 j c_z"] | None,
    *parameters: Float[Array, "..."],
    outgoing: bool,
    residual: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b i j c_z"]:
    """Update of each edge from the triangles it is part of (Suppl. Alg. 11 and 12).

    With ``factor`` the update is multiplied by it (dropout), with ``residual`` added to ``pair``.
    ``parameters`` are TriangleParameters in order; for kernels also ``projections.FoldedTriangle``.
    """
    if _kernel_runs("triangle_multiplication", implementation, pair):
        from jaxfold import _triangle

        return _triangle.triangle_multiplication(
            pair, pair_mask, factor, parameters, outgoing, residual
        )
    w, plain = TriangleParameters(*parameters), "reference"
    x = layer_norm(pair, w.norm_scale, w.norm_offset, implementation=plain)
    mask = pair_mask[..., None].astype(x.dtype)
    gate = jax.nn.sigmoid(_plus(x @ w.left_gate, w.left_gate_bias))
    left = mask * _plus(x @ w.left, w.left_bias) * gate
    gate = jax.nn.sigmoid(_plus(x @ w.right_gate, w.right_gate_bias))
    right = mask * _plus(x @ w.right, w.right_bias) * gate
    product = triangle_product(left, right, outgoing, implementation=plain)
    center = layer_norm(product, w.center_scale, w.center_offset, implementation=plain)
    update = _plus(center @ w.output, w.output_bias)
    update = update * jax.nn.sigmoid(_plus(x @ w.gating, w.gating_bias))
    return apply_update(pair, update, factor, residual)


def apply_update(
    x: Float[Array, "*batch c"],
    update: Float[Array, "*batch c"],
    factor: Float[Array, "..."] | None,
    residual: bool,
) -> Float[Array, "*batch c"]:
    """The update times ``factor`` (dropout), with ``residual`` added to ``x``."""
    if factor is not None:
        update = (update * factor).astype(x.dtype)
    return x + update if residual else update


def linear_update(
    x: Float[Array, "b i j c"],
    y: Float[Array, "b p q k"],
    weights: Float[Array, "k c"],
    bias: Float[Array, " c"],
    factor: Float[Array, "b ..."] | None = None,
    *,
    residual: bool = False,
    transposed: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b i j c"]:
    """A projection of ``y``, of the same table or with ``transposed`` of [b j i], to update ``x``.

    With ``factor`` the update is multiplied by it (dropout, the same along axis 1 or 2), with
    ``residual`` added to ``x``.
    """
    if _kernel_runs("linear_update", implementation, x):
        from jaxfold import _linear_update

        return _linear_update.linear_update(x, y, weights, bias, factor, residual, transposed)
    y = jnp.swapaxes(y, 1, 2) if transposed else y
    return apply_update(x, _plus(y @ weights, bias), factor, residual)


def transition(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"],
    offset: Float[Array, " c"],
    weights1: Float[Array, "c f"],
    bias1: Float[Array, " f"],
    weights2: Float[Array, "f c"],
    bias2: Float[Array, " c"],
    *,
    residual: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*batch c"]:
    """LayerNorm and a two-layer perceptron (Suppl. Alg. 9, 15), with ``residual`` added to x."""
    if _kernel_runs("transition", implementation, x):
        from jaxfold import _rows

        return _rows.transition(x, scale, offset, weights1, bias1, weights2, bias2, residual)
    normal = layer_norm(x, scale, offset, implementation="reference")
    update = _plus(jax.nn.relu(_plus(normal @ weights1, bias1)) @ weights2, bias2)
    return x + update if residual else update


def triangle_product(
    left: Float[Array, "b i j c"],
    right: Float[Array, "b i j c"],
    outgoing: bool,
    *,
    implementation: str | None = None,
) -> Float[Array, "b i j c"]:
    """Sum over the third corner k of a triangle of edges (Suppl. Alg. 11 and 12, line 4).

    Outgoing: left_ik right_jk. Incoming: left_kj right_ki (in this order, as the published weights
    need it).
    """
    if _kernel_runs("triangle_product", implementation, left, right):
        _refuse("triangle_product", implementation, "there is no such kernel yet", left, right)
    equation = "bikc,bjkc->bijc" if outgoing else "bkjc,bkic->bijc"
    return _sum_product(equation, left, right).astype(left.dtype)


def outer_product_mean(
    left: Float[Array, "b s i c"],
    right: Float[Array, "b s j e"],
    mask: Float[Array, "b s r"],
    weights: Float[Array, "c e c_z"],
    bias: Float[Array, " c_z"],
    pair: Float[Array, "b i j c_z"] | None = None,
    count: Float[Array, "b i j"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "b i j c_z"]:
    """Mean over sequences of the outer product, projected (Suppl. Alg. 10, lines 3-4).

    ``left`` and ``right`` are zero where masked. The bias is divided by the count too, of the
    sequences that have both residues, which the mask says unless given. Added to ``pair``, if any.
    """
    count = _sum_product("bsi,bsj->bij", mask, mask) if count is None else count
    if _kernel_runs("outer_product_mean", implementation, left, right):
        from jaxfold import _outer_product

        return _outer_product.outer_product_mean(left, right, count, weights, bias, pair)
    outer = _sum_product("bsic,bsje->bijce", left, right).astype(left.dtype)
    projected = _sum_product("bijce,cez->bijz", outer, weights)
    total = projected + bias.astype(projected.dtype)
    update = (total / (OUTER_PRODUCT_EPS + count.astype(total.dtype))[..., None]).astype(left.dtype)
    return update if pair is None else pair + update
