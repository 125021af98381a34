"""The last projection of a module with bias, dropout and residual, in one pass.

The backward pass also sums the gradient of the bias; the gradient of the weights is a matrix
product over all rows, which is left to the library.

The rows that are projected may be those of the transposed table: (j, i), where the result's are
(i, j). A tile is a rectangle of positions then, so that both tables are read and written in pieces
of several rows.

On Hopper's GPUs the model's sizes have a forward kernel of their own, see
``linear_update_pipelined``.

Legend: n = b i j rows, k input channels, c output channels, t tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from foldcore.kernels import linear_update_pipelined
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv
from foldcore.kernels.norm_project import find_tile
from foldcore.kernels.rows import (
    MIN_BLOCK,
    Tiles,
    block,
    choose,
    load_tile,
    load_vector,
    load_weights,
    product,
)
from foldcore.kernels.turns import MULTIPROCESSORS

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
WEIGHTS = 256 * 256  # elements that a program holds at most
SIDE = 16  # positions along i of a tile of transposed rows


@dataclass(frozen=True)
class Shape:
    """Rows (i, j) of b examples; the dropout factor is the same along the axis ``shared``.

    ``shared`` is 1 for i, 2 for j, 0 where there is no factor. With a ``side``, the rows that are
    projected are (j, i), and a tile has so many positions along i.
    """

    b: int
    i: int
    j: int
    shared: int
    side: int = 0

    @classmethod
    def of(
        cls, x: Sequence[int], factor: Sequence[int] | None, transposed: bool = False
    ) -> "Shape":
        """From the shapes of the result and of the factor."""
        b, i, j, c = x
        known = {None: 0, (b, 1, j, c): 1, (b, i, 1, c): 2}
        shape = None if factor is None else tuple(factor)
        if shape not in known:
            raise ValueError(f"a factor of shape {shape} for rows of shape {tuple(x)}")
        return cls(b, i, j, known[shape], SIDE if transposed else 0)

    @property
    def rows(self) -> int:
        return self.b * self.i * self.j

    def tiles(self, rows: int) -> int:
        """Tiles of so many rows."""
        if not self.side:
            return cdiv(self.rows, rows)
        return self.b * cdiv(self.i, self.side) * cdiv(self.j, rows // self.side)

    def constants(self, rows: int) -> dict[str, int]:
        """What the kernels know of tiles of so many rows."""
        sizes = {"N": self.rows, "I": self.i, "J": self.j, "SHARED": self.shared}
        return sizes | {"SIDE": self.side, "BLOCK_N": rows, "TILES": self.tiles(rows)}


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
    SIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Weights once a program, then tiles of rows in turn."""
    await_previous()
    c = tl.program_id(1) * BLOCK_C
    inner = tl.arange(0, BLOCK_K)[None, :]
    column = tl.arange(0, BLOCK_C)[None, :]
    weights = load_weights(weights_ptr, c, K, C, BLOCK_K, column).to(y_ptr.dtype.element_ty)
    bias = load_vector(bias_ptr + c, column, C - c)
    for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), num_stages=AHEAD):
        start, row, y_start, y_row, inside = find_rows(tile, N, I, J, BLOCK_N, SIDE)
        y = load_rows(y_ptr + y_start * K, y_row, inside, inner, K, K)
        update = product(y, weights) + bias
        if SHARED > 0:
            factors = factor_rows(tl.cast(start, tl.int32) + row, I, J, SHARED)
            update *= load_rows(factor_ptr + c, factors, inside, column, C - c, C)
        if RESIDUAL:
            at = x_ptr + start * C + c
            update += load_rows(at, row, inside, column, C - c, C).to(tl.float32)
        store_rows(out_ptr + start * C + c, update, row, inside, column, C - c, C)


@triton.jit
def linear_update_backward_kernel(
    dout_ptr,  # [n, c]
    weights_ptr,  # [k, c]
    factor_ptr,  # [b, j, c] or [b, i, c] float32
    dy_ptr,  # [n, k]
    dupdate_ptr,  # [n, c]: dout times the factor, in the order of dy; see backward
    sums_ptr,  # [t, c]: of dupdate
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    SHARED: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    await_previous()
    tile = tl.program_id(0).to(tl.int64)
    start, row, y_start, y_row, inside = find_rows(tl.program_id(0), N, I, J, BLOCK_N, SIDE)
    index = tl.arange(0, BLOCK_C)
    column = index[None, :]
    dout = load_rows(dout_ptr + start * C, row, inside, column, C, C)
    dupdate = dout.to(tl.float32)
    if SHARED > 0:
        factors = factor_rows(tl.cast(start, tl.int32) + row, I, J, SHARED)
        dupdate *= load_rows(factor_ptr, factors, inside, column, C, C)
    if SHARED > 0 or SIDE > 0:
        store_rows(dupdate_ptr + y_start * C, dupdate, y_row, inside, column, C, C)
    tl.store(sums_ptr + tile * C + index, tl.sum(dupdate, 0), mask=index < C)
    dupdate = dupdate.to(dout.dtype)
    for k in range(0, K, BLOCK_K):
        inner = tl.arange(0, BLOCK_K)
        at = weights_ptr + k * C
        weights = load_tile(at, K - k, C, inner[:, None], column, C, 1).to(dout.dtype)
        dy = product(dupdate, tl.trans(weights))
        store_rows(dy_ptr + y_start * K + k, dy, y_row, inside, inner[None, :], K - k, K)


@triton.jit
def find_rows(
    tile,
    N: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Of a tile: its first row, its rows from there, the same of the rows that are projected, and
    which are inside."""
    row = tl.arange(0, BLOCK_N)[:, None]
    if SIDE > 0:
        example, first_i, first_j = find_tile(tile, I, J, SIDE, BLOCK_N // SIDE)
        i, j = row % SIDE, row // SIDE
        inside = (i < I - first_i) & (j < J - first_j)
        start = example * (I * J) + first_i * J + first_j
        y_start = example * (I * J) + first_j * I + first_i
        row, y_row = i * J + j, j * I + i
    else:
        start = tl.cast(tile, tl.int64) * BLOCK_N
        inside = row < N - start
        y_start, y_row = start, row
    return start, row, y_start, y_row, inside


@triton.jit
def load_rows(base_ptr, row, inside, column, COLUMNS, WIDTH: tl.constexpr):
    """Rows of WIDTH channels, of which COLUMNS are left; 0 outside."""
    at = base_ptr + row * WIDTH + column
    return tl.load(at, mask=inside & (column < COLUMNS), other=0.0)


@triton.jit
def store_rows(base_ptr, tile, row, inside, column, COLUMNS, WIDTH: tl.constexpr):
    """The counterpart of ``load_rows``."""
    at = base_ptr + row * WIDTH + column
    tl.store(at, tile.to(base_ptr.dtype.element_ty), mask=inside & (column < COLUMNS))


@triton.jit
def factor_rows(row, I: tl.constexpr, J: tl.constexpr, SHARED: tl.constexpr):  # noqa: E741
    """The row of the factor for each row (example, i, j)."""
    if SHARED == 1:
        found = row // (I * J) * J + row % J
    else:
        found = row // J
    return found


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
    table, transposed = (shape.b, shape.i, shape.j), shape.side > 0
    if tiles is None and linear_update_pipelined.fits(table, k, c, transposed, dtype, architecture):
        return linear_update_pipelined.forward(table, c, shape.shared, transposed, residual)
    tiles = tiles or choose(FORWARD, k, dtype, architecture)
    columns = max(MIN_BLOCK, min(tiles.fit(c), WEIGHTS // block(k)))
    parts, count = cdiv(c, columns), shape.tiles(tiles.rows)
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

    Without a factor, and in the same order, dupdate is dout, and the second output but a
    placeholder.
    """
    tiles = tiles or choose(BACKWARD, c, dtype, architecture)
    count = shape.tiles(tiles.rows)
    outputs = (
        Output((shape.rows, k), dtype),
        Output((shape.rows, c) if shape.shared or shape.side else (1, 1), dtype),
        Output((count, c), "float32"),
    )
    sizes = {"K": k, "C": c, "BLOCK_K": tiles.fit(k), "BLOCK_C": block(c)}
    grid = (count,)
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
        constants=shape.constants(tiles.rows) | sizes,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
