"""Checkpoints: what is written comes back, damage is named, and a kill leaves only whole ones."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from foldcore import checkpoint
from foldcore.checkpoint import CheckpointError, CheckpointWriter
from foldcore.layout import Layout, LayoutError, make_layout

SHAPES = {"evoformer/b//weights": (2, 3), "evoformer/a//bias": (3,), "zero//scalar": ()}
SECTIONS = ("params", "mu", "nu", "ema")


@pytest.fixture
def layout() -> Layout:
    return make_layout(SHAPES)


def sections(layout: Layout, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(layout.size).astype(np.float32) for name in SECTIONS}


def save_some(folder: Path, layout: Layout, steps: list[int], keep: int = 3) -> None:
    writer = CheckpointWriter(folder, keep)
    for step in steps:
        writer.save(step, sections(layout, step), layout, {"loader": {"position": step}})
    writer.wait()


def test_layout_is_sorted_and_round_trips(layout: Layout) -> None:
    assert layout.names == tuple(sorted(SHAPES))
    flat = np.arange(layout.size, dtype=np.float32)
    arrays = layout.unflatten(flat)
    assert {name: array.shape for name, array in arrays.items()} == SHAPES
    np.testing.assert_array_equal(layout.flatten(arrays), flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("zero//scalar"), "'zero//scalar' is missing"),
        (lambda a: a.update(extra=np.zeros(1)), "'extra' is not part"),
        (lambda a: a.update({"evoformer/b//weights": np.zeros((3, 2))}), "b//weights' has shape"),
    ],
)
def test_layout_names_the_first_wrong_array(layout: Layout, change, message: str) -> None:
    arrays = layout.unflatten(np.zeros(layout.size, np.float32))
    change(arrays)
    with pytest.raises(LayoutError, match=message):
        layout.flatten(arrays)


def test_what_is_saved_comes_back(tmp_path: Path, layout: Layout) -> None:
    save_some(tmp_path, layout, [50])
    found = checkpoint.restore(tmp_path, pytest.fail)
    assert found is not None and found.step == 50
    assert found.metadata["loader"] == {"position": 50}
    for name, flat in sections(layout, 50).items():
        np.testing.assert_array_equal(found.flat(name, layout), flat)


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path, layout: Layout) -> None:
    save_some(tmp_path, layout, [50])
    folder = tmp_path / "step_00000050"
    tensors = load_file(folder / "state.safetensors")
    assert set(tensors) == {f"{s}/{n}" for s in SECTIONS for n in SHAPES}
    assert json.loads((folder / "metadata.json").read_text())["step"] == 50


def test_the_buffers_may_be_reused_after_save(tmp_path: Path, layout: Layout) -> None:
    state = sections(layout)
    expected = state["params"].copy()
    writer = CheckpointWriter(tmp_path, 1)
    writer.save(1, state, layout, {})
    state["params"][:] = np.nan
    writer.wait()
    found = checkpoint.restore(tmp_path, pytest.fail)
    assert found is not None
    np.testing.assert_array_equal(found.flat("params", layout), expected)


def test_only_the_newest_are_kept(tmp_path: Path, layout: Layout) -> None:
    save_some(tmp_path, layout, [9, 10, 11, 100], keep=2)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [100, 11]
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_step_can_be_saved_again(tmp_path: Path, layout: Layout) -> None:
    save_some(tmp_path, layout, [5, 5])
    found = checkpoint.restore(tmp_path, pytest.fail)
    assert found is not None and found.step == 5


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["state.safetensors", "metadata.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink, lambda p: p.write_text("")])
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(
    tmp_path: Path, layout: Layout, name: str, damage
) -> None:
    save_some(tmp_path, layout, [50, 100])
    damage(tmp_path / "step_00000100" / name)
    said: list[str] = []
    found = checkpoint.restore(tmp_path, said.append)
    assert found is not None and found.step == 50
    assert len(said) == 1 and str(tmp_path / "step_00000100") in said[0]
    # the run continues from 50: its next checkpoint must survive, though its number is smaller
    save_some(tmp_path, layout, [75], keep=1)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [75]


def test_all_damaged_is_an_error_not_a_new_start(tmp_path: Path, layout: Layout) -> None:
    save_some(tmp_path, layout, [50])
    truncate(tmp_path / "step_00000050" / "state.safetensors")
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        checkpoint.restore(tmp_path, lambda line: None)


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.restore(tmp_path / "absent", pytest.fail) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a checkpoint of twinfold"),
        ({"version": 99}, "format version 99"),
        ({"step": "50"}, "no step"),
    ],
)
def test_foreign_metadata_is_named(tmp_path: Path, layout: Layout, change, message: str) -> None:
    save_some(tmp_path, layout, [50])
    path = tmp_path / "step_00000050" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.read(path.parent)
    assert str(path) in str(error.value)


def test_another_model_names_the_first_wrong_array(tmp_path: Path, layout: Layout) -> None:
    save_some(tmp_path, layout, [50])
    found = checkpoint.restore(tmp_path, pytest.fail)
    assert found is not None
    other = make_layout({**SHAPES, "evoformer/b//weights": (2, 4)})
    with pytest.raises(CheckpointError, match=r"'mu'.*'evoformer/b//weights' has shape \(2, 3\)"):
        found.flat("mu", other)


def test_a_failed_write_is_raised_by_the_next_save(tmp_path: Path, layout: Layout) -> None:
    writer = CheckpointWriter(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    writer.save(1, sections(layout), layout, {})
    with pytest.raises(CheckpointError, match="step_00000001: cannot be written: Not a directory;"):
        writer.save(2, sections(layout), layout, {})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_named_and_leaves_the_checkpoints_before(
    error: Exception, tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_some(tmp_path, layout, [1])

    def cut_short(tensors: object, path: Path) -> None:
        path.write_bytes(b"as much as there was room for")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", cut_short)
    with pytest.raises(CheckpointError) as raised:
        save_some(tmp_path, layout, [2])
    reason = "cannot be written: No space left on device; the same command continues"
    assert str(raised.value).startswith(f"{tmp_path / 'step_00000002'}: {reason}")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    found = checkpoint.restore(tmp_path, pytest.fail)
    assert found is not None and found.step == 1


def test_parameters_to_start_from_that_are_not_there(tmp_path: Path, layout: Layout) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match=f"^{path}: no such file, run or checkpoint"):
            checkpoint.read_params(str(path), layout)
    save_some(tmp_path / "checkpoints", layout, [1, 2])
    expected = sections(layout, 2)["ema"]
    for path in (tmp_path, tmp_path / "checkpoints" / "step_00000002"):
        np.testing.assert_array_equal(checkpoint.read_params(str(path), layout), expected)


def test_a_disabled_writer_touches_nothing(tmp_path: Path, layout: Layout) -> None:
    writer = CheckpointWriter(tmp_path / "checkpoints", 1, enabled=False)
    writer.save(1, sections(layout), layout, {})
    assert writer.wait() is None and not list(tmp_path.iterdir())


SAVE_FOREVER = """
import sys, numpy as np
from foldcore.checkpoint import CheckpointWriter
from foldcore.layout import make_layout
layout = make_layout({"a": (200_000,)})
writer = CheckpointWriter(sys.argv[1], 2)
for step in range(1, 10**9):
    writer.save(step, {"params": np.full(layout.size, step, np.float32)}, layout, {"step": step})
"""


@pytest.mark.parametrize("delay", [0.05, 0.13, 0.31])
def test_killed_while_saving_leaves_whole_checkpoints(tmp_path: Path, delay: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)])
    while not checkpoint.list_checkpoints(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = checkpoint.restore(tmp_path, pytest.fail)
    assert found is not None
    assert (found.tensors["params/a"] == found.step).all()
    CheckpointWriter(tmp_path, 2)
    assert not list(tmp_path.glob(".unfinished*"))
