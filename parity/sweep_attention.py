"""Launch sizes of attention worth trying; see ``parity.sweep``."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foldcore.kernels import attention, attention_backward, attention_bias, attention_long
from foldcore.kernels.attention_tiles import Problem, Tiles
from foldcore.kernels.launch import Launch
from parity.bench_attention import SHAPES, Shape
from torchfold._triton import call


@dataclass(frozen=True)
class Candidate:
    """One way to launch one kernel."""

    shape: Shape
    kernel: str
    tiles: Tiles | None  # None for those in use

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
        first = [arrays[name] for name in _inputs("forward", self.shape.biased)]
        output, logsumexp = call(attention.forward(self.problem()), *first)
        arrays |= {"output": output, "logsumexp": logsumexp, "grad": torch.randn_like(output)}
        arrays |= {"delta": torch.randn_like(logsumexp), "gathered_grad": torch.randn_like(output)}
        arrays |= {"query_grad": torch.empty_like(arrays["projected"])}
        return [arrays[name] for name in _inputs(self.kernel, self.shape.biased)]

    def finish(self, outputs: tuple[Tensor, ...]) -> object:
        return outputs[-1].sum(0).to(torch.bfloat16) if "bias_grad" in self.kernel else None


LAUNCHES: dict[str, Callable[[Problem, Tiles | None], Launch]] = {
    "forward": attention.forward,
    "whole_grad": attention_backward.whole_grad,
    "bias_grad": attention_backward.bias_grad,
    "output_grad": attention_bias.output_grad,
    "query_bias_grad": attention_bias.query_bias_grad,
    "query_grad": attention_long.query_grad,
    "key_value_grad": attention_long.key_value_grad,
}


DTYPES = {
    "projected": torch.bfloat16,
    "gate_bias": torch.bfloat16,
    "mask": torch.float32,
    "bias": torch.bfloat16,
    "output": torch.bfloat16,
    "grad": torch.bfloat16,
    "gathered_grad": torch.bfloat16,
    "query_grad": torch.bfloat16,
    "logsumexp": torch.float32,
    "delta": torch.float32,
}


def _inputs(kernel: str, biased: bool) -> list[str]:
    bias = "bias" if biased else "mask"
    if kernel == "output_grad":
        return ["projected", "gate_bias", "output", "grad"]
    if kernel in ("bias_grad", "key_value_grad", "query_bias_grad"):
        scores = ["projected", "mask", bias, "logsumexp", "delta", "gathered_grad"]
        return scores if kernel == "bias_grad" else [*scores, "query_grad"]
    first = ["projected", "gate_bias", "mask", bias]
    return first if kernel == "forward" else [*first, "output", "logsumexp", "grad"]


def candidates() -> Iterator[Candidate]:
    """Every size worth trying, for each kernel and shape."""
    for shape in SHAPES:
        for kernel in LAUNCHES:
            if _runs(kernel, shape):
                for tiles in _sizes(kernel, shape):
                    yield Candidate(shape, kernel, tiles)


def in_use() -> Iterator[Candidate]:
    """Every kernel at the shapes of the model, with the sizes that it has."""
    for shape in SHAPES:
        for kernel in LAUNCHES:
            if _runs(kernel, shape):
                yield Candidate(shape, kernel, None)


def _runs(kernel: str, shape: Shape) -> bool:
    problem = Candidate(shape, kernel, None).problem()
    apart = not problem.whole and not problem.together
    return {
        "forward": True,
        "whole_grad": problem.whole and not problem.together,
        "bias_grad": shape.biased and not problem.together,
        "output_grad": problem.together,
        "query_bias_grad": problem.together,
        "query_grad": apart,
        "key_value_grad": apart or problem.together,
    }[kernel]


def _sizes(kernel: str, shape: Shape) -> Iterator[Tiles]:
    """(queries, keys, warps) x (groups, stages)."""
    tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)]
    depths = [(1, 1), (1, 2), (1, 3)]
    if kernel == "forward":
        tiles += [(64, 256, 4), (128, 256, 8), (128, 128, 4), (64, 32, 4)]
        depths = [(1, 1), (1, 2), (8, 2), (8, 3), (16, 2), (16, 3)]
    elif kernel == "whole_grad":
        keys = 128 if shape.length <= 128 else 256
        tiles = [(16, keys, 4), (32, keys, 4), (64, keys, 4)]
        tiles += [(16, keys, 8), (32, keys, 8), (64, keys, 8), (128, keys, 8)]
    elif kernel == "key_value_grad":
        tiles += [(32, 64, 4), (32, 128, 4)]
        depths = [(1, 2), (1, 3), (1, 4)]
    elif kernel == "query_bias_grad":
        tiles, depths = [(64, 32, 4), (64, 64, 4), (128, 64, 8)], [(1, 1), (1, 2), (1, 3)]
    elif kernel == "bias_grad":
        tiles += [(64, 128, 8)]
        depths = [(8, 2), (16, 2), (32, 2), (8, 3), (16, 3), (32, 3), (64, 3)]
    for (queries, keys, warps), (groups, stages) in itertools.product(tiles, depths):
        if queries <= shape.length and keys <= max(128, shape.length):
            yield Tiles(queries, keys, groups, warps, stages)
            if kernel == "forward" and shape.width <= 16 and keys == shape.length:
                yield Tiles(queries, keys, groups, warps, stages, held=True)
            if kernel == "key_value_grad" and shape.biased:
                yield Tiles(queries, keys, groups, warps, stages, held=True)
