"""Kernels of attention with one query for ``parity.sweep_rows``: launches, inputs, sizes to try."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from foldcore.kernels import (
    global_attention,
    global_attention_backward,
    group_mean,
    template_attention,
)
from foldcore.kernels.launch import Launch
from foldcore.kernels.rows import Tiles
from parity.bench_rows import GLOBAL, TEMPLATES, Array, global_arrays, template_arrays

KIND = ("bfloat16", 90)  # dtype and architecture
SHAPE = tuple[int, int, int, int]  # sequences or templates, residues, heads, width
Sizes = global_attention.Tiles | group_mean.Sizes | Tiles | template_attention.Sizes


def _problem(shape: SHAPE) -> global_attention.Problem:
    s, r, h, d = shape
    return global_attention.Problem((1, s, r), h, d, 1, d**-0.5, *KIND)


def _templates(shape: SHAPE) -> template_attention.Problem:
    t, r, h, d = shape
    return template_attention.Problem(1, t, r * r, h, d, d**-0.5, *KIND)


def _mean(shape: SHAPE) -> tuple[tuple[int, int, int], int]:
    """The table, and as many channels as all heads have."""
    s, r, h, d = shape
    return (1, s, r), h * d


LAUNCHES: dict[str, Callable[[Any, Any], Launch]] = {
    "global mean": lambda s, t: group_mean.forward(*_mean(s), 1, *KIND, t),
    "global mean gradient": lambda s, t: group_mean.backward(
        *_mean(s), (2 + s[2]) * s[3], 1, *KIND, t
    ),
    "global forward": lambda s, t: global_attention.forward(_problem(s), t),
    "global backward": lambda s, t: global_attention_backward.backward(_problem(s), t),
    "template forward": lambda s, t: template_attention.forward(
        _templates(s), t or template_attention.FORWARD
    ),
    "template gradient": lambda s, t: template_attention.backward(
        _templates(s), t or template_attention.BACKWARD
    ),
}


def inputs(kernel: str, shape: SHAPE) -> list[Array]:
    """What a kernel takes; any float32 array is drawn as a mask is."""
    count, r, h, d = shape
    if kernel.startswith("template"):
        query, projected, mask = template_arrays(*shape).values()
        found = [query, projected, mask]
        return found + [("mask", (1, r * r, h)), query] * (kernel != "template forward")
    query, projected, gate_bias, mask = global_arrays(*shape).values()
    x: Array = "normal", (1, count, r, h * d)
    weights: Array = "weights", (h * d, (2 + h) * d)
    given = [query, projected, gate_bias, mask]
    return {
        "global mean": [x, mask],
        "global mean gradient": [
            *(projected, weights, mask, ("mask", (1, r))),
            ("normal", (1, r, h * d)),
        ],
        "global forward": given,
        "global backward": [*given, ("mask", (1, r, h, d)), ("mask", (1, r, h)), x],
    }[kernel]


def candidates() -> Iterator[tuple[str, SHAPE, Sizes]]:
    """Sizes worth trying, for each kernel."""
    for elements, warps, ahead in itertools.product((4096, 8192, 16384), (4, 8), (1, 2, 3)):
        yield "global mean", GLOBAL, group_mean.Sizes(elements, 64, warps, ahead)
    for rows, warps in itertools.product((64, 128, 256), (4, 8)):
        yield "global mean gradient", GLOBAL, Tiles(rows, 128, warps, 1)
    for keys, rows, warps, ahead in itertools.product(
        (256, 512, 1024), (128, 256), (8, 16), (1, 2, 3)
    ):
        tiles = global_attention.Tiles(keys * 16, rows * 64, warps, ahead)
        yield "global forward", GLOBAL, tiles
    for keys, rows, warps, ahead in itertools.product(
        (128, 256), (32, 64, 128), (8, 16), (1, 2, 3)
    ):
        tiles = global_attention.Tiles(keys * 16, rows * 64, warps, ahead)
        yield "global backward", GLOBAL, tiles
    for kernel in ("template forward", "template gradient"):
        for elements, warps in itertools.product((1024, 2048, 4096), (2, 4, 8)):
            yield kernel, TEMPLATES, template_attention.Sizes(elements, warps)
