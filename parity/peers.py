"""What others offer for the operations of the network, as functions of the same arrays.

cuEquivariance is used where its wheels are installed, cuequivariance-torch and
cuequivariance-ops-torch: ``absent`` says what is not.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torchfold.ops import apply_update

CUEQUIVARIANCE = ("cuequivariance_torch", "cuequivariance_ops_torch")


class Table(Protocol):
    """An attention: the table of positions, and what attends within it."""

    @property
    def batch(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def axis(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def scale(self) -> float: ...


def absent() -> dict[str, str]:
    """Peers that cannot run here, with what is missing."""
    missing = [name for name in CUEQUIVARIANCE if importlib.util.find_spec(name) is None]
    return {"cuEquivariance": f"not installed: {', '.join(missing)}"} if missing else {}


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """By ``torch.compile``, in one piece and for each shape apart, however many there are."""
    import torch._dynamo  # slow to import, and only needed here

    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


# Attention ----------------------------------------------------------------------------------------


def _heads_first(shape: Table, projected: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """Query, gate, key, value [b*g h n d], and the mask [b*g n]."""
    if shape.axis == 1:
        projected, mask = projected.transpose(1, 2), mask.transpose(1, 2)
    parts = projected.flatten(0, 1).unbind(2)
    return [part.transpose(1, 2) for part in parts], mask.flatten(0, 1)


def _gate(shape: Table, gathered: Tensor, gate: Tensor, gate_bias: Tensor) -> Tensor:
    output = (gathered * torch.sigmoid(gate + gate_bias[:, None])).transpose(1, 2)
    output = output.unflatten(0, (shape.batch, -1))
    return output.transpose(1, 2) if shape.axis == 1 else output


def sdpa(shape: Table) -> Callable[..., Tensor]:
    """PyTorch's fused attention, with bias and mask in one array for every group."""

    def run(
        projected: Tensor, gate_bias: Tensor, mask: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        (query, gate, key, value), mask = _heads_first(shape, projected, mask)
        summand = ((mask - 1) * 1e9).to(query.dtype)[:, None, None, :]
        groups = len(mask) // shape.batch
        if bias is not None:
            summand = bias.repeat_interleave(groups, dim=0) + summand
        summand = summand.expand(-1, shape.heads, shape.length, -1)
        gathered = F.scaled_dot_product_attention(
            query, key, value, attn_mask=summand, scale=shape.scale
        )
        return _gate(shape, gathered, gate, gate_bias)

    return run


def flex(shape: Table) -> Callable[..., Tensor]:
    """FlexAttention, to be compiled; it takes heads of at least 16 channels."""
    from torch.nn.attention.flex_attention import flex_attention

    groups = shape.rows if shape.axis == 2 else shape.columns

    def run(
        projected: Tensor, gate_bias: Tensor, mask: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        (query, gate, key, value), mask = _heads_first(shape, projected, mask)

        def score(logit: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if bias is not None:
                logit = logit + bias[b // groups, h, q, k]
            return torch.where(mask[b, k] > 0, logit, -1e9)

        gathered = flex_attention(query, key, value, score_mod=score, scale=shape.scale)
        return _gate(shape, gathered, gate, gate_bias)

    return run


def triangle_attention(shape: Table) -> Callable[..., Tensor]:
    """cuEquivariance's attention with a bias."""

    def run(projected: Tensor, gate_bias: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        from cuequivariance_torch import triangle_attention as attend

        (query, gate, key, value), mask = _heads_first(shape, projected, mask)
        by_group = [x.unflatten(0, (shape.batch, -1)).contiguous() for x in (query, key, value)]
        kept = mask.unflatten(0, (shape.batch, -1))[:, :, None, None] > 0
        gathered = attend(*by_group, bias[:, None], mask=kept, scale=shape.scale)
        return _gate(shape, gathered.flatten(0, 1), gate, gate_bias)

    return run


# Triangle multiplication --------------------------------------------------------------------------


def triangle_multiplication(outgoing: bool) -> Callable[..., Tensor]:
    """cuEquivariance's update, then dropout and residual; what joins its weights is timed too."""

    def run(pair: Tensor, mask: Tensor, factor: Tensor, w: Any) -> Tensor:
        from cuequivariance_torch import triangle_multiplicative_update

        first, second = ("left", "right") if outgoing else ("right", "left")

        def joined(part: str) -> Tensor:
            both = [getattr(w, f"{side}{part}") for side in (first, second)]
            return torch.cat(both, dim=-1).mT if both[0].ndim == 2 else torch.cat(both)

        update = triangle_multiplicative_update(
            pair,
            direction="outgoing" if outgoing else "incoming",
            mask=mask,
            norm_in_weight=w.norm_scale,
            norm_in_bias=w.norm_offset,
            p_in_weight=joined("").contiguous(),
            p_in_bias=joined("_bias"),
            g_in_weight=joined("_gate").contiguous(),
            g_in_bias=joined("_gate_bias"),
            norm_out_weight=w.center_scale,
            norm_out_bias=w.center_offset,
            p_out_weight=w.output.T.contiguous(),
            p_out_bias=w.output_bias,
            g_out_weight=w.gating.T.contiguous(),
            g_out_bias=w.gating_bias,
        )
        return apply_update(pair, update, factor, residual=True)

    return run
