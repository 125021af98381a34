"""Outer product mean (Suppl. Alg. 10, lines 3-4) whose outer products stay on chip.

The result and all of its gradients are sums of one form, with two products after one another:

    out[v, i, y] = sum over u, d of (sum over x of P[x, u, i] Q[x, v, d]) R[u, d, y]

| of | u | i | v | d | x | y | P | Q | R |
|---|---|---|---|---|---|---|---|---|---|
| the pairs | c | i | j | e | s | z | left | right | weights |
| the gradient by left | j | i | c | e | z | s | gradient by the sum | weights | right |
| by right | i | j | e | c | z | s | gradient by the sum | weights | left |
| by the weights | j | e | c | i | s | z | right | left | gradient by the sum |

A program keeps Q and its results on chip and takes the u in turn. What the first product leaves in
registers, [(u i), (v d)], the second one takes from there as [(v i), (u d)]: threads exchange
nothing if a tile has one u only, and 16 i a warp. Channels, sequences and the channels of pairs
have to fit into a tile; ``outer_product`` is for what does not.

Legend as in ``outer_product``; s sequences, i and j residues.
"""

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv
from foldcore.kernels.outer_product import COUNT_EPS
from foldcore.kernels.rows import block, load_vector, product

SIDES_WIDTH = 32  # channels of either side, at most
WIDTH = 128  # sequences, and channels of pairs, at most
ALIGNED = 8  # residues whose channels, turned, are what a thread loads at once
TESTED_WIDTH = 16  # of sequences in the interpreter: more of them are for the other kernels


@dataclass(frozen=True)
class Tiles:
    """How many of u, i, v and d a program has at a time, and among how many it shares the u."""

    u: int
    i: int
    v: int
    d: int
    splits: int
    num_warps: int
    num_stages: int


PROJECT = {90: Tiles(1, 64, 2, 32, 1, 4, 3)}  # by architecture
_TESTED = Tiles(4, 32, 4, 16, 2, 4, 1)


@dataclass(frozen=True)
class Shape:
    """Of left [b, s, i, c], right [b, s, j, e] and their pairs [b, i, j, z]."""

    b: int
    s: int
    i: int
    j: int
    c: int
    e: int
    z: int

    @property
    def constants(self) -> dict[str, int]:
        """What the kernels know of it."""
        sizes = {"S": self.s, "I": self.i, "J": self.j, "C": self.c, "E": self.e, "Z": self.z}
        return sizes | {"BLOCK_S": block(self.s), "BLOCK_Z": block(self.z)}


def fits(shape: Shape, dtype: str, architecture: int) -> bool:
    """Whether these kernels are for such a problem."""
    narrow = max(shape.c, shape.e) <= SIDES_WIDTH and shape.z <= WIDTH
    if architecture == INTERPRETER:
        return narrow and shape.s <= TESTED_WIDTH
    known = architecture == 90 and dtype == "bfloat16"
    return known and narrow and shape.s <= WIDTH and shape.i % ALIGNED == 0


def choose(measured: dict[int, Tiles], architecture: int) -> Tiles:
    """The sizes of an architecture's programs."""
    return _TESTED if architecture == INTERPRETER else measured[architecture]


@triton.jit
def load_axes(
    base_ptr, outer, inner, across, OUTER, INNER, ACROSS: tl.constexpr, STEPS, WHOLE: tl.constexpr
):
    """Elements [outer, inner, across] of an array with these steps, 0 beyond the limits."""
    at = base_ptr + outer * STEPS[0] + inner * STEPS[1] + across * STEPS[2]
    if WHOLE:
        tile = tl.load(at)
    else:
        inside = (outer < OUTER) & (inner < INNER) & (across < ACROSS)
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def turn(tile, U: tl.constexpr, I: tl.constexpr, V: tl.constexpr, D: tl.constexpr):  # noqa: E741
    """[(v i), (u d)] from [(u i), (v d)]."""
    tile = tl.permute(tl.reshape(tile, [U, I, V, D]), [2, 1, 0, 3])
    return tl.reshape(tile, [V * I, U * D])


@triton.jit
def contract(
    p_ptr,  # at the first u and i; its steps along u, i, x
    P,
    q_ptr,  # at the first v and d; its steps along v, d, x
    Q,
    r_ptr,  # at the first u and d; its steps along u, d, y
    R,
    counts,  # how many u, i, v and d there are from there on
    X: tl.constexpr,
    Y: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What the module says, [(v i), y] in float32, over the u of so many turns."""
    ui = tl.arange(0, BLOCK_U * BLOCK_I)[:, None]
    vd = tl.arange(0, BLOCK_V * BLOCK_D)[None, :]
    ud = tl.arange(0, BLOCK_U * BLOCK_D)[:, None]
    x_row, x_column = tl.arange(0, BLOCK_X)[None, :], tl.arange(0, BLOCK_X)[:, None]
    y = tl.arange(0, BLOCK_Y)[None, :]
    q = load_axes(q_ptr, vd // BLOCK_D, vd % BLOCK_D, x_column, counts[2], counts[3], X, Q, WHOLE)
    q = q.to(p_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_V * BLOCK_I, BLOCK_Y], tl.float32)
    for step in tl.range(0, TURNS, num_stages=STAGES):
        u = step * BLOCK_U
        p_u, r_u = u + ui // BLOCK_I, u + ud // BLOCK_D
        p = load_axes(p_ptr, p_u, ui % BLOCK_I, x_row, counts[0], counts[1], X, P, WHOLE)
        r = load_axes(r_ptr, r_u, ud % BLOCK_D, y, counts[0], counts[3], Y, R, WHOLE)
        tile = turn(product(p, q).to(p.dtype), BLOCK_U, BLOCK_I, BLOCK_V, BLOCK_D)
        total = tl.dot(tile, r.to(p.dtype), total, input_precision="ieee")
    return total


@triton.jit
def outer_product_mean_kernel(
    left_ptr,  # [b, s, c, i]
    right_ptr,  # [b, s, j, e]
    weights_ptr,  # [c, e, z]
    bias_ptr,  # [z]
    count_ptr,  # [b, i, j] float32: sequences that have both residues
    pair_ptr,  # [b, i, j, z]: what the mean is added to
    out_ptr,  # [b, i, j, z]
    S: tl.constexpr,
    I: tl.constexpr,  # noqa: E741, the legend's name
    J: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    Z: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    await_previous()
    I_BLOCKS: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    i = tl.program_id(0) % I_BLOCKS * BLOCK_I
    j = tl.program_id(0) // I_BLOCKS * BLOCK_V
    example = tl.program_id(1).to(tl.int64)
    total = contract(
        left_ptr + example * (S * C * I) + i,
        (I, 1, C * I),
        right_ptr + example * (S * J * E) + j * E,
        (E, 1, J * E),
        weights_ptr,
        (E * Z, Z, 1),
        (C, I - i, J - j, E),
        *(S, Z, (C + BLOCK_U - 1) // BLOCK_U),
        *(BLOCK_U, BLOCK_I, BLOCK_V, BLOCK_D, BLOCK_S, BLOCK_Z, WHOLE, STAGES),
    )
    row, z = tl.arange(0, BLOCK_V * BLOCK_I)[:, None], tl.arange(0, BLOCK_Z)[None, :]
    row_i, row_j = row % BLOCK_I, row // BLOCK_I
    start = (example * I + i) * J + j
    at, inside = row_i * J + row_j, (row_i < I - i) & (row_j < J - j)
    count = tl.load(count_ptr + start + at, mask=inside, other=1.0)
    total = (total + load_vector(bias_ptr, z, Z)) / (count + COUNT_EPS)
    inside, at = inside & (z < Z), at * Z + z
    if RESIDUAL:
        total += tl.load(pair_ptr + start * Z + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + start * Z + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def outer_product_turn_kernel(
    side_ptr,  # [n, i, c]
    turned_ptr,  # [n, c, i]
    I: tl.constexpr,  # noqa: E741
    C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    await_previous()
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    at, inside = tl.program_id(0).to(tl.int64) * (I * C), (i < I) & (c < C)
    side = tl.load(side_ptr + at + (i * C + c), mask=inside, other=0.0)
    tl.store(turned_ptr + at + (c * I + i), side, mask=inside)


def project(
    shape: Shape, dtype: str, architecture: int, residual: bool, tiles: Tiles | None = None
) -> Launch:
    """(left turned, right, weights, bias, count, pair) -> the projected mean [b, i, j, z].

    With ``residual`` it is added to the pair, which is not read without.
    """
    tiles = tiles or choose(PROJECT, architecture)
    tiles = replace(tiles, d=block(shape.e))
    whole = whole_tiles(tiles, shape.c, shape.i, shape.j, shape.e, shape.s, shape.z)
    return Launch(
        kernel=outer_product_mean_kernel,
        grid=(cdiv(shape.i, tiles.i) * cdiv(shape.j, tiles.v), shape.b),
        outputs=(Output((shape.b, shape.i, shape.j, shape.z), dtype),),
        constants=shape.constants | blocks(tiles) | {"RESIDUAL": residual, "WHOLE": whole},
        num_warps=tiles.num_warps,
    )


def turned(n: int, i: int, c: int, dtype: str) -> Launch:
    """A side [n, i, c] -> [n, c, i]."""
    rows = min(256, block(i))
    return Launch(
        kernel=outer_product_turn_kernel,
        grid=(n, cdiv(i, rows)),
        outputs=(Output((n, c, i), dtype),),
        constants={"I": i, "C": c, "BLOCK_I": rows, "BLOCK_C": block(c)},
        num_warps=8,
    )


def blocks(tiles: Tiles) -> dict[str, int]:
    """The sizes of a program's tiles."""
    sizes = {"BLOCK_U": tiles.u, "BLOCK_I": tiles.i, "BLOCK_V": tiles.v, "BLOCK_D": tiles.d}
    return sizes | {"STAGES": tiles.num_stages}


def whole_tiles(tiles: Tiles, u: int, i: int, v: int, d: int, x: int, y: int) -> bool:
    """Whether all tiles are full."""
    parts = (
        (u, tiles.u * tiles.splits),
        *((i, tiles.i), (v, tiles.v), (d, tiles.d), (x, block(x)), (y, block(y))),
    )
    return all(size % part == 0 for size, part in parts)
