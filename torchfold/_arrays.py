"""Small functions of jax.numpy that PyTorch lacks, or whose versions there wait for the device.

None reads from the device, and only the first call of ``table`` copies to it, so that a step may be
captured as a CUDA graph.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foldcore import constants

_tables: dict[tuple[object, ...], Tensor] = {}


def one_hot(
    index: Int[Tensor, "*batch"], num_classes: int, dtype: torch.dtype
) -> Float[Tensor, "*batch k"]:
    """One-hot vectors; an index outside 0..num_classes-1 gives zeros."""
    classes = torch.arange(num_classes, device=index.device)
    return (index[..., None] == classes).to(dtype)


def table(name: str, dtype: torch.dtype, device: torch.device, *arguments: float) -> Tensor:
    """An array of ``foldcore.constants``, or the result of a function there, on a device."""
    key = (name, dtype, device, *arguments)
    if key not in _tables:
        source = getattr(constants, name)
        array = np.array(source(*arguments) if callable(source) else source)
        _tables[key] = torch.from_numpy(array).to(device, dtype)
    return _tables[key]


def map_tree(function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` of every leaf of equal trees of dicts, tuples, named tuples, lists and None."""
    tree = trees[0]
    if tree is None:
        assert all(other is None for other in trees)
        return None
    if isinstance(tree, dict):
        return {key: map_tree(function, *(t[key] for t in trees)) for key in tree}
    if isinstance(tree, tuple | list):
        parts = [map_tree(function, *leaves) for leaves in zip(*trees, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(*trees)
