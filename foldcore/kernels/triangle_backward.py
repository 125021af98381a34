"""Triangle multiplication (Suppl. Alg. 11, 12), backward: from left and right to the pair.

What is cheap is recomputed from the pair representation. The gradients by all five projections
of a row lie side by side in one array, channel first, so that one product of the library takes
them to the normalised rows, and one to the weights (see ``triangle_fold``).

Legend: see ``triangle``; g groups of tiles.
"""

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv
from foldcore.kernels.rows import (
    block,
    load_tile,
    load_vector,
    product,
    standardize,
    standardize_backward,
    store_tile,
)
from foldcore.kernels.triangle import gated_weights
from foldcore.kernels.triangle_tiles import launch_turns, operand, place, scaled_sigmoid
from foldcore.kernels.turns import Turns, choose, groups

# measured on an H200, 256 x 256 positions of 128 channels, bfloat16
PROJECT = Turns(rows=32, columns=128, num_warps=8, programs=2, ahead=3)
NORM_ELEMENTS, NORM_WARPS = 2048, 8  # of a tile


@triton.jit
def triangle_project_backward_kernel(
    pair_ptr,  # [b, p, c]
    mask_ptr,  # [b, p] float32
    rstd_ptr,  # [b, p]
    dleft_ptr,  # [b, h, p]
    dright_ptr,  # [b, h, p]
    folded_ptr,  # [c, w]
    folded_bias_ptr,  # [w] float32
    dgate_ptr,  # the next in place, its last c rows written already
    dprojected_ptr,  # [w, n]: by the arguments of the projections
    sums_ptr,  # [g, 4 h]: those of the first four summed
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
    """Programs: left or right, some of its channels, group of tiles."""
    await_previous()
    N: tl.constexpr = B * P
    first_channel = tl.cast(tl.program_id(1) * BLOCK_H, tl.int64)
    channels = H - first_channel
    value_weights, gate_weights, value_bias, gate_bias = gated_weights(
        folded_ptr, folded_bias_ptr, C, H, WHOLE, BLOCK_C, BLOCK_H
    )
    dgated_ptr = dleft_ptr
    if tl.program_id(0) == 1:
        dgated_ptr = dright_ptr
    column = tl.program_id(0) * (2 * H) + first_channel
    row = tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)[None, :]
    index = tl.arange(0, BLOCK_H)
    some = index[:, None]
    value_sums = tl.zeros([BLOCK_H], tl.float32)
    gate_sums = tl.zeros([BLOCK_H], tl.float32)
    for tile in tl.range(tl.program_id(2), TILES, tl.num_programs(2), num_stages=AHEAD):
        example, start, left = place(tile, P, BLOCK_P)
        first = example * P + start
        x = load_tile(pair_ptr + first * C, left, C, row[:, None], channel, C, 1, WHOLE)
        mask = load_vector(mask_ptr + first, row, left, WHOLE)[None, :]
        rstd = load_vector(rstd_ptr + first, row, left, WHOLE)[None, :]
        x = tl.trans(operand(x, channel < C, C, 1))
        at = dgated_ptr + example * H * P + first_channel * P + start
        dgated = load_tile(at, channels, left, some, row[None, :], P, 1, WHOLE)
        value = product(value_weights, x) * rstd + value_bias
        gate = scaled_sigmoid(product(gate_weights, x), rstd, gate_bias)
        dvalue = dgated.to(tl.float32) * gate * mask
        dgate = dvalue * value * (1.0 - gate)
        value_sums += tl.sum(dvalue, 1)
        gate_sums += tl.sum(dgate, 1)
        at = dprojected_ptr + column * N + first
        store_tile(at, dvalue, channels, left, some, row[None, :], N, 1, WHOLE)
        store_tile(at + H * N, dgate, channels, left, some, row[None, :], N, 1, WHOLE)
    sums = sums_ptr + tl.program_id(2) * (4 * H) + column + index
    tl.store(sums, value_sums, mask=index < channels)
    tl.store(sums + H, gate_sums, mask=index < channels)


@triton.jit
def triangle_norm_backward_kernel(
    pair_ptr,  # [n, c]
    dnormal_ptr,  # [n, c]
    dout_ptr,  # [n, c]
    dpair_ptr,  # [n, c]
    normal_ptr,  # [n, c]: the standardised pair
    N: tl.constexpr,
    C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient by the pair, with ``dout`` added; scale and offset are in the weights."""
    await_previous()
    start = tl.program_id(0).to(tl.int64) * BLOCK_P
    row = tl.arange(0, BLOCK_P)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    left = N - start
    x = load_tile(pair_ptr + start * C, left, C, row, column, C, 1, WHOLE).to(tl.float32)
    at = dnormal_ptr + start * C
    dnormal = load_tile(at, left, C, row, column, C, 1, WHOLE).to(tl.float32)
    normal, rstd = standardize(x, column < C, C, 1)
    store_tile(normal_ptr + start * C, normal, left, C, row, column, C, 1, WHOLE)
    dx = standardize_backward(dnormal, normal, rstd, C, 1)
    if RESIDUAL:
        dx += load_tile(dout_ptr + start * C, left, C, row, column, C, 1, WHOLE).to(tl.float32)
    store_tile(dpair_ptr + start * C, dx, left, C, row, column, C, 1, WHOLE)


def project(
    b: int, p: int, c: int, h: int, dtype: str, architecture: int, turns: Turns | None = None
) -> Launch:
    """See the kernel -> dprojected [w n], sums."""
    turns = turns or choose(PROJECT, max(c, h), dtype, architecture)
    columns = min(turns.columns, block(h))
    parts, tiles = cdiv(h, columns), b * cdiv(p, turns.rows)
    sizes = {"B": b, "P": p, "C": c, "H": h, "TILES": tiles}
    blocks = {"BLOCK_C": block(c), "BLOCK_H": columns}
    whole = {"WHOLE": p % turns.rows == 0 and c == block(c) and h % columns == 0}
    grid = 2, parts, groups(tiles, turns, 2 * parts, architecture)
    outputs = Output((4 * h + c, b * p), dtype), Output((grid[2], 4 * h), "float32")
    return launch_turns(
        triangle_project_backward_kernel, grid, outputs, sizes | blocks | whole, turns, {7: 0}
    )


def norm(n: int, c: int, dtype: str, architecture: int, residual: bool) -> Launch:
    """(pair, dnormal, dout) -> the gradient by the pair, the standardised pair; [n c] each."""
    elements = 256 if architecture == INTERPRETER else NORM_ELEMENTS
    rows = max(1, elements // block(c))
    whole = n % rows == 0 and c == block(c)
    sizes = {"N": n, "C": c, "RESIDUAL": residual, "WHOLE": whole}
    return Launch(
        kernel=triangle_norm_backward_kernel,
        grid=(cdiv(n, rows),),
        outputs=(Output((n, c), dtype), Output((n, c), dtype)),
        constants=sizes | {"BLOCK_P": rows, "BLOCK_C": block(c)},
        num_warps=NORM_WARPS,
    )
