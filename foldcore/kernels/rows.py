"""What the kernels share that normalise rows of channels and project them.

A tile holds some rows with all their channels, so that mean and variance cost no extra pass; it is
padded to a power of two with zeros. A tile is [rows, channels] (AXIS 1, channels are summed along
axis 1) or, where positions lie next to each other in memory, [channels, rows] (AXIS 0).
"""

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv, next_power_of_2

EPS = tl.constexpr(1e-5)  # added to the variance
LOG2_E = tl.constexpr(1.4426950408889634)
MIN_BLOCK = 16  # the tensor cores take no less


@dataclass(frozen=True)
class Tiles:
    """Sizes of a launch: rows of a tile, channels of the results computed at a time."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    def fit(self, columns: int) -> int:
        """The block of ``columns`` channels that are computed at a time."""
        return min(self.columns, block(columns))


# Without a measured row: the interpreter wants several small tiles, exact float32 products need
# many registers.
_TESTED = Tiles(64, 16, 4, 1)
_FLOAT32 = Tiles(32, 16, 8, 1)


def choose(measured: dict[tuple[int, int], Tiles], c: int, dtype: str, architecture: int) -> Tiles:
    """The sizes for rows of ``c`` channels; ``measured`` is keyed by architecture and channels.

    An architecture without a row of its own takes those of the nearest older one, rows wider than
    all measured ones get smaller tiles.
    """
    if architecture == INTERPRETER:
        return _TESTED
    if dtype != "bfloat16":
        return _FLOAT32
    known = {a for a, _ in measured}
    nearest = max((a for a in known if a <= architecture), default=min(known))
    widths = sorted(width for a, width in measured if a == nearest)
    width = next((w for w in widths if w >= block(c)), widths[-1])
    tiles = measured[nearest, width]
    return replace(tiles, rows=max(MIN_BLOCK, tiles.rows * width // max(width, block(c))))


def block(c: int) -> int:
    """The channels of a tile that holds ``c``."""
    return max(MIN_BLOCK, next_power_of_2(c))


@triton.jit
def sigmoid(x):
    # 1 / y as the square of 1 / sqrt(y): two instructions, a division takes seven
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def standardize(x, inside, C: tl.constexpr, AXIS: tl.constexpr):
    """``x`` with mean 0 and variance 1 along AXIS, and 1 / standard deviation; 0 outside."""
    mean = tl.expand_dims(tl.sum(x, AXIS) / C, AXIS)
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.expand_dims(tl.sum(centred * centred, AXIS) / C, AXIS) + EPS)
    return centred * rstd, rstd


@triton.jit
def standardize_backward(gradient, normal, rstd, C: tl.constexpr, AXIS: tl.constexpr):
    """Gradient by ``x``, valid inside, from the gradient by ``normal`` (0 outside)."""
    mean = tl.expand_dims(tl.sum(gradient, AXIS) / C, AXIS)
    slope = tl.expand_dims(tl.sum(gradient * normal, AXIS) / C, AXIS)
    return (gradient - mean - normal * slope) * rstd


@triton.jit
def load_tile(
    base_ptr,
    ROWS,
    COLUMNS,
    rows,
    columns,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Elements at a column of indices ``rows`` and a row ``columns``, 0 beyond the limits.

    A ``WHOLE`` tile is within them.
    """
    at = base_ptr + rows * ROW_STEP + columns * COLUMN_STEP
    if WHOLE:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(rows < ROWS) & (columns < COLUMNS), other=0.0)
    return tile


@triton.jit
def store_tile(
    base_ptr,
    tile,
    ROWS,
    COLUMNS,
    rows,
    columns,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """The counterpart of ``load_tile``."""
    at = base_ptr + rows * ROW_STEP + columns * COLUMN_STEP
    tile = tile.to(base_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=(rows < ROWS) & (columns < COLUMNS))


@triton.jit
def load_vector(base_ptr, index, SIZE: tl.constexpr, WHOLE: tl.constexpr = False):
    """float32 elements, 0 beyond ``SIZE``; the result has the shape of ``index``."""
    if WHOLE:
        vector = tl.load(base_ptr + index)
    else:
        vector = tl.load(base_ptr + index, mask=index < SIZE, other=0.0)
    return vector.to(tl.float32)


@triton.jit
def product(a, b):
    """Matrix product with sums in float32; float32 factors are not rounded."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def normalized_rows(
    x_ptr, scale_ptr, offset_ptr, left, row, C: tl.constexpr, BLOCK_C: tl.constexpr
):
    """LayerNorm of rows, in their dtype."""
    column = tl.arange(0, BLOCK_C)[None, :]
    x = load_tile(x_ptr, left, C, row, column, C, 1)
    normal, _ = standardize(x.to(tl.float32), column < C, C, 1)
    y = normal * load_vector(scale_ptr, column, C) + load_vector(offset_ptr, column, C)
    return y.to(x.dtype)


@triton.jit
def load_weights(
    weights_ptr, start, IN: tl.constexpr, OUT: tl.constexpr, BLOCK_IN: tl.constexpr, column
):
    """[BLOCK_IN, columns] of weights [IN, OUT], zero outside."""
    row = tl.arange(0, BLOCK_IN)[:, None]
    return load_tile(weights_ptr + start, IN, OUT - start, row, column, OUT, 1)


@triton.jit
def column_sums_kernel(
    x_ptr,  # [n, m]
    y_ptr,  # [m]
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    await_previous()
    sum_columns(x_ptr, y_ptr, tl.program_id(0), N, M, BLOCK_N, BLOCK_M)


@triton.jit
def two_column_sums_kernel(
    first_ptr,  # [n1, m1]
    second_ptr,  # [n2, m2]
    y_ptr,  # [m1 + m2]
    N1: tl.constexpr,
    M1: tl.constexpr,
    N2: tl.constexpr,
    M2: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    await_previous()
    FIRST: tl.constexpr = (M1 + BLOCK_M - 1) // BLOCK_M
    part = tl.program_id(0)
    if part < FIRST:
        sum_columns(first_ptr, y_ptr, part, N1, M1, BLOCK_N1, BLOCK_M)
    else:
        sum_columns(second_ptr, y_ptr + M1, part - FIRST, N2, M2, BLOCK_N2, BLOCK_M)


@triton.jit
def sum_columns(
    x_ptr,
    y_ptr,
    part,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums of BLOCK_M columns of x [n, m] over all rows."""
    column = part * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # loads of several tiles are on their way at once: a program has little else to wait for
    for start in tl.range(0, N, BLOCK_N, loop_unroll_factor=4):
        inside = (row[:, None] < N - start) & (column[None, :] < M)
        at = x_ptr + (start + row[:, None]) * M + column[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(y_ptr + column, tl.sum(total, 0).to(y_ptr.dtype.element_ty), mask=column < M)


def column_sums(n: int, m: int, dtype: str, architecture: int) -> Launch:
    """x [n, m] float32 -> its sum over rows, [m]: the last step of the gradients of vectors."""
    rows = min(128, block(n))
    columns = max(16, 2048 // rows)
    if architecture == INTERPRETER:
        rows, columns = 16, 64
    return Launch(
        kernel=column_sums_kernel,
        grid=(cdiv(m, columns),),
        outputs=(Output((m,), dtype),),
        constants={"N": n, "M": m, "BLOCK_N": rows, "BLOCK_M": columns},
        num_warps=4,
    )


def two_column_sums(first: tuple[int, ...], second: tuple[int, ...], dtype: str) -> Launch:
    """x [n1, m1], y [n2, m2] float32 -> their sums over rows, end to end, [m1 + m2]."""
    (n1, m1), (n2, m2), columns = first, second, 16
    return Launch(
        kernel=two_column_sums_kernel,
        grid=(cdiv(m1, columns) + cdiv(m2, columns),),
        outputs=(Output((m1 + m2,), dtype),),
        constants={"N1": n1, "M1": m1, "N2": n2, "M2": m2, "BLOCK_M": columns}
        | {"BLOCK_N1": min(128, block(n1)), "BLOCK_N2": min(128, block(n2))},
        num_warps=4,
    )
