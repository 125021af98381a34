"""Parameters by name: reading, replacing and drawing the parameters of a model.

Names and shapes are DeepMind's (``foldcore/deepmind.py``), in sorted order.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float32

from foldcore.deepmind import canonical_name
from foldcore.initializers import draw


class ParameterError(ValueError):
    """Arrays that do not fit the model; the message names the first wrong one."""


def parameters(model: nnx.Module) -> dict[str, Array]:
    """Every parameter of a model; of an abstract model, its shape and dtype."""
    return {name: getattr(*place).get_value() for name, place in _places(model).items()}


def load_parameters(model: nnx.Module, arrays: Mapping[str, ArrayLike]) -> None:
    """Replace every parameter; names and shapes must be exactly the model's.

    Other models that share the old parameters (``nnx.split`` and ``nnx.merge`` share them) keep
    them.
    """
    places = _places(model)
    for name in sorted(places.keys() | arrays.keys()):
        if name not in arrays:
            raise ParameterError(f"parameter {name!r} is missing")
        if name not in places:
            raise ParameterError(f"parameter {name!r} is not part of this model")
        found, needed = jnp.shape(arrays[name]), getattr(*places[name]).shape
        if found != needed:
            raise ParameterError(
                f"parameter {name!r} has shape {found}, but this model needs {needed}"
            )
    for name, (module, leaf) in places.items():
        variable = getattr(module, leaf)
        setattr(module, leaf, variable.replace(jnp.asarray(arrays[name])))


def initialize(model: nnx.Module, seed: int) -> None:
    """Fill every parameter with its initial value, which depends on its name and the seed alone."""
    load_parameters(model, initial_parameters(model, seed))


def initial_parameters(model: nnx.Module, seed: int) -> dict[str, Float32[np.ndarray, "..."]]:
    """Initial value of every parameter; the model may be abstract."""
    variables = {name: getattr(*place) for name, place in _places(model).items()}
    return {
        name: draw(name, variable.shape, variable.kind, seed, variable.stacked)
        for name, variable in variables.items()
    }


def _places(model: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """Module and attribute of every parameter, by name."""
    found = {
        canonical_name([*(str(part) for part in path), leaf]): (module, leaf)
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Module)
        for leaf, value in vars(module).items()
        if isinstance(value, nnx.Param)
    }
    return dict(sorted(found.items()))
