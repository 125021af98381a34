"""The least time that the modules of a step can take, on this GPU.

A module reads its inputs and parameters once and writes its results once, and everything between
stays on the chip; its backward pass reads them again with the gradients of the results, and writes
those of parameters and inputs. Or it is bound by its matrix products, if these take longer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from foldcore.config import Config
from foldcore.features import FEATURES
from parity.case import Setting
from parity.module_run import Module, _load_in_jax, abstract, is_float
from parity.throughput_modules import Part, parts, shapes
from parity.timing import Ceilings, measure_ceilings
from parity.tracks import JAX, Named, flatten, using

UPDATE = "clip, Adam, averages"
# of float32 buffers: the gradient twice (its norm comes first), the state, read and written
PASSES_OF_UPDATE = 2 + 4 + 4


def roofline(config: Config) -> dict[str, Any]:
    """The ceilings of the GPU, None without one; of each module, what it takes at least."""
    ceilings = measure_ceilings() if torch.cuda.is_available() else None
    modules = {part.name: _least(part, config, ceilings) for part in parts(config)}
    rounded = 2 if config.model.dtype == "bfloat16" else 0  # bytes of a parameter, written as well
    moved = (PASSES_OF_UPDATE * 4 + rounded) * JAX.step.Network(config.model).layout.size
    modules[UPDATE] = {"forward": _bound(moved, 0, ceilings), "backward": _bound(0, 0, ceilings)}
    return {"ceilings": asdict(ceilings) if ceilings else None, "modules": modules}


def _least(part: Part, config: Config, ceilings: Ceilings | None) -> dict[str, Any]:
    forward, backward = moved(part, config)
    return {
        "forward": _bound(forward, part.operations, ceilings),
        "backward": _bound(backward, 2 * part.operations, ceilings),
    }


def _bound(moved: float, operations: float, ceilings: Ceilings | None) -> dict[str, Any]:
    ms, by = ceilings.floor_ms(moved, operations) if ceilings else (None, None)
    return {"bytes": moved, "operations": operations, "ms": ms, "bound": by}


def moved(part: Part, config: Config) -> tuple[int, int]:
    """Bytes that a call and its backward pass must read and write."""
    setting, module = Setting(dtype=config.model.dtype), part.module
    of_inputs, of_parameters = shapes(config), module.shapes()
    dtypes = module.dtypes(setting, of_parameters, of_inputs)

    def array(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        kind = FEATURES[name].dtype if name in FEATURES else "float32"
        return jax.ShapeDtypeStruct(shape, dtypes[name] if kind == "float32" else kind)

    x = {name: array(name, shape) for name, shape in of_inputs.items()}
    parameters = {name: array(name, shape) for name, shape in of_parameters.items()}
    outputs, asked = using(JAX, "reference", ask)(module, parameters, x)
    inside = _bytes(x[name] for name in asked) + _bytes(parameters.values())
    gradients = _bytes(x[name] for name in module.derive) + _bytes(parameters.values())
    return inside + _bytes(outputs.values()), inside + _bytes(outputs.values()) + gradients


def ask(module: Module, parameters: Named, x: Named) -> tuple[Named, list[str]]:
    """Shapes of the outputs that are real numbers, and the inputs that are read; runs nothing."""
    graph, state = nnx.split(abstract(JAX, module))
    asked: set[str] = set()

    def call(parameters: Named, x: Named) -> Named:
        modules = nnx.merge(graph, state)
        _load_in_jax(modules, parameters)
        noted = _Noted(x)
        outputs = flatten(module.call(JAX, modules, noted))
        asked.update(noted.names)
        return outputs

    outputs = jax.eval_shape(call, parameters, x)
    return {name: o for name, o in outputs.items() if is_float(o)}, sorted(asked)


class _Noted(dict[str, Any]):
    """Inputs that note which of them are read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays)
