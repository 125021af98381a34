"""The last projection of a module with bias, dropout and residual, in one pass.

The backward pass also sums the gradient of the bias; the gradient of the weights is a matrix
product over all rows, which is left to the library.

Legend: n = b i j rows, k input channels, c output channels, t tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv
from foldcore.kernels.rows import (
    MIN_BLOCK,
    Tiles,
    block,
    choose,
    load_tile,
    load_vector,
    load_weights,
    product,
    store_tile,
)

# (architecture, channels of the tile that is loaded once, up to) -> sizes
FORWARD = {
    (90, 64): Tiles(64, 64, 8, 2),
    (90, 128): Tiles(64, 128, 8, 2),
    (90, 256): Tiles(64, 256, 8, 2),
}
BACKWARD = {
    (90, 64): Tiles(128, 64, 4, 2),
    (90, 128): Tiles(128, 64, 8, 2),
    (90, 256): Tiles(64, 64, 8, 2),
}
# Of FORWARD in bfloat16: channels up to -> programs on each multiprocessor, which take tiles in
# turn; tiles whose loads are on their way at once, where they fit on chip.
TURNS: dict[int, tuple[int, int | None]] = {64: (2, 3), 128: (1, 3), 256: (1, None)}
MULTIPROCESSORS = 132
WEIGHTS = 256 * 256  # elements that a program holds at most


@dataclass(frozen=True)
class Shape:
    """Rows (i, j) of b examples; the dropout factor is the same along the axis ``shared``.

    ``shared`` is 1 for i, 2 for j, 0 where there is no factor.
    """

    b: int
    i: int
    j: int
    shared: int

    @classmethod
    def of(cls, x: Sequence[int], factor: Sequence[int] | None) -> "Shape":
        """From the shapes of the result and of the factor."""
        b, i, j, c = x
        known = {None: 0, (b, 1, j, c): 1, (b, i, 1, c): 2}
        shape = None if factor is None else tuple(factor)
        if shape not in known:
            raise ValueError(f"a factor of shape {shape} for rows of shape {tuple(x)}")
        return cls(b, i, j, known[shape])

    @property
    def rows(self) -> int:
        return self.b * self.i * self.j

    @property
    def constants(self) -> dict[str, int]:
        return {"N": self.rows, "I": self.i, "J": self.j, "SHARED": self.shared}


@triton.jit
def linear_update_forward_kernel(
    y_ptr,  # [n, k]
    weights_ptr,  # [k, c]
    bias_ptr,  # [c]
    x_ptr,  # [n, c]
    factor_ptr,  # [b, j, c] or [b, i, c] float32: SHARED 1 or 2
    out_ptr,  # [n, c]
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741, the legend's name
    J: tl.constexpr,
    SHARED: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Weights once a program, then tiles of rows in turn."""
    await_previous()
    c = tl.program_id(1) * BLOCK_C
    row = tl.arange(0, BLOCK_N)[:, None]
    inner = tl.arange(0, BLOCK_K)[None, :]
    column = tl.arange(0, BLOCK_C)[None, :]
    weights = load_weights(weights_ptr, c, K, C, BLOCK_K, column).to(y_ptr.dtype.element_ty)
    bias = load_vector(bias_ptr + c, column, C - c)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=AHEAD):
        start = tl.cast(tile, tl.int64) * BLOCK_N
        left = N - start
        y = load_tile(y_ptr + start * K, left, K, row, inner, K, 1)
        update = product(y, weights) + bias
        if SHARED > 0:
            factors = factor_rows(tile * BLOCK_N + row, I, J, SHARED)
            update *= load_factor(factor_ptr + c, factors, row, left, C - c, column, C)
        if RESIDUAL:
            at = x_ptr + start * C + c
            update += load_tile(at, left, C - c, row, column, C, 1).to(tl.float32)
        store_tile(out_ptr + start * C + c, update, left, C - c, row, column, C, 1)


@triton.jit
def linear_update_backward_kernel(
    dout_ptr,  # [n, c]
    weights_ptr,  # [k, c]
    factor_ptr,  # [b, j, c] or [b, i, c] float32
    dy_ptr,  # [n, k]
    dupdate_ptr,  # [n, c]: dout times the factor; not written without
    sums_ptr,  # [t, c]: of dupdate
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    SHARED: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    await_previous()
    tile = tl.program_id(0).to(tl.int64)
    start = tile * BLOCK_N
    left = N - start
    row = tl.arange(0, BLOCK_N)[:, None]
    index = tl.arange(0, BLOCK_C)
    column = index[None, :]
    dout = load_tile(dout_ptr + start * C, left, C, row, column, C, 1)
    dupdate = dout.to(tl.float32)
    if SHARED > 0:
        factors = factor_rows(tl.program_id(0) * BLOCK_N + row, I, J, SHARED)
        dupdate *= load_factor(factor_ptr, factors, row, left, C, column, C)
        store_tile(dupdate_ptr + start * C, dupdate, left, C, row, column, C, 1)
    tl.store(sums_ptr + tile * C + index, tl.sum(dupdate, 0), mask=index < C)
    dupdate = dupdate.to(dout.dtype)
    for k in range(0, K, BLOCK_K):
        inner = tl.arange(0, BLOCK_K)
        at = weights_ptr + k * C
        weights = load_tile(at, K - k, C, inner[:, None], column, C, 1).to(dout.dtype)
        dy = product(dupdate, tl.trans(weights))
        store_tile(dy_ptr + start * K + k, dy, left, K - k, row, inner[None, :], K, 1)


@triton.jit
def factor_rows(row, I: tl.constexpr, J: tl.constexpr, SHARED: tl.constexpr):  # noqa: E741
    """The row of the factor for each row (example, i, j)."""
    if SHARED == 1:
        found = row // (I * J) * J + row % J
    else:
        found = row // J
    return found


@triton.jit
def load_factor(base_ptr, factors, row, left, COLUMNS, column, C: tl.constexpr):
    inside = (row < left) & (column < COLUMNS)
    return tl.load(base_ptr + factors * C + column, mask=inside, other=0.0)


def forward(
    shape: Shape,
    k: int,
    c: int,
    dtype: str,
    architecture: int,
    residual: bool,
    tiles: Tiles | None = None,
) -> Launch:
    """(y, weights, bias, x, factor) -> factor * (y @ weights + bias), plus x with ``residual``."""
    tiles = tiles or choose(FORWARD, k, dtype, architecture)
    columns = max(MIN_BLOCK, min(tiles.fit(c), WEIGHTS // block(k)))
    parts, count = cdiv(c, columns), cdiv(shape.rows, tiles.rows)
    programs, ahead = _turns(k, parts, dtype, architecture) or (count, None)
    sizes = {"K": k, "C": c, "RESIDUAL": residual, "AHEAD": ahead}
    blocks = {"BLOCK_K": block(k), "BLOCK_C": columns}
    outputs = (Output((shape.rows, c), dtype),)
    grid = min(count, programs), parts
    return _launch(linear_update_forward_kernel, shape, outputs, sizes | blocks, tiles, grid)


def _turns(k: int, parts: int, dtype: str, architecture: int) -> tuple[int, int | None] | None:
    """Programs that take tiles in turn and tiles ahead; None: a program for each tile."""
    if architecture == INTERPRETER:
        return 2, 2
    if dtype != "bfloat16":
        return None
    width = next((w for w in TURNS if w >= block(k)), max(TURNS))
    programs, ahead = TURNS[width]
    return max(1, MULTIPROCESSORS * programs // parts), ahead


def backward(
    shape: Shape, k: int, c: int, dtype: str, architecture: int, tiles: Tiles | None = None
) -> Launch:
    """(dout, weights, factor) -> dy [n, k], dupdate [n, c], sums [t, c] for the bias.

    Without a factor dupdate is dout, and the second output but a placeholder.
    """
    tiles = tiles or choose(BACKWARD, c, dtype, architecture)
    outputs = (
        Output((shape.rows, k), dtype),
        Output((shape.rows, c) if shape.shared else (1, 1), dtype),
        Output((cdiv(shape.rows, tiles.rows), c), "float32"),
    )
    sizes = {"K": k, "C": c, "BLOCK_K": tiles.fit(k), "BLOCK_C": block(c)}
    grid = (cdiv(shape.rows, tiles.rows),)
    return _launch(linear_update_backward_kernel, shape, outputs, sizes, tiles, grid)


def _launch(
    kernel: Any,
    shape: Shape,
    outputs: tuple[Output, ...],
    sizes: dict[str, Any],
    tiles: Tiles,
    grid: tuple[int, ...],
) -> Launch:
    return Launch(
        kernel=kernel,
        grid=grid,
        outputs=outputs,
        constants=shape.constants | sizes | {"BLOCK_N": tiles.rows},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
