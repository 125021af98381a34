"""Layer normalisation of the last axis, forward and backward.

The backward pass recomputes mean and variance: it has the row at hand anyway. Gradients of scale
and offset are summed a group of rows at a time and then over the groups, in a fixed order.

Legend: n rows, c channels, g groups of rows.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv
from foldcore.kernels.rows import (
    block,
    load_tile,
    load_vector,
    standardize,
    standardize_backward,
    store_tile,
)


@dataclass(frozen=True)
class Sizes:
    """Elements of a tile; most groups, each of as many tiles."""

    elements: int
    num_warps: int
    groups: int = 256


FORWARD, BACKWARD = Sizes(4096, 8), Sizes(8192, 4)
_TESTED = Sizes(256, 4, groups=2)  # in the interpreter: several tiles of small arrays


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,  # [n, c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    y_ptr,  # [n, c]
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    await_previous()
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    left = N - start  # rows
    x = load_tile(x_ptr + start * C, left, C, row, column, C, 1).to(tl.float32)
    normal, _ = standardize(x, column < C, C, 1)
    y = normal * load_vector(scale_ptr, column, C) + load_vector(offset_ptr, column, C)
    store_tile(y_ptr + start * C, y, left, C, row, column, C, 1)


@triton.jit
def layer_norm_backward_kernel(
    x_ptr,  # [n, c]
    scale_ptr,  # [c]
    dy_ptr,  # [n, c]
    dresidual_ptr,  # [n, c]: what goes past the norm to dx
    dx_ptr,  # [n, c]
    sums_ptr,  # [g, 2 c]: of the gradients by scale and by offset
    N: tl.constexpr,
    C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    await_previous()
    group = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    scale = load_vector(scale_ptr, column, C)
    dscale = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    doffset = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for tile in range(TILES):
        start = (group * TILES + tile) * BLOCK_N
        left = N - start  # rows, none at all beyond the last
        x = load_tile(x_ptr + start * C, left, C, row, column, C, 1).to(tl.float32)
        dy = load_tile(dy_ptr + start * C, left, C, row, column, C, 1).to(tl.float32)
        normal, rstd = standardize(x, column < C, C, 1)
        dscale += dy * normal
        doffset += dy
        dx = standardize_backward(dy * scale, normal, rstd, C, 1)
        if RESIDUAL:
            dx += load_tile(dresidual_ptr + start * C, left, C, row, column, C, 1).to(tl.float32)
        store_tile(dx_ptr + start * C, dx, left, C, row, column, C, 1)
    column = tl.arange(0, BLOCK_C)
    sums = sums_ptr + group * (2 * C) + column
    tl.store(sums, tl.sum(dscale, 0), mask=column < C)
    tl.store(sums + C, tl.sum(doffset, 0), mask=column < C)


def forward(n: int, c: int, dtype: str, architecture: int, sizes: Sizes = FORWARD) -> Launch:
    """(x [n, c], scale [c], offset [c]) -> y [n, c]."""
    sizes = _TESTED if architecture == INTERPRETER else sizes
    rows = max(sizes.elements // block(c), 1)
    return Launch(
        kernel=layer_norm_forward_kernel,
        grid=(cdiv(n, rows),),
        outputs=(Output((n, c), dtype),),
        constants={"N": n, "C": c, "BLOCK_N": rows, "BLOCK_C": block(c)},
        num_warps=sizes.num_warps,
    )


def backward(
    n: int,
    c: int,
    dtype: str,
    architecture: int,
    residual: bool = False,
    sizes: Sizes = BACKWARD,
) -> Launch:
    """(x [n, c], scale [c], dy [n, c], dresidual [n, c]) -> dx [n, c], sums [g, 2 c] for scale and
    offset. Without ``residual`` the kernel does not read ``dresidual``."""
    sizes = _TESTED if architecture == INTERPRETER else sizes
    rows = max(sizes.elements // block(c), 1)
    tiles = cdiv(cdiv(n, rows), sizes.groups)
    groups = cdiv(n, rows * tiles)
    return Launch(
        kernel=layer_norm_backward_kernel,
        grid=(groups,),
        outputs=(Output((n, c), dtype), Output((groups, 2 * c), "float32")),
        constants={"N": n, "C": c, "BLOCK_N": rows, "BLOCK_C": block(c), "TILES": tiles}
        | {"RESIDUAL": residual},
        num_warps=sizes.num_warps,
    )
