"""Modules of either track as functions of parameters and inputs: their outputs and gradients.

The gradient is that of one number, the sum of all outputs with random weights, by every parameter
and every input named in ``derive``. The weights are zero at padding, where values are arbitrary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jaxfold.params
import torchfold.params
from foldcore.deepmind import canonical_name
from parity.case import Run, Setting, draw
from parity.tracks import JAX, TORCH, TRUNK, Arrays, Named, Track, cast, flatten, to_numpy, using

Real = Callable[[str, Arrays], np.ndarray]  # which elements of an output are no padding


def everything(name: str, inputs: Arrays) -> np.ndarray:
    """For outputs without padding."""
    del name, inputs
    return np.ones((), bool)


@dataclass(frozen=True)
class Module:
    """Modules built and called alike in both tracks.

    ``build`` makes modules by name from the packages of a track (a module called "" gives its
    parameters their plain names); ``call`` turns modules and named inputs into named outputs.
    """

    build: Callable[[Track], Named]
    call: Callable[[Track, Named, Named], Any]
    derive: tuple[str, ...] = ()
    narrow_inputs: tuple[str, ...] = ()  # in the precision of the trunk, if they are real numbers
    narrow: Callable[[str], bool] = field(default=lambda name: name.startswith(TRUNK))
    real: Real = everything

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter."""
        found = {}
        for key, module in abstract(JAX, self).items():
            for name, array in jaxfold.params.parameters(module).items():
                found[full_name(key, name)] = tuple(array.shape)
        return found

    def dtypes(self, setting: Setting, parameters: Any, inputs: Any) -> dict[str, str]:
        """The precision of every array."""
        by_name = {n: setting.dtype if self.narrow(n) else setting.wide for n in parameters}
        chosen = {n: setting.dtype if n in self.narrow_inputs else setting.wide for n in inputs}
        return by_name | chosen


def full_name(key: str, name: str) -> str:
    """The name of a parameter of one of several modules."""
    return f"{key}: {name}" if key else name


def abstract(track: Track, module: Module) -> Named:
    """The modules without values."""
    if track.is_jax:
        return nnx.eval_shape(lambda: module.build(track))
    with torch.device("meta"):
        return module.build(track)


def weights_of(name: str, output: Any, real: np.ndarray) -> np.ndarray:
    """What the gradient of an output starts from."""
    shape = tuple(output.shape)
    mask = np.broadcast_to(real.reshape(real.shape + (1,) * (len(shape) - real.ndim)), shape)
    return draw(f"weights of {name}", shape) * mask


def is_float(array: Any) -> bool:
    """Whether a gradient can flow through it."""
    return "float" in str(array.dtype)


def keep_real(module: Module, found: Arrays, inputs: Arrays) -> Arrays:
    """Outputs, and gradients by inputs, with zeros for padding."""
    kept = {}
    for name, array in found.items():
        kind, _, rest = name.partition(" ")
        if kind in ("output", "input"):
            real = module.real(rest, inputs)
            padding = ~real.reshape(real.shape + (1,) * (array.ndim - real.ndim))
            array = np.where(padding, np.zeros((), array.dtype), array)
        kept[name] = array
    return kept


# JAX ----------------------------------------------------------------------------------------------


def jax_run(module: Module, setting: Setting) -> Run:
    """The modules in the JAX track, compiled by the first call."""
    graph, state = nnx.split(abstract(JAX, module))
    programs: list[Any] = []

    def function(real: Any, parameters: Named, derived: Named, rest: Named) -> Any:
        modules = nnx.merge(graph, state)
        _load_in_jax(modules, parameters)
        outputs = flatten(module.call(JAX, modules, {**derived, **rest}))
        weights = {n: weights_of(n, o, real(n)) for n, o in outputs.items() if is_float(o)}
        total = sum(jnp.sum(outputs[n].astype(setting.wide) * w) for n, w in weights.items())
        return total, outputs

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        dtypes = module.dtypes(setting, parameters, inputs)
        own, x = (cast(JAX, dtypes, arrays, "") for arrays in (parameters, inputs))
        derived = {name: x.pop(name) for name in module.derive}
        if not programs:
            # the padding of the first inputs stays in the program
            here = functools.partial(function, lambda name: module.real(name, inputs))
            programs.append(jax.jit(jax.value_and_grad(here, argnums=(0, 1), has_aux=True)))
        (_, outputs), by = programs[0](own, derived, x)
        return keep_real(module, _named(outputs, *by), inputs)

    return using(JAX, setting.implementation, run)


def _load_in_jax(modules: Named, parameters: Named) -> None:
    """Give modules their values; what a case does not use gets none."""
    graph, state = nnx.split(modules)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    values = [parameters.get(_name_at(path), value) for path, value in leaves]
    full: Any = nnx.merge(graph, jax.tree.unflatten(structure, values))
    modules.update(full)


def _name_at(path: Any) -> str:
    """The name of the parameter at a path in the state of modules, which ends in its value."""
    module, *rest = (str(key.key) for key in path[:-1])
    return full_name(module, canonical_name(rest))


def _named(outputs: Named, by_parameter: Named, by_input: Named) -> Arrays:
    found = {f"output {name}": value for name, value in outputs.items()}
    found |= {f"gradient {name}": value for name, value in by_parameter.items()}
    found |= {f"input {name}": value for name, value in by_input.items()}
    return {name: to_numpy(value) for name, value in found.items()}


# PyTorch ------------------------------------------------------------------------------------------


def torch_run(module: Module, setting: Setting) -> Run:
    """The modules in the PyTorch track."""
    device = "cuda" if setting.device == "gpu" else setting.device
    modules = abstract(TORCH, module)

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        dtypes = module.dtypes(setting, parameters, inputs)
        own, x = (cast(TORCH, dtypes, arrays, device) for arrays in (parameters, inputs))
        own = _load_in_torch(modules, own, device)
        derived = {name: x[name].requires_grad_() for name in module.derive}
        outputs = flatten(module.call(TORCH, modules, x))
        total: Any = torch.zeros((), dtype=getattr(torch, setting.wide), device=device)
        for name, output in outputs.items():
            if is_float(output) and output.requires_grad:
                weights = weights_of(name, output, module.real(name, inputs))
                total = total + torch.sum(output.to(total.dtype) * torch.tensor(weights).to(output))
        leaves = [*own.values(), *derived.values()]
        by: Any = ()
        if leaves:
            by = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        by_parameter = dict(zip(own, by, strict=False))
        by_input = dict(zip(derived, by[len(own) :], strict=True))
        return keep_real(module, _named(outputs, by_parameter, by_input), inputs)

    return using(TORCH, setting.implementation, run)


def _load_in_torch(modules: Named, parameters: Named, device: str) -> Named:
    """The leaves by which gradients are taken."""
    leaves: Named = {}
    for key, one in modules.items():
        shapes = {n: tuple(p.shape) for n, p in torchfold.params.parameters(one).items()}
        given = {name: parameters.get(full_name(key, name)) for name in shapes}
        empty = torch.zeros((), device=device)
        full = {n: empty.expand(shapes[n]) if v is None else v for n, v in given.items()}
        torchfold.params.load_parameters(one, full)
        found = torchfold.params.parameters(one)
        leaves |= {full_name(key, n): found[n] for n, v in given.items() if v is not None}
    return {name: leaves[name] for name in parameters}
