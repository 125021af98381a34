"""Parameters by name: reading, replacing and drawing the parameters of a model.

Names and shapes are DeepMind's (``foldcore/deepmind.py``), in sorted order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from foldcore.deepmind import canonical_name
from foldcore.initializers import draw


class ParameterError(ValueError):
    """Arrays that do not fit the model; the message names the first wrong one."""


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a model; of a model on the meta device, its shape and dtype."""
    return {name: parameter for name, (_, _, parameter) in _variables(model).items()}


def load_parameters(model: nn.Module, arrays: Mapping[str, Tensor]) -> None:
    """Replace every parameter; names and shapes must be exactly the model's."""
    variables = _variables(model)
    for name in sorted(variables.keys() | arrays.keys()):
        if name not in arrays:
            raise ParameterError(f"parameter {name!r} is missing")
        if name not in variables:
            raise ParameterError(f"parameter {name!r} is not part of this model")
        expected = tuple(variables[name][2].shape)
        if expected != tuple(arrays[name].shape):
            raise ParameterError(
                f"parameter {name!r} has shape {tuple(arrays[name].shape)}, "
                f"but this model needs {expected}"
            )
    for name, place in variables.items():
        _replace(*place, torch.as_tensor(arrays[name]))


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter with its initial value, which depends on its name and the seed alone."""
    for name, (module, leaf, parameter) in _variables(model).items():
        declared = parameter.kind, seed, parameter.stacked  # type: ignore[attr-defined]
        value = draw(name, tuple(parameter.shape), *declared)
        _replace(module, leaf, parameter, torch.from_numpy(value))


def _variables(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """The parameters by name, each with the module and the attribute that hold it."""
    found = {
        canonical_name([*path.split("."), leaf] if path else [leaf]): (module, leaf, parameter)
        for path, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    return dict(sorted(found.items()))


def _replace(module: nn.Module, leaf: str, parameter: nn.Parameter, value: Tensor) -> None:
    """A new parameter, because an old one keeps its dtype and device."""
    replacement = nn.Parameter(value.detach())
    replacement.kind = parameter.kind  # type: ignore[attr-defined]
    replacement.stacked = parameter.stacked  # type: ignore[attr-defined]
    setattr(module, leaf, replacement)
