"""Benchmarks of single operations other than attention, at the shapes of ``initial_training``."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from jaxfold import ops as jax_ops
from jaxfold import projections as jax_projections
from parity import peers
from parity.benchmark import Benchmark
from torchfold import ops as torch_ops
from torchfold import projections as torch_projections

# what an array holds: normal numbers, weights of projections, or zeros and ones in float32
Array = tuple[str, tuple[int, ...]]
NORMS = ((65536, 128), (32768, 256), (262144, 64), (256, 384))
BEST = {"65536x128": (0.008, 0.042)}  # of LayerNorm; see Benchmark
BIASES = ((256, 128, 8), (384, 128, 8))  # residues, channels, heads
TRANSITIONS = (("pair", 65536, 128, 512), ("msa", 32768, 256, 1024), ("extra msa", 262144, 64, 256))
OUTER = (("msa", 128, 256, 32, 128), ("extra msa", 1024, 256, 32, 128))  # sequences, residues, c, z
TRIANGLES = ((1, 256, 128, 128), (4, 256, 64, 64), (1, 384, 128, 128))  # b, residues, c, hidden
# positions, channels before and after, axis along which dropout is the same (0: no dropout)
UPDATES = (
    ("msa row", (1, 128, 256), 256, 256, 1),
    ("pair starting", (1, 256, 256), 128, 128, 1),
    ("pair ending", (1, 256, 256), 128, 128, 2),
    ("msa column", (1, 128, 256), 256, 256, 0),
    ("extra msa row", (1, 1024, 256), 64, 64, 1),
    ("template", (4, 256, 256), 64, 64, 1),
)
# sequences, residues, heads, width; templates, residues, heads, width
GLOBAL = (1024, 256, 8, 8)
TEMPLATES = (4, 256, 4, 16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(arrays: dict[str, Array]) -> dict[str, Tensor]:
    """Fresh random arrays in bfloat16; masks stay in float32."""
    made = {}
    for name, (kind, shape) in arrays.items():
        x = torch.randn(shape, device=DEVICE)
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


def bias_arrays(n: int, c: int, h: int) -> dict[str, Array]:
    """The arrays of a bias of pairs."""
    _, scale, offset = norm_arrays(1, c).values()
    pair: Array = "normal", (1, n, n, c)
    return {"pair": pair, "scale": scale, "offset": offset, "weights": ("weights", (c, h))}


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


def update_arrays(table: tuple[int, int, int], k: int, c: int, shared: int) -> dict[str, Array]:
    """The arrays of an output projection with dropout and residual."""
    arrays: dict[str, Array] = {
        "x": ("normal", (*table, c)),
        "y": ("normal", (*table, k)),
        "weights": ("weights", (k, c)),
        "bias": ("normal", (c,)),
    }
    factor = [*table, c]
    factor[shared] = 1
    return arrays | ({"factor": ("mask", tuple(factor))} if shared else {})


def global_arrays(s: int, r: int, h: int, d: int) -> dict[str, Array]:
    """The arrays of attention with one query a column."""
    return {
        "query": ("normal", (1, r, h, d)),
        "projected": ("normal", (1, s, r, (2 + h) * d)),
        "gate_bias": ("normal", (h, d)),
        "mask": ("mask", (1, s, r)),
    }


def template_arrays(t: int, r: int, h: int, d: int) -> dict[str, Array]:
    """The arrays of attention to templates."""
    return {
        "query": ("normal", (1, r, r, h, d)),
        "projected": ("normal", (1, t, r, r, 2, h, d)),
        "mask": ("mask", (1, t)),
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
    """Each operation with its peers."""
    for n, c in NORMS:
        shape = f"{n}x{c}"
        yield _benchmark("layer_norm", shape, norm_arrays(n, c), (0, 0), best=BEST.get(shape))
    for n, c, h in BIASES:
        shape, forward = f"{n}x{n}x{c}x{h}", 2 * n * n * c * h
        yield _benchmark("pair_bias", shape, bias_arrays(n, c, h), (forward, 2 * forward))
    for name, table, k, c, shared in UPDATES:
        rows = table[0] * table[1] * table[2]
        shape, forward = f"{name} {rows}x{k}x{c}", 2 * rows * k * c
        arrays, options = update_arrays(table, k, c, shared), {"residual": True}
        yield _benchmark("linear_update", shape, arrays, (forward, 2 * forward), options)
    for name, s, n, c, z in OUTER:
        forward = 2 * n * n * c * c * (s + z)
        shape, arrays = f"{name} {s}x{n}x{c}x{c}x{z}", outer_arrays(s, n, c, z)
        yield _benchmark("outer_product_mean", shape, arrays, (forward, 2 * forward))
    yield from _attentions()
    for b, n, c, h in TRIANGLES[1:]:  # that of the pairs is a module of its own
        forward = 2 * b * n * n * (5 * c * h + c * c + n * h)
        shape, options = f"{b}x{n}x{n}x{c}", {"outgoing": True, "residual": True}
        arrays = triangle_arrays(b, n, c, h)
        yield _benchmark("triangle_multiplication", shape, arrays, (forward, 2 * forward), options)


def _first(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    return function(*arrays, **options)[0]


def _attentions() -> Iterator[Benchmark]:
    """With one query a column, and from a pair to its templates: no matrix products to speak of."""
    s, n, h, d = GLOBAL
    title, arrays = f"{s}x{n} {h}x{d}", global_arrays(*GLOBAL)
    yield _benchmark("global_attention", title, arrays, (0, 0), {"axis": 1, "scale": d**-0.5})
    t, n, h, d = TEMPLATES
    title, arrays = f"{t}x{n}x{n} {h}x{d}", template_arrays(*TEMPLATES)
    yield _benchmark("template_attention", title, arrays, (0, 0), {"scale": d**-0.5})


def _benchmark(
    op: str,
    shape: str,
    arrays: dict[str, Array],
    operations: tuple[float, float],
    options: dict[str, Any] | None = None,
    best: tuple[float, float] | None = None,
) -> Benchmark:
    def version(ops: Any, implementation: str) -> Callable[..., Any]:
        named = (options or {}) | {"implementation": implementation}
        if op == "pair_bias":
            ops = torch_projections if ops is torch_ops else jax_projections
            return functools.partial(_first, ops.pair_bias, **named)
        return functools.partial(getattr(ops, op), **named)

    reference = version(torch_ops, "reference")
    return Benchmark(
        op=op,
        shape=shape,
        draw=functools.partial(draw, arrays),
        reference=reference,
        versions={
            "triton, torch": version(torch_ops, "triton"),
            "torch": reference,
            "torch compiled": peers.compiled(reference),
        },
        jax_versions={
            "triton, JAX": version(jax_ops, "triton"),
            "XLA": version(jax_ops, "reference"),
        },
        differentiable=_names(arrays),
        operations=operations,
        best=best,
    )
