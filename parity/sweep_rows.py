"""Launch sizes worth trying, of kernels other than attention; see ``parity.sweep``."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foldcore.config import OptimizerConfig
from foldcore.kernels import (
    layer_norm,
    linear_update,
    norm_project,
    optimizer,
    outer_product,
    rows,
    transition,
    transition_backward,
    transition_layers,
)
from foldcore.kernels.launch import Launch
from foldcore.kernels.layer_norm import Sizes
from foldcore.kernels.rows import Tiles
from foldcore.kernels.turns import Turns
from parity import sweep_global, sweep_projections, sweep_triangle
from parity.bench_rows import (
    GLOBAL,
    NORMS,
    OUTER,
    TEMPLATES,
    TRANSITIONS,
    TRIANGLES,
    UPDATES,
    Array,
    draw,
    norm_arrays,
    outer_arrays,
    transition_arrays,
    update_arrays,
)
from parity.bench_state import PARAMETERS
from torchfold._triton import call

KIND = ("bfloat16", 90)  # dtype and architecture


@dataclass(frozen=True)
class Candidate:
    """One way to launch one kernel, at a shape as the functions of its arrays take it."""

    kernel: str
    shape: tuple[int, ...]
    # None: those in use
    tiles: Tiles | Sizes | Turns | norm_project.Sizes | optimizer.Sizes | sweep_global.Sizes | None

    @property
    def label(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.shape))}"

    def launch(self) -> Launch:
        return LAUNCHES[self.kernel](self.shape, self.tiles)

    def input_dtypes(self) -> list[torch.dtype]:
        kinds = [kind for kind, _ in INPUTS[self.kernel](self.shape)]
        return [torch.float32 if kind == "mask" else torch.bfloat16 for kind in kinds]

    def draw_inputs(self) -> list[Tensor]:
        arrays = {str(i): array for i, array in enumerate(INPUTS[self.kernel](self.shape))}
        return list(draw(arrays).values())

    def finish(self, outputs: tuple[Tensor, ...]) -> object:
        """The sums of gradients of vectors, of which there are as many as tiles."""
        if "backward" not in self.kernel or outputs[-1].dtype != torch.float32:
            return None
        n, m = outputs[-1].shape
        return call(rows.column_sums(n, m, *KIND), outputs[-1])


def _update_kind(
    shape: tuple[int, int, int, int],
) -> tuple[linear_update.Shape, int, int, str, int]:
    i, j, k, c = shape
    return linear_update.Shape(1, i, j, shared=1), k, c, *KIND


def _outer_shape(shape: tuple[int, int, int]) -> outer_product.Shape:
    n, c, z = shape
    return outer_product.Shape(n, n, c, c, z)


LAUNCHES: dict[str, Callable[[Any, Any], Launch]] = {
    "norm forward": lambda s, t: layer_norm.forward(s[0], s[1], *KIND, t or layer_norm.FORWARD),
    "norm backward": lambda s, t: layer_norm.backward(
        s[0], s[1], *KIND, sizes=t or layer_norm.BACKWARD
    ),
    "transition forward": lambda s, t: transition.forward(s[0], s[1], s[2], *KIND, True, t),
    "transition hidden": lambda s, t: transition_layers.hidden(s[0], s[1], s[2], *KIND, t),
    "transition second": lambda s, t: transition_layers.second(s[0], s[1], s[2], *KIND, True, t),
    "transition mask backward": lambda s, t: transition_backward.mask(s[0], s[1], s[2], *KIND, t),
    "transition norm backward": lambda s, t: transition_backward.norm(
        s[0], s[1], *KIND, True, t or transition_backward.NORM
    ),
    "update forward": lambda s, t: linear_update.forward(*_update_kind(s), residual=True, tiles=t),
    "update backward": lambda s, t: linear_update.backward(*_update_kind(s), tiles=t),
    "optimizer": lambda s, t: optimizer.update(
        s[0], OptimizerConfig(), KIND[1], True, t or optimizer.MEASURED
    ),
    "outer project": lambda s, t: outer_product.project(_outer_shape(s), *KIND, True, t),
    "outer gradient backward": lambda s, t: outer_product.gradient(_outer_shape(s), *KIND, t),
    "outer weights backward": lambda s, t: outer_product.weights(_outer_shape(s), *KIND, t),
    **sweep_triangle.LAUNCHES,
    **sweep_projections.LAUNCHES,
    **sweep_global.LAUNCHES,
}


def _norm_inputs(shape: tuple[int, int]) -> list[Array]:
    return list(norm_arrays(*shape).values())


def _norm_backward_inputs(shape: tuple[int, int]) -> list[Array]:
    x, scale, _ = _norm_inputs(shape)
    return [x, scale, x, x]


def _transition_inputs(kernel: str, shape: tuple[int, int, int]) -> list[Array]:
    x, scale, offset, weights1, bias1, weights2, bias2 = transition_arrays(*shape).values()
    hidden: Array = "normal", (shape[0], shape[2])
    return {
        "forward": [x, scale, offset, weights1, bias1, weights2, bias2],
        "hidden": [x, weights1, bias1],
        "second": [hidden, weights2, bias2, x],
        "mask backward": [x, hidden, weights2],
        "norm backward": [x, scale, offset, x, x],
    }[kernel]


def _update_inputs(shape: tuple[int, int, int, int]) -> list[Array]:
    i, j, k, c = shape
    x, y, weights, bias, factor = update_arrays((1, i, j), k, c, 1).values()
    return [y, weights, bias, x, factor]


def _update_backward_inputs(shape: tuple[int, int, int, int]) -> list[Array]:
    _, weights, _, x, factor = _update_inputs(shape)
    return [x, weights, factor]


def _optimizer_inputs(shape: tuple[int]) -> list[Array]:
    buffer: Array = "mask", shape
    return [buffer, buffer, buffer, buffer, buffer, ("normal", shape), ("mask", (6,))]


def _outer_inputs(kernel: str, shape: tuple[int, int, int]) -> list[Array]:
    n, c, z = shape
    outer: Array = "normal", (n, c, n, c)
    dsum: Array = "normal", (n * n, z)
    count: Array = "mask", (n * n,)
    weights, bias = list(outer_arrays(1, n, c, z).values())[3:]
    return {
        "project": [outer, weights, bias, count, dsum],
        "gradient": [dsum, weights, count],
        "weights": [outer, dsum],
    }[kernel]


INPUTS: dict[str, Callable[[Any], list[Array]]] = {
    "norm forward": _norm_inputs,
    "norm backward": _norm_backward_inputs,
    **{
        f"transition {name}": functools.partial(_transition_inputs, name)
        for name in ("forward", "hidden", "second", "mask backward", "norm backward")
    },
    "update forward": _update_inputs,
    "update backward": _update_backward_inputs,
    "optimizer": _optimizer_inputs,
    "outer project": lambda s: _outer_inputs("project", s),
    "outer gradient backward": lambda s: _outer_inputs("gradient", s),
    "outer weights backward": lambda s: _outer_inputs("weights", s),
    **{
        name: functools.partial(module.inputs, name)
        for module in (sweep_triangle, sweep_projections, sweep_global)
        for name in module.LAUNCHES
    },
}


# lines, columns, warps, stages
TILES = (
    (64, 32, 4, 1),
    (64, 32, 4, 2),
    (64, 64, 4, 1),
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (64, 128, 8, 1),
    (128, 32, 8, 1),
    (128, 32, 8, 2),
    (128, 32, 8, 3),
    (128, 64, 8, 1),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 1),
)
OUTER_TILES = (
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 3),
    (64, 128, 8, 3),
    (64, 128, 8, 4),
    (128, 32, 8, 3),
    (128, 64, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
    (256, 32, 8, 3),
    (256, 64, 8, 3),
)


def _tiles(kernel: str) -> Iterator[Tiles | Sizes | Turns]:
    if kernel in ("transition hidden", "transition mask backward"):
        yield from sweep_triangle.TURNS
    elif kernel == "transition norm backward":
        for elements, groups in itertools.product((2048, 4096), (132, 264, 528)):
            yield Sizes(elements, elements // 512, groups)
    else:
        for tile in OUTER_TILES if kernel.startswith("outer") else TILES:
            yield Tiles(*tile)


def candidates() -> Iterator[Candidate]:
    """Sizes worth trying, for each kernel and shape."""
    for shape in NORMS[:3]:
        for elements, warps in itertools.product((2048, 4096, 8192), (4, 8)):
            yield Candidate("norm forward", shape, Sizes(elements, warps))
        for elements, groups in itertools.product((4096, 8192, 16384), (132, 256, 512)):
            yield Candidate("norm backward", shape, Sizes(elements, elements // 2048, groups))
    for elements, groups, warps in itertools.product((1024, 2048, 4096), (528, 1056, 2112), (4, 8)):
        yield Candidate("optimizer", (PARAMETERS,), optimizer.Sizes(elements, groups, warps))
    shapes: dict[str, list[tuple[int, ...]]] = {
        "transition": [(n, c, f) for _, n, c, f in TRANSITIONS],
        "triangle": [],
        "outer": [(n, c, z) for _, _, n, c, z in OUTER[:1]],
        "update": [(i, j, k, c) for _, (_, i, j), k, c, _ in UPDATES[:2]],
        "norm": [],
        "optimizer": [],
        "pairs": [],
        "sides": [],
        "global": [],
        "template": [],
    }
    for kernel in LAUNCHES:
        kind = kernel.split()[0]
        for where, tile in itertools.product(shapes[kind], _tiles(kernel)):
            yield Candidate(kernel, where, tile)
    for triangle in sweep_triangle.candidates(list(TRIANGLES[:2])):
        yield Candidate(*triangle)
    for projection in sweep_projections.candidates():
        yield Candidate(*projection)
    for attention in sweep_global.candidates():
        yield Candidate(*attention)


def in_use() -> Iterator[Candidate]:
    """Every kernel at the shapes of the model, with the sizes that it has."""
    shapes: dict[str, list[tuple[int, ...]]] = {
        "norm": list(NORMS[:3]),
        "transition": [(n, c, f) for _, n, c, f in TRANSITIONS],
        "triangle": list(TRIANGLES[:2]),
        "outer": [(n, c, z) for _, _, n, c, z in OUTER[:1]],
        "update": [(i, j, k, c) for _, (_, i, j), k, c, shared in UPDATES[:-1] if shared == 1],
        "optimizer": [(PARAMETERS,)],
        **{kind: list(given) for kind, given in sweep_projections.SHAPES.items()},
        "global": [GLOBAL],
        "template": [TEMPLATES],
    }
    for kernel in LAUNCHES:
        for shape in shapes[kernel.split()[0]]:
            yield Candidate(kernel, shape, None)
