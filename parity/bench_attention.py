"""Benchmarks of attention by itself at the shapes of ``initial_training``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jaxfold import ops as jax_ops
from parity import peers
from parity.benchmark import Benchmark
from torchfold import ops as torch_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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

    @property
    def operations(self) -> tuple[float, float]:
        """Two products of matrices forward, five backward, for scores are not kept."""
        product = 2 * self.batch * self.rows * self.columns * self.length * self.heads * self.width
        return 2 * product, 5 * product

    def draw(self) -> dict[str, Tensor]:
        table = (self.batch, self.rows, self.columns)
        kind: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        arrays = {
            "projected": torch.randn(*table, 4, self.heads, self.width, **kind),
            "gate_bias": torch.randn(self.heads, self.width, **kind),
            "mask": (torch.rand(table, device=DEVICE) > 0.1).float(),
        }
        if self.biased:
            n = self.length
            arrays["bias"] = torch.randn(self.batch, self.heads, n, n, **kind)
        return arrays


SHAPES = (
    Shape("msa row 128x256 8x32", 1, 128, 256, 8, 32),
    Shape("msa column 128x256 8x32", 1, 128, 256, 8, 32, axis=1, biased=False),
    Shape("triangle 256x256 4x32", 1, 256, 256, 4, 32),
    Shape("triangle ending 256x256 4x32", 1, 256, 256, 4, 32, axis=1),
    Shape("template 4x256x256 4x16", 4, 256, 256, 4, 16),
    Shape("extra msa row 1024x256 8x8", 1, 1024, 256, 8, 8),
    Shape("triangle 384x384 4x32", 1, 384, 384, 4, 32),
)
BEST = {"triangle 256x256 4x32": (0.12, 0.70)}  # see Benchmark


def benchmarks() -> Iterator[Benchmark]:
    """Each attention of the model, with every peer."""
    for shape in SHAPES:
        yield Benchmark(
            op="gated_attention",
            shape=shape.name,
            draw=shape.draw,
            reference=of_ops(torch_ops, shape, "reference"),
            versions={
                "triton, torch": of_ops(torch_ops, shape, "triton"),
                "torch": of_ops(torch_ops, shape, "reference"),
                "torch SDPA": peers.sdpa(shape),
                "torch compiled": peers.compiled(of_ops(torch_ops, shape, "reference")),
                "torch FlexAttention": peers.compiled(peers.flex(shape)),
                **({"cuEquivariance": peers.triangle_attention(shape)} if shape.biased else {}),
            },
            jax_versions={
                "triton, JAX": of_ops(jax_ops, shape, "triton"),
                "XLA": of_ops(jax_ops, shape, "reference"),
            },
            differentiable=("projected", "gate_bias", *(("bias",) if shape.biased else ())),
            operations=shape.operations,
            best=BEST.get(shape.name),
        )


def of_ops(ops: Any, shape: Shape, implementation: str) -> Callable[..., Any]:
    """The track's own operation."""

    def run(projected: Any, gate_bias: Any, mask: Any, bias: Any = None) -> Any:
        return ops.gated_attention(
            projected,
            gate_bias,
            mask,
            bias,
            axis=shape.axis,
            scale=shape.scale,
            implementation=implementation,
        )

    return run
