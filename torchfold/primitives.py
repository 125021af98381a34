"""Linear layers, attention, transition and dropout: what the larger modules are made of.

Parameters have DeepMind's names and shapes and are declared, as zeros, with the kind of their
initial values; ``params.initialize`` fills them. A module computes in the dtype of its parameters.

Legend: g groups that attend independently, h heads, d head width.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from foldcore import dropout as definition
from torchfold import ops
from torchfold._masks import MaskPlan, Masks, Rehearsal, Request, kept
from torchfold._masks import threefry as _threefry
from torchfold.stack import Deriving

Kind = Literal["linear", "relu", "glorot", "normal", "zeros", "ones", "point_weights"]
# what a Linear may start from: "final" adds nothing at first, "gating" leaves a gate half open
LinearInit = Literal["linear", "relu", "final", "gating"]


def parameter(shape: tuple[int, ...], kind: Kind) -> nn.Parameter:
    """Declare a parameter; ``kind`` is a key of ``foldcore.initializers.KINDS``."""
    declared = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
    declared.kind, declared.stacked = kind, False  # type: ignore[attr-defined]
    return declared


class Linear(nn.Module):
    """``x @ weights + bias``."""

    def __init__(self, c_in: int, c_out: int, init: LinearInit = "linear"):
        super().__init__()
        kind: Kind = "zeros" if init in ("final", "gating") else init  # type: ignore[assignment]
        self.weights = parameter((c_in, c_out), kind)
        self.bias = parameter((c_out,), "ones" if init == "gating" else "zeros")

    def forward(self, x: Float[Tensor, "*batch c_in"]) -> Float[Tensor, "*batch c_out"]:
        return F.linear(x, self.weights.T, self.bias)


class LayerNorm(nn.Module):
    """Layer normalisation of the channels, with learnt scale and offset."""

    def __init__(self, c: int):
        super().__init__()
        self.scale = parameter((c,), "ones")
        self.offset = parameter((c,), "zeros")

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        return ops.layer_norm(x, self.scale, self.offset)

    def with_residual(
        self, x: Float[Tensor, "*batch c"]
    ) -> tuple[Float[Tensor, "*batch c"], Float[Tensor, "*batch c"]]:
        """The same, and x to add an update to: one kernel sums the gradients by both."""
        return ops.layer_norm_residual(x, self.scale, self.offset)


class Attention(Deriving):
    """Attention of several heads, gated or not (Suppl. Alg. 7, 8, 13, 14, 17, without the norm)."""

    packed: Float[Tensor, "c n h d"] | None = None

    def __init__(
        self, c_q: int, c_kv: int, c_out: int, num_heads: int, c_hidden: int, gating: bool = True
    ):
        super().__init__()
        self.gating = gating
        self.query_w = parameter((c_q, num_heads, c_hidden), "glorot")
        self.key_w = parameter((c_kv, num_heads, c_hidden), "glorot")
        self.value_w = parameter((c_kv, num_heads, c_hidden), "glorot")
        if gating:
            self.gating_w = parameter((c_q, num_heads, c_hidden), "zeros")
            self.gating_b = parameter((num_heads, c_hidden), "ones")
        self.output_w = parameter((num_heads, c_hidden, c_out), "zeros")
        self.output_b = parameter((c_out,), "zeros")

    def derive(self) -> dict[str, Tensor]:
        """Weights of all that is projected from one input, side by side."""
        first = (self.query_w, self.gating_w) if self.gating else ()
        return {"packed": torch.stack((*first, self.key_w, self.value_w), dim=-3)}

    def project(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch n h d"]:
        """What ``ops.gated_attention`` reads of each position; without a gate, key and value."""
        packed = self.derive()["packed"] if self.packed is None else self.packed
        return (x @ packed.flatten(1)).unflatten(-1, packed.shape[1:])

    def within(
        self,
        projected: Float[Tensor, "b s r 4 h d"],
        mask: Float[Tensor, "b s r"],
        base: Float[Tensor, "b p q c_out"],
        bias: Float[Tensor, "b h n n"] | None = None,
        axis: int = 2,
        factor: Float[Tensor, "b ..."] | None = None,
        residual: bool = False,
        transposed: bool = False,
    ) -> Float[Tensor, "b p q c_out"]:
        """Gated self-attention along the rows (axis 2) or the columns (axis 1) of a table.

        The result is an update of ``base``, which is the same table or with ``transposed`` its
        transpose; multiplied by ``factor`` (dropout), and with ``residual`` added to it.
        """
        scale = self.query_w.shape[-1] ** -0.5
        gathered = ops.gated_attention(projected, self.gating_b, mask, bias, axis=axis, scale=scale)
        output = self.output_w, self.output_b
        return _project(gathered, *output, base, factor, residual, transposed)

    def to_templates(
        self,
        pair: Float[Tensor, "b i j c_z"],
        embedded: Float[Tensor, "b t i j c_t"],
        mask: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b i j c_z"]:
        """From each pair to the same pair of every template, without a gate (Suppl. Alg. 17)."""
        query = (pair @ self.query_w.flatten(1)).unflatten(-1, self.query_w.shape[1:])
        projected, scale = self.project(embedded), query.shape[-1] ** -0.5
        gathered = ops.template_attention(query, projected, mask, scale=scale)
        return _project(gathered, self.output_w, self.output_b, pair, None, False)


def _project(
    gathered: Float[Tensor, "b s r h d"],
    weights: Float[Tensor, "h d c"],
    bias: Float[Tensor, " c"],
    base: Float[Tensor, "b p q c"],
    factor: Float[Tensor, "b ..."] | None,
    residual: bool,
    transposed: bool = False,
) -> Float[Tensor, "b p q c"]:
    """The heads' results as one update of ``base``, times ``factor``."""
    flat = gathered.flatten(3), weights.flatten(0, 1)
    return ops.linear_update(base, *flat, bias, factor, residual=residual, transposed=transposed)


class GlobalAttention(Deriving):
    """Attention whose query is the mean of a group, with one shared key head (Suppl. Alg. 19)."""

    packed: Float[Tensor, "c n"] | None = None

    def __init__(self, c: int, num_heads: int, c_hidden: int):
        super().__init__()
        self.query_w = parameter((c, num_heads, c_hidden), "glorot")
        self.key_w = parameter((c, c_hidden), "glorot")
        self.value_w = parameter((c, c_hidden), "glorot")
        self.gating_w = parameter((c, num_heads, c_hidden), "zeros")
        self.gating_b = parameter((num_heads, c_hidden), "ones")
        self.output_w = parameter((num_heads, c_hidden, c), "zeros")
        self.output_b = parameter((c,), "zeros")

    def derive(self) -> dict[str, Tensor]:
        """Weights of key, value and gates side by side."""
        return {"packed": torch.cat((self.key_w, self.value_w, self.gating_w.flatten(-2)), dim=-1)}

    def forward(
        self,
        x: Float[Tensor, "b s r c"],
        mask: Float[Tensor, "b s r"],
        base: Float[Tensor, "b s r c"],
        axis: int = 2,
        residual: bool = False,
    ) -> Float[Tensor, "b s r c"]:
        """Along the rows (axis 2) or the columns (axis 1), an update of ``base`` or added to it."""
        packed = self.derive()["packed"] if self.packed is None else self.packed
        projected, mean = ops.project_with_mean(x, mask, packed, axis=axis)
        query = torch.einsum("bgc,chd->bghd", mean, self.query_w)
        gathered = ops.global_attention(
            query, projected, self.gating_b, mask, axis=axis, scale=query.shape[-1] ** -0.5
        )
        return _project(gathered, self.output_w, self.output_b, base, None, residual)


class Transition(nn.Module):
    """Two-layer perceptron on each position (Suppl. Alg. 9 and 15); padding is not masked.

    With ``residual`` it returns its input plus the update.
    """

    def __init__(self, c: int, factor: int):
        super().__init__()
        self.input_layer_norm = LayerNorm(c)
        self.transition1 = Linear(c, c * factor, init="relu")
        self.transition2 = Linear(c * factor, c, init="final")

    def forward(
        self, x: Float[Tensor, "*batch c"], residual: bool = False
    ) -> Float[Tensor, "*batch c"]:
        return ops.transition(
            x,
            self.input_layer_norm.scale,
            self.input_layer_norm.offset,
            self.transition1.weights,
            self.transition1.bias,
            self.transition2.weights,
            self.transition2.bias,
            residual=residual,
        )


# Dropout ------------------------------------------------------------------------------------------

Word = Int[Tensor, ""] | int  # known on the device, or on the host


@dataclass(frozen=True)
class DropoutKey:
    """Names the random masks of a step: ``foldcore/dropout.py`` says how.

    Modules pass it on with ``enter``. Tensors live on the device of the model, so that a captured
    step draws new masks as they change. With a plan, a recycling pass draws its masks together.
    """

    seed: Word
    step: Word
    example_id: Int32[Tensor, " b"]
    recycling: Word = 0
    block: Word = 0
    scope: str = ""
    _repeat: int = 1
    _plan: MaskPlan | None = None
    _masks: Masks | Rehearsal | None = None

    def enter(self, scope: str, block: Word | None = None) -> "DropoutKey":
        """The key of a part of the model; ``block`` is its position where it is one of a stack."""
        path = f"{self.scope}/{scope}" if self.scope else scope
        if block is None:
            return dataclasses.replace(self, scope=path)
        masks = self._masks and self._masks.of((path, int(block)))
        return dataclasses.replace(self, scope=path, block=block, _masks=masks)

    def at_pass(self, recycling: Word) -> "DropoutKey":
        """The key of one recycling pass."""
        masks: Masks | Rehearsal | None = self._masks
        if self._plan:
            masks = self._plan.draw(self.seed, self.step, self.example_id, recycling)
        return dataclasses.replace(self, recycling=recycling, _masks=masks)

    def repeat(self, count: int) -> "DropoutKey":
        """The key for a batch in which every example stands ``count`` times in a row."""
        ids = self.example_id.repeat_interleave(count)
        return dataclasses.replace(self, example_id=ids, _repeat=self._repeat * count)


def dropout(
    update: Float[Tensor, "b *rest"],
    rate: float,
    key: DropoutKey | None,
    name: str,
    shared_axis: int | None = None,
) -> Float[Tensor, "b *rest"]:
    """Zero a share ``rate`` of the elements and scale up the others; no key, no dropout.

    The mask is the same along ``shared_axis`` (Suppl. 1.11.6).
    """
    factor = dropout_factor(update, rate, key, name, shared_axis)
    return update if factor is None else (update * factor).to(update.dtype)


def dropout_factor(
    x: Float[Tensor, "b *rest"],
    rate: float,
    key: DropoutKey | None,
    name: str,
    shared_axis: int | None,
) -> Float[Tensor, "b ..."] | None:
    """What ``dropout`` multiplies an update of ``x`` by, of size 1 along ``shared_axis``."""
    if key is None or rate == 0:
        return None
    shape = list(x.shape)
    if shared_axis is not None:
        shape[shared_axis] = 1
    if key._masks is not None:
        request = Request(f"{key.scope}/{name}", tuple(shape[1:]), rate, key._repeat)
        if (factor := key._masks.factor(request)) is not None:
            return factor
    keep = keep_mask(tuple(shape), rate, key, name)
    return keep.to(ops.at_least_float32(x.dtype)) / (1 - rate)


def keep_mask(shape: tuple[int, ...], rate: float, key: DropoutKey, name: str) -> Tensor:
    """Which elements of a mask of ``shape`` (batch axis first) are kept."""
    path = f"{key.scope}/{name}"
    if key._masks is not None:
        mask = key._masks.get(Request(path, shape[1:], rate, key._repeat))
        return mask.expand(shape)  # a rehearsal has one for all examples
    device = key.example_id.device
    words = (_path_hash(path), key.example_id), (key.block, key.recycling)
    stream, _ = _threefry(*words, device)
    element = torch.arange(math.prod(shape[1:]), dtype=torch.int32, device=device)
    bits, _ = _threefry((key.seed, key.step), (stream[:, None], element[None]), device)
    return kept(bits, rate).reshape(shape)


@torch.compiler.assume_constant_result
def _path_hash(path: str) -> int:
    return definition.path_hash(path)
