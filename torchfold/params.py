"""Parameters by name: reading, replacing and drawing the parameters of a model.

Names and shapes are DeepMind's (``foldcore/deepmind.py``), in sorted order.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from foldcore.deepmind import canonical_name
from foldcore.initializers import draw


class ParameterError(ValueError):
    """Arrays that do not fit the model; the message names the first wrong one."""


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a model; of a model on the meta device, its shape and dtype."""
    return {name: getattr(*place) for name, place in _places(model).items()}


def load_parameters(model: nn.Module, arrays: Mapping[str, Tensor | np.ndarray]) -> None:
    """Replace every parameter; names and shapes must be exactly the model's.

    The new parameters have the dtype and the device of the arrays, and share their memory where
    these are tensors.
    """
    places = _places(model)
    for name in sorted(places.keys() | arrays.keys()):
        if name not in arrays:
            raise ParameterError(f"parameter {name!r} is missing")
        if name not in places:
            raise ParameterError(f"parameter {name!r} is not part of this model")
        found, needed = tuple(arrays[name].shape), tuple(getattr(*places[name]).shape)
        if found != needed:
            raise ParameterError(
                f"parameter {name!r} has shape {found}, but this model needs {needed}"
            )
    for name, (module, leaf) in places.items():
        old = getattr(module, leaf)
        new = nn.Parameter(torch.as_tensor(arrays[name]).detach())
        new.kind, new.stacked = old.kind, old.stacked  # type: ignore[attr-defined]
        setattr(module, leaf, new)


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter with its initial value, which depends on its name and the seed alone."""
    load_parameters(model, initial_parameters(model, seed))


def initial_parameters(model: nn.Module, seed: int) -> dict[str, Float32[np.ndarray, "..."]]:
    """Initial value of every parameter; the model may be on the meta device."""
    variables = {name: getattr(*place) for name, place in _places(model).items()}
    return {
        name: draw(name, tuple(variable.shape), variable.kind, seed, variable.stacked)
        for name, variable in variables.items()
    }


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Module and attribute of every parameter, by name."""
    return dict(sorted((_name(path), place) for path, place in _paths(model).items()))


def _paths(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The same by PyTorch's path."""
    return {
        f"{path}.{leaf}" if path else leaf: (module, leaf)
        for path, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }


def _name(path: str) -> str:
    return canonical_name(path.split("."))
