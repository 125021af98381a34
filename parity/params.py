"""Parameters of AlphaFold in every format: twinfold's, DeepMind's and OpenFold's.

    python -m parity.params show FILE
    python -m parity.params convert IN OUT [CONFIG [section.key=value ...]]

IN is a run or checkpoint folder of ours, a DeepMind .npz, an OpenFold .pt (or the folder of a
DeepSpeed checkpoint), or a .safetensors with our names; its contents tell which. OUT ends in .npz,
.pt or .safetensors, or is the name of a new checkpoint folder. Of a training checkpoint the
averaged weights are taken. The sizes of the network are read off the arrays; CONFIG names them
instead. Every value is carried over exactly, and nothing in a file is executed.
"""

import functools
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from foldcore import checkpoint, openfold
from foldcore.archives import cut_in_safetensors
from foldcore.checkpoint import CheckpointError
from foldcore.config import Config, ConfigError, DataConfig, ModelConfig, dumps, load
from foldcore.deepmind import ParameterFileError, check_finite, read_npz, write_npz
from foldcore.layout import Layout, LayoutError
from foldcore.sizes import identify
from parity.torch_files import read_state_dict, write_state_dict
from torchfold.step import Network

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
EXPECTED = (ParameterFileError, CheckpointError, LayoutError, ConfigError)


@dataclass(frozen=True)
class Stored:
    """The arrays of a file under its own names, none of them looked at yet."""

    path: Path
    format: str
    arrays: dict[str, np.ndarray]
    note: str = ""  # which of several sets of weights these are


@dataclass(frozen=True)
class Parameters:
    """A whole set of parameters by our names, and the network that it belongs to."""

    params: dict[str, np.ndarray]
    model: ModelConfig


@functools.cache
def layout_of(model: ModelConfig) -> Layout:
    """Names and shapes of a network's parameters."""
    return Network(model).layout


# Reading ------------------------------------------------------------------------------------------


def read(path: Path) -> Stored:
    """The arrays of a file or folder in any format, told by its contents."""
    if path.is_dir():
        return _read_folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ParameterFileError(f"{path}: cannot be read: {error.strerror}") from None
    if start[8:] == b"{":
        return _read_safetensors(path)
    if _is_npz(path):
        return Stored(path, "DeepMind .npz", read_npz(path))
    return _read_openfold(path, path)


def interpret(stored: Stored, model: ModelConfig | None = None) -> Parameters:
    """Check names and shapes against the network, which ``model`` names or the arrays tell."""
    if stored.format.startswith("OpenFold"):
        try:
            arrays = openfold.current_names(stored.arrays)
        except ValueError as error:
            raise ParameterFileError(f"{stored.path}: {error}") from None
        model = model or _nearest(
            {key: array.shape for key, array in arrays.items()},
            openfold.identify(arrays),
            lambda layout: {key: place.shape for key, place in openfold.places(layout).items()},
        )
        params = openfold.from_openfold(arrays, layout_of(model), stored.path)
    else:
        shapes = {name: array.shape for name, array in stored.arrays.items()}
        model = model or _nearest(shapes, identify(shapes), _named_shapes)
        layout_of(model).check(shapes, str(stored.path))
        params = stored.arrays
    return Parameters({n: _float32(stored.path, n, a) for n, a in sorted(params.items())}, model)


def _read_folder(path: Path) -> Stored:
    if newest := checkpoint.list_checkpoints(path / "checkpoints"):
        path = newest[0][1]
    if (path / checkpoint.METADATA).exists():
        found = _read_checkpoint(path)
        note = f"averaged weights of step {found.step}"
        return Stored(path, "twinfold checkpoint", _section(found.tensors, "ema"), note)
    if (path / "latest").exists():  # DeepSpeed's pointer to its newest checkpoint
        tag = (path / "latest").read_text(errors="replace").strip()
        return _read_openfold(path, path / Path(tag).name / "mp_rank_00_model_states.pt")
    raise ParameterFileError(f"{path}: neither a run, nor a checkpoint, nor one of DeepSpeed's")


def _read_checkpoint(path: Path) -> checkpoint.Checkpoint:
    try:
        return checkpoint.read(path)
    except checkpoint.DamagedCheckpointError:
        _refuse_cut(path / checkpoint.TENSORS)
        raise


def _refuse_cut(path: Path) -> None:
    if name := cut_in_safetensors(path):
        raise ParameterFileError(f"{path}: cut short: array {name!r} is not whole")


def _read_safetensors(path: Path) -> Stored:
    _refuse_cut(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ParameterFileError(f"{path}: cannot be read as safetensors: {error}") from None
    averaged = _section(tensors, "ema")
    for name, array in tensors.items():
        check_finite(path, name, array)
    note = "averaged weights of a checkpoint" if averaged else ""
    return Stored(path, "safetensors", averaged or tensors, note)


def _read_openfold(path: Path, file: Path) -> Stored:
    arrays, note = read_state_dict(file)
    return Stored(path, "OpenFold .pt", arrays, note)


def _is_npz(path: Path) -> bool:
    """Whether a zip file is one of numpy's; PyTorch's have a pickle in them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, RuntimeError, UnicodeDecodeError, zipfile.BadZipFile):
        return path.suffix == ".npz"  # the reader then says what is wrong


def _section(tensors: Arrays, section: str) -> dict[str, np.ndarray]:
    prefix = f"{section}/"
    return {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}


def _named_shapes(layout: Layout) -> Shapes:
    return dict(zip(layout.names, layout.shapes, strict=True))


def _nearest(
    found: Shapes, inferred: ModelConfig, expected: Callable[[Layout], Shapes]
) -> ModelConfig:
    """The published network or that of the inferred sizes, whichever more arrays agree with.

    Sizes are inferred from single arrays: were one of these damaged, all others would look wrong.
    """

    def wrong(model: ModelConfig) -> int:
        needed = expected(layout_of(model))
        return sum(found.get(name) != needed.get(name) for name in found.keys() | needed.keys())

    return min(_published(inferred), inferred, key=wrong)


def _published(model: ModelConfig) -> ModelConfig:
    """The published network with the same heads and embedders."""
    return ModelConfig(templates_enabled=model.templates_enabled, pae_enabled=model.pae_enabled)


def _float32(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    exact = array.astype(np.float32)
    if exact.dtype != array.dtype and not np.array_equal(exact, array):
        raise ParameterFileError(f"{path}: array {name!r} has {array.dtype} values beyond float32")
    return exact


# Writing ------------------------------------------------------------------------------------------


def check_target(path: Path) -> None:
    """Refuse a name that is taken, or whose ending tells no format."""
    if path.exists():
        raise ParameterFileError(f"{path}: exists already; name a new file or folder")
    if path.suffix and path.suffix not in WRITERS:
        raise ParameterFileError(f"{path}: ends in none of {', '.join(WRITERS)}; no ending: ours")


def write(path: Path, parameters: Parameters) -> str:
    """Write a new file or folder in the format that its name says; what was written."""
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        return _write_checkpoint(path, parameters)
    name, writer = WRITERS[path.suffix]
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        writer(unfinished, parameters.params)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return name


def _write_openfold(path: Path, params: Arrays) -> None:
    write_state_dict(path, openfold.to_openfold(params))


def _write_safetensors(path: Path, params: Arrays) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in params.items()}, path)


WRITERS: dict[str, tuple[str, Callable[[Path, Arrays], None]]] = {
    ".npz": ("DeepMind .npz", write_npz),
    ".pt": ("OpenFold .pt", _write_openfold),
    ".safetensors": ("safetensors", _write_safetensors),
}


def _write_checkpoint(path: Path, parameters: Parameters) -> str:
    layout = layout_of(parameters.model)
    flat = layout.flatten(parameters.params)
    data = DataConfig(num_templates=DataConfig().num_templates * parameters.model.templates_enabled)
    config = Config(model=parameters.model, data=data)
    checkpoint.write(path, 0, {"params": flat, "ema": flat}, layout, {"config": dumps(config)})
    return "twinfold checkpoint"


# The command line ---------------------------------------------------------------------------------


def describe(stored: Stored, found: Parameters) -> str:
    """One line: format, variant, number of arrays and parameters."""
    note = f" ({stored.note})" if stored.note else ""
    count = sum(array.size for array in found.params.values())
    return (
        f"{stored.path}: {stored.format}{note}, {variant(found.model)}, "
        f"{len(stored.arrays):,} arrays, {count:,} parameters"
    )


def variant(model: ModelConfig) -> str:
    """Heads, embedders and size in words."""
    parts = [
        "templates" if model.templates_enabled else "no templates",
        "PAE head" if model.pae_enabled else "no PAE head",
    ]
    if model == _published(model):
        numbers = (1, 2) if model.templates_enabled else (3, 4, 5)
        ending = "_ptm" if model.pae_enabled else ""
        parts.append("as " + "/".join(f"model_{n}{ending}" for n in numbers))
    else:
        parts.append(f"{model.evoformer_blocks} blocks of its own sizes")
    return ", ".join(parts)


def show(file: str, *config: str) -> None:
    """List the arrays of a file, then say what it is."""
    stored = read(Path(file))
    for name, array in sorted(stored.arrays.items()):
        print(f"{name}  {list(array.shape)}  {array.dtype}")
    print(describe(stored, interpret(stored, _model(config))))


def convert(source: str, target: str, *config: str) -> None:
    """Read one format, write another."""
    check_target(Path(target))
    stored = read(Path(source))
    found = interpret(stored, _model(config))
    print(describe(stored, found))
    print(f"wrote {target}: {write(Path(target), found)}")


def _model(config: Sequence[str]) -> ModelConfig | None:
    return load(config[0], list(config[1:])).model if config else None


def _problem(argv: list[str]) -> str:
    """What is wrong with a command line as such; "" if nothing is."""
    needed = {"show": ("FILE",), "convert": ("IN", "OUT")}
    if not argv or argv[0] not in needed:
        given = f"{argv[0]!r} is no command" if argv else "no command is given"
        return f"{given}: give show or convert"
    missing = needed[argv[0]][len(argv) - 1 :]
    return f"{argv[0]}: {' and '.join(missing)} missing" if missing else ""


def main(argv: list[str]) -> int:
    """Do what the command line says; the exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if problem := _problem(argv):
        print(f"{__doc__}\nerror: {problem}", file=sys.stderr)
        return 2
    command, *rest = argv
    try:
        (show if command == "show" else convert)(*rest)
    except (*EXPECTED, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
