"""DeepMind's parameter names and files (``params_model_*.npz``).

A parameter is called ``scope//leaf`` everywhere in twinfold; DeepMind's files put a prefix before
the scope. Our modules have the names of DeepMind's scopes, except for those in the table below.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

PREFIX = "alphafold/alphafold_iteration/"

_TEMPLATE_STACK = "template_embedding/single_template_embedding/template_pair_stack"
# module path -> scope, where they differ; the longest path that fits counts
_SCOPES = {
    "input_embedder": "evoformer",
    "recycling_embedder": "evoformer",
    "template_angle_embedder": "evoformer",
    "extra_msa_embedder": "evoformer",
    "template_embedding": "evoformer/template_embedding",
    f"{_TEMPLATE_STACK}/blocks": f"evoformer/{_TEMPLATE_STACK}/__layer_stack_no_state",
    "extra_msa_stack/blocks": "evoformer/extra_msa_stack",
    "evoformer/blocks": "evoformer/evoformer_iteration",
}


class ParameterFileError(ValueError):
    """A file that does not hold DeepMind's parameters; the message names the array."""


class Variant(NamedTuple):
    """Which of the published networks a set of parameters belongs to."""

    templates: bool  # models 1 and 2
    pae: bool  # the ptm models


def canonical_name(path: Sequence[str]) -> str:
    """``scope//leaf`` of the parameter at a path of attribute names."""
    *modules, leaf = path
    module = "/".join(modules)
    for length in range(len(modules), 0, -1):
        head = "/".join(modules[:length])
        if head in _SCOPES:
            module = "/".join([_SCOPES[head], *modules[length:]])
            break
    return f"{module}//{leaf}"


def detect_variant(names: Iterable[str]) -> Variant:
    """Which heads and embedders these parameters are for."""
    scopes = {name.partition("//")[0] for name in names}
    return Variant(
        templates="evoformer/template_projection" in scopes,
        pae="predicted_aligned_error_head/logits" in scopes,
    )


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Parameters of a DeepMind file by name, as stored; nothing in the file is executed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {_strip(path, key): _checked(path, key, file[key]) for key in file.files}
    except (OSError, BadZipFile, EOFError) as error:
        raise ParameterFileError(f"{path}: cannot read this file: {error}") from None
    except ValueError as error:
        if isinstance(error, ParameterFileError):
            raise
        raise ParameterFileError(f"{path}: not a file of plain arrays: {error}") from None


def write_npz(path: str | Path, params: Mapping[str, np.ndarray]) -> None:
    """Write parameters as a file that DeepMind's code reads."""
    arrays = {PREFIX + name: np.asarray(array) for name, array in sorted(params.items())}
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _strip(path: str | Path, key: str) -> str:
    if not key.startswith(PREFIX) or "//" not in key:
        raise ParameterFileError(f"{path}: array {key!r} is not named {PREFIX}scope//leaf")
    return key.removeprefix(PREFIX)


def _checked(path: str | Path, key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f":
        raise ParameterFileError(f"{path}: array {key!r} has dtype {array.dtype}, not a float")
    if not np.isfinite(array).all():
        raise ParameterFileError(f"{path}: array {key!r} contains non-finite values")
    return array
