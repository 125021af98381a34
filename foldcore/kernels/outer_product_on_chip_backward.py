"""Outer product mean: its gradients, whose outer products stay on chip.

Legend and form as in ``outer_product_on_chip``.
"""

from dataclasses import replace

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.outer_product import COUNT_EPS
from foldcore.kernels.outer_product_on_chip import (
    Shape,
    Tiles,
    blocks,
    choose,
    contract,
    whole_tiles,
)
from foldcore.kernels.rows import block, load_tile, load_vector, store_tile

# by architecture
SIDES = {90: Tiles(1, 64, 2, 32, 4, 4, 3)}
WEIGHTS = {90: Tiles(4, 32, 8, 16, 2, 8, 3)}


@triton.jit
def store_part(out_ptr, total, v, i, V, I, Y, BLOCK_V, BLOCK_I, BLOCK_Y):  # noqa: E741
    """[(v i), y] into a part [v, i, y] at these first v and i."""
    row, y = tl.arange(0, BLOCK_V * BLOCK_I)[:, None], tl.arange(0, BLOCK_Y)[None, :]
    row_v, row_i = v + row // BLOCK_I, i + row % BLOCK_I
    inside = (row_v < V) & (row_i < I) & (y < Y)
    tl.store(out_ptr + (row_v * I + row_i) * Y + y, total, mask=inside)


@triton.jit
def outer_product_side_gradient_kernel(
    dsum_ptr,  # [b, i, j, z]: gradient by what is divided by the count
    weights_ptr,  # [c, e, z]
    other_ptr,  # [b, s, u, d]: the other side
    parts_ptr,  # [g, b, v, i, s] float32: of the side, to be summed over g
    S: tl.constexpr,
    I: tl.constexpr,  # noqa: E741, residues of the side
    U: tl.constexpr,  # residues of the other side
    V: tl.constexpr,  # channels of the side
    D: tl.constexpr,  # channels of the other side
    Z: tl.constexpr,
    LEFT: tl.constexpr,
    SPLITS: tl.constexpr,
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
    V_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    TURNS: tl.constexpr = (U + BLOCK_U * SPLITS - 1) // (BLOCK_U * SPLITS)
    # steps along u, i and along v, d
    UP: tl.constexpr = Z if LEFT else I * Z
    IP: tl.constexpr = U * Z if LEFT else Z
    VQ: tl.constexpr = D * Z if LEFT else Z
    DQ: tl.constexpr = Z if LEFT else V * Z
    v = tl.program_id(0) % V_BLOCKS * BLOCK_V
    i = tl.program_id(0) // V_BLOCKS % I_BLOCKS * BLOCK_I
    split = tl.program_id(0) // (V_BLOCKS * I_BLOCKS)
    u = split * (TURNS * BLOCK_U)
    example = tl.program_id(1).to(tl.int64)
    total = contract(
        dsum_ptr + example * (I * U * Z) + u * UP + i * IP,
        (UP, IP, 1),
        weights_ptr + v * VQ,
        (VQ, DQ, 1),
        other_ptr + example * (S * U * D) + u * D,
        (D, 1, U * D),
        (U - u, I - i, V - v, D),
        *(Z, S, TURNS),
        *(BLOCK_U, BLOCK_I, BLOCK_V, BLOCK_D, BLOCK_Z, BLOCK_S, WHOLE, STAGES),
    )
    part = parts_ptr + (split * tl.num_programs(1) + example) * (V * I * S)
    store_part(part, total, v, i, V, I, S, BLOCK_V, BLOCK_I, BLOCK_S)


@triton.jit
def outer_product_weights_gradient_kernel(
    right_ptr,  # [b, s, j, e]
    left_ptr,  # [b, s, c, i]
    dsum_ptr,  # [b, i, j, z]
    parts_ptr,  # [g, c, e, z] float32, to be summed over g
    S: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    Z: tl.constexpr,
    SPLITS: tl.constexpr,
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
    V_BLOCKS: tl.constexpr = (C + BLOCK_V - 1) // BLOCK_V
    D_BLOCKS: tl.constexpr = (I + BLOCK_D - 1) // BLOCK_D
    TURNS: tl.constexpr = (J + BLOCK_U * SPLITS - 1) // (BLOCK_U * SPLITS)
    c = tl.program_id(0) % V_BLOCKS * BLOCK_V
    i = tl.program_id(0) // V_BLOCKS % D_BLOCKS * BLOCK_D
    j = tl.program_id(0) // (V_BLOCKS * D_BLOCKS) * (TURNS * BLOCK_U)
    example = tl.program_id(1).to(tl.int64)
    total = contract(
        right_ptr + example * (S * J * E) + j * E,
        (E, 1, J * E),
        left_ptr + example * (S * C * I) + c * I + i,
        (I, 1, C * I),
        dsum_ptr + ((example * I + i) * J + j) * Z,
        (Z, J * Z, 1),
        (J - j, E, C - c, I - i),
        *(S, Z, TURNS),
        *(BLOCK_U, BLOCK_I, BLOCK_V, BLOCK_D, BLOCK_S, BLOCK_Z, WHOLE, STAGES),
    )
    group = example * (D_BLOCKS * SPLITS) + tl.program_id(0) // V_BLOCKS
    part = parts_ptr + group * (C * E * Z)
    store_part(part, total, c, 0, C, E, Z, BLOCK_V, BLOCK_I, BLOCK_Z)


@triton.jit
def outer_product_divide_kernel(
    dout_ptr,  # [n, z]
    count_ptr,  # [n] float32
    dsum_ptr,  # [n, z]: by what is divided by the count
    sums_ptr,  # [t, z] float32: of dsum
    N: tl.constexpr,
    Z: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    await_previous()
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    row, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_Z)[None, :]
    index, left = tl.arange(0, BLOCK_Z), N - start
    dout = load_tile(dout_ptr + start * Z, left, Z, row, column, Z, 1).to(tl.float32)
    dsum = dout / (load_vector(count_ptr + start, row, left) + COUNT_EPS)
    tl.store(sums_ptr + tl.program_id(0) * Z + index, tl.sum(dsum, 0), mask=index < Z)
    store_tile(dsum_ptr + start * Z, dsum, left, Z, row, column, Z, 1)


@triton.jit
def outer_product_side_sum_kernel(
    parts_ptr,  # [g, b, v, i, s] float32
    side_ptr,  # [b, s, i, v]
    G: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    await_previous()
    i, example = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v, s = tl.arange(0, BLOCK_V)[:, None], tl.arange(0, BLOCK_S)[None, :]
    inside = (v < V) & (s < S)
    total = tl.zeros([BLOCK_V, BLOCK_S], tl.float32)
    for g in tl.static_range(G):
        at = (g * B + example) * (V * I * S) + i * S
        total += tl.load(parts_ptr + at + (v * (I * S) + s), mask=inside, other=0.0)
    at = example * (S * I * V) + i * V
    tl.store(side_ptr + at + (s * (I * V) + v), total.to(side_ptr.dtype.element_ty), mask=inside)


def side_gradient(
    shape: Shape, architecture: int, left: bool, tiles: Tiles | None = None
) -> Launch:
    """(gradient by the sum, weights, the other side) -> gradient by a side, of splits
    [g, b, v, i, s]."""
    tiles = tiles or choose(SIDES, architecture)
    if left:
        i, u, v, d = shape.i, shape.j, shape.c, shape.e
    else:
        i, u, v, d = shape.j, shape.i, shape.e, shape.c
    tiles = replace(tiles, d=block(d))
    sizes = {"S": shape.s, "I": i, "U": u, "V": v, "D": d, "Z": shape.z, "LEFT": left}
    sizes |= {"BLOCK_S": block(shape.s), "BLOCK_Z": block(shape.z), "SPLITS": tiles.splits}
    whole = whole_tiles(tiles, u, i, v, d, shape.z, shape.s)
    return Launch(
        kernel=outer_product_side_gradient_kernel,
        grid=(cdiv(i, tiles.i) * cdiv(v, tiles.v) * tiles.splits, shape.b),
        outputs=(Output((tiles.splits, shape.b, v, i, shape.s), "float32"),),
        constants=sizes | blocks(tiles) | {"WHOLE": whole},
        num_warps=tiles.num_warps,
    )


def weights_gradient(shape: Shape, architecture: int, tiles: Tiles | None = None) -> Launch:
    """(right, left turned, gradient by the sum) -> gradient by the weights, of
    groups [g, c e z]."""
    tiles = tiles or choose(WEIGHTS, architecture)
    tiles = replace(tiles, i=block(shape.e))
    whole = whole_tiles(tiles, shape.j, shape.e, shape.c, shape.i, shape.s, shape.z)
    groups = cdiv(shape.i, tiles.d) * tiles.splits
    return Launch(
        kernel=outer_product_weights_gradient_kernel,
        grid=(cdiv(shape.c, tiles.v) * groups, shape.b),
        outputs=(Output((groups * shape.b, shape.c * shape.e * shape.z), "float32"),),
        constants=shape.constants | blocks(tiles) | {"SPLITS": tiles.splits, "WHOLE": whole},
        num_warps=tiles.num_warps,
    )


def divide(n: int, z: int, dtype: str, rows: int = 128) -> Launch:
    """(gradient [n, z], count) -> the gradient by what is divided, and its column sums [t, z]."""
    return Launch(
        kernel=outer_product_divide_kernel,
        grid=(cdiv(n, rows),),
        outputs=(Output((n, z), dtype), Output((cdiv(n, rows), z), "float32")),
        constants={"N": n, "Z": z, "BLOCK_N": rows, "BLOCK_Z": block(z)},
        num_warps=8,
    )


def side_sum(parts: tuple[int, ...], dtype: str) -> Launch:
    """Gradients by a side, of splits [g, b, v, i, s] -> their sum [b, s, i, v]."""
    g, b, v, i, s = parts
    return Launch(
        kernel=outer_product_side_sum_kernel,
        grid=(i, b),
        outputs=(Output((b, s, i, v), dtype),),
        constants={"G": g, "B": b, "V": v, "I": i, "S": s}
        | {"BLOCK_V": block(v), "BLOCK_S": block(s)},
        num_warps=4,
    )
