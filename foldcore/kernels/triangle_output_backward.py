"""Triangle multiplication (Suppl. Alg. 11, 12), backward: from the result to the product.

In two lean kernels. The first needs a position's channels of pairs, and computes the gradients by
the update before its gate and by the gate's argument; the second needs those of the product, and
computes the gradient by the product through the norm. Gradients of weights are matrix products,
which are left to the library: the kernels write their factors.

The gradient by a standardised row loses its mean and its part along the row, ``slope`` times the
row. The slope is summed over the channels of pairs in the first kernel, where they are at hand:
sum over h of (W' du) normal = sum over c of du (normal W').

Legend: see ``triangle``; g groups of tiles, o parts of the channels of pairs.
"""

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import (
    block,
    load_tile,
    load_vector,
    product,
    store_tile,
)
from foldcore.kernels.triangle import output_sizes, output_weights
from foldcore.kernels.triangle_tiles import (
    launch_turns,
    operand,
    place,
    scaled_sigmoid,
    store_vector,
)
from foldcore.kernels.turns import Turns, choose, groups

# measured on an H200, 256 x 256 positions of 128 channels, bfloat16
OUTPUT = Turns(rows=64, columns=128, num_warps=8, programs=1, ahead=3)
CENTER = Turns(rows=32, columns=128, num_warps=8, programs=2, ahead=3)


@triton.jit
def triangle_output_backward_kernel(
    dout_ptr,  # [b, p, c]
    product_ptr,  # [b, h, p]
    pair_ptr,  # [b, p, c]
    factor_ptr,  # [b, j, c] float32
    rstd_ptr,  # [b, p]
    center_rstd_ptr,  # [b, p]
    folded_ptr,  # [c, w]
    folded_bias_ptr,  # [w] float32
    output_folded_ptr,  # [h, c]
    output_folded_bias_ptr,  # [c] float32
    dupdate_ptr,  # [n, c]: by the output projection
    slope_ptr,  # [o, n]
    dprojected_ptr,  # [w, n]: by the gate's argument, its last c rows
    sums_ptr,  # [g, 2 c]: of the gradient by the gate's argument, of dupdate
    B: tl.constexpr,
    I: tl.constexpr,  # noqa: E741, the legend's name
    J: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Programs: group of i, some of the channels, block of an example's j."""
    await_previous()
    P: tl.constexpr = I * J
    N: tl.constexpr = B * P
    example, j, left = place(tl.program_id(2), J, BLOCK_P)
    c = tl.program_id(1) * BLOCK_O
    row = tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)[None, :]
    hidden = tl.arange(0, BLOCK_H)[:, None]
    some = tl.arange(0, BLOCK_O)[None, :]
    folded_ptrs = folded_ptr, folded_bias_ptr, output_folded_ptr, output_folded_bias_ptr
    update_weights, gate_weights, update_bias, gate_bias = output_weights(
        folded_ptrs, C, H, WHOLE, BLOCK_C, BLOCK_H, BLOCK_O
    )
    update_sums = tl.zeros([BLOCK_P // 16, 8, BLOCK_O], tl.float32)
    gate_sums = tl.zeros([BLOCK_P // 16, 8, BLOCK_O], tl.float32)
    if HAS_FACTOR:
        factors_ptr = factor_ptr + (example * J + j) * C + c
        factor = load_tile(factors_ptr, left, C - c, row[:, None], some, C, 1, WHOLE)
    for i in tl.range(tl.program_id(0), I, tl.num_programs(0), num_stages=AHEAD):
        start = i * J + j
        first = example * P + start
        x = load_tile(pair_ptr + first * C, left, C, row[:, None], channel, C, 1, WHOLE)
        at = product_ptr + example * H * P + start
        z = load_tile(at, H, left, hidden, row[None, :], P, 1, WHOLE)
        dout = load_tile(dout_ptr + first * C + c, left, C - c, row[:, None], some, C, 1, WHOLE)
        rstd = load_vector(rstd_ptr + first, row, left, WHOLE)
        center_rstd = load_vector(center_rstd_ptr + first, row, left, WHOLE)
        gate = product(operand(x, channel < C, C, 1), gate_weights)
        update = product(tl.trans(operand(z, hidden < H, H, 0)), update_weights)
        update *= center_rstd[:, None]
        if HAS_FACTOR:
            dout *= factor
        gate = scaled_sigmoid(gate, rstd[:, None], gate_bias)
        dupdate = dout * gate
        slope = tl.sum(dupdate * update, 1) / H
        dgate = dupdate * (update + update_bias) * (1.0 - gate)
        update_sums += sum_rows(dupdate)
        gate_sums += sum_rows(dgate)
        store_vector(slope_ptr + tl.program_id(1) * N + first, slope, row, left, WHOLE)
        at = dupdate_ptr + first * C + c
        store_tile(at, dupdate, left, C - c, row[:, None], some, C, 1, WHOLE)
        at = dprojected_ptr + tl.cast(4 * H + c, tl.int64) * N + first
        store_tile(at, dgate, left, C - c, row[:, None], some, 1, N, WHOLE)
    store_sums(sums_ptr + c, gate_sums, C - c, 2 * C)
    store_sums(sums_ptr + C + c, update_sums, C - c, 2 * C)


@triton.jit
def sum_rows(x):
    """Rows i and i + 8 of each 16, which one thread holds after a product: no exchange."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    return tl.sum(tl.reshape(x, [ROWS // 16, 2, 8, COLUMNS]), 1)


@triton.jit
def store_sums(to_ptr, partial, left, STEP: tl.constexpr):
    """What is left to add of sums over rows; into the row of the program's group."""
    COLUMNS: tl.constexpr = partial.shape[2]
    index = tl.arange(0, COLUMNS)
    sums = tl.sum(tl.reshape(partial, [partial.shape[0] * 8, COLUMNS]), 0)
    group = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tl.store(to_ptr + group * STEP + index, sums, mask=index < left)


@triton.jit
def triangle_center_backward_kernel(
    dupdate_ptr,  # [n, c]
    product_ptr,  # [b, h, p]
    slope_ptr,  # [o, n]
    center_mean_ptr,  # [b, p]
    center_rstd_ptr,  # [b, p]
    output_folded_ptr,  # [h, c]
    dproduct_ptr,  # [b, h, p]
    center_ptr,  # [h, n]: the standardised product
    B: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Programs: group of tiles, some of the channels of the product."""
    await_previous()
    N: tl.constexpr = B * P
    h = tl.cast(tl.program_id(1) * BLOCK_H, tl.int64)
    position = tl.arange(0, BLOCK_P)
    row = position[None, :]
    channel = tl.arange(0, BLOCK_C)[None, :]
    hidden = tl.arange(0, BLOCK_H)[:, None]
    at = output_folded_ptr + h * C
    weights = load_tile(at, H - h, C, hidden, channel, C, 1, WHOLE)
    for tile in tl.range(tl.program_id(0), TILES, tl.num_programs(0), num_stages=AHEAD):
        example, start, left = place(tile, P, BLOCK_P)
        first = example * P + start
        at = dupdate_ptr + first * C
        dupdate = load_tile(at, left, C, position[:, None], channel, C, 1, WHOLE)
        shift = example * H * P + h * P + start
        z = load_tile(product_ptr + shift, H - h, left, hidden, row, P, 1, WHOLE)
        slope = load_vector(slope_ptr + first, position, left, WHOLE)
        for part in tl.static_range(1, PARTS):
            slope += load_vector(slope_ptr + part * N + first, position, left, WHOLE)
        mean = load_vector(center_mean_ptr + first, position, left, WHOLE)[None, :]
        rstd = load_vector(center_rstd_ptr + first, position, left, WHOLE)[None, :]
        dnormal = product(weights, tl.trans(dupdate))
        normal = z.to(tl.float32) * rstd - mean * rstd
        dproduct = (dnormal - normal * slope[None, :]) * rstd
        store_tile(center_ptr + h * N + first, normal, H - h, left, hidden, row, N, 1, WHOLE)
        store_tile(dproduct_ptr + shift, dproduct, H - h, left, hidden, row, P, 1, WHOLE)


def output(
    b: int,
    shape: tuple[int, int],
    c: int,
    h: int,
    dtype: str,
    architecture: int,
    has_factor: bool,
    turns: Turns | None = None,
) -> Launch:
    """See the kernel -> dupdate, slopes, dprojected (in part), sums; ``shape`` is (i, j)."""
    turns = turns or choose(OUTPUT, max(c, h), dtype, architecture)
    n = b * shape[0] * shape[1]
    sizes, grid = output_sizes(b, shape, c, h, turns, architecture)
    outputs = (
        Output((n, c), dtype),
        Output((grid[1], n), "float32"),
        Output((4 * h + c, n), dtype),
        Output((grid[0] * grid[2], 2 * c), "float32"),
    )
    sizes |= {"HAS_FACTOR": has_factor}
    return launch_turns(triangle_output_backward_kernel, grid, outputs, sizes, turns)


def center(
    b: int,
    p: int,
    c: int,
    h: int,
    dtype: str,
    architecture: int,
    slopes: int,
    turns: Turns | None = None,
) -> Launch:
    """See the kernel -> dproduct [b h p], the standardised product [h n]; so many ``slopes``."""
    turns = turns or choose(CENTER, max(c, h), dtype, architecture)
    columns = min(turns.columns, block(h))
    parts, tiles = cdiv(h, columns), b * cdiv(p, turns.rows)
    sizes = {"B": b, "P": p, "C": c, "H": h, "PARTS": slopes, "TILES": tiles}
    blocks = {"BLOCK_C": block(c), "BLOCK_H": columns}
    whole = {"WHOLE": p % turns.rows == 0 and c == block(c) and h % columns == 0}
    grid = groups(tiles, turns, parts, architecture), parts
    outputs = Output((b, h, p), dtype), Output((h, b * p), dtype)
    return launch_turns(
        triangle_center_backward_kernel, grid, outputs, sizes | blocks | whole, turns
    )
