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
from foldcore.kernels.rows import EPS, LOG2_E, product
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
def place(tile, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The example of a tile, where it starts among the example's P, and what is left from there."""
    tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    start = tile % tiles * BLOCK_P
    return tl.cast(tile // tiles, tl.int64), start, P - start


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
    if x.dtype == tl.float32:
        mean = tl.sum(x, AXIS) / C
        centred = tl.where(inside, x - tl.expand_dims(mean, AXIS), 0.0)
        variance = tl.sum(centred * centred, AXIS) / C
    else:
        sums, squares = sums_of_powers(x, AXIS)
        mean = sums / C
        variance = tl.maximum(squares / C - mean * mean, 0.0)
    return mean, tl.rsqrt(variance + EPS)


@triton.jit
def sums_of_powers(x, AXIS: tl.constexpr):
    """Sums along AXIS of the elements and of their squares.

    Along axis 0, across threads, by the units for matrix products: they take less time for all
    products of columns than threads for sums of squares, which are the diagonal.
    """
    if AXIS == 1:
        wide = x.to(tl.float32)
        sums, squares = tl.sum(wide, 1), tl.sum(wide * wide, 1)
    else:
        rows = tl.trans(x)
        ones = tl.full([x.shape[0], 16], 1.0, tl.float32).to(x.dtype)
        sums = tl.sum(product(rows, ones), 1) / 16
        index = tl.arange(0, x.shape[1])
        diagonal = index[:, None] == index[None, :]
        squares = tl.sum(tl.where(diagonal, product(rows, x), 0.0), 1)
    return sums, squares


@triton.jit
def held(weights):
    """Weights [m, k] as the result of a product with the identity.

    A product takes its first factor from registers where another product has left it, so these stay
    there, for all tiles of a program, in place of being read from shared memory for each. Wider
    ones than were measured, and float32, take too many registers, and come back as they are.
    """
    if weights.dtype != tl.float32 and weights.shape[1] <= 128:
        index = tl.arange(0, weights.shape[1])
        one = tl.where(index[:, None] == index[None, :], 1.0, 0.0).to(weights.dtype)
        weights = product(weights, one).to(weights.dtype)
    return weights


@triton.jit
def scaled_sigmoid(x, scale, bias):
    """sigmoid(x scale + bias)."""
    return sigmoid_of_power(power(x, scale, bias))


@triton.jit
def power(x, scale, bias):
    """The power of 2 that is exp(-x scale - bias): the factor goes to the fewer numbers."""
    return x * (scale * -LOG2_E) + bias * -LOG2_E


@triton.jit
def sigmoid_of_power(x):
    """1 / (1 + 2^x)."""
    root = tl.rsqrt(1.0 + tl.exp2(x))
    return root * root


@triton.jit
def store_vector(base_ptr, vector, index, SIZE, WHOLE: tl.constexpr):
    """The counterpart of ``load_vector``, of float32."""
    if WHOLE:
        tl.store(base_ptr + index, vector)
    else:
        tl.store(base_ptr + index, vector, mask=index < SIZE)
