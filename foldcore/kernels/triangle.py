"""Triangle multiplication (Suppl. Alg. 11, 12), all but the third corner's product: forward.

Before the product: LayerNorm and the gated projections, left and right, in one pass. Both are
written channel first, [b h p] with p counting the positions (i, j), so that the product is a plain
batched matrix product over b h. After it: LayerNorm of the product's channels, projection, gate,
dropout and residual in one pass, in which a program keeps to some j, and their factors of dropout
on chip. Both kernels take folded weights: see ``triangle_fold``. Where sizes fit, there are quicker
ones: ``triangle_pipelined``, ``triangle_output_pipelined``.

Legend: p = i j positions of an example, n = b p, c channels of pairs, h channels of the product,
w = 4 h + c columns of folded weights.
"""

from typing import Any

import triton
import triton.language as tl

from foldcore.kernels import triangle_output_pipelined
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import block, load_tile, load_vector, product, store_tile
from foldcore.kernels.triangle_tiles import (
    held,
    launch_turns,
    moments,
    operand,
    place,
    power,
    scaled_sigmoid,
    sigmoid_of_power,
    store_vector,
)
from foldcore.kernels.turns import Turns, choose, groups

# measured on an H200, 256 x 256 positions of 128 channels, bfloat16
PROJECT = Turns(rows=64, columns=64, num_warps=4, programs=2, ahead=3)
OUTPUT = Turns(rows=64, columns=128, num_warps=8, programs=1, ahead=4)


@triton.jit
def triangle_project_kernel(
    pair_ptr,  # [b, p, c]
    mask_ptr,  # [b, p] float32
    rstd_ptr,  # [b, p]: 1 / standard deviation of the pair's channels
    folded_ptr,  # [c, w]
    folded_bias_ptr,  # [w] float32
    left_ptr,  # [b, h, p]
    right_ptr,  # [b, h, p]
    B: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Programs: left or right, some of its channels, group of tiles.

    A tile is finished, gates and stores, when the products of the next have been started: the
    compiler mixes the two. The first tile writes zeros, which the same threads overwrite.
    """
    await_previous()
    value_weights, gate_weights, value_bias, gate_bias = gated_weights(
        folded_ptr, folded_bias_ptr, C, H, WHOLE, BLOCK_C, BLOCK_H
    )
    out_ptr = left_ptr
    if tl.program_id(0) == 1:
        out_ptr = right_ptr
    value_weights, gate_weights = held(value_weights), held(gate_weights)
    row = tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)[None, :]
    step = tl.num_programs(2)
    value = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
    gate = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
    for tile in tl.range(tl.program_id(2), TILES, step, num_stages=AHEAD):
        example, start, left = place(tile, P, BLOCK_P)
        first = example * P + start
        x = load_tile(pair_ptr + first * C, left, C, row[:, None], channel, C, 1, WHOLE)
        mask = load_vector(mask_ptr + first, row, left, WHOLE)[None, :]
        rstd = load_vector(rstd_ptr + first, row, left, WHOLE)[None, :]
        x = tl.trans(operand(x, channel < C, C, 1))
        next_value = product(value_weights, x)
        next_gate = product(gate_weights, x)
        before = tl.where(tile < step, tile, tile - step)
        store_gated(out_ptr, value, gate, before, P, H, WHOLE)
        value = (next_value * rstd + value_bias) * mask
        gate = power(next_gate, rstd, gate_bias)
    last = tl.program_id(2) + (TILES - 1 - tl.program_id(2)) // step * step
    store_gated(out_ptr, value, gate, last, P, H, WHOLE)


@triton.jit
def store_gated(
    out_ptr,  # [b, h, p]
    value,  # [h, p]: some of its channels
    gate,  # what ``power`` makes of the gate's argument
    tile,
    P: tl.constexpr,
    H: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The gated values of a tile."""
    example, start, left = place(tile, P, value.shape[1])
    channels = tl.program_id(1) * value.shape[0]
    some = tl.arange(0, value.shape[0])[:, None]
    row = tl.arange(0, value.shape[1])[None, :]
    at = out_ptr + example * H * P + channels * P + start
    gated = value * sigmoid_of_power(gate)
    store_tile(at, gated, H - channels, left, some, row, P, 1, WHOLE)


@triton.jit
def gated_weights(
    folded_ptr,
    folded_bias_ptr,
    C: tl.constexpr,
    H: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Of the program's channels, of a projection and of its gate: weights [h, c], biases [h, 1]."""
    W: tl.constexpr = 4 * H + C
    start = tl.program_id(1) * BLOCK_H
    channels = H - start
    start += tl.program_id(0) * (2 * H)
    row = tl.arange(0, BLOCK_C)[:, None]
    column = tl.arange(0, BLOCK_H)
    at = folded_ptr + start
    value = load_tile(at, C, channels, row, column[None, :], W, 1, WHOLE)
    gate = load_tile(at + H, C, channels, row, column[None, :], W, 1, WHOLE)
    at = folded_bias_ptr + start
    value_bias = load_vector(at, column[:, None], channels, WHOLE)
    gate_bias = load_vector(at + H, column[:, None], channels, WHOLE)
    return tl.trans(value), tl.trans(gate), value_bias, gate_bias


@triton.jit
def triangle_output_kernel(
    product_ptr,  # [b, h, p]
    pair_ptr,  # [b, p, c]
    factor_ptr,  # [b, j, c] float32: dropout, the same for all i of p = (i, j)
    rstd_ptr,  # [b, p]
    folded_ptr,  # [c, w]
    folded_bias_ptr,  # [w] float32
    output_folded_ptr,  # [h, c]
    output_folded_bias_ptr,  # [c] float32
    out_ptr,  # [b, p, c]
    center_mean_ptr,  # [b, p]: of the product's channels
    center_rstd_ptr,  # [b, p]
    B: tl.constexpr,
    I: tl.constexpr,  # noqa: E741, the legend's name
    J: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    RESIDUAL: tl.constexpr,
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
    if HAS_FACTOR:
        factors_ptr = factor_ptr + (example * J + j) * C + c
        factor = load_tile(factors_ptr, left, C - c, row[:, None], some, C, 1, WHOLE)
    for i in tl.range(tl.program_id(0), I, tl.num_programs(0), num_stages=AHEAD):
        start = i * J + j
        first = example * P + start
        x = load_tile(pair_ptr + first * C, left, C, row[:, None], channel, C, 1, WHOLE)
        at = product_ptr + example * H * P + start
        z = load_tile(at, H, left, hidden, row[None, :], P, 1, WHOLE)
        rstd = load_vector(rstd_ptr + first, row, left, WHOLE)
        # first, so that the sigmoids are computed beside the products that follow
        gate = product(operand(x, channel < C, C, 1), gate_weights)
        center_mean, center_rstd = moments(z, hidden < H, H, 0)
        if tl.program_id(1) == 0:
            store_vector(center_mean_ptr + first, center_mean, row, left, WHOLE)
            store_vector(center_rstd_ptr + first, center_rstd, row, left, WHOLE)
        update = product(tl.trans(operand(z, hidden < H, H, 0)), update_weights)
        update = update * center_rstd[:, None] + update_bias
        update *= scaled_sigmoid(gate, rstd[:, None], gate_bias)
        if HAS_FACTOR:
            update *= factor
        if RESIDUAL:
            if BLOCK_O == BLOCK_C:
                update += x.to(tl.float32)
            else:
                at = pair_ptr + first * C + c
                update += load_tile(at, left, C - c, row[:, None], some, C, 1, WHOLE).to(tl.float32)
        store_tile(out_ptr + first * C + c, update, left, C - c, row[:, None], some, C, 1, WHOLE)


@triton.jit
def output_weights(
    folded_ptrs,  # weights and biases of what comes from the pair, and of the output
    C: tl.constexpr,
    H: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Of the program's channels: weights of update and gate [h or c, o], biases [1, o]."""
    folded_ptr, folded_bias_ptr, output_folded_ptr, output_folded_bias_ptr = folded_ptrs
    W: tl.constexpr = 4 * H + C
    start = tl.program_id(1) * BLOCK_O
    channels = C - start
    column = tl.arange(0, BLOCK_O)[None, :]
    at = output_folded_ptr + start
    update = load_tile(at, H, channels, tl.arange(0, BLOCK_H)[:, None], column, C, 1, WHOLE)
    at = folded_ptr + 4 * H + start
    gate = load_tile(at, C, channels, tl.arange(0, BLOCK_C)[:, None], column, W, 1, WHOLE)
    update_bias = load_vector(output_folded_bias_ptr + start, column, channels, WHOLE)
    gate_bias = load_vector(folded_bias_ptr + 4 * H + start, column, channels, WHOLE)
    return update, gate, update_bias, gate_bias


def project(
    b: int, p: int, c: int, h: int, dtype: str, architecture: int, turns: Turns | None = None
) -> Launch:
    """(pair, mask, rstd, folded weights, bias) -> left, right [b, h, p]."""
    turns = turns or choose(PROJECT, max(c, h), dtype, architecture)
    columns = min(turns.columns, block(h))
    parts, tiles = cdiv(h, columns), b * cdiv(p, turns.rows)
    sizes = {"B": b, "P": p, "C": c, "H": h, "TILES": tiles}
    blocks = {"BLOCK_C": block(c), "BLOCK_H": columns}
    whole = {"WHOLE": p % turns.rows == 0 and c == block(c) and h % columns == 0}
    grid = 2, parts, groups(tiles, turns, 2 * parts, architecture)
    outputs = (Output((b, h, p), dtype),) * 2
    return launch_turns(triangle_project_kernel, grid, outputs, sizes | blocks | whole, turns)


def output(
    b: int,
    shape: tuple[int, int],
    c: int,
    h: int,
    dtype: str,
    architecture: int,
    has_factor: bool,
    residual: bool,
    turns: Turns | None = None,
) -> Launch:
    """See the kernel -> result [b p c], mean and rstd of the product [b p]; ``shape``: (i, j)."""
    if turns is None and triangle_output_pipelined.fits(b, shape, c, h, dtype, architecture):
        return triangle_output_pipelined.output(b, shape, c, h, has_factor, residual)
    turns = turns or choose(OUTPUT, max(c, h), dtype, architecture)
    i, j = shape
    number = Output((b, i * j), "float32")
    sizes, grid = output_sizes(b, shape, c, h, turns, architecture)
    sizes |= {"HAS_FACTOR": has_factor, "RESIDUAL": residual}
    outputs = Output((b, i * j, c), dtype), number, number
    return launch_turns(triangle_output_kernel, grid, outputs, sizes, turns)


def output_sizes(
    b: int, shape: tuple[int, int], c: int, h: int, turns: Turns, architecture: int
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Constants and grid of a kernel whose programs keep to one block of j, and to its factors."""
    i, j = shape
    columns = min(turns.columns, block(c))
    parts, tiles = cdiv(c, columns), b * cdiv(j, turns.rows)
    whole = j % turns.rows == 0 and c % columns == 0 and c == block(c) and h == block(h)
    sizes = {"B": b, "I": i, "J": j, "C": c, "H": h, "WHOLE": whole}
    blocks = {"BLOCK_C": block(c), "BLOCK_H": block(h), "BLOCK_O": columns}
    return sizes | blocks, (groups(i, turns, parts * tiles, architecture), parts, tiles)
