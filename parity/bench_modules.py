"""Benchmarks of whole modules: LayerNorm, projections, the operation, output, dropout, residual.

They are the parts of the throughput report at the shapes of ``initial_training``, called as their
parents call them, but for the outer product mean, whose update stays alone. Ours are timed as in a
step, with the weights that a stack derives from the parameters of all its blocks at once (what that
takes is a row of the throughput report); others, and errors, with the parameters.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from flax import nnx
from torch import Tensor, nn
from torch.func import functional_call

import torchfold.params
from foldcore.config import Config
from parity import peers
from parity.benchmark import Benchmark, Timed, Version
from parity.derived import InJax, in_torch
from parity.module_run import _load_in_jax, abstract
from parity.throughput import read_config
from parity.throughput_modules import TRIANGLES, Part, draw_parameters, parts, shapes
from parity.tracks import JAX, TORCH, using
from torchfold.ops import TriangleParameters
from torchfold.stack import Deriving

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what a module takes; the first of these is what its update is added to
TAKES = {
    "MSA row attention": ("rows", "pair", "rows_mask", "rows_factor"),
    "MSA column attention": ("rows", "rows_mask"),
    "MSA transition": ("rows",),
    "outer product mean": ("rows", "rows_mask"),
    **{name: ("pair", "pair_mask", factor) for name, factor in TRIANGLES.items()},
    "pair transition": ("pair",),
    "extra MSA row attention": ("extra", "pair", "extra_msa_mask", "extra_factor"),
    "extra MSA column attention": ("extra", "extra_msa_mask"),
    "extra MSA transition": ("extra",),
    "extra outer product mean": ("extra", "extra_msa_mask"),
}
# see Benchmark
BEST = {
    "MSA row attention": (0.26, 1.12),
    "MSA column attention": (0.33, 0.98),
    "MSA transition": (0.14, 0.43),
    "outer product mean": (0.21, 0.60),
    "triangle multiplication outgoing": (0.06, 0.32),
    "triangle multiplication incoming": (0.06, 0.32),
    "triangle attention starting node": (0.25, 1.10),
    "triangle attention ending node": (0.25, 1.10),
    "pair transition": (0.12, 0.41),
}


def benchmarks(config: Config | None = None) -> Iterator[Benchmark]:
    """Each module of a block, with its peers."""
    config = config or read_config("initial_training", [])
    for part in parts(config):
        if part.name in TAKES:
            yield _Whole(part, config).benchmark()
        if "triangle multiplication" in part.name:
            yield _Whole(part, config, alone=True).benchmark()


@dataclass(frozen=True)
class _Whole:
    """A module as functions of its parameters, by DeepMind's names, and then its inputs.

    ``alone``: what others' modules compute, the update without dropout and residual.
    """

    part: Part
    config: Config
    alone: bool = False

    @property
    def takes(self) -> tuple[str, ...]:
        takes = TAKES[self.part.name]
        return tuple(x for x in takes if not (self.alone and x.endswith("_factor")))

    @property
    def options(self) -> dict[str, bool]:
        return {} if self.alone or "outer" in self.part.name else {"residual": True}

    @functools.cached_property
    def parameters(self) -> list[str]:
        return sorted(self.part.module.shapes())

    def benchmark(self) -> Benchmark:
        outgoing = self.part.name.endswith("outgoing")
        others = {}
        if "triangle multiplication" in self.part.name and not self.alone:
            others["cuEquivariance"] = self.cuequivariance(outgoing)
        given = [name for name in self.takes if not name.endswith(("_mask", "_factor"))]
        return Benchmark(
            op=self.part.name,
            shape="update alone, module" if self.alone else "module",
            draw=self.draw,
            reference=self.in_torch("reference"),
            versions={
                "triton, torch": self.in_torch("triton"),
                "torch": self.in_torch("reference"),
                "torch compiled": self.in_torch("reference", peers.compiled),
                **others,
            },
            jax_versions={"triton, JAX": self.in_jax("triton"), "XLA": self.in_jax("reference")},
            differentiable=(*self.parameters, *given),
            operations=(self.part.operations, 2 * self.part.operations),
            best=BEST.get(self.part.name),
            timed=self.timed() if self.derives else {},
        )

    @property
    def derives(self) -> bool:
        (module,) = abstract(TORCH, self.part.module).values()
        return any(isinstance(part, Deriving) for part in module.modules())

    def timed(self, implementation: str = "triton") -> dict[str, Timed]:
        """Ours with weights that a stack has derived."""
        both = ("triton, torch", TORCH, _TorchInStack), ("triton, JAX", JAX, _JaxInStack)
        found = {}
        for name, track, make in both:
            module: Any = make(self)
            steps = (using(track, implementation, f) for f in (module.arrays, module.version))
            found[name] = Timed(*steps)
        return found

    def draw(self) -> dict[str, Tensor]:
        """Parameters and activations in bfloat16; masks and factors in float32."""
        arrays: dict[str, Tensor] = {}
        for name, values in draw_parameters(self.part).items():
            arrays[name] = torch.tensor(values, device=DEVICE).bfloat16()
        for name, shape in ((n, shapes(self.config)[n]) for n in self.takes):
            x = torch.randn(shape, device=DEVICE)
            rare = name.endswith(("_mask", "_factor"))
            arrays[name] = (x > -1).float() if rare else x.bfloat16()
        return arrays

    def in_torch(
        self, implementation: str, around: Callable[[Version], Version] = lambda function: function
    ) -> Version:
        """``around`` turns the function of plain operations into another."""
        (module,) = abstract(TORCH, self.part.module).values()
        places, options = self.places(module), self.options

        def run(*arrays: Tensor) -> Tensor:
            values = dict(zip(places, arrays, strict=False))
            return functional_call(module, values, arrays[len(places) :], options)

        return using(TORCH, implementation, around(run))

    def places(self, module: nn.Module) -> list[str]:
        """PyTorch's paths of the parameters, in order."""
        paths = {id(x): path for path, x in module.named_parameters()}
        own = {name: paths[id(x)] for name, x in torchfold.params.parameters(module).items()}
        return [own[name.removeprefix("module: ")] for name in self.parameters]

    def in_jax(self, implementation: str) -> Version:
        graph, state = nnx.split(abstract(JAX, self.part.module))

        def run(*arrays: Any) -> Any:
            modules = nnx.merge(graph, state)
            _load_in_jax(modules, dict(zip(self.parameters, arrays, strict=False)))
            (module,) = modules.values()
            return module(*arrays[len(self.parameters) :], **self.options)

        return using(JAX, implementation, run)

    def cuequivariance(self, outgoing: bool) -> Version:
        """The peer of triangle multiplication."""
        update, parameters = peers.triangle_multiplication(outgoing), self.parameters

        def run(*arrays: Tensor) -> Tensor:
            named = dict(zip(parameters, arrays, strict=False))
            own = {ours: named[f"module: {theirs}"] for ours, theirs in FIELDS.items()}
            return update(*arrays[len(parameters) :], SimpleNamespace(**own))

        return run


class _TorchInStack:
    """A module of PyTorch as a function of what it derives, and of its inputs."""

    def __init__(self, whole: _Whole) -> None:
        self._whole = whole
        (self._module,) = abstract(TORCH, whole.part.module).values()
        self._paths: list[str] = []

    def arrays(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = self._whole
        places = zip(whole.places(self._module), whole.parameters, strict=True)
        found = in_torch(self._module, {place: arrays[name] for place, name in places})
        self._paths = list(found)
        return found | {name: arrays[name] for name in whole.takes}

    def version(self, *arrays: Tensor) -> Tensor:
        values, count = dict(zip(self._paths, arrays, strict=False)), len(self._paths)
        return functional_call(self._module, values, arrays[count:], self._whole.options)


class _JaxInStack:
    """The same of JAX."""

    def __init__(self, whole: _Whole) -> None:
        self._whole = whole

    @functools.cached_property
    def _modules(self) -> InJax:
        return InJax(self._whole.part.module)

    def arrays(self, arrays: dict[str, Any]) -> dict[str, Any]:
        own = {name: arrays[name] for name in self._whole.parameters}
        found = self._modules.arrays(own)
        inputs = {name: arrays[name] for name in self._whole.takes}
        return {f"array {i}": x for i, x in enumerate(found)} | inputs

    def version(self, *arrays: Any) -> Any:
        count = len(arrays) - len(self._whole.takes)
        (module,) = self._modules.modules(list(arrays[:count])).values()
        return module(*arrays[count:], **self._whole.options)


_MODULES = {
    "norm": "layer_norm_input",
    "left": "left_projection",
    "left_gate": "left_gate",
    "right": "right_projection",
    "right_gate": "right_gate",
    "center": "center_layer_norm",
    "output": "output_projection",
    "gating": "gating_linear",
}


def _leaf(field: str) -> str:
    """DeepMind's name of a field of TriangleParameters."""
    module, _, kind = field.rpartition("_")
    if kind not in ("scale", "offset", "bias"):
        module, kind = field, "weights"
    return f"{_MODULES[module]}//{kind}"


FIELDS = {field: _leaf(field) for field in TriangleParameters._fields}
