"""What the kernels of triangle multiplication share: launches and places, norms for folded weights.

The weights of the projections are folded (see ``triangle_fold``): they take away what all channels
of a position have in common, so that a norm is a product with the rows as they are, times one
number for each position, 1 / standard deviation.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.rows import EPS
from foldcore.kernels.turns import Turns


def launch_turns(
    kernel: Any,
    grid: tuple[int, ...],
    outputs: tuple[Output, ...],
    sizes: Mapping[str, Any],
    turns: Turns,
    in_place: Mapping[int, int] | None = None,
) -> Launch:
    """A launch with ``turns``, of which every kernel knows BLOCK_P and AHEAD."""
    return Launch(
        kernel=kernel,
        grid=grid,
        outputs=outputs,
        constants=dict(sizes) | {"BLOCK_P": turns.rows, "AHEAD": turns.ahead},
        num_warps=turns.num_warps,
        in_place=in_place or {},
    )


@triton.jit
def place(tile, I: tl.constexpr, J: tl.constexpr, BLOCK_P: tl.constexpr):  # noqa: E741
    """The example of a tile, whose positions have one i; its first j and position there; j left.

    Where i does not matter an example is one row of positions: I is 1 then, J their number.
    """
    blocks: tl.constexpr = (J + BLOCK_P - 1) // BLOCK_P
    line = tile // blocks  # example, i
    j = tile % blocks * BLOCK_P
    return tl.cast(line // I, tl.int64), j, line % I * J + j, J - j


@triton.jit
def operand(x, inside, C: tl.constexpr, AXIS: tl.constexpr):
    """What a product with folded weights takes of a tile ``x``, which is 0 outside.

    Folded weights take the mean along AXIS away, but only up to rounding: float32 loses it before.
    """
    if x.dtype == tl.float32:
        x = tl.where(inside, x - tl.expand_dims(tl.sum(x, AXIS) / C, AXIS), 0.0)
    return x


@triton.jit
def moments(x, inside, C: tl.constexpr, AXIS: tl.constexpr):
    """Mean and 1 / standard deviation along AXIS of a tile, which is 0 outside.

    bfloat16 takes one pass: its own rounding is far more than what is lost in float32 where the
    mean of the squares and the square of the mean are close.
    """
    wide = x.to(tl.float32)
    mean = tl.sum(wide, AXIS) / C
    if x.dtype == tl.float32:
        centred = tl.where(inside, x - tl.expand_dims(mean, AXIS), 0.0)
        variance = tl.sum(centred * centred, AXIS) / C
    else:
        variance = tl.maximum(tl.sum(wide * wide, AXIS) / C - mean * mean, 0.0)
    return mean, tl.rsqrt(variance + EPS)


@triton.jit
def store_vector(base_ptr, vector, index, SIZE, WHOLE: tl.constexpr):
    """The counterpart of ``load_vector``, of float32."""
    if WHOLE:
        tl.store(base_ptr + index, vector)
    else:
        tl.store(base_ptr + index, vector, mask=index < SIZE)
