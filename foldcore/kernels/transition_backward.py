"""The transition's backward pass, between its products of matrices.

With the hidden layer at hand there are five of them: the gradient by the argument of relu, which
takes a mask and the sums of a bias and so is a kernel; and four that are left to the library,

    dW1 = normalised^T dhidden    dW2 = hidden^T dy    dnormalised = dhidden W1^T

the last followed by the backward pass of LayerNorm. Its kernel writes the normalised rows again
rather than to have them saved.

Legend: n rows, c channels, f hidden channels, g groups of rows.
"""

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv
from foldcore.kernels.layer_norm import Sizes
from foldcore.kernels.rows import (
    block,
    load_tile,
    load_vector,
    product,
    standardize,
    standardize_backward,
    store_tile,
)
from foldcore.kernels.transition_layers import choose_turns, count_groups, launch_groups
from foldcore.kernels.turns import Turns

# channels up to -> sizes, of an H200
MASK = {128: Turns(64, 128, 8, 1, 4), 256: Turns(64, 128, 8, 1, 3)}
NORM = Sizes(2048, 8, groups=264)  # of an H200
AHEAD, AHEAD_CHANNELS = 3, 128  # rows that are no wider gain if the next are loaded ahead
_TESTED = Sizes(256, 4, groups=2)  # in the interpreter: several tiles of small arrays


@triton.jit
def transition_mask_kernel(
    dy_ptr,  # [n, c]
    hidden_ptr,  # [n, f]
    weights2_ptr,  # [f, c]
    dhidden_ptr,  # [n, f]: by the argument of relu
    sums_ptr,  # [g, f]: by bias1
    N: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    await_previous()
    f = tl.program_id(0) % PARTS * BLOCK_F
    group = tl.program_id(0) // PARTS
    row = tl.arange(0, BLOCK_N)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    index = tl.arange(0, BLOCK_F)
    column = index[None, :]
    weights = load_tile(weights2_ptr + f * C, F - f, C, index[:, None], channel, C, 1, WHOLE)
    weights = tl.trans(weights.to(dy_ptr.dtype.element_ty))
    total = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for tile in tl.range(group, tl.cdiv(N, BLOCK_N), tl.num_programs(0) // PARTS, num_stages=AHEAD):
        start = tl.cast(tile, tl.int64) * BLOCK_N
        left = N - start
        at = start * F + f
        dy = load_tile(dy_ptr + start * C, left, C, row, channel, C, 1, WHOLE)
        hidden = load_tile(hidden_ptr + at, left, F - f, row, column, F, 1, WHOLE)
        dhidden = product(dy, weights)
        dhidden = tl.where(hidden.to(tl.float32) > 0.0, dhidden, 0.0)
        store_tile(dhidden_ptr + at, dhidden, left, F - f, row, column, F, 1, WHOLE)
        total += dhidden
    tl.store(sums_ptr + group * F + f + index, tl.sum(total, 0), mask=index < F - f)


@triton.jit
def transition_norm_backward_kernel(
    x_ptr,  # [n, c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    dnormalized_ptr,  # [n, c]
    dy_ptr,  # [n, c]
    dx_ptr,  # [n, c]
    normalized_ptr,  # [n, c]
    sums_ptr,  # [g, 3 c]: by bias2, scale and offset
    N: tl.constexpr,
    C: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    await_previous()
    group = tl.program_id(0)
    row = tl.arange(0, BLOCK_N)[:, None]
    index = tl.arange(0, BLOCK_C)
    column = index[None, :]
    scale = load_vector(scale_ptr, column, C, WHOLE)
    offset = load_vector(offset_ptr, column, C, WHOLE)
    dscale = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    doffset = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for tile in tl.range(group, tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=AHEAD):
        start = tl.cast(tile, tl.int64) * BLOCK_N
        left, at = N - start, start * C
        x = load_tile(x_ptr + at, left, C, row, column, C, 1, WHOLE).to(tl.float32)
        gradient = load_tile(dnormalized_ptr + at, left, C, row, column, C, 1, WHOLE)
        gradient = gradient.to(tl.float32)
        dy = load_tile(dy_ptr + at, left, C, row, column, C, 1, WHOLE).to(tl.float32)
        normal, rstd = standardize(x, column < C, C, 1)
        y = normal * scale + offset
        store_tile(normalized_ptr + at, y, left, C, row, column, C, 1, WHOLE)
        dbias += dy
        dscale += gradient * normal
        doffset += gradient
        dx = standardize_backward(gradient * scale, normal, rstd, C, 1)
        if RESIDUAL:
            dx += dy
        store_tile(dx_ptr + at, dx, left, C, row, column, C, 1, WHOLE)
    sums = sums_ptr + group * (3 * C) + index
    tl.store(sums, tl.sum(dbias, 0), mask=index < C)
    tl.store(sums + C, tl.sum(dscale, 0), mask=index < C)
    tl.store(sums + 2 * C, tl.sum(doffset, 0), mask=index < C)


def mask(
    n: int, c: int, f: int, dtype: str, architecture: int, turns: Turns | None = None
) -> Launch:
    """(dy [n, c], hidden layer [n, f], weights2) -> gradient by the argument of relu [n, f], its
    sums [g, f] for bias1."""
    turns = turns or choose_turns(MASK, c, dtype, architecture)
    count = count_groups(n, f, turns, architecture)
    outputs = Output((n, f), dtype), Output((count, f), "float32")
    return launch_groups(transition_mask_kernel, (n, c, f), count, outputs, turns)


def norm(
    n: int, c: int, dtype: str, architecture: int, residual: bool, sizes: Sizes = NORM
) -> Launch:
    """(x, scale, offset, gradient by the normalised x, dy) -> dx, normalised x [n, c], and sums
    [g, 3 c] for bias2, scale and offset. With ``residual`` dy goes past the norm as well."""
    sizes = _TESTED if architecture == INTERPRETER else sizes
    rows = max(sizes.elements // block(c), 1)
    count = min(sizes.groups, cdiv(n, rows))
    ahead = AHEAD if block(c) <= AHEAD_CHANNELS and dtype == "bfloat16" else None
    return Launch(
        kernel=transition_norm_backward_kernel,
        grid=(count,),
        outputs=(Output((n, c), dtype), Output((n, c), dtype), Output((count, 3 * c), "float32")),
        constants={"N": n, "C": c, "RESIDUAL": residual, "AHEAD": ahead}
        | {"BLOCK_N": rows, "BLOCK_C": block(c), "WHOLE": n % rows == 0 and c == block(c)},
        num_warps=sizes.num_warps,
    )
