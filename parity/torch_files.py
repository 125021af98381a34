"""OpenFold's files: state dicts, and the training checkpoints around them, without unpickling."""

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # the error only: nothing is unpickled
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foldcore.deepmind import ParameterFileError

# where a training checkpoint keeps its weights, the averaged ones first, and what they are called
_WEIGHTS = (
    (("ema", "params"), "averaged weights of a training checkpoint"),
    (("ema",), "averaged weights of a training checkpoint"),
    (("state_dict",), "raw weights of a training checkpoint, which has no averaged ones"),
    (("module",), "raw weights of a training checkpoint, which has no averaged ones"),
)


def read_state_dict(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a state dict as stored, and what they were found in ("" for a bare one)."""
    tree = _load(path)
    if not isinstance(tree, Mapping):
        raise ParameterFileError(f"{path}: holds a {type(tree).__name__}, not a state dict")
    found, note = _weights(tree)
    if not found:
        raise ParameterFileError(f"{path}: no arrays: its keys are {list(map(str, tree))[:8]}")
    return {str(key): _array(path, str(key), value) for key, value in found.items()}, note


def write_state_dict(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a bare state dict, as OpenFold's published weights are."""
    torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, path)


def _load(path: Path) -> Any:
    _check_members(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's message recommends to unpickle, which would run what the file says
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise ParameterFileError(f"{path}: damaged, or not a file of PyTorch's") from None
        raise ParameterFileError(
            f"{path}: holds Python objects ({refused[1]}), and only plain arrays are read; "
            "where you trust it, save its state dict alone"
        ) from None
    except Exception as error:  # of a damaged file, torch may raise anything
        reason = str(error).partition("\n")[0]
        raise ParameterFileError(f"{path}: cannot be read: {reason}") from None


def _check_members(path: Path) -> None:
    """Refuse a zip file that is cut short or altered: torch's reader looks at no checksum."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\3\4":  # before PyTorch 1.6, files were no zip files
                return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, UnicodeDecodeError):
        reason = "the table of contents at its end cannot be read"
        raise ParameterFileError(f"{path}: cut short or damaged: {reason}") from None
    # RuntimeError: encrypted, NotImplementedError: an unknown compression
    except (OSError, EOFError, zlib.error, RuntimeError) as error:
        raise ParameterFileError(f"{path}: cannot be read: {error}") from None
    if damaged is not None:
        raise ParameterFileError(
            f"{path}: damaged: its member {damaged!r} does not match its checksum (CRC-32)"
        )


def _weights(tree: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], str]:
    for keys, note in _WEIGHTS:
        inner: Any = tree
        for key in keys:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            return inner, note
    bare = any(isinstance(value, Tensor) for value in tree.values())
    return (tree if bare else {}), ""


def _array(path: Path, key: str, value: Any) -> np.ndarray:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ParameterFileError(f"{path}: {key!r} is not a plain array")
    if not value.is_floating_point():
        raise ParameterFileError(f"{path}: array {key!r} has dtype {value.dtype}, not a float")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ParameterFileError(f"{path}: array {key!r} is larger than what is stored of it")
    # numpy has no bfloat16, and float32 holds each of its values
    return (value.float() if value.element_size() < 4 else value).detach().numpy()
