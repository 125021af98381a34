"""Benchmarks of attention at the shapes of ``initial_training``, and sweeps of its launch sizes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foldcore.kernels import attention, attention_backward, attention_long
from foldcore.kernels.attention_tiles import WHOLE_LIMIT, Problem, Tiles
from foldcore.kernels.launch import Launch
from parity.benchmark import Benchmark, Cost
from torchfold import ops as torch_ops
from torchfold._triton import call


@dataclass(frozen=True)
class Shape:
    """An attention of the model: the table of positions, and what attends within it."""

    name: str
    batch: int
    rows: int
    columns: int
    heads: int
    width: int
    axis: int = 2
    biased: bool = True

    @property
    def length(self) -> int:
        return self.columns if self.axis == 2 else self.rows

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def draw(self) -> dict[str, Tensor]:
        table = (self.batch, self.rows, self.columns)
        kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        arrays = {
            "projected": torch.randn(*table, 4, self.heads, self.width, **kind),
            "mask": (torch.rand(table, device="cuda") > 0.1).float(),
        }
        if self.biased:
            n = self.length
            arrays["bias"] = torch.randn(self.batch, self.heads, n, n, **kind)
        return arrays

    def cost(self) -> tuple[Cost, Cost]:
        """Forward reads 4 projections and writes the output; backward reads both and writes 4."""
        positions = self.batch * self.rows * self.columns
        unit = 2 * positions * self.heads * self.width  # bytes of one projection
        bias = 2 * self.batch * self.heads * self.length**2 if self.biased else 0
        product = 2 * positions * self.length * self.heads * self.width  # a product of matrices
        mask = 4 * positions
        return Cost(5 * unit + bias + mask, 2 * product), Cost(
            10 * unit + 2 * bias + mask, 5 * product
        )


SHAPES = (
    Shape("msa row 128x256 8x32", 1, 128, 256, 8, 32),
    Shape("msa column 128x256 8x32", 1, 128, 256, 8, 32, axis=1, biased=False),
    Shape("triangle 256x256 4x32", 1, 256, 256, 4, 32),
    Shape("triangle ending 256x256 4x32", 1, 256, 256, 4, 32, axis=1),
    Shape("template 4x256x256 4x16", 4, 256, 256, 4, 16),
    Shape("extra msa row 1024x256 8x8", 1, 1024, 256, 8, 8),
    Shape("triangle 384x384 4x32", 1, 384, 384, 4, 32),
)


SWEPT = tuple(shape.name for shape in SHAPES if "ending" not in shape.name)


def benchmarks() -> Iterator[Benchmark]:
    """Each attention of the model, with every peer."""
    for shape in SHAPES:
        forward, backward = shape.cost()
        yield Benchmark(
            op="gated_attention",
            shape=shape.name,
            draw=shape.draw,
            differentiable=("projected", "bias") if shape.biased else ("projected",),
            reference=of_ops(torch_ops, shape, "reference"),
            versions={
                "triton, torch": of_ops(torch_ops, shape, "triton"),
                "torch": of_ops(torch_ops, shape, "reference"),
                "torch compiled": torch.compile(of_ops(torch_ops, shape, "reference")),
                "torch SDPA": sdpa(shape),
                "torch FlexAttention": torch.compile(flex(shape)),
            },
            forward=forward,
            backward=backward,
            jax_versions=jax_versions(shape),
        )


def of_ops(ops: Any, shape: Shape, implementation: str) -> Callable[..., Any]:
    """The track's own operation."""

    def run(projected: Any, mask: Any, bias: Any = None) -> Any:
        return ops.gated_attention(
            projected,
            mask,
            bias,
            axis=shape.axis,
            scale=shape.scale,
            implementation=implementation,
        )

    return run


def jax_versions(shape: Shape) -> dict[str, Callable[..., Any]]:
    """The JAX track's implementations, by name."""
    from jaxfold import ops as jax_ops

    return {
        "triton, JAX": of_ops(jax_ops, shape, "triton"),
        "XLA": of_ops(jax_ops, shape, "reference"),
    }


def _heads_first(shape: Shape, projected: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """Query, gate, key, value [b*g h n d], and the mask [b*g n]."""
    if shape.axis == 1:
        projected, mask = projected.transpose(1, 2), mask.transpose(1, 2)
    parts = projected.flatten(0, 1).unbind(2)
    return [part.transpose(1, 2) for part in parts], mask.flatten(0, 1)


def _gate(shape: Shape, gathered: Tensor, gate: Tensor) -> Tensor:
    output = (gathered * torch.sigmoid(gate)).transpose(1, 2)
    output = output.unflatten(0, (shape.batch, -1))
    return output.transpose(1, 2) if shape.axis == 1 else output


def sdpa(shape: Shape) -> Callable[..., Tensor]:
    """PyTorch's fused attention, with bias and mask in one array for every group."""

    def run(projected: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        (query, gate, key, value), mask = _heads_first(shape, projected, mask)
        summand = ((mask - 1) * 1e9).to(query.dtype)[:, None, None, :]
        groups = len(mask) // shape.batch
        if bias is not None:
            summand = bias.repeat_interleave(groups, dim=0) + summand
        summand = summand.expand(-1, shape.heads, shape.length, -1)
        gathered = F.scaled_dot_product_attention(
            query, key, value, attn_mask=summand, scale=shape.scale
        )
        return _gate(shape, gathered, gate)

    return run


def flex(shape: Shape) -> Callable[..., Tensor]:
    """FlexAttention, to be compiled; it takes heads of at least 16 channels."""
    from torch.nn.attention.flex_attention import flex_attention

    groups = shape.rows if shape.axis == 2 else shape.columns

    def run(projected: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        (query, gate, key, value), mask = _heads_first(shape, projected, mask)

        def score(logit: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if bias is not None:
                logit = logit + bias[b // groups, h, q, k]
            return torch.where(mask[b, k] > 0, logit, -1e9)

        gathered = flex_attention(query, key, value, score_mod=score, scale=shape.scale)
        return _gate(shape, gathered, gate)

    return run


# Launch sizes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One way to launch one kernel."""

    shape: Shape
    kernel: str
    tiles: Tiles

    def problem(self) -> Problem:
        s = self.shape
        return Problem(
            shape=(s.batch, s.rows, s.columns, 4, s.heads, s.width),
            axis=s.axis,
            scale=s.scale,
            dtype="bfloat16",
            has_bias=s.biased,
            architecture=90,
        )

    @property
    def label(self) -> str:
        return f"{self.kernel} {self.shape.name}"

    def launch(self) -> Launch:
        return LAUNCHES[self.kernel](self.problem(), self.tiles)

    def input_dtypes(self) -> list[torch.dtype]:
        return [DTYPES[name] for name in _inputs(self.kernel, self.shape.biased)]

    def draw_inputs(self) -> list[Tensor]:
        """Results of the forward pass, as the kernels of the backward pass need them."""
        arrays = self.shape.draw()
        first = [arrays["projected"], arrays["mask"], arrays.get("bias", arrays["mask"])]
        output, logsumexp = call(attention.forward(self.problem()), *first)
        arrays |= {"output": output, "logsumexp": logsumexp, "grad": torch.randn_like(output)}
        arrays["delta"] = torch.randn_like(logsumexp)
        return [arrays[name] for name in _inputs(self.kernel, self.shape.biased)]

    def finish(self, outputs: tuple[Tensor, ...]) -> object:
        return outputs[0].sum(0).to(torch.bfloat16) if self.kernel == "bias_grad" else None


LAUNCHES: dict[str, Callable[[Problem, Tiles], Launch]] = {
    "forward": attention.forward,
    "whole_grad": attention_backward.whole_grad,
    "bias_grad": attention_backward.bias_grad,
    "query_grad": attention_long.query_grad,
    "key_value_grad": attention_long.key_value_grad,
}


DTYPES = {
    "projected": torch.bfloat16,
    "mask": torch.float32,
    "bias": torch.bfloat16,
    "output": torch.bfloat16,
    "grad": torch.bfloat16,
    "logsumexp": torch.float32,
    "delta": torch.float32,
}


def _inputs(kernel: str, biased: bool) -> list[str]:
    first = ["projected", "mask", "bias" if biased else "mask"]
    if kernel == "forward":
        return first
    whole = kernel in ("whole_grad", "query_grad")
    return first + (["output", "logsumexp"] if whole else ["logsumexp", "delta"]) + ["grad"]


def candidates() -> Iterator[Candidate]:
    """Every size worth trying, for each kernel and shape."""
    for shape in SHAPES:
        for kernel in LAUNCHES:
            if shape.name in SWEPT and _runs(kernel, shape):
                for tiles in _sizes(kernel, shape):
                    yield Candidate(shape, kernel, tiles)


def _runs(kernel: str, shape: Shape) -> bool:
    whole = shape.length <= WHOLE_LIMIT
    return {
        "forward": True,
        "whole_grad": whole,
        "bias_grad": shape.biased,
        "query_grad": not whole,
        "key_value_grad": not whole,
    }[kernel]


def _sizes(kernel: str, shape: Shape) -> Iterator[Tiles]:
    """(queries, keys, warps) x (groups, stages)."""
    tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)]
    depths = [(1, 1), (1, 2), (1, 3)]
    if kernel == "forward":
        tiles += [(64, 256, 4), (128, 256, 8), (64, 32, 4)]
        depths = [(1, 1), (1, 2), (8, 2), (8, 3)]
    elif kernel == "whole_grad":
        keys = 128 if shape.length <= 128 else 256
        tiles = [(16, keys, 4), (32, keys, 4), (64, keys, 4)]
        tiles += [(16, keys, 8), (32, keys, 8), (64, keys, 8), (128, keys, 8)]
    elif kernel == "bias_grad":
        tiles += [(64, 128, 8)]
        depths = [(8, 2), (16, 2), (32, 2), (8, 3), (16, 3), (32, 3)]
    for (queries, keys, warps), (groups, stages) in itertools.product(tiles, depths):
        if queries <= shape.length and keys <= max(128, shape.length):
            yield Tiles(queries, keys, groups, warps, stages)
