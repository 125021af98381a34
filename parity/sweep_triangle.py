"""Kernels of triangle multiplication for ``parity.sweep_rows``: launches, inputs, sizes to try."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from foldcore.kernels import (
    triangle,
    triangle_backward,
    triangle_fold,
    triangle_output_backward,
)
from foldcore.kernels.launch import Launch
from foldcore.kernels.turns import Turns
from parity.bench_rows import Array, triangle_arrays

KIND = ("bfloat16", 90)  # dtype and architecture
LAYERS = 48  # of the stack for which weights are folded at once
SHAPE = tuple[int, int, int, int]  # examples, residues, channels of pairs and of the product
# positions, channels, warps, programs on a multiprocessor, tiles on chip
TURNS = [
    Turns(*sizes)
    for sizes in itertools.product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3), (1, 2, 3, 4))
    if sizes[0] * sizes[1] <= 1024 * sizes[2]  # registers
]


def _flat(shape: SHAPE) -> tuple[int, int, int, int, str, int]:
    b, n, c, h = shape
    return b, n * n, c, h, *KIND


def _square(shape: SHAPE) -> tuple[int, tuple[int, int], int, int, str, int]:
    b, n, c, h = shape
    return b, (n, n), c, h, *KIND


LAUNCHES: dict[str, Callable[[Any, Any], Launch]] = {
    "triangle fold": lambda s, _: triangle_fold.forward(LAYERS, s[2], s[3], KIND[0]),
    "triangle rstd": lambda s, _: triangle_fold.rstd(s[0], s[1] ** 2, s[2], KIND[0]),
    "triangle project": lambda s, t: triangle.project(*_flat(s), turns=t),
    "triangle output": lambda s, t: triangle.output(*_square(s), True, True, turns=t),
    "triangle output backward": lambda s, t: triangle_output_backward.output(
        *_square(s), has_factor=True, turns=t
    ),
    "triangle center backward": lambda s, t: triangle_output_backward.center(
        *_flat(s), slopes=1, turns=t
    ),
    "triangle project backward": lambda s, t: triangle_backward.project(*_flat(s), turns=t),
    "triangle norm backward": lambda s, _: triangle_backward.norm(
        s[0] * s[1] ** 2, s[2], *KIND, residual=True
    ),
    "triangle fold backward": lambda s, _: triangle_fold.backward(LAYERS, s[2], s[3], KIND[0]),
}
FIXED = {
    name for name in LAUNCHES if name.split()[1] in ("fold", "rstd", "norm")
}  # have no sizes to choose


def inputs(kernel: str, shape: SHAPE) -> list[Array]:
    """What a kernel takes; any float32 array is drawn as a mask is."""
    b, n, c, h = shape
    pair, mask, factor, *w = triangle_arrays(*shape).values()
    p, wide = b * n * n, 4 * h + c
    hidden: Array = "normal", (b, h, n * n)
    number: Array = "mask", (p,)
    folded: list[Array] = [("weights", (c, wide)), ("mask", (wide,))]
    output: list[Array] = [("weights", (h, c)), ("mask", (c,))]
    return {
        "triangle fold": stacked(w),
        "triangle rstd": [pair],
        "triangle project": [pair, mask, number, *folded],
        "triangle output": [hidden, pair, factor, number, *folded, *output],
        "triangle output backward": [
            *(pair, hidden, pair, factor, number, number),
            *(*folded, *output),
        ],
        "triangle center backward": [pair, hidden, number, number, number, output[0]],
        "triangle project backward": [
            *(pair, mask, number, hidden, hidden, *folded),
            ("normal", (wide, p)),
        ],
        "triangle norm backward": [pair, pair, pair],
        "triangle fold backward": stacked(
            [*folded, *output, *(w[i] for i in triangle_fold.WITHOUT_BIASES)]
        ),
    }[kernel]


def stacked(arrays: Sequence[Array]) -> list[Array]:
    """With an axis of layers."""
    return [(kind, (LAYERS, *shape)) for kind, shape in arrays]


def candidates(shapes: list[SHAPE]) -> Iterator[tuple[str, SHAPE, Turns]]:
    """Sizes worth trying, for each kernel that has any, and shape."""
    yield from itertools.product((x for x in LAUNCHES if x not in FIXED), shapes, TURNS)
