"""Linear layers, attention, transition and dropout: what the larger modules are made of.

Parameters have DeepMind's names and shapes and are declared, as zeros, with the kind of their
initial values; ``params.initialize`` fills them. A module computes in the dtype of its parameters.

Legend: g groups that attend independently, h heads, d head width.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from foldcore import dropout as definition
from jaxfold import ops
from jaxfold.stack import Deriving

Kind = Literal["linear", "relu", "glorot", "normal", "zeros", "ones", "point_weights"]
# what a Linear may start from: "final" adds nothing at first, "gating" leaves a gate half open
LinearInit = Literal["linear", "relu", "final", "gating"]


def parameter(shape: tuple[int, ...], kind: Kind) -> nnx.Param[Array]:
    """Declare a parameter; ``kind`` is a key of ``foldcore.initializers.KINDS``."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), kind=kind, stacked=False)


class Linear(nnx.Module):
    """``x @ weights + bias``."""

    def __init__(self, c_in: int, c_out: int, init: LinearInit = "linear"):
        kind: Kind = "zeros" if init in ("final", "gating") else init  # type: ignore[assignment]
        self.weights = parameter((c_in, c_out), kind)
        self.bias = parameter((c_out,), "ones" if init == "gating" else "zeros")

    def __call__(self, x: Float[Array, "*batch c_in"]) -> Float[Array, "*batch c_out"]:
        return ops._plus(x @ self.weights[...], self.bias[...])


class LayerNorm(nnx.Module):
    """Layer normalisation of the channels, with learnt scale and offset."""

    def __init__(self, c: int):
        self.scale = parameter((c,), "ones")
        self.offset = parameter((c,), "zeros")

    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        return ops.layer_norm(x, self.scale[...], self.offset[...])

    def with_residual(
        self, x: Float[Array, "*batch c"]
    ) -> tuple[Float[Array, "*batch c"], Float[Array, "*batch c"]]:
        """The same, and x to add an update to: one kernel sums the gradients by both."""
        return ops.layer_norm_residual(x, self.scale[...], self.offset[...])


class Attention(Deriving):
    """Attention of several heads, gated or not (Suppl. Alg. 7, 8, 13, 14, 17, without the norm)."""

    packed: nnx.Variable[Array] | None = None

    def __init__(
        self, c_q: int, c_kv: int, c_out: int, num_heads: int, c_hidden: int, gating: bool = True
    ):
        self.gating = gating
        self.query_w = parameter((c_q, num_heads, c_hidden), "glorot")
        self.key_w = parameter((c_kv, num_heads, c_hidden), "glorot")
        self.value_w = parameter((c_kv, num_heads, c_hidden), "glorot")
        if gating:
            self.gating_w = parameter((c_q, num_heads, c_hidden), "zeros")
            self.gating_b = parameter((num_heads, c_hidden), "ones")
        self.output_w = parameter((num_heads, c_hidden, c_out), "zeros")
        self.output_b = parameter((c_out,), "zeros")

    def derive(self) -> dict[str, Array]:
        """Weights of all that is projected from one input, side by side."""
        first = (self.query_w, self.gating_w) if self.gating else ()
        return {"packed": jnp.stack([w[...] for w in (*first, self.key_w, self.value_w)], axis=-3)}

    def project(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch n h d"]:
        """What ``ops.gated_attention`` reads of each position; without a gate, key and value."""
        packed = self.derive()["packed"] if self.packed is None else self.packed[...]
        return (x @ packed.reshape(len(packed), -1)).reshape(*x.shape[:-1], *packed.shape[1:])

    def within(
        self,
        projected: Float[Array, "b s r 4 h d"],
        mask: Float[Array, "b s r"],
        base: Float[Array, "b p q c_out"],
        bias: Float[Array, "b h n n"] | None = None,
        axis: int = 2,
        factor: Float[Array, "b ..."] | None = None,
        residual: bool = False,
        transposed: bool = False,
    ) -> Float[Array, "b p q c_out"]:
        """Gated self-attention along the rows (axis 2) or the columns (axis 1) of a table.

        The result is an update of ``base``, which is the same table or with ``transposed`` its
        transpose; multiplied by ``factor`` (dropout), and with ``residual`` added to it.
        """
        scale = self.query_w.shape[-1] ** -0.5
        gathered = ops.gated_attention(
            projected, self.gating_b[...], mask, bias, axis=axis, scale=scale
        )
        output = self.output_w[...], self.output_b[...]
        return _project(gathered, *output, base, factor, residual, transposed)

    def to_templates(
        self,
        pair: Float[Array, "b i j c_z"],
        embedded: Float[Array, "b t i j c_t"],
        mask: Float[Array, "b t"],
    ) -> Float[Array, "b i j c_z"]:
        """From each pair to the same pair of every template, without a gate (Suppl. Alg. 17)."""
        query = pair @ self.query_w[...].reshape(pair.shape[-1], -1)
        query = query.reshape(*pair.shape[:3], *self.query_w.shape[1:])
        projected, scale = self.project(embedded), query.shape[-1] ** -0.5
        gathered = ops.template_attention(query, projected, mask, scale=scale)
        return _project(gathered, self.output_w[...], self.output_b[...], pair, None, False)


def _project(
    gathered: Float[Array, "b s r h d"],
    weights: Float[Array, "h d c"],
    bias: Float[Array, " c"],
    base: Float[Array, "b p q c"],
    factor: Float[Array, "b ..."] | None,
    residual: bool,
    transposed: bool = False,
) -> Float[Array, "b p q c"]:
    """The heads' results as one update of ``base``, times ``factor``."""
    flat = gathered.reshape(*gathered.shape[:3], -1), weights.reshape(-1, weights.shape[-1])
    return ops.linear_update(base, *flat, bias, factor, residual=residual, transposed=transposed)


class GlobalAttention(Deriving):
    """Attention whose query is the mean of a group, with one shared key head (Suppl. Alg. 19)."""

    packed: nnx.Variable[Array] | None = None

    def __init__(self, c: int, num_heads: int, c_hidden: int):
        self.query_w = parameter((c, num_heads, c_hidden), "glorot")
        self.key_w = parameter((c, c_hidden), "glorot")
        self.value_w = parameter((c, c_hidden), "glorot")
        self.gating_w = parameter((c, num_heads, c_hidden), "zeros")
        self.gating_b = parameter((num_heads, c_hidden), "ones")
        self.output_w = parameter((num_heads, c_hidden, c), "zeros")
        self.output_b = parameter((c,), "zeros")

    def derive(self) -> dict[str, Array]:
        """Weights of key, value and gates side by side."""
        gates = self.gating_w[...].reshape(*self.key_w.shape[:-1], -1)
        return {"packed": jnp.concatenate((self.key_w[...], self.value_w[...], gates), axis=-1)}

    def __call__(
        self,
        x: Float[Array, "b s r c"],
        mask: Float[Array, "b s r"],
        base: Float[Array, "b s r c"],
        axis: int = 2,
        residual: bool = False,
    ) -> Float[Array, "b s r c"]:
        """Along the rows (axis 2) or the columns (axis 1), an update of ``base`` or added to it."""
        packed = self.derive()["packed"] if self.packed is None else self.packed[...]
        projected, mean = ops.project_with_mean(x, mask, packed, axis=axis)
        query = jnp.einsum("bgc,chd->bghd", mean, self.query_w[...])
        gathered = ops.global_attention(
            query, projected, self.gating_b[...], mask, axis=axis, scale=query.shape[-1] ** -0.5
        )
        return _project(gathered, self.output_w[...], self.output_b[...], base, None, residual)


class Transition(nnx.Module):
    """Two-layer perceptron on each position (Suppl. Alg. 9 and 15); padding is not masked.

    With ``residual`` it returns its input plus the update.
    """

    def __init__(self, c: int, factor: int):
        self.input_layer_norm = LayerNorm(c)
        self.transition1 = Linear(c, c * factor, init="relu")
        self.transition2 = Linear(c * factor, c, init="final")

    def __call__(
        self, x: Float[Array, "*batch c"], residual: bool = False
    ) -> Float[Array, "*batch c"]:
        return ops.transition(
            x,
            self.input_layer_norm.scale[...],
            self.input_layer_norm.offset[...],
            self.transition1.weights[...],
            self.transition1.bias[...],
            self.transition2.weights[...],
            self.transition2.bias[...],
            residual=residual,
        )


# Dropout ------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DropoutKey:
    """Names the random masks of a step: ``foldcore/dropout.py`` says how.

    Modules pass it on with ``enter``; its numbers may be traced, the scope is fixed.
    """

    seed: UInt32[Array, ""] | int
    step: Int[Array, ""]
    example_id: Int32[Array, " b"]
    recycling: Int[Array, ""] | int = 0
    block: Int[Array, ""] | int = 0
    scope: str = dataclasses.field(default="", metadata={"static": True})
    _masks: Any = None  # drawn ahead (``_masks.py``)

    def enter(self, scope: str, block: Int[Array, ""] | int | None = None) -> "DropoutKey":
        """The key of a part of the model; ``block`` is its position where it is one of a stack."""
        path = f"{self.scope}/{scope}" if self.scope else scope
        return dataclasses.replace(self, scope=path, block=self.block if block is None else block)

    def at_pass(self, recycling: Int[Array, ""] | int) -> "DropoutKey":
        """The key of one recycling pass."""
        return dataclasses.replace(self, recycling=recycling)

    def repeat(self, count: int) -> "DropoutKey":
        """The key for a batch in which every example stands ``count`` times in a row."""
        return dataclasses.replace(self, example_id=jnp.repeat(self.example_id, count))


def dropout(
    update: Float[Array, "b *rest"],
    rate: float,
    key: DropoutKey | None,
    name: str,
    shared_axis: int | None = None,
) -> Float[Array, "b *rest"]:
    """Zero a share ``rate`` of the elements and scale up the others; no key, no dropout.

    The mask is the same along ``shared_axis`` (Suppl. 1.11.6).
    """
    if key is None or rate == 0:
        return update
    shape = list(update.shape)
    if shared_axis is not None:
        shape[shared_axis] = 1
    if key._masks is not None:
        keep = key._masks.factor(f"{key.scope}/{name}", tuple(shape), rate) > 0
    else:
        keep = keep_mask(tuple(shape), rate, key, name)
    if shared_axis is not None:  # else XLA draws it again for each element that shares it
        keep = jax.lax.optimization_barrier(keep)
    # JAX would first round the number to a bfloat16 update's precision
    scaled = update.astype(ops.at_least_float32(update.dtype)) / (1 - rate)
    return jnp.where(keep, scaled, 0).astype(update.dtype)


def dropout_factor(
    x: Float[Array, "b *rest"], rate: float, key: DropoutKey | None, name: str, shared_axis: int
) -> Float[Array, "b ..."] | None:
    """What ``dropout`` multiplies an update of ``x`` by, of size 1 along ``shared_axis``."""
    if key is None or rate == 0:
        return None
    shape = list(x.shape)
    shape[shared_axis] = 1
    if key._masks is not None:
        return key._masks.factor(f"{key.scope}/{name}", tuple(shape), rate)
    # else XLA draws it again for each element that shares it
    keep = jax.lax.optimization_barrier(keep_mask(tuple(shape), rate, key, name))
    return keep.astype(ops.at_least_float32(x.dtype)) / (1 - rate)


def keep_mask(shape: tuple[int, ...], rate: float, key: DropoutKey, name: str) -> Array:
    """Which elements of a mask of ``shape`` (batch axis first) are kept."""
    return _keep_mask(shape, rate, key, name, ops._chosen)


def _keep_mask(
    shape: tuple[int, ...], rate: float, key: DropoutKey, name: str, implementation: str
) -> Array:
    path = definition.path_hash(f"{key.scope}/{name}")
    if implementation == "triton":
        from jaxfold import _dropout

        words = _word(key.seed), _word(key.step), _word(key.recycling)
        position = path, _word(key.block)
        ids = _word(key.example_id)
        return _dropout.keep_mask(shape, definition.threshold(rate), position, words, ids)
    stream, _ = _threefry((path, key.example_id), (key.block, key.recycling))
    size = 1
    for length in shape[1:]:
        size *= length
    element = jnp.arange(size, dtype=jnp.uint32)
    bits, _ = _threefry((key.seed, key.step), (stream[:, None], element[None]))
    return (bits < jnp.uint32(definition.threshold(rate))).reshape(shape)


Word = Array | int


def _threefry(key: tuple[Word, Word], counter: tuple[Word, Word]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds in 32-bit arithmetic, elementwise over broadcast arrays."""
    k0, k1, x0, x1 = (_word(w) for w in (*key, *counter))
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(definition.PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(definition.GROUPS):
        for rotation in definition.ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << rotation) | (x1 >> (32 - rotation)))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _word(value: Word) -> UInt32[Array, "..."]:
    if isinstance(value, int):
        return jnp.uint32(value % 2**32)
    return value.astype(jnp.uint32)  # two's complement: negative ids keep their bits
