"""Transition (Suppl. Alg. 9, 15): LayerNorm, two linear layers, residual, in one pass.

The hidden layer is computed some channels at a time and stays on chip. On Hopper's GPUs the model's
sizes have a kernel of their own, see ``transition_pipelined``; elsewhere, where a gradient is
wanted, the layers come one by one, see ``transition_layers``.

Legend: n rows, c channels, f hidden channels.
"""

import triton
import triton.language as tl

from foldcore.kernels import transition_pipelined
from foldcore.kernels.dependent import await_previous
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
    await_previous()
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
    if tiles is None and transition_pipelined.fits(n, c, f, dtype, architecture):
        return transition_pipelined.forward(n, c, f, residual, save=False)
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
