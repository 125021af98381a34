"""The mean of a group's positions, and its gradient as a part of a projection's (Suppl. Alg. 19).

Groups are the rows (axis 2) or columns (axis 1) of a table [s r] of positions. The projection
itself and the gradient of its weights are matrix products of the library; that of the input is one
here, as the mean's has to be added to it.

Legend: n projected channels, g groups.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.global_attention import walk
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv
from foldcore.kernels.rows import Tiles, block, choose, load_tile, product, store_tile

COUNT_EPS = tl.constexpr(1e-10)  # added to the number of positions
MEAN_ELEMENTS = 8192  # of a tile
# (architecture, channels up to) -> rows, projected channels at a time, warps, stages
BACKWARD = {(90, 64): Tiles(128, 128, 4, 1)}


@triton.jit
def group_mean_kernel(
    x_ptr,  # [b s r c]
    mask_ptr,  # [b s r]
    mean_ptr,  # [b g c]
    count_ptr,  # [b g] float32
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP_STEP: tl.constexpr,
    STEP: tl.constexpr,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr,
):
    await_previous()
    WHOLE: tl.constexpr = LENGTH % BLOCK_S == 0 and C % BLOCK_C == 0
    group = (tl.program_id(1) * GROUPS + tl.program_id(0)).to(tl.int64)
    position = tl.program_id(1).to(tl.int64) * (GROUPS * LENGTH) + tl.program_id(0) * GROUP_STEP
    first = tl.program_id(2) * BLOCK_C
    channel = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_S], tl.float32)
    for start in tl.range(0, LENGTH, BLOCK_S, num_stages=AHEAD):
        member = start + tl.arange(0, BLOCK_S)
        x = load_tile(
            x_ptr + position * C + first,
            LENGTH,
            C - first,
            member[:, None],
            channel[None, :],
            STEP * C,
            1,
            WHOLE,
        )
        mask_at = mask_ptr + position + member * STEP
        if WHOLE:
            mask = tl.load(mask_at)
        else:
            mask = tl.load(mask_at, mask=member < LENGTH, other=0.0)
        total += x.to(tl.float32) * mask[:, None]
        count += mask
    counted = tl.sum(count, 0)
    mean = tl.sum(total, 0) / (counted + COUNT_EPS)
    at = mean_ptr + group * C + first + channel
    tl.store(at, mean.to(mean_ptr.dtype.element_ty), mask=channel < C - first)
    tl.store(count_ptr + group, counted)  # equal in all programs of a group


@triton.jit
def group_of(position, GROUPS: tl.constexpr, LENGTH: tl.constexpr, GROUP_STEP: tl.constexpr):
    """The group of each position [b s r], counted through all examples."""
    within = position % (GROUPS * LENGTH)
    if GROUP_STEP == 1:
        own = within % GROUPS
    else:
        own = within // GROUP_STEP
    return position // (GROUPS * LENGTH) * GROUPS + own


@triton.jit
def group_mean_backward_kernel(
    projected_grad_ptr,  # [b s r n]
    weights_ptr,  # [c n]
    mask_ptr,  # [b s r]
    count_ptr,  # [b g]
    mean_grad_ptr,  # [b g c]
    x_grad_ptr,  # [b s r c]
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP_STEP: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    await_previous()
    start = tl.program_id(0).to(tl.int64) * BLOCK_R
    left = ROWS - start
    first = tl.program_id(1) * BLOCK_C
    row = tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for n in range(0, N, BLOCK_N):
        inner = tl.arange(0, BLOCK_N)[None, :]
        grad = load_tile(projected_grad_ptr + start * N + n, left, N - n, row, inner, N, 1)
        at = weights_ptr + first * N + n
        channel = tl.arange(0, BLOCK_C)[:, None]
        weights = load_tile(at, C - first, N - n, channel, inner, N, 1)
        total += product(grad, tl.trans(weights.to(grad.dtype)))
    group = group_of(tl.program_id(0) * BLOCK_R + row, GROUPS, LENGTH, GROUP_STEP)
    real = row < left
    mask = tl.load(mask_ptr + start + row, mask=real, other=0.0)
    share = mask / (tl.load(count_ptr + group, mask=real, other=1.0) + COUNT_EPS)
    inside = real & (column < C - first)
    of_mean = tl.load(mean_grad_ptr + group * C + first + column, mask=inside, other=0.0)
    total += share * of_mean.to(tl.float32)
    store_tile(x_grad_ptr + start * C + first, total, left, C - first, row, column, C, 1)


@dataclass(frozen=True)
class Sizes:
    """Of a launch of the mean: elements of a tile, channels at most, warps, tiles ahead."""

    elements: int
    channels: int
    num_warps: int
    ahead: int


FORWARD = Sizes(8192, 64, 8, 3)
_TESTED = Sizes(256, 16, 4, 2)


def forward(
    table: tuple[int, int, int],
    c: int,
    axis: int,
    dtype: str,
    architecture: int,
    sizes: Sizes | None = None,
) -> Launch:
    """(x, mask) -> (mean [b g c], number of positions that count [b g])."""
    sizes = sizes or (_TESTED if architecture == INTERPRETER else FORWARD)
    channels = min(block(c), sizes.channels)
    groups = table[3 - axis]
    blocks = {"BLOCK_S": sizes.elements // channels, "BLOCK_C": channels, "AHEAD": sizes.ahead}
    return Launch(
        kernel=group_mean_kernel,
        grid=(groups, table[0], cdiv(c, channels)),
        outputs=(Output((table[0], groups, c), dtype), Output((table[0], groups), "float32")),
        constants=walk(table, axis) | {"C": c} | blocks,
        num_warps=sizes.num_warps,
        num_stages=sizes.ahead,
    )


def backward(
    table: tuple[int, int, int],
    c: int,
    n: int,
    axis: int,
    dtype: str,
    architecture: int,
    tiles: Tiles | None = None,
) -> Launch:
    """(gradient by what is projected, weights, mask, count, mean's gradient) -> that by x."""
    tiles = tiles or choose(BACKWARD, c, dtype, architecture)
    columns, rows = min(block(c), 64), table[0] * table[1] * table[2]
    sizes = {"ROWS": rows, "N": n, "C": c}
    blocks = {"BLOCK_R": tiles.rows, "BLOCK_N": tiles.fit(n), "BLOCK_C": columns}
    return Launch(
        kernel=group_mean_backward_kernel,
        grid=(cdiv(rows, tiles.rows), cdiv(c, columns)),
        outputs=(Output((*table, c), dtype),),
        constants=walk(table, axis) | sizes | blocks,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
