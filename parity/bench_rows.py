"""Benchmarks of kernels other than attention, and sweeps of their launch sizes."""

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
    optimizer,
    outer_product,
    rows,
    transition,
    triangle,
    triangle_backward,
)
from foldcore.kernels.launch import Launch
from foldcore.kernels.layer_norm import Sizes
from foldcore.kernels.rows import Tiles
from parity.benchmark import Benchmark, Cost
from torchfold import ops as torch_ops
from torchfold._triton import call

# what an array holds: normal numbers, weights of projections, or zeros and ones in float32
Array = tuple[str, tuple[int, ...]]
NORMS = ((65536, 128), (32768, 256), (262144, 64), (256, 384))
TRANSITIONS = (("pair", 65536, 128, 512), ("msa", 32768, 256, 1024), ("extra msa", 262144, 64, 256))
PARAMETERS = 93_200_000
OUTER = (("msa", 128, 256, 32, 128), ("extra msa", 1024, 256, 32, 128))  # sequences, residues, c, z
TRIANGLES = ((1, 256, 128, 128), (4, 256, 64, 64), (1, 384, 128, 128))  # b, residues, c, hidden


def draw(arrays: dict[str, Array]) -> dict[str, Tensor]:
    """Fresh random arrays in bfloat16; masks stay in float32."""
    made = {}
    for name, (kind, shape) in arrays.items():
        x = torch.randn(shape, device="cuda")
        if kind == "mask":
            made[name] = (x > -1).float()
        else:
            made[name] = (x * shape[0] ** -0.5 if kind == "weights" else x).bfloat16()
    return made


def _names(arrays: dict[str, Array]) -> tuple[str, ...]:
    return tuple(name for name, (kind, _) in arrays.items() if kind != "mask")


def norm_arrays(n: int, c: int) -> dict[str, Array]:
    """The arrays of a layer normalisation."""
    return {"x": ("normal", (n, c)), "scale": ("normal", (c,)), "offset": ("normal", (c,))}


def transition_arrays(n: int, c: int, f: int) -> dict[str, Array]:
    """The arrays of a transition."""
    hidden: dict[str, Array] = {"weights1": ("weights", (c, f)), "bias1": ("normal", (f,))}
    output: dict[str, Array] = {"weights2": ("weights", (f, c)), "bias2": ("normal", (c,))}
    return norm_arrays(n, c) | hidden | output


def triangle_arrays(b: int, n: int, c: int, h: int) -> dict[str, Array]:
    """The arrays of a triangle multiplication."""
    arrays: dict[str, Array] = {
        "pair": ("normal", (b, n, n, c)),
        "pair_mask": ("mask", (b, n, n)),
        "factor": ("mask", (b, 1, n, c)),
    }
    return arrays | {name: parameter(name, c, h) for name in torch_ops.TriangleParameters._fields}


def outer_arrays(s: int, n: int, c: int, z: int) -> dict[str, Array]:
    """The arrays of an outer product mean."""
    projected: Array = "normal", (1, s, n, c)
    return {
        "left": projected,
        "right": projected,
        "mask": ("mask", (1, s, n)),
        "weights": ("weights", (c, c, z)),
        "bias": ("normal", (z,)),
    }


def parameter(name: str, c: int, h: int) -> Array:
    """What a field of TriangleParameters holds."""
    part, _, kind = name.rpartition("_")
    matrices = {"output": (h, c), "gating": (c, c)}
    if kind in ("scale", "offset"):
        return "normal", ((c if part == "norm" else h),)
    if kind == "bias":
        return "normal", matrices.get(part, (c, h))[1:]
    return "weights", matrices.get(name, (c, h))


def benchmarks() -> Iterator[Benchmark]:
    """Each operation at the shapes of ``initial_training``, with its peers."""
    for n, c in NORMS:
        forward, backward = Cost(4 * n * c, 8 * n * c), Cost(6 * n * c, 12 * n * c)
        yield _benchmark("layer_norm", f"{n}x{c}", norm_arrays(n, c), forward, backward, {})
    for name, n, c, f in TRANSITIONS:
        forward, backward = Cost(4 * n * c, 4 * n * c * f), Cost(6 * n * c, 8 * n * c * f)
        shape, arrays = f"{name} {n}x{c}x{f}", transition_arrays(n, c, f)
        yield _benchmark("transition", shape, arrays, forward, backward, {"residual": True})
    for name, s, n, c, z in OUTER:
        moved, pairs = 4 * s * n * c + 2 * n * n * z, 2 * n * n * c * c
        forward, backward = Cost(moved, pairs * (s + z)), Cost(2 * moved, 2 * pairs * (s + z))
        shape, arrays = f"{name} {s}x{n}x{c}x{c}x{z}", outer_arrays(s, n, c, z)
        yield _benchmark("outer_product_mean", shape, arrays, forward, backward, {})
    for (b, n, c, h), outgoing in itertools.product(TRIANGLES, (True, False)):
        p = b * n * n
        operations = 2 * p * (5 * c * h + c * c + n * h)
        forward, backward = Cost(4 * p * c, operations), Cost(6 * p * c, 2 * operations)
        shape = f"{b}x{n}x{n}x{c} {'outgoing' if outgoing else 'incoming'}"
        options = {"outgoing": outgoing, "residual": True}
        arrays = triangle_arrays(b, n, c, h)
        yield _benchmark("triangle_multiplication", shape, arrays, forward, backward, options)


def _benchmark(
    op: str,
    shape: str,
    arrays: dict[str, Array],
    forward: Cost,
    backward: Cost,
    options: dict[str, Any],
) -> Benchmark:
    from jaxfold import ops as jax_ops

    def version(ops: Any, implementation: str) -> Callable[..., Any]:
        return functools.partial(getattr(ops, op), **options, implementation=implementation)

    reference = version(torch_ops, "reference")
    return Benchmark(
        op=op,
        shape=shape,
        draw=functools.partial(draw, arrays),
        differentiable=_names(arrays),
        reference=reference,
        versions={
            "triton, torch": version(torch_ops, "triton"),
            "torch": reference,
            "torch compiled": torch.compile(reference),
        },
        forward=forward,
        backward=backward,
        jax_versions={
            "triton, JAX": version(jax_ops, "triton"),
            "XLA": version(jax_ops, "reference"),
        },
    )


# Launch sizes -------------------------------------------------------------------------------------

KIND = ("bfloat16", 90)  # dtype and architecture


@dataclass(frozen=True)
class Candidate:
    """One way to launch one kernel, at a shape as the functions of its arrays take it."""

    kernel: str
    shape: tuple[int, ...]
    tiles: Tiles | Sizes | optimizer.Sizes

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
        if "backward" not in self.kernel:
            return None
        n, m = outputs[-1].shape
        return call(rows.column_sums(n, m, *KIND), outputs[-1])


def _kind(shape: tuple[int, ...]) -> tuple[int, int, int, int, str, int]:
    """What a launch of a triangle's first part is told."""
    b, n, c, h = shape
    return b, n * n, c, h, *KIND


def _output_kind(
    shape: tuple[int, ...],
) -> tuple[int, tuple[int, int], int, int, str, int]:
    b, n, c, h = shape
    return b, (n, n), c, h, *KIND


def _outer_shape(shape: tuple[int, int, int]) -> outer_product.Shape:
    n, c, z = shape
    return outer_product.Shape(n, n, c, c, z)


LAUNCHES: dict[str, Callable[[Any, Any], Launch]] = {
    "norm forward": lambda s, t: layer_norm.forward(s[0], s[1], *KIND, t),
    "norm backward": lambda s, t: layer_norm.backward(s[0], s[1], *KIND, sizes=t),
    "transition forward": lambda s, t: transition.forward(s[0], s[1], s[2], *KIND, True, t),
    "transition backward": lambda s, t: transition.backward(s[0], s[1], s[2], *KIND, t),
    "optimizer": lambda s, t: optimizer.update(s[0], OptimizerConfig(), KIND[1], t),
    "outer project": lambda s, t: outer_product.project(_outer_shape(s), *KIND, t),
    "outer gradient backward": lambda s, t: outer_product.gradient(_outer_shape(s), *KIND, t),
    "outer weights backward": lambda s, t: outer_product.weights(_outer_shape(s), *KIND, t),
    "triangle project": lambda s, t: triangle.project(*_kind(s), tiles=t),
    "triangle output": lambda s, t: triangle.output(
        *_output_kind(s), has_factor=True, residual=True, tiles=t
    ),
    "triangle output backward": lambda s, t: triangle_backward.output_backward(
        *_output_kind(s), has_factor=True, tiles=t
    ),
    "triangle project backward": lambda s, t: triangle_backward.project_backward(
        *_kind(s), tiles=t
    ),
}


def _norm_inputs(shape: tuple[int, int]) -> list[Array]:
    return list(norm_arrays(*shape).values())


def _norm_backward_inputs(shape: tuple[int, int]) -> list[Array]:
    x, scale, _ = _norm_inputs(shape)
    return [x, scale, x, x]


def _transition_inputs(shape: tuple[int, int, int]) -> list[Array]:
    return list(transition_arrays(*shape).values())


def _transition_backward_inputs(shape: tuple[int, int, int]) -> list[Array]:
    x, *parameters, _ = _transition_inputs(shape)
    return [x, x, *parameters]


def _optimizer_inputs(shape: tuple[int]) -> list[Array]:
    buffer: Array = "mask", shape
    return [buffer, buffer, buffer, buffer, buffer, ("mask", (6,))]


def _outer_inputs(kernel: str, shape: tuple[int, int, int]) -> list[Array]:
    n, c, z = shape
    outer: Array = "normal", (n, c, n, c)
    dsum: Array = "normal", (n * n, z)
    count: Array = "mask", (n * n,)
    weights, bias = list(outer_arrays(1, n, c, z).values())[3:]
    return {
        "project": [outer, weights, bias, count],
        "gradient": [dsum, weights, count],
        "weights": [outer, dsum],
    }[kernel]


def _triangle_inputs(kernel: str, shape: tuple[int, int, int, int]) -> list[Array]:
    b, n, _, h = shape
    pair, mask, factor, *w = triangle_arrays(*shape).values()
    first = ("normal", (b, h, n * n))
    before, after = w[:10], [*w[10:14], *w[:2], *w[14:]]
    return {
        "project": [pair, mask, *before],
        "output": [first, pair, factor, *after],
        "output backward": [pair, first, pair, factor, *after],
        "project backward": [pair, mask, first, first, *before],
    }[kernel]


INPUTS: dict[str, Callable[[Any], list[Array]]] = {
    "norm forward": _norm_inputs,
    "norm backward": _norm_backward_inputs,
    "transition forward": _transition_inputs,
    "transition backward": _transition_backward_inputs,
    "optimizer": _optimizer_inputs,
    "outer project": lambda s: _outer_inputs("project", s),
    "outer gradient backward": lambda s: _outer_inputs("gradient", s),
    "outer weights backward": lambda s: _outer_inputs("weights", s),
    "triangle project": lambda s: _triangle_inputs("project", s),
    "triangle output": lambda s: _triangle_inputs("output", s),
    "triangle output backward": lambda s: _triangle_inputs("output backward", s),
    "triangle project backward": lambda s: _triangle_inputs("project backward", s),
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
        "triangle": list(TRIANGLES[:2]),
        "outer": [(n, c, z) for _, _, n, c, z in OUTER[:1]],
        "norm": [],
        "optimizer": [],
    }
    for kernel in LAUNCHES:
        kind = kernel.split()[0]
        tiles = OUTER_TILES if kind == "outer" else TILES
        for where, tile in itertools.product(shapes[kind], tiles):
            yield Candidate(kernel, where, Tiles(*tile))
