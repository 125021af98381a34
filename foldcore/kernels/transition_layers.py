"""The transition layer by layer, for a pass whose gradient is wanted: the hidden layer is kept.

Written once and read twice it costs less than to be computed again backward. LayerNorm comes first,
by its own kernel; then a program of the first layer keeps the weights of some hidden channels and
takes tiles of rows in turn, and the second layer adds bias and residual to its product.

Legend: n rows, c channels, f hidden channels.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import (
    Tiles,
    block,
    choose,
    load_tile,
    load_vector,
    product,
    store_tile,
)
from foldcore.kernels.turns import MEASURED_CHANNELS, Turns, groups
from foldcore.kernels.turns import choose as choose_measured

# channels up to -> sizes, of an H200
HIDDEN = {128: Turns(64, 128, 8, 2, 3), 256: Turns(64, 128, 8, 1, 4)}
SECOND = {(90, 256): Tiles(128, 128, 8, 3)}
INNER = 64  # hidden channels that the second layer sums at a time, at most


@triton.jit
def transition_hidden_kernel(
    x_ptr,  # [n, c]: normalised
    weights_ptr,  # [c, f]
    bias_ptr,  # [f]
    hidden_ptr,  # [n, f]
    N: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    await_previous()
    f = tl.program_id(0) % PARTS * BLOCK_F
    group = tl.program_id(0) // PARTS
    row = tl.arange(0, BLOCK_N)[:, None]
    channel = tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_F)[None, :]
    weights = load_tile(weights_ptr + f, C, F - f, channel[:, None], column, F, 1, WHOLE)
    weights = weights.to(x_ptr.dtype.element_ty)
    bias = load_vector(bias_ptr + f, column, F - f, WHOLE)
    for tile in tl.range(group, tl.cdiv(N, BLOCK_N), tl.num_programs(0) // PARTS, num_stages=AHEAD):
        start = tl.cast(tile, tl.int64) * BLOCK_N
        left = N - start
        x = load_tile(x_ptr + start * C, left, C, row, channel[None, :], C, 1, WHOLE)
        hidden = tl.maximum(product(x, weights) + bias, 0.0)
        store_tile(hidden_ptr + start * F + f, hidden, left, F - f, row, column, F, 1, WHOLE)


@triton.jit
def transition_second_kernel(
    hidden_ptr,  # [n, f]
    weights_ptr,  # [f, c]
    bias_ptr,  # [c]
    x_ptr,  # [n, c]
    y_ptr,  # [n, c]
    N: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    await_previous()
    start = tl.cast(tl.program_id(0) // PARTS, tl.int64) * BLOCK_N
    c = tl.program_id(0) % PARTS * BLOCK_C
    left = N - start
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    inner = tl.arange(0, BLOCK_F)
    at = start * C + c
    y = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for f in range(0, F, BLOCK_F):
        hidden = hidden_ptr + start * F + f
        hidden = load_tile(hidden, left, F - f, row, inner[None, :], F, 1, WHOLE)
        weights = weights_ptr + f * C + c
        weights = load_tile(weights, F - f, C - c, inner[:, None], column, C, 1, WHOLE)
        y += product(hidden, weights.to(hidden.dtype))
    y += load_vector(bias_ptr + c, column, C - c, WHOLE)
    if RESIDUAL:
        y += load_tile(x_ptr + at, left, C - c, row, column, C, 1, WHOLE).to(tl.float32)
    store_tile(y_ptr + at, y, left, C - c, row, column, C, 1, WHOLE)


def hidden(
    n: int, c: int, f: int, dtype: str, architecture: int, turns: Turns | None = None
) -> Launch:
    """(normalised x [n, c], weights1, bias1) -> hidden layer [n, f]."""
    turns = turns or choose_turns(HIDDEN, c, dtype, architecture)
    shared = count_groups(n, f, turns, architecture)
    outputs = (Output((n, f), dtype),)
    return launch_groups(transition_hidden_kernel, (n, c, f), shared, outputs, turns)


def second(
    n: int,
    c: int,
    f: int,
    dtype: str,
    architecture: int,
    residual: bool,
    tiles: Tiles | None = None,
) -> Launch:
    """(hidden layer [n, f], weights2, bias2, x [n, c]) -> y [n, c]. Without ``residual`` the kernel
    does not read x."""
    tiles = tiles or choose(SECOND, c, dtype, architecture)
    columns, inner = tiles.fit(c), min(INNER, tiles.columns, block(f))
    parts = cdiv(c, columns)
    whole = n % tiles.rows == 0 and c % columns == 0 and f % inner == 0
    return Launch(
        kernel=transition_second_kernel,
        grid=(parts * cdiv(n, tiles.rows),),
        outputs=(Output((n, c), dtype),),
        constants={"N": n, "C": c, "F": f, "RESIDUAL": residual, "PARTS": parts}
        | {"BLOCK_N": tiles.rows, "BLOCK_C": columns, "BLOCK_F": inner, "WHOLE": whole},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


# Programs that keep the weights of some hidden channels -------------------------------------------


def choose_turns(measured: Mapping[int, Turns], c: int, dtype: str, architecture: int) -> Turns:
    """The sizes for rows of ``c`` channels; ``measured`` is keyed by channels, in rising order."""
    fitting = next((turns for width, turns in measured.items() if c <= width), None)
    if fitting is None:
        return choose_measured(measured[max(measured)], c, dtype, architecture)
    return choose_measured(fitting, min(c, MEASURED_CHANNELS), dtype, architecture)


def count_groups(n: int, f: int, turns: Turns, architecture: int) -> int:
    """Groups of programs, of which each takes its tiles of rows with all hidden channels."""
    parts = cdiv(f, min(turns.columns, block(f)))
    return groups(cdiv(n, turns.rows), turns, parts, architecture)


def launch_groups(
    kernel: Any,
    shape: tuple[int, int, int],
    shared: int,
    outputs: tuple[Output, ...],
    turns: Turns,
) -> Launch:
    """A launch of ``shared`` groups, of rows, channels and hidden channels ``shape``."""
    n, c, f = shape
    columns = min(turns.columns, block(f))
    parts = cdiv(f, columns)
    whole = n % turns.rows == 0 and c == block(c) and f % columns == 0
    return Launch(
        kernel=kernel,
        grid=(parts * shared,),
        outputs=outputs,
        constants={"N": n, "C": c, "F": f, "PARTS": parts}
        | {"BLOCK_N": turns.rows, "BLOCK_C": block(c), "BLOCK_F": columns}
        | {"WHOLE": whole, "AHEAD": turns.ahead},
        num_warps=turns.num_warps,
    )
