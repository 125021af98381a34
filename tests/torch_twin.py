"""The two tracks side by side in float64: the same weights and inputs, outputs and gradients.

A case is written once for both tracks: it gets the modules of one track as ``track.primitives``,
``track.model``, ... A build function makes named modules from them; a call function turns these
modules and named inputs into named outputs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jaxfold.params
import torchfold.params

Arrays = dict[str, np.ndarray]
Named = dict[str, Any]
SAME = 1e-9  # largest difference, relative to the largest value of the array
# each program runs once or twice: compiling it fast matters more than running it fast
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
# several threads wait for each other far longer than such small arrays need
TORCH_THREADS = 1
torch.set_num_threads(TORCH_THREADS)
NOTHING = 1e-11  # where the exact value is zero, such as a gradient by a bias that softmax ignores


class Track:
    """The modules of one package as attributes."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __getattr__(self, name: str) -> Any:
        return import_module(f"{self.package}.{name}")


JAX, TORCH = Track("jaxfold"), Track("torchfold")
Build = Callable[[Track], Named]
Call = Callable[[Track, Named, Named], Any]


def nothing(track: Track) -> Named:
    """For a case without modules."""
    return {}


def compare(
    build: Build, call: Call, *inputs: Arrays, gradient_of: str = "", by_inputs: bool = True
) -> None:
    """Outputs and gradients agree for each set of inputs.

    Gradients are those of every output, or of those whose name begins with ``gradient_of``, by
    every parameter and every float input.
    """
    jax_run = in_jax(build, call, by_inputs, gradient_of)
    torch_run = in_torch(build, call, by_inputs, gradient_of)
    for arrays in inputs:
        ours, theirs = jax_run(arrays), torch_run(arrays)
        assert ours.keys() == theirs.keys()
        different = [
            f"{name}: largest value {np.abs(ours[name]).max():.3g}, differs by {error:.3g}"
            for name in ours
            if (error := difference(ours[name], theirs[name])) > SAME
        ]
        assert not different, "\n".join(different)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference relative to the largest value; nan where a value is not finite."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if not ours.size:
        return 0.0
    error, size = np.abs(ours - theirs).max(), np.abs(ours).max()
    if max(error, size) < NOTHING:
        return 0.0
    return float(error / size) if np.isfinite(error) else np.inf


def in_jax(build: Build, call: Call, by_inputs: bool, of: str = "") -> Callable[[Arrays], Arrays]:
    modules = build(JAX)
    for name, module in modules.items():
        shapes = {k: v.shape for k, v in jaxfold.params.parameters(module).items()}
        jaxfold.params.load_parameters(module, weights(name, shapes))
    graph, state = nnx.split(modules)
    names = {name: list(jaxfold.params.parameters(m)) for name, m in modules.items()}

    def function(state: Any, real: Named, whole: Named) -> Any:
        outputs = flatten(call(JAX, nnx.merge(graph, state), {**real, **whole}))
        total = sum(
            jnp.sum(x * cotangent(k, x.shape))
            for k, x in outputs.items()
            if is_real(x) and k.startswith(of)
        )
        return total, outputs

    derivative = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    program = jax.jit(derivative, compiler_options=FAST_COMPILE)

    def run(inputs: Arrays) -> Arrays:
        (_, outputs), (by_state, by_input) = program(state, *parted(inputs, by_inputs))
        gradients = nnx.merge(graph, by_state)
        found = {f"output {k}": v for k, v in outputs.items()}
        found |= {f"gradient by input {k}": v for k, v in by_input.items()}
        for name in names:
            by_name = jaxfold.params.parameters(gradients[name])
            found |= {f"gradient by {name} {k}": v for k, v in by_name.items()}
        return {k: np.asarray(v) for k, v in found.items()}

    return run


def in_torch(build: Build, call: Call, by_inputs: bool, of: str = "") -> Callable[[Arrays], Arrays]:
    modules = build(TORCH)
    for name, module in modules.items():
        shapes = {k: tuple(v.shape) for k, v in torchfold.params.parameters(module).items()}
        torchfold.params.load_parameters(module, weights(name, shapes))

    def run(inputs: Arrays) -> Arrays:
        real, whole = (
            {k: torch.tensor(v) for k, v in part.items()} for part in parted(inputs, by_inputs)
        )
        leaves = {f"gradient by input {k}": v.requires_grad_() for k, v in real.items()}
        for name, module in modules.items():
            by_name = torchfold.params.parameters(module)
            leaves |= {f"gradient by {name} {k}": v for k, v in by_name.items()}
        outputs = flatten(call(TORCH, modules, {**real, **whole}))
        total = sum(
            torch.sum(x * torch.from_numpy(cotangent(k, tuple(x.shape))))
            for k, x in outputs.items()
            if is_real(x) and x.requires_grad and k.startswith(of)
        )
        gradients = torch.autograd.grad(
            total, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        found = {f"output {k}": v.detach() for k, v in outputs.items()}
        found |= dict(zip(leaves, gradients, strict=True))
        return {k: v.numpy() for k, v in found.items()}

    return run


def weights(module: str, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Weights with which every part of a module matters."""
    rng = np.random.default_rng(sum(module.encode()))
    return {
        name: 0.3 * rng.normal(size=shape) + name.endswith("//scale")
        for name, shape in sorted(shapes.items())
    }


def cotangent(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What an output's gradient starts from."""
    return np.random.default_rng(sum(name.encode())).normal(size=shape)


def parted(inputs: Arrays, by_inputs: bool) -> tuple[Arrays, Arrays]:
    """The inputs with gradients, and the others."""
    real = {k: v for k, v in inputs.items() if is_real(v) and by_inputs}
    return real, {k: v for k, v in inputs.items() if k not in real}


def is_real(array: Any) -> bool:
    return str(array.dtype).endswith("float64")


def flatten(value: Any, name: str = "") -> Named:
    """Every array in nested outputs, by its path."""
    return dict(_leaves(value, name))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        parts = dict(value)
    elif isinstance(value, tuple | list):
        parts = {str(i): part for i, part in enumerate(value)}
    elif is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
    else:
        yield name, value
        return
    for key, part in parts.items():
        yield from _leaves(part, f"{name}.{key}" if name else key)
