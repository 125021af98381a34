"""Kernels of norms with narrow projections for ``parity.sweep_rows``, as ``sweep_triangle``."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from foldcore.kernels import norm_project, norm_project_backward
from foldcore.kernels.launch import Launch
from foldcore.kernels.norm_project import Pairs, Sizes
from parity.bench_rows import Array

KIND = ("bfloat16", 90)  # dtype and architecture
Shape = tuple[int, ...]
# examples, residues, channels, heads, axis of attention; rows of an MSA, channels, those of a side
PAIRS = ((1, 256, 128, 8, 2), (1, 256, 128, 4, 2), (1, 256, 128, 4, 1), (4, 256, 64, 4, 1))
SIDES = ((32768, 256, 32), (262144, 64, 32))
# rows, warps, programs on a multiprocessor, tiles ahead
SIZES = [
    Sizes(*sizes)
    for sizes in itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 4, 7), (1, 2, 3))
    if sizes[0] <= 16 * sizes[1]  # registers
]


def _pairs(shape: Shape) -> Pairs:
    b, n, c, h, axis = shape
    return Pairs.of((b, n, n, c), h, axis)


def _alone(shape: Shape) -> bool:
    """Whether nothing needs the normalised pairs but the bias: of an MSA's eight heads."""
    return shape[3] == PAIRS[0][3]


LAUNCHES: dict[str, Callable[[Any, Any], Launch]] = {
    "pairs bias": lambda s, t: norm_project.pair_bias(
        _pairs(s), *KIND, normal=not _alone(s), sizes=t
    ),
    "pairs bias backward": lambda s, t: norm_project_backward.pair_bias(
        _pairs(s), *KIND, normal=not _alone(s), residual=True, sizes=t
    ),
    "sides of outer product": lambda s, t: norm_project.outer_product_sides(
        s[0], s[1], s[2], *KIND, sizes=t
    ),
    "sides of outer product backward": lambda s, t: norm_project_backward.outer_product_sides(
        s[0], s[1], s[2], *KIND, residual=True, sizes=t
    ),
}
SHAPES: dict[str, tuple[Shape, ...]] = {"pairs": PAIRS, "sides": SIDES}


def inputs(kernel: str, shape: Shape) -> list[Array]:
    """What a kernel takes; the gradients have the sizes of what they are gradients of."""
    if kernel.startswith("pairs"):
        b, n, c, h, _ = shape
        x: Array = "normal", (b * n * n, c)
        bias: Array = "normal", (b, h, n, n)
        given: list[Array] = [x, ("normal", (c,)), ("normal", (c,)), ("weights", (c, h))]
        return [*given, bias, x, x] if kernel.endswith("backward") else given
    rows, c, e = shape
    x, vector, weights, side = (
        ("normal", (rows, c)),
        ("normal", (c,)),
        ("weights", (c, e)),
        ("normal", (rows, e)),
    )
    given = [x, ("mask", (rows,)), vector, vector]
    if kernel.endswith("backward"):
        return [*given, weights, weights, side, side, x]
    return [*given, weights, ("normal", (e,)), weights, ("normal", (e,))]


def candidates() -> Iterator[tuple[str, Shape, Sizes]]:
    """Sizes worth trying, for each kernel and shape."""
    for kernel in LAUNCHES:
        yield from itertools.product((kernel,), SHAPES[kernel.split()[0]], SIZES)
