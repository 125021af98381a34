"""Gated attention with one query a group and head, and one key head for all (Suppl. Alg. 19).

A position holds key, value and gate side by side, as one matrix product leaves them, in N = 2 d +
h d channels. Positions form a table [s r]; a group is a row of it (axis 2) or a column (axis 1).
One program walks through a group twice: through keys and values, of which a tile is one array,
then through the gates. In a matrix [heads, 2 d] the queries leave the values' columns empty, and
what is gathered only counts there, so that neither has to be cut out.

Logits are natural, their maxima and the logarithms of sums in units of log 2, for exp2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from foldcore.kernels.attention import LOG2_E, MASKED, key_summand
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output
from foldcore.kernels.rows import block, load_tile, load_vector, product, sigmoid, store_tile


@dataclass(frozen=True)
class Problem:
    """A table [b s r] of positions, heads and their width; what each group attends within.

    ``axis`` 2 attends along rows, 1 along columns. dtypes are names, such as "bfloat16".
    """

    table: tuple[int, int, int]
    heads: int
    width: int
    axis: int
    scale: float
    dtype: str
    architecture: int

    @classmethod
    def of(
        cls,
        query: Sequence[int],
        projected: Sequence[int],
        axis: int,
        scale: float,
        dtype: str,
        architecture: int,
    ) -> "Problem":
        """From the shapes of the queries and of what is projected."""
        (b, s, r, n), (_, _, h, d) = projected, query
        problem = cls((b, s, r), h, d, axis, scale, dtype, architecture)
        if tuple(query) != (*problem.by_head, d) or n != (2 + h) * d:
            raise ValueError(f"queries of shape {tuple(query)} for projections {tuple(projected)}")
        return problem

    @property
    def groups(self) -> int:
        return self.table[3 - self.axis]

    @property
    def length(self) -> int:
        return self.table[self.axis]

    @property
    def grid(self) -> tuple[int, int]:
        """A program for each group of each example."""
        return self.groups, self.table[0]

    @property
    def by_head(self) -> tuple[int, int, int]:
        """The shape of one number for each head of each group."""
        return self.table[0], self.groups, self.heads

    def walk(self) -> dict[str, int]:
        """Where the groups are, and the members of one."""
        return walk(self.table, self.axis)

    def constants(self, tiles: "Tiles") -> dict[str, Any]:
        """What both kernels are told."""
        channels, both = block(self.heads * self.width), block(2 * self.width)
        sizes = {
            "SCALE": self.scale,
            "HEADS": self.heads,
            "WIDTH": self.width,
            "BLOCK_H": block(self.heads),
            "BLOCK_E": both,
            "BLOCK_J": channels,
        }
        rows = {
            "BLOCK_S": fit(tiles.keys, both, self.length),
            "BLOCK_T": fit(tiles.gates, channels, self.length),
            "AHEAD": tiles.ahead,
        }
        return self.walk() | sizes | rows


def walk(table: tuple[int, int, int], axis: int) -> dict[str, int]:
    """Where the rows (axis 2) or columns (axis 1) of a table [b s r] are, and their members."""
    columns = table[2]
    return {
        "GROUPS": table[3 - axis],
        "LENGTH": table[axis],
        "GROUP_STEP": columns if axis == 2 else 1,  # positions from one group to the next
        "STEP": 1 if axis == 2 else columns,  # from one member of a group to the next
    }


def fit(elements: int, channels: int, length: int) -> int:
    """Members of a group in a tile of so many channels."""
    return max(16, min(elements // channels, block(length)))


@dataclass(frozen=True)
class Tiles:
    """Sizes of a launch: elements in a tile of keys and values, and in one of gates."""

    keys: int
    gates: int
    num_warps: int
    ahead: int  # tiles that are on chip at once


_TESTED = Tiles(16 * 16, 16 * 64, 4, 2)
_FLOAT32 = Tiles(32 * 16, 32 * 64, 8, 1)
FORWARD = Tiles(512 * 16, 128 * 64, 8, 3)
BACKWARD = Tiles(128 * 16, 64 * 64, 8, 3)


def choose(measured: Tiles, problem: Problem) -> Tiles:
    """The sizes for this type and device."""
    if problem.architecture == INTERPRETER:
        return _TESTED
    return measured if problem.dtype == "bfloat16" else _FLOAT32


@triton.jit
def load_heads(
    base_ptr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """[heads, 2 d] with a group's [h, d] in the columns from ``FIRST`` on, zero elsewhere."""
    head = tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_E)[None, :] - FIRST
    inside = (head < HEADS) & (channel >= 0) & (channel < WIDTH)
    return tl.load(base_ptr + head * WIDTH + channel, mask=inside, other=0.0)


@triton.jit
def places(
    WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Where all heads' channels are in a matrix [heads, 2 d]: ones in [h d, heads], [h d, 2 d]."""
    channel = tl.arange(0, BLOCK_J)[:, None]
    of_head = channel // WIDTH == tl.arange(0, BLOCK_H)[None, :]
    of_value = WIDTH + channel % WIDTH == tl.arange(0, BLOCK_E)[None, :]
    return tl.where(of_head, 1.0, 0.0), tl.where(of_value, 1.0, 0.0)


@triton.jit
def end_to_end(values, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr):
    """[h d] of the values' columns of a matrix [heads, 2 d]."""
    of_head, of_value = places(WIDTH, values.shape[0], values.shape[1], BLOCK_J)
    return tl.sum(product(of_head, values) * of_value, 1)


@triton.jit
def by_head(flat, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr):
    """The counterpart of ``end_to_end``, zero elsewhere."""
    of_head, of_value = places(WIDTH, BLOCK_H, BLOCK_E, flat.shape[0])
    return product(tl.trans(of_head), flat[:, None] * of_value)


@triton.jit
def global_attention_forward_kernel(
    query_ptr,  # [b g h d]
    projected_ptr,  # [b s r n]
    gate_bias_ptr,  # [h d]
    mask_ptr,  # [b s r]
    output_ptr,  # [b s r h d]
    gathered_ptr,  # [b g h d] float32: before the gate
    logsumexp_ptr,  # [b g h], in units of log 2
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP_STEP: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    AHEAD: tl.constexpr,
):
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    N: tl.constexpr = 2 * WIDTH + CHANNELS
    WHOLE: tl.constexpr = LENGTH % BLOCK_S == 0 and BLOCK_E == 2 * WIDTH
    WHOLE_GATES: tl.constexpr = LENGTH % BLOCK_T == 0 and BLOCK_J == CHANNELS
    group = (tl.program_id(1) * GROUPS + tl.program_id(0)).to(tl.int64)
    position = tl.program_id(1).to(tl.int64) * (GROUPS * LENGTH) + tl.program_id(0) * GROUP_STEP
    projected_ptr += position * N
    head, both = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E)[None, :]
    query = load_heads(query_ptr + group * CHANNELS, 0, HEADS, WIDTH, BLOCK_H, BLOCK_E)
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    gathered = tl.zeros([BLOCK_H, BLOCK_E], tl.float32)
    for start in tl.range(0, LENGTH, BLOCK_S, num_stages=AHEAD):
        key = start + tl.arange(0, BLOCK_S)
        kv = load_tile(projected_ptr, LENGTH, 2 * WIDTH, key[:, None], both, STEP * N, 1, WHOLE)
        summand = key_summand(mask_ptr + position, key, STEP, LENGTH, MASKED)
        logits = product(kv, tl.trans(query)) * SCALE + summand[:, None]
        higher = tl.maximum(highest, tl.max(logits, 0) * LOG2_E)
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(logits * LOG2_E - higher[None, :])
        total = total * shrink + tl.sum(weights, 0)
        gathered = gathered * shrink[:, None] + product(tl.trans(weights.to(kv.dtype)), kv)
        highest = higher
    gathered *= (1 / total)[:, None]
    values = (head < HEADS)[:, None] & (both >= WIDTH) & (both < 2 * WIDTH)
    at = gathered_ptr + group * CHANNELS + head[:, None] * WIDTH + both - WIDTH
    tl.store(at, gathered, mask=values)
    logsumexp = highest + tl.log2(total)
    tl.store(logsumexp_ptr + group * HEADS + head, logsumexp, mask=head < HEADS)
    flat = end_to_end(gathered, WIDTH, BLOCK_J)  # as the gates are
    channel = tl.arange(0, BLOCK_J)
    gate_bias = load_vector(gate_bias_ptr, channel, CHANNELS)[None, :]
    for start in tl.range(0, LENGTH, BLOCK_T, num_stages=AHEAD):
        row, column = start + tl.arange(0, BLOCK_T)[:, None], channel[None, :]
        gate_ptr = projected_ptr + 2 * WIDTH
        gate = load_tile(gate_ptr, LENGTH, CHANNELS, row, column, STEP * N, 1, WHOLE_GATES)
        output = flat[None, :] * sigmoid(gate.to(tl.float32) + gate_bias)
        out_ptr = output_ptr + position * CHANNELS
        store_tile(out_ptr, output, LENGTH, CHANNELS, row, column, STEP * CHANNELS, 1, WHOLE_GATES)


def forward(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """(query, projected, gate bias, mask) -> (output, gathered, logsumexp)."""
    tiles = tiles or choose(FORWARD, problem)
    return Launch(
        kernel=global_attention_forward_kernel,
        grid=problem.grid,
        outputs=(
            Output((*problem.table, problem.heads, problem.width), problem.dtype),
            Output((*problem.by_head, problem.width), "float32"),
            Output(problem.by_head, "float32"),
        ),
        constants=problem.constants(tiles),
        num_warps=tiles.num_warps,
        num_stages=tiles.ahead,
    )
