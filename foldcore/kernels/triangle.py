"""Triangle multiplication (Suppl. Alg. 11, 12), all but the third corner's product: forward.

Before the product: LayerNorm and the gated projections, left and right, in one pass. Both are
written channel first, [b h p] with p counting the positions (i, j), so that the product is a plain
batched matrix product over b h. After it: LayerNorm of the product's channels, projection, gate,
dropout and residual in one pass.

Legend: p positions of an example, c channels of pairs, h channels of the product.
"""

from typing import Any

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
    store_tile,
)

# (architecture, channels up to) -> sizes
PROJECT = {(90, 64): Tiles(64, 64, 4, 2), (90, 128): Tiles(128, 64, 8, 1)}
OUTPUT = {(90, 64): Tiles(64, 32, 4, 2), (90, 128): Tiles(64, 64, 8, 2)}


@triton.jit
def triangle_project_kernel(
    pair_ptr,  # [b, p, c]
    mask_ptr,  # [b, p] float32
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
    left_out_ptr,  # [b, h, p]
    right_out_ptr,  # [b, h, p]
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
    x = normalized_rows(pair_ptr + first * C, scale_ptr, offset_ptr, left, row, C, BLOCK_C)
    mask = load_vector(mask_ptr + first, row, left)
    out = example * H * P + start
    for h in range(0, H, BLOCK_H):
        column = tl.arange(0, BLOCK_H)[None, :]
        value, gate = value_and_gate(
            x, left_ptr, left_bias_ptr, left_gate_ptr, left_gate_bias_ptr, h, C, H, BLOCK_C, BLOCK_H
        )
        at = left_out_ptr + out + h * P
        store_tile(at, value * gate * mask, left, H - h, row, column, 1, P)
        value, gate = value_and_gate(
            x,
            right_ptr,
            right_bias_ptr,
            right_gate_ptr,
            right_gate_bias_ptr,
            h,
            C,
            H,
            BLOCK_C,
            BLOCK_H,
        )
        at = right_out_ptr + out + h * P
        store_tile(at, value * gate * mask, left, H - h, row, column, 1, P)


@triton.jit
def value_and_gate(
    x,
    weights_ptr,
    bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    h,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A projection and its gate, [rows, BLOCK_H] from channel ``h`` on."""
    column = tl.arange(0, BLOCK_H)[None, :]
    weights = load_weights(weights_ptr, h, C, H, BLOCK_C, column).to(x.dtype)
    value = product(x, weights) + load_vector(bias_ptr + h, column, H - h)
    weights = load_weights(gate_ptr, h, C, H, BLOCK_C, column).to(x.dtype)
    gate = product(x, weights) + load_vector(gate_bias_ptr + h, column, H - h)
    return value, sigmoid(gate)


@triton.jit
def triangle_output_kernel(
    product_ptr,  # [b, h, p]
    pair_ptr,  # [b, p, c]
    factor_ptr,  # [b, j, c] float32: dropout, the same for all i of p = (i, j)
    center_scale_ptr,  # [h]
    center_offset_ptr,  # [h]
    output_ptr,  # [h, c]
    output_bias_ptr,  # [c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    gating_ptr,  # [c, c]
    gating_bias_ptr,  # [c]
    out_ptr,  # [b, p, c]
    P: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    RESIDUAL: tl.constexpr,
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
    x = normalized_rows(pair_ptr + first * C, scale_ptr, offset_ptr, left, row, C, BLOCK_C)
    center = normalized_product(
        product_ptr + example * H * P + start,
        center_scale_ptr,
        center_offset_ptr,
        left,
        P,
        H,
        BLOCK_P,
        BLOCK_H,
    )
    center = tl.trans(center)
    for c in range(0, C, BLOCK_O):
        column = tl.arange(0, BLOCK_O)[None, :]
        weights = load_weights(output_ptr, c, H, C, BLOCK_H, column).to(x.dtype)
        update = product(center, weights) + load_vector(output_bias_ptr + c, column, C - c)
        weights = load_weights(gating_ptr, c, C, C, BLOCK_C, column).to(x.dtype)
        gate = product(x, weights) + load_vector(gating_bias_ptr + c, column, C - c)
        update *= sigmoid(gate)
        if HAS_FACTOR:
            factor_row = (start + row) % J
            at = factor_ptr + example * J * C + c
            update *= load_tile(at, J, C - c, factor_row, column, C, 1)
        if RESIDUAL:
            at = pair_ptr + first * C + c
            update += load_tile(at, left, C - c, row, column, C, 1).to(tl.float32)
        store_tile(out_ptr + first * C + c, update, left, C - c, row, column, C, 1)


@triton.jit
def normalized_product(
    product_ptr,
    scale_ptr,
    offset_ptr,
    left,
    P: tl.constexpr,
    H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """LayerNorm of a tile [BLOCK_H, BLOCK_P], whose positions lie side by side."""
    channel = tl.arange(0, BLOCK_H)[:, None]
    position = tl.arange(0, BLOCK_P)[None, :]
    x = load_tile(product_ptr, H, left, channel, position, P, 1)
    normal, _ = standardize(x.to(tl.float32), channel < H, H, 0)
    y = normal * load_vector(scale_ptr, channel, H) + load_vector(offset_ptr, channel, H)
    return y.to(x.dtype)


def project(
    b: int, p: int, c: int, h: int, dtype: str, architecture: int, tiles: Tiles | None = None
) -> Launch:
    """(pair, mask, scale, offset, 4 x (weights, bias)) -> left, right [b, h, p]."""
    tiles = tiles or choose(PROJECT, c, dtype, architecture)
    gated = Output((b, h, p), dtype)
    sizes = {"P": p, "C": c, "H": h, "BLOCK_C": block(c), "BLOCK_H": tiles.fit(h)}
    return launch_tiles(triangle_project_kernel, b, p, (gated, gated), sizes, tiles)


def output(
    b: int,
    shape: tuple[int, int],
    c: int,
    h: int,
    dtype: str,
    architecture: int,
    has_factor: bool,
    residual: bool,
    tiles: Tiles | None = None,
) -> Launch:
    """See the kernel -> result [b p c]; ``shape`` is (i, j)."""
    tiles = tiles or choose(OUTPUT, c, dtype, architecture)
    p = shape[0] * shape[1]
    sizes = {"P": p, "J": shape[1], "C": c, "H": h, "HAS_FACTOR": has_factor, "RESIDUAL": residual}
    blocks = {"BLOCK_C": block(c), "BLOCK_H": block(h), "BLOCK_O": tiles.fit(c)}
    return launch_tiles(
        triangle_output_kernel, b, p, (Output((b, p, c), dtype),), sizes | blocks, tiles
    )


def launch_tiles(
    kernel: Any, b: int, p: int, outputs: tuple[Output, ...], sizes: dict[str, Any], tiles: Tiles
) -> Launch:
    """A program for each tile of positions of each example."""
    return Launch(
        kernel=kernel,
        grid=(cdiv(p, tiles.rows), b),
        outputs=outputs,
        constants=sizes | {"BLOCK_P": tiles.rows},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
