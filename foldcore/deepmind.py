"""DeepMind's parameter names and files (``params_model_*.npz``).

A parameter is called ``scope//leaf`` everywhere in twinfold; DeepMind's files put a prefix before
the scope. Our modules have the names of DeepMind's scopes, except for those in the table below.
"""

import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from foldcore.archives import cut_in_npz

PREFIX = "alphafold/alphafold_iteration/"

_TEMPLATE_STACK = "template_embedding/single_template_embedding/template_pair_stack"
# scopes whose arrays begin with an axis of layers
EVOFORMER_STACK = "evoformer/evoformer_iteration"
EXTRA_MSA_STACK = "evoformer/extra_msa_stack"
TEMPLATE_STACK = f"evoformer/{_TEMPLATE_STACK}/__layer_stack_no_state"
# module path -> scope, where they differ; the longest path that fits counts
_SCOPES = {
    "input_embedder": "evoformer",
    "recycling_embedder": "evoformer",
    "template_angle_embedder": "evoformer",
    "extra_msa_embedder": "evoformer",
    "template_embedding": "evoformer/template_embedding",
    f"{_TEMPLATE_STACK}/blocks": TEMPLATE_STACK,
    "extra_msa_stack/blocks": EXTRA_MSA_STACK,
    "evoformer/blocks": EVOFORMER_STACK,
}

MAX_BYTES = 2**32  # of one array; the largest published one has 5e7
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ParameterFileError(ValueError):
    """A file that does not hold usable parameters; the message names the file and the array."""


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
    """Which heads and embedders these parameters are for: those of which any array is there."""
    scopes = {name.partition("//")[0] for name in names}
    return Variant(
        templates=any(scope.startswith("evoformer/template_") for scope in scopes),
        pae=any(scope.startswith("predicted_aligned_error_head") for scope in scopes),
    )


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Parameters of a DeepMind file by name, as stored; nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {_strip(path, i): _read_array(path, archive, i) for i in archive.infolist()}
    except ParameterFileError:
        raise
    except zipfile.BadZipFile as error:
        if not zipfile.is_zipfile(path) and (place := cut_in_npz(path)):
            raise ParameterFileError(f"{path}: cut short {place}") from None
        raise ParameterFileError(f"{path}: cut short, damaged, or no .npz: {error}") from None
    # RuntimeError: encrypted, NotImplementedError: an unknown compression
    except (OSError, EOFError, zlib.error, RuntimeError, UnicodeDecodeError) as error:
        raise ParameterFileError(f"{path}: cannot be read as .npz: {error}") from None


def write_npz(path: str | Path, params: Mapping[str, np.ndarray]) -> None:
    """Write parameters as a file that DeepMind's code reads."""
    arrays = {PREFIX + name: np.asarray(array) for name, array in sorted(params.items())}
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _strip(path: str | Path, info: zipfile.ZipInfo) -> str:
    key = _key(info)
    if not key.startswith(PREFIX) or "//" not in key:
        raise ParameterFileError(f"{path}: array {key!r} is not named {PREFIX}scope//leaf")
    return key.removeprefix(PREFIX)


def _key(info: zipfile.ZipInfo) -> str:
    return info.filename.removesuffix(".npy")


def _read_array(path: str | Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One member, whose header must agree with its size before memory is taken for it."""
    key = _key(info)
    with archive.open(info) as stream:
        try:
            header = _HEADERS[np.lib.format.read_magic(stream)]
            shape, fortran_order, dtype = header(stream)
        except (ValueError, KeyError) as error:
            raise ParameterFileError(
                f"{path}: array {key!r} has no usable header: {error}"
            ) from None
        if dtype.kind != "f":
            raise ParameterFileError(f"{path}: array {key!r} has dtype {dtype}, not a float")
        size, found = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        if size != found or size > MAX_BYTES:
            raise ParameterFileError(
                f"{path}: array {key!r} of shape {shape} needs {size} bytes, but has {found}"
            )
        flat = np.frombuffer(bytearray(stream.read(size)), dtype)
    array = flat.reshape(shape, order="F" if fortran_order else "C")
    check_finite(path, key, array)
    return array


def check_finite(path: str | Path, name: str, array: np.ndarray) -> None:
    """Refuse an array with an infinity or a NaN."""
    if not np.isfinite(array).all():
        raise ParameterFileError(f"{path}: array {name!r} contains non-finite values")
