"""Parameters by name: reading, replacing and drawing the parameters of a model.

Names and shapes are DeepMind's (``foldcore/deepmind.py``), in sorted order.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from foldcore.deepmind import canonical_name
from foldcore.initializers import draw


class ParameterError(ValueError):
    """Arrays that do not fit the model; the message names the first wrong one."""


def parameters(model: nnx.Module) -> dict[str, Array]:
    """Every parameter of a model; of an abstract model, its shape and dtype."""
    return {name: variable.get_value() for name, variable in _variables(model).items()}


def load_parameters(model: nnx.Module, arrays: Mapping[str, Array]) -> None:
    """Replace every parameter; names and shapes must be exactly the model's."""
    variables = _variables(model)
    for name in sorted(variables.keys() | arrays.keys()):
        if name not in arrays:
            raise ParameterError(f"parameter {name!r} is missing")
        if name not in variables:
            raise ParameterError(f"parameter {name!r} is not part of this model")
        if variables[name].shape != arrays[name].shape:
            raise ParameterError(
                f"parameter {name!r} has shape {tuple(arrays[name].shape)}, "
                f"but this model needs {variables[name].shape}"
            )
    for name, variable in variables.items():
        variable.set_value(jnp.asarray(arrays[name]))


def initialize(model: nnx.Module, seed: int) -> None:
    """Fill every parameter with its initial value, which depends on its name and the seed alone."""
    for name, variable in _variables(model).items():
        value = draw(name, variable.shape, variable.kind, seed, variable.stacked)
        variable.set_value(jnp.asarray(value))


def _variables(model: nnx.Module) -> dict[str, nnx.Param]:
    found = {
        canonical_name([str(part) for part in path]): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param)
    }
    return dict(sorted(found.items()))
