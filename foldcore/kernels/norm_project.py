"""Layer normalisation and a narrow projection of it, in one pass over the rows.

Of pairs, the bias of an attention (Suppl. Alg. 7, 13, 14, line 3), written the way that attention
reads it: along columns, transposed. The normalised pairs are written only where something else
needs them, and in the same order, for then that attention reads rows as well. Of the MSA, both
sides of an outer product (Alg. 10, lines 1 and 2).

A program takes tiles of rows in turn and keeps its weights on chip: all of an MSA's are as many
bytes as a tile.

Legend: b examples, i and j axes of pairs, n rows of an MSA, c channels, h heads, e channels of a
side of the outer product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv
from foldcore.kernels.rows import (
    MIN_BLOCK,
    block,
    load_tile,
    load_vector,
    load_weights,
    product,
    standardize,
)
from foldcore.kernels.turns import MULTIPROCESSORS

SIDE = 16  # positions along either axis of a tile that is turned: 32 bytes of bfloat16
CHANNELS, WEIGHTS = 512, 512 * 64  # padded, that a program holds at most
SUMS = 2  # columns beside the heads, for what the backward pass sums over rows


@dataclass(frozen=True)
class Sizes:
    """Rows of a tile; programs on each multiprocessor; tiles whose loads are on their way."""

    rows: int
    num_warps: int
    programs: int
    ahead: int


# channels up to -> sizes in bfloat16
PAIR_BIAS = {64: Sizes(64, 4, 7, 2), 128: Sizes(32, 4, 7, 3)}
SIDES = {64: Sizes(64, 4, 4, 3), 256: Sizes(64, 8, 2, 2)}
_TESTED = Sizes(32, 4, 1, 2)
_FLOAT32 = Sizes(16, 8, 2, 1)  # exact products need many registers


def choose(measured: dict[int, Sizes], c: int, dtype: str, architecture: int) -> Sizes:
    """The sizes for rows of ``c`` channels; rows wider than all measured ones get smaller tiles."""
    if architecture == INTERPRETER:
        return _TESTED
    if dtype != "bfloat16":
        return _FLOAT32
    width = next((w for w in measured if w >= block(c)), max(measured))
    rows = max(MIN_BLOCK, measured[width].rows * width // max(width, block(c)))
    return replace(measured[width], rows=rows)


def groups(tiles: int, sizes: Sizes, architecture: int) -> int:
    """Programs that share the tiles."""
    processors = 3 if architecture == INTERPRETER else MULTIPROCESSORS
    return min(tiles, processors * sizes.programs)


def fits(c: int, narrow: int) -> bool:
    """Whether a program can hold rows of ``c`` channels and the weights of so many outputs."""
    return block(c) <= CHANNELS and block(c) * block(narrow) <= WEIGHTS


@dataclass(frozen=True)
class Pairs:
    """Pairs [b, i, j, c] whose bias is [b, h, j, i], and normalised [b, j, i, c].

    A bias [b, h, i, j] is that of pairs [b, 1, i j, c], which so stay in their order.
    """

    b: int
    i: int
    j: int
    c: int
    h: int

    @classmethod
    def of(cls, pair: Sequence[int], h: int, axis: int) -> "Pairs":
        """For attention along ``axis`` of pairs of this shape."""
        b, i, j, c = pair
        return cls(b, 1, i * j, c, h) if axis == 2 else cls(b, i, j, c, h)

    def tile(self, rows: int) -> tuple[int, int]:
        """Positions of a tile along i and along j."""
        side = min(SIDE, rows)
        return (1, rows) if self.i == 1 else (side, rows // side)

    def tiles(self, rows: int) -> int:
        """Tiles of all pairs."""
        i, j = self.tile(rows)
        return self.b * cdiv(self.i, i) * cdiv(self.j, j)

    def constants(self, rows: int) -> dict[str, int | bool]:
        """What the kernels know of their tiles."""
        i, j = self.tile(rows)
        whole = self.i % i == 0 and self.j % j == 0 and self.c == block(self.c)
        sizes = {"B": self.b, "I": self.i, "J": self.j, "C": self.c, "H": self.h}
        blocks = {
            "BLOCK_I": i,
            "BLOCK_J": j,
            "BLOCK_C": block(self.c),
            "BLOCK_H": block(self.h + SUMS),
        }
        return sizes | blocks | {"WHOLE": whole}


@triton.jit
def find_tile(
    tile,
    I: tl.constexpr,  # noqa: E741, the legend's name
    J: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Example and first position of a tile of pairs."""
    J_TILES: tl.constexpr = (J + BLOCK_J - 1) // BLOCK_J
    I_TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    example = tl.cast(tile // (I_TILES * J_TILES), tl.int64)
    return example, tile // J_TILES % I_TILES * BLOCK_I, tile % J_TILES * BLOCK_J


@triton.jit
def load_row(base_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A vector as a row [1, BLOCK_C] in float32.

    Its threads are not those of a row that is loaded as such: a tile would be spread over them in
    the same way, a row over all warps.
    """
    return load_vector(base_ptr, tl.arange(0, BLOCK_C), C)[None, :]


@triton.jit
def load_pairs(base_ptr, place, inside, column, C: tl.constexpr, WHOLE: tl.constexpr):
    at = base_ptr + place * C + column
    if WHOLE:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside & (column < C), other=0.0)
    return tile


@triton.jit
def store_pairs(base_ptr, tile, place, inside, column, C: tl.constexpr, WHOLE: tl.constexpr):
    """The counterpart of ``load_pairs``."""
    at = base_ptr + place * C + column
    tile = tile.to(base_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=inside & (column < C))


@triton.jit
def pair_bias_kernel(
    x_ptr,  # [b, i, j, c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    weights_ptr,  # [c, h]
    bias_ptr,  # [b, h, j, i]
    normal_ptr,  # [b, j, i, c]; not written without NORMAL
    B: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    NORMAL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    AHEAD: tl.constexpr,
):
    await_previous()
    position = tl.arange(0, BLOCK_I * BLOCK_J)[:, None]
    i, j = position % BLOCK_I, position // BLOCK_I
    column, head = tl.arange(0, BLOCK_C)[None, :], tl.arange(0, BLOCK_H)[None, :]
    weights = load_weights(weights_ptr, 0, C, H, BLOCK_C, head).to(x_ptr.dtype.element_ty)
    scale, offset = load_row(scale_ptr, C, BLOCK_C), load_row(offset_ptr, C, BLOCK_C)
    tiles = B * tl.cdiv(I, BLOCK_I) * tl.cdiv(J, BLOCK_J)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=AHEAD):
        example, first_i, first_j = find_tile(tile, I, J, BLOCK_I, BLOCK_J)
        inside = (i < I - first_i) & (j < J - first_j)
        start = (example * (I * J) + first_i * J + first_j) * C
        x = load_pairs(x_ptr + start, i * J + j, inside, column, C, WHOLE)
        normal, _ = standardize(x.to(tl.float32), column < C, C, 1)
        normal = (normal * scale + offset).to(x.dtype)
        start = first_j * I + first_i
        if NORMAL:
            at = normal_ptr + (example * (I * J) + start) * C
            store_pairs(at, normal, j * I + i, inside, column, C, WHOLE)
        bias = product(normal, weights).to(x.dtype)
        at = bias_ptr + example * (H * I * J) + start + (head * (I * J) + (j * I + i))
        tl.store(at, bias, mask=inside & (head < H))


@triton.jit
def load_sides(left_ptr, right_ptr, rows, row, column, STEP: tl.constexpr, E: tl.constexpr):
    """Rows of two arrays of E columns side by side, 0 beyond."""
    inside = row < rows
    left = tl.load(left_ptr + row * STEP + column, mask=inside & (column < E), other=0.0)
    second = inside & (column >= E) & (column < 2 * E)
    return left + tl.load(right_ptr + row * STEP + (column - E), mask=second, other=0.0)


@triton.jit
def outer_product_sides_kernel(
    x_ptr,  # [n, c]
    mask_ptr,  # [n] float32
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    left_weights_ptr,  # [c, e]
    left_bias_ptr,  # [e]
    right_weights_ptr,  # [c, e]
    right_bias_ptr,  # [e]
    left_ptr,  # [n, e]
    right_ptr,  # [n, e]
    N: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,  # of both sides
    AHEAD: tl.constexpr,
):
    await_previous()
    row, inner = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_C)[:, None]
    column, side = tl.arange(0, BLOCK_C)[None, :], tl.arange(0, BLOCK_E)[None, :]
    weights = load_sides(left_weights_ptr, right_weights_ptr, C, inner, side, E, E)
    weights = weights.to(x_ptr.dtype.element_ty)
    bias = load_sides(left_bias_ptr, right_bias_ptr, 1, side * 0, side, 0, E).to(tl.float32)
    scale, offset = load_row(scale_ptr, C, BLOCK_C), load_row(offset_ptr, C, BLOCK_C)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=AHEAD):
        start = tl.cast(tile, tl.int64) * BLOCK_N
        rows = N - start
        x = load_tile(x_ptr + start * C, rows, C, row, column, C, 1, WHOLE)
        normal, _ = standardize(x.to(tl.float32), column < C, C, 1)
        normal = (normal * scale + offset).to(x.dtype)
        both = (product(normal, weights) + bias) * load_vector(mask_ptr + start, row, rows)
        both = both.to(x.dtype)
        inside, at = row < rows, start * E + row * E + side
        tl.store(left_ptr + at, both, mask=inside & (side < E))
        tl.store(right_ptr + at - E, both, mask=inside & (side >= E) & (side < 2 * E))


def pair_bias(
    pairs: Pairs, dtype: str, architecture: int, normal: bool, sizes: Sizes | None = None
) -> Launch:
    """(x, scale, offset, weights) -> bias [b, h, j, i], normalised pairs [b, j, i, c].

    Without ``normal`` the second output is but a placeholder.
    """
    sizes = sizes or choose(PAIR_BIAS, pairs.c, dtype, architecture)
    shape = pairs.b, pairs.j, pairs.i, pairs.c
    bias = Output((pairs.b, pairs.h, pairs.j, pairs.i), dtype)
    return Launch(
        kernel=pair_bias_kernel,
        grid=(groups(pairs.tiles(sizes.rows), sizes, architecture),),
        outputs=(bias, Output(shape if normal else (1,), dtype)),
        constants=pairs.constants(sizes.rows) | {"NORMAL": normal, "AHEAD": sizes.ahead},
        num_warps=sizes.num_warps,
    )


def outer_product_sides(
    n: int, c: int, e: int, dtype: str, architecture: int, sizes: Sizes | None = None
) -> Launch:
    """(x, mask, scale, offset, weights and bias of the left and of the right side) -> both sides
    [n, e]."""
    sizes = sizes or choose(SIDES, c, dtype, architecture)
    return Launch(
        kernel=outer_product_sides_kernel,
        grid=(groups(cdiv(n, sizes.rows), sizes, architecture),),
        outputs=(Output((n, e), dtype),) * 2,
        constants=row_constants(n, c, e, sizes),
        num_warps=sizes.num_warps,
    )


def row_constants(n: int, c: int, e: int, sizes: Sizes) -> dict[str, int | bool]:
    """What the kernels of an MSA know of their tiles."""
    whole = n % sizes.rows == 0 and c == block(c)
    blocks = {"BLOCK_N": sizes.rows, "BLOCK_C": block(c), "BLOCK_E": block(2 * e)}
    return {"N": n, "C": c, "E": e, "WHOLE": whole, "AHEAD": sizes.ahead} | blocks
