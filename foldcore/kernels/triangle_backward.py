"""Triangle multiplication (Suppl. Alg. 11, 12), all but the third corner's product: backward.

What is cheap is recomputed from the pair representation. The gradients of weights and of the
normalised pair are matrix products, which are left to the library: the kernels write their factors.

Legend: p positions of an example, c channels of pairs, h channels of the product, t tiles.
"""

import triton
import triton.language as tl

from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import (
    Tiles,
    block,
    choose,
    load_tile,
    load_vector,
    load_weights,
    normalized_rows,
    product,
    sigmoid,
    standardize,
    standardize_backward,
    store_tile,
)
from foldcore.kernels.triangle import launch_tiles, normalized_product

# (architecture, channels up to) -> sizes
PROJECT_BACKWARD = {(90, 64): Tiles(64, 32, 4, 2), (90, 128): Tiles(64, 32, 4, 2)}
OUTPUT_BACKWARD = {(90, 64): Tiles(64, 32, 4, 2), (90, 128): Tiles(128, 64, 8, 1)}


@triton.jit
def triangle_output_backward_kernel(
    dout_ptr,  # [b, p, c]
    product_ptr,  # [b, h, p]
    pair_ptr,  # [b, p, c]
    factor_ptr,  # [b, j, c] float32
    center_scale_ptr,  # [h]
    center_offset_ptr,  # [h]
    output_ptr,  # [h, c]
    output_bias_ptr,  # [c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    gating_ptr,  # [c, c]
    gating_bias_ptr,  # [c]
    dproduct_ptr,  # [b, h, p]
    dupdate_ptr,  # [b, p, c]: by the output projection
    dgate_ptr,  # [b, p, c]: by the gate's argument
    center_ptr,  # [b, p, h]: the normalised product
    sums_ptr,  # [b t, 2 c + 2 h]: by output_bias, gating_bias, center_scale, center_offset
    P: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_P
    example = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_P)[:, None]
    left = P - start
    first = example * P + start
    sums = sums_ptr + (example * tl.num_programs(0) + tl.program_id(0)) * (2 * C + 2 * H)
    x = normalized_rows(pair_ptr + first * C, scale_ptr, offset_ptr, left, row, C, BLOCK_C)
    product_start = example * H * P + start
    center = normalized_product(
        product_ptr + product_start,
        center_scale_ptr,
        center_offset_ptr,
        left,
        P,
        H,
        BLOCK_P,
        BLOCK_H,
    )
    channel = tl.arange(0, BLOCK_H)[:, None]
    position = tl.arange(0, BLOCK_P)[None, :]
    store_tile(center_ptr + first * H, center, H, left, channel, position, 1, H)
    center = tl.trans(center)
    dcenter = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
    for c in range(0, C, BLOCK_O):
        column = tl.arange(0, BLOCK_O)[None, :]
        dout = load_tile(dout_ptr + first * C + c, left, C - c, row, column, C, 1).to(tl.float32)
        if HAS_FACTOR:
            factor_row = (start + row) % J
            at = factor_ptr + example * J * C + c
            dout *= load_tile(at, J, C - c, factor_row, column, C, 1)
        weights = load_weights(gating_ptr, c, C, C, BLOCK_C, column).to(x.dtype)
        gate = product(x, weights) + load_vector(gating_bias_ptr + c, column, C - c)
        gate = sigmoid(gate)
        weights = load_weights(output_ptr, c, H, C, BLOCK_H, column).to(x.dtype)
        update = product(center, weights) + load_vector(output_bias_ptr + c, column, C - c)
        dgate = dout * update * gate * (1.0 - gate)
        store_tile(dgate_ptr + first * C + c, dgate, left, C - c, row, column, C, 1)
        dupdate = dout * gate
        store_tile(dupdate_ptr + first * C + c, dupdate, left, C - c, row, column, C, 1)
        index = tl.arange(0, BLOCK_O)
        tl.store(sums + c + index, tl.sum(dupdate, 0), mask=index < C - c)
        tl.store(sums + C + c + index, tl.sum(dgate, 0), mask=index < C - c)
        dcenter += product(weights, tl.trans(dupdate.to(x.dtype)))
    # a second time: kept normalised through the loop it would take too many registers
    x = load_tile(product_ptr + product_start, H, left, channel, position, P, 1).to(tl.float32)
    normal, rstd = standardize(x, channel < H, H, 0)
    index = tl.arange(0, BLOCK_H)
    tl.store(sums + 2 * C + index, tl.sum(dcenter * normal, 1), mask=index < H)
    tl.store(sums + 2 * C + H + index, tl.sum(dcenter, 1), mask=index < H)
    dcenter *= load_vector(center_scale_ptr, channel, H)
    dproduct = standardize_backward(dcenter, normal, rstd, H, 0)
    store_tile(dproduct_ptr + product_start, dproduct, H, left, channel, position, P, 1)


@triton.jit
def triangle_project_backward_kernel(
    pair_ptr,  # [b, p, c]
    mask_ptr,  # [b, p] float32
    dleft_ptr,  # [b, h, p]
    dright_ptr,  # [b, h, p]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    left_ptr,  # [c, h] and its bias [h], as are the three that follow
    left_bias_ptr,
    left_gate_ptr,
    left_gate_bias_ptr,
    right_ptr,
    right_bias_ptr,
    right_gate_ptr,
    right_gate_bias_ptr,
    normalized_ptr,  # [b, p, c]: the normalised pair
    dprojected_ptr,  # [b, p, 4 h]: by left, the argument of its gate, right, that of its gate
    sums_ptr,  # [b t, 4 h]: the same summed
    P: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_P
    example = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_P)[:, None]
    left = P - start
    first = example * P + start
    sums = sums_ptr + (example * tl.num_programs(0) + tl.program_id(0)) * (4 * H)
    x = normalized_rows(pair_ptr + first * C, scale_ptr, offset_ptr, left, row, C, BLOCK_C)
    channel = tl.arange(0, BLOCK_C)[None, :]
    store_tile(normalized_ptr + first * C, x, left, C, row, channel, C, 1)
    mask = load_vector(mask_ptr + first, row, left)
    out = example * H * P + start
    dprojected = dprojected_ptr + first * (4 * H)
    left_side = (left_ptr, left_bias_ptr, left_gate_ptr, left_gate_bias_ptr)
    right_side = (right_ptr, right_bias_ptr, right_gate_ptr, right_gate_bias_ptr)
    for h in range(0, H, BLOCK_H):
        dgated = load_gated(dleft_ptr + out, mask, h, left, P, H, BLOCK_P, BLOCK_H)
        to, sum_to = dprojected + h, sums + h
        gated_backward(x, dgated, left_side, to, sum_to, h, left, C, H, BLOCK_C)
        dgated = load_gated(dright_ptr + out, mask, h, left, P, H, BLOCK_P, BLOCK_H)
        to, sum_to = to + 2 * H, sum_to + 2 * H
        gated_backward(x, dgated, right_side, to, sum_to, h, left, C, H, BLOCK_C)


@triton.jit
def load_gated(
    base_ptr,
    mask,
    h,
    left,
    P: tl.constexpr,
    H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[BLOCK_P, BLOCK_H] of [h, p], times the mask."""
    row = tl.arange(0, BLOCK_P)[:, None]
    column = tl.arange(0, BLOCK_H)[None, :]
    return load_tile(base_ptr + h * P, left, H - h, row, column, 1, P).to(tl.float32) * mask


@triton.jit
def gated_backward(
    x,
    dgated,
    pointers,  # to the weights and bias of the projection and of its gate
    dprojected_ptr,
    sums_ptr,
    h,
    left,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients by some channels of one gated projection, from ``h`` on, and their sums."""
    weights_ptr, bias_ptr, gate_ptr, gate_bias_ptr = pointers
    row = tl.arange(0, dgated.shape[0])[:, None]
    index = tl.arange(0, dgated.shape[1])
    column = index[None, :]
    wide: tl.constexpr = 4 * H
    weights = load_weights(weights_ptr, h, C, H, BLOCK_C, column).to(x.dtype)
    gate_weights = load_weights(gate_ptr, h, C, H, BLOCK_C, column).to(x.dtype)
    value = product(x, weights) + load_vector(bias_ptr + h, column, H - h)
    gate = sigmoid(product(x, gate_weights) + load_vector(gate_bias_ptr + h, column, H - h))
    dvalue = dgated * gate
    store_tile(dprojected_ptr, dvalue, left, H - h, row, column, wide, 1)
    tl.store(sums_ptr + index, tl.sum(dvalue, 0), mask=index < H - h)
    dgate = dvalue * value * (1.0 - gate)
    store_tile(dprojected_ptr + H, dgate, left, H - h, row, column, wide, 1)
    tl.store(sums_ptr + H + index, tl.sum(dgate, 0), mask=index < H - h)


def project_backward(
    b: int,
    p: int,
    c: int,
    h: int,
    dtype: str,
    architecture: int,
    tiles: Tiles | None = None,
) -> Launch:
    """See the kernel -> normalised pair [b p c], dprojected [b p 4h], sums."""
    tiles = tiles or choose(PROJECT_BACKWARD, c, dtype, architecture)
    outputs = (
        Output((b, p, c), dtype),
        Output((b, p, 4 * h), dtype),
        Output((b * cdiv(p, tiles.rows), 4 * h), "float32"),
    )
    sizes = {"P": p, "C": c, "H": h}
    blocks = {"BLOCK_C": block(c), "BLOCK_H": tiles.fit(h)}
    return launch_tiles(triangle_project_backward_kernel, b, p, outputs, sizes | blocks, tiles)


def output_backward(
    b: int,
    shape: tuple[int, int],
    c: int,
    h: int,
    dtype: str,
    architecture: int,
    has_factor: bool,
    tiles: Tiles | None = None,
) -> Launch:
    """See the kernel -> dproduct, dupdate, dgate, normalised product [b p h], sums."""
    tiles = tiles or choose(OUTPUT_BACKWARD, c, dtype, architecture)
    p = shape[0] * shape[1]
    pair = Output((b, p, c), dtype)
    outputs = (
        Output((b, h, p), dtype),
        pair,
        pair,
        Output((b, p, h), dtype),
        Output((b * cdiv(p, tiles.rows), 2 * (c + h)), "float32"),
    )
    sizes = {"P": p, "J": shape[1], "C": c, "H": h, "HAS_FACTOR": has_factor}
    blocks = {"BLOCK_C": block(c), "BLOCK_H": block(h), "BLOCK_O": tiles.fit(c)}
    return launch_tiles(triangle_output_backward_kernel, b, p, outputs, sizes | blocks, tiles)
