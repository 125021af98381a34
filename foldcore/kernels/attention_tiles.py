"""What an attention kernel works on, and the sizes of its launches."""

import math
from dataclasses import dataclass, replace
from typing import Any

import triton.language as tl

from foldcore.kernels.launch import INTERPRETER, Output, next_power_of_2

# The logit of a masked key. So low that adding it to any other logit gives this very number: a
# query without any key attends to all alike. A power of 2, which is exact in bfloat16 as well.
MASKED = tl.constexpr(-(2.0**100))
WHOLE_LIMIT = 256  # most keys that one backward program holds on chip


@dataclass(frozen=True)
class Problem:
    """The projections' shape [b s r 4 h d] and what goes with them.

    ``axis`` 2 attends along rows, 1 along columns. dtypes are names, such as "bfloat16".
    """

    shape: tuple[int, ...]
    axis: int
    scale: float
    dtype: str
    has_bias: bool
    architecture: int

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def groups(self) -> int:
        return self.shape[3 - self.axis]

    @property
    def length(self) -> int:
        return self.shape[self.axis]

    @property
    def heads(self) -> int:
        return self.shape[4]

    @property
    def width(self) -> int:
        return self.shape[5]

    @property
    def padded_width(self) -> int:
        """The least that the tensor cores take."""
        return max(16, next_power_of_2(self.width))

    @property
    def whole(self) -> bool:
        """One backward program holds all keys, and so needs no second pass for the queries."""
        return self.length <= WHOLE_LIMIT

    @property
    def together(self) -> bool:
        """Gradients of queries and of the bias come from one kernel, where that was measured."""
        limit = next((limit for limit in LENGTH_CLASSES if self.length <= limit), 0)
        sizes = _MEASURED.get(self.architecture, {})
        found = sizes.get(("query_bias_grad", limit, self.padded_width))
        exact = found is not None and self.length % max(found.queries, found.keys) == 0
        return exact and self.holds_bias and self.dtype != "float32"

    @property
    def short_scale(self) -> bool:
        """bfloat16 has 1 / scale but for a part of 1 / 4096. For 8 channels it is 1 / 9300."""
        mantissa, _ = math.frexp(1 / self.scale)
        return abs(round(mantissa * 256) / (mantissa * 256) - 1) < 1 / 4096

    @property
    def holds_bias(self) -> bool:
        """There is a bias, and the tensor cores may add it."""
        return self.has_bias and self.short_scale

    @property
    def short(self) -> bool:
        """Within an example places are 32 bits."""
        return math.prod(self.shape[1:]) < 2**31

    @property
    def statistics(self) -> Output:
        """One number for each query."""
        return Output((self.batch, self.groups, self.heads, self.length), "float32")

    @property
    def gathered(self) -> Output:
        """What the weights gather, by queries and heads."""
        return Output((*self.shape[:3], *self.shape[4:]), self.dtype)

    def gate_sums(self, tiles: int) -> Output:
        """Sums of the gate's gradient over so many tiles of a group's positions."""
        rows = self.batch * self.groups * tiles
        return Output((rows, self.heads * self.width), "float32")

    def constants(self) -> dict[str, Any]:
        """What every kernel is told."""
        columns = self.shape[2]
        return {
            "SCALE": self.scale,
            "GROUPS": self.groups,
            "LENGTH": self.length,
            "GROUP_STEP": columns if self.axis == 2 else 1,
            "STEP": 1 if self.axis == 2 else columns,
            "HEADS": self.heads,
            "WIDTH": self.width,
            "BLOCK_D": self.padded_width,
            "HAS_BIAS": self.has_bias,
        }


@dataclass(frozen=True)
class Tiles:
    """Sizes of a launch: at most so many queries and keys a tile, groups a program."""

    queries: int
    keys: int
    groups: int
    num_warps: int
    num_stages: int
    held: bool = False  # the tensor cores add the bias; forward: it stays on chip

    def fit(self, length: int) -> dict[str, int]:
        """The tile for this length; the tensor cores take at least 16 by 16."""
        padded = max(16, next_power_of_2(length))
        return {"BLOCK_Q": min(self.queries, padded), "BLOCK_K": min(self.keys, padded)}


# Where no measured row fits: few registers.
_DEFAULT = {
    "forward": Tiles(64, 64, 1, 4, 2),
    "query_grad": Tiles(64, 64, 1, 4, 2),
    "key_value_grad": Tiles(32, 64, 1, 4, 2),
    "whole_grad": Tiles(32, WHOLE_LIMIT, 1, 8, 2),
    "bias_grad": Tiles(64, 64, 16, 4, 2),
    "output_grad": Tiles(128, 64, 1, 4, 1),
    "query_bias_grad": Tiles(64, 64, 1, 4, 2),
}
# Exact float32 products do without the tensor cores and need the registers.
_FLOAT32 = {
    "forward": Tiles(32, 64, 1, 4, 1),
    "query_grad": Tiles(32, 32, 1, 4, 1),
    "key_value_grad": Tiles(32, 32, 1, 4, 1),
    "whole_grad": Tiles(16, WHOLE_LIMIT, 1, 8, 1),
    "bias_grad": Tiles(32, 32, 16, 4, 1),
}
_INTERPRETED = Tiles(128, 128, 2, 4, 1)
# bfloat16 by architecture: (kernel, keys up to, padded head width) -> sizes. On H200, by
# ``parity.bench_kernels sweep=`` over the model's shapes.
_MEASURED: dict[int, dict[tuple[str, int, int], Tiles]] = {
    90: {
        ("forward", 128, 32): Tiles(128, 128, 8, 4, 3),
        ("forward", 256, 32): Tiles(64, 256, 16, 4, 2),
        ("forward", 512, 32): Tiles(64, 64, 8, 4, 3),
        ("forward", 256, 16): Tiles(64, 256, 16, 4, 3, held=True),
        ("whole_grad", 128, 32): Tiles(64, 128, 1, 4, 1),
        ("whole_grad", 256, 32): Tiles(64, WHOLE_LIMIT, 1, 8, 2),
        ("whole_grad", 256, 16): Tiles(32, WHOLE_LIMIT, 1, 4, 2),
        ("bias_grad", 256, 32): Tiles(64, 64, 16, 4, 3),
        ("bias_grad", 256, 16): Tiles(64, 64, 64, 4, 3),
        ("bias_grad", 512, 32): Tiles(64, 64, 32, 4, 2),
        ("output_grad", 256, 32): Tiles(128, 64, 1, 4, 1),
        ("output_grad", 256, 16): Tiles(128, 64, 1, 4, 1),
        ("query_bias_grad", 256, 32): Tiles(64, 32, 1, 4, 2, held=True),
        ("query_bias_grad", 256, 16): Tiles(64, 64, 1, 4, 2, held=True),
        ("key_value_grad", 256, 32): Tiles(32, 64, 1, 4, 3, held=True),
        ("key_value_grad", 256, 16): Tiles(32, 128, 1, 4, 3, held=True),
        ("query_grad", 512, 32): Tiles(128, 64, 1, 4, 3),
        ("key_value_grad", 512, 32): Tiles(64, 128, 1, 4, 2),
    }
}
LENGTH_CLASSES = (128, 256, 512)


def choose(kernel: str, problem: Problem) -> Tiles:
    """The sizes measured to be best for this kernel and class of shapes."""
    if problem.architecture == INTERPRETER:
        return replace(_INTERPRETED, keys=WHOLE_LIMIT) if kernel == "whole_grad" else _INTERPRETED
    if problem.dtype == "float32":
        return _FLOAT32[kernel]
    table = _MEASURED.get(problem.architecture, {})
    for limit in LENGTH_CLASSES:
        found = table.get((kernel, limit, problem.padded_width))
        if found and problem.length <= limit:
            return found
    return _DEFAULT[kernel]
