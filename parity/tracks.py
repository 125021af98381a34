"""The two tracks behind one face, so that a comparison is written once for both.

A case gets the modules of one package as ``track.primitives``, ``track.model``, ... and the few
array functions whose names differ.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from flax import nnx
from torch.func import functional_call

from foldcore.config import ModelConfig

Arrays = dict[str, np.ndarray]
Named = dict[str, Any]
DTYPES = ("float64", "float32", "bfloat16")
TRUNK = "evoformer/"  # names of the parameters that compute in the trunk's precision
WIDE = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}  # of everything else


class Track:
    """The modules of one package as attributes."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __getattr__(self, name: str) -> Any:
        return import_module(f"{self.package}.{name}")

    @property
    def is_jax(self) -> bool:
        """Whether its arrays are JAX's."""
        return self.package == "jaxfold"

    def model_of(self, config: ModelConfig) -> Any:
        """The network without values."""
        if self.is_jax:
            return _abstract_in_jax(config)
        with torch.device("meta"):
            return self.model.AlphaFold(config)

    def part(self, stacked: Any, index: int, path: str = "") -> Callable[..., Any]:
        """A module, by its name, of one block of a stack; the block itself without a name."""
        if self.is_jax:
            graph, state = nnx.split(stacked)
            block = nnx.merge(graph, jax.tree.map(lambda value: _layer(value, index), state))
            return getattr(block, path) if path else block
        module = stacked.get_submodule(path)
        own = {name: values[index] for name, values in module.named_parameters()}
        return lambda *arguments: functional_call(module, own, arguments)

    def concatenate(self, arrays: Sequence[Any], axis: int) -> Any:
        """Joined along an axis."""
        return jnp.concatenate(arrays, axis) if self.is_jax else torch.cat(list(arrays), axis)

    def moveaxis(self, array: Any, source: int, destination: int) -> Any:
        """An axis moved to another place."""
        move = jnp.moveaxis if self.is_jax else torch.moveaxis
        return move(array, source, destination)

    def dtype(self, name: str) -> Any:
        """The framework's own name of a precision."""
        return jnp.dtype(name) if self.is_jax else getattr(torch, name)


JAX, TORCH = Track("jaxfold"), Track("torchfold")


@functools.cache
def _abstract_in_jax(config: ModelConfig) -> Any:
    """Traced once: every case that needs a part of the network asks for it."""
    return nnx.eval_shape(lambda: JAX.model.AlphaFold(config))


def _layer(value: Any, index: int) -> Any:
    """One layer of stacked values; a parameter that has none stays as it is."""
    return value if isinstance(value, jax.ShapeDtypeStruct) else value[index]


def using(track: Track, implementation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the operations of this implementation."""

    def run(*arguments: Any) -> Any:
        track.ops.use(implementation)
        try:
            return function(*arguments)
        finally:
            track.ops.use("reference")

    return run


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


def to_numpy(array: Any) -> np.ndarray:
    """On the host, in the same precision."""
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    array = array.detach().cpu()
    if array.dtype == torch.bfloat16:
        return array.float().numpy().astype(ml_dtypes.bfloat16)
    return array.numpy()


def cast(track: Track, dtypes: Mapping[str, str], arrays: Mapping[str, Any], device: str) -> Named:
    """Arrays for a track; floating-point ones in the precision that ``dtypes`` names."""

    def one(name: str, array: Any) -> Any:
        array, name = np.asarray(array), dtypes[name]
        real = array.dtype.kind == "f"
        if track.is_jax:
            # cast by numpy: every shape that JAX casts is a program to compile
            return jax.device_put(np.asarray(array, jnp.dtype(name) if real else None))
        tensor = torch.tensor(array, device=device)
        return tensor.to(getattr(torch, name)) if real else tensor

    return {name: one(name, array) for name, array in arrays.items()}
