"""Transition (Suppl. Alg. 9, 15): LayerNorm, two linear layers, residual, in one pass.

The hidden layer is computed some channels at a time and stays on chip. The backward pass computes
it again, and writes it and its gradient: what follows is matrix products, which are left to the
library, and the backward pass of LayerNorm.

Legend: n rows, c channels, f hidden channels, t tiles.
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
    store_tile,
)

# (architecture, channels up to) -> sizes
FORWARD = {
    (90, 64): Tiles(64, 64, 4, 2),
    (90, 128): Tiles(128, 64, 8, 3),
    (90, 256): Tiles(128, 64, 8, 2),
}
BACKWARD = {
    (90, 64): Tiles(128, 64, 8, 2),
    (90, 128): Tiles(128, 32, 8, 2),
    (90, 256): Tiles(128, 32, 8, 2),
}


@triton.jit
def transition_forward_kernel(
    x_ptr,  # [n, c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    weights1_ptr,  # [c, f]
    bias1_ptr,  # [f]
    weights2_ptr,  # [f, c]
    bias2_ptr,  # [c]
    y_ptr,  # [n, c]
    N: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    left = N - start
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    x = normalized_rows(x_ptr + start * C, scale_ptr, offset_ptr, left, row, C, BLOCK_C)
    y = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for f in range(0, F, BLOCK_F):
        hidden_column = tl.arange(0, BLOCK_F)[None, :]
        weights1 = load_weights(weights1_ptr, f, C, F, BLOCK_C, hidden_column).to(x.dtype)
        bias1 = load_vector(bias1_ptr + f, hidden_column, F - f)
        hidden = tl.maximum(product(x, weights1) + bias1, 0.0).to(x.dtype)
        hidden_row = tl.arange(0, BLOCK_F)[:, None]
        weights2 = load_tile(weights2_ptr + f * C, F - f, C, hidden_row, column, C, 1)
        y += product(hidden, weights2.to(x.dtype))
    y += load_vector(bias2_ptr, column, C)
    if RESIDUAL:
        y += load_tile(x_ptr + start * C, left, C, row, column, C, 1).to(tl.float32)
    store_tile(y_ptr + start * C, y, left, C, row, column, C, 1)


@triton.jit
def transition_backward_kernel(
    x_ptr,  # [n, c]
    dy_ptr,  # [n, c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    weights1_ptr,  # [c, f]
    bias1_ptr,  # [f]
    weights2_ptr,  # [f, c]
    normalized_ptr,  # [n, c]
    hidden_ptr,  # [n, f]
    dhidden_ptr,  # [n, f]: by the argument of relu
    sums_ptr,  # [t, f + c]: by bias1 and bias2
    N: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    start = tile * BLOCK_N
    left = N - start
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    index = tl.arange(0, BLOCK_C)
    sums = sums_ptr + tile * (F + C)
    x = normalized_rows(x_ptr + start * C, scale_ptr, offset_ptr, left, row, C, BLOCK_C)
    store_tile(normalized_ptr + start * C, x, left, C, row, column, C, 1)
    dy = load_tile(dy_ptr + start * C, left, C, row, column, C, 1)
    tl.store(sums + F + index, tl.sum(dy.to(tl.float32), 0), mask=index < C)
    for f in range(0, F, BLOCK_F):
        hidden_column = tl.arange(0, BLOCK_F)[None, :]
        hidden_row = tl.arange(0, BLOCK_F)[:, None]
        weights1 = load_weights(weights1_ptr, f, C, F, BLOCK_C, hidden_column).to(x.dtype)
        bias1 = load_vector(bias1_ptr + f, hidden_column, F - f)
        hidden = tl.maximum(product(x, weights1) + bias1, 0.0)
        at = start * F + f
        store_tile(hidden_ptr + at, hidden, left, F - f, row, hidden_column, F, 1)
        weights2 = load_tile(weights2_ptr + f * C, F - f, C, hidden_row, column, C, 1)
        dhidden = product(dy, tl.trans(weights2.to(x.dtype)))
        dhidden = tl.where(hidden > 0.0, dhidden, 0.0)
        store_tile(dhidden_ptr + at, dhidden, left, F - f, row, hidden_column, F, 1)
        hidden_index = tl.arange(0, BLOCK_F)
        tl.store(sums + f + hidden_index, tl.sum(dhidden, 0), mask=hidden_index < F - f)


def forward(
    n: int,
    c: int,
    f: int,
    dtype: str,
    architecture: int,
    residual: bool,
    tiles: Tiles | None = None,
) -> Launch:
    """(x, scale, offset, weights1, bias1, weights2, bias2) -> y [n, c]."""
    tiles = tiles or choose(FORWARD, c, dtype, architecture)
    return Launch(
        kernel=transition_forward_kernel,
        grid=(cdiv(n, tiles.rows),),
        outputs=(Output((n, c), dtype),),
        constants={"N": n, "C": c, "F": f, "RESIDUAL": residual}
        | {"BLOCK_N": tiles.rows, "BLOCK_C": block(c), "BLOCK_F": tiles.fit(f)},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def backward(
    n: int,
    c: int,
    f: int,
    dtype: str,
    architecture: int,
    tiles: Tiles | None = None,
) -> Launch:
    """(x, dy, scale, offset, weights1, bias1, weights2) -> normalised x, hidden layer and its
    gradient [n, f], sums [t, f + c]."""
    tiles = tiles or choose(BACKWARD, c, dtype, architecture)
    rows, hidden = Output((n, c), dtype), Output((n, f), dtype)
    count = cdiv(n, tiles.rows)
    return Launch(
        kernel=transition_backward_kernel,
        grid=(count,),
        outputs=(rows, hidden, hidden, Output((count, f + c), "float32")),
        constants={"N": n, "C": c, "F": f}
        | {"BLOCK_N": tiles.rows, "BLOCK_C": block(c), "BLOCK_F": tiles.fit(f)},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
