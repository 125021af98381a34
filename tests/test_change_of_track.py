"""A run that changes track: 30 steps in one, 30 in the other, against 60 in one.

Whole runs by the training programs of both tracks, with dropout, on real examples. The tracks round
differently, and training amplifies that; how far the curves of equal runs drift apart is measured,
on runs of one track whose initial weights differ by half a unit in the last place.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import jaxfold.step
import jaxfold.train
import torchfold.train
from foldcore import checkpoint
from foldcore.checkpoint import SECTIONS
from foldcore.config import load
from tests.conftest import ROOT
from tests.torch_twin import FAST_COMPILE, TORCH_THREADS

CONFIG = "tests/data/tiny.toml"
HALF, WHOLE = 30, 60
PERTURBED = 3  # runs that measure the floor
FLOORS = 4  # as in the parity suite: a track may be this many noise floors off
TRACKS: dict[str, Any] = {"jax": jaxfold.train, "torch": torchfold.train}


class Runs:
    """Runs of both tracks in one folder, and the examples that each step of them saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.examples: dict[str, list[int]] = {}

    def train(self, track: str, name: str, steps: int, *overrides: str) -> None:
        """Train up to a step: from the start, or on from what is there under this name."""
        seen = self.examples.setdefault(name, [])
        settings = (
            *(f"train.out={self.folder}", f"train.name={name}", f"train.steps={steps}"),
            *("train.log_every=1", f"train.save_every={HALF}", "data.workers=0"),
        )
        with pytest.MonkeyPatch.context() as patch:
            program = TRACKS[track]
            patch.setattr(program, "prefetch", recorded(program.prefetch, seen))
            # scores do not matter here, and their program takes long to compile
            patch.setattr(program, "evaluate", lambda *_: {})
            assert program.main([CONFIG, *settings, *overrides]) == 0

    def branch(self, name: str, other: str) -> None:
        """A copy of a run under another name."""
        shutil.copytree(self.folder / name, self.folder / other)
        self.examples[other] = list(self.examples[name])
        written = self.folder / other / "config.toml"
        written.write_text(written.read_text().replace(f'"{name}"', f'"{other}"'))

    def rows(self, name: str) -> list[dict[str, float]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "grad_norm" in row]

    def curve(self, name: str, metric: str) -> np.ndarray:
        return np.array([row[metric] for row in self.rows(name)])

    def state(self, name: str) -> checkpoint.Checkpoint:
        found = checkpoint.restore(self.folder / name / "checkpoints", pytest.fail)
        assert found is not None and found.step == WHOLE
        return found


def recorded(prefetch: Any, seen: list[int]) -> Any:
    """``prefetch`` that notes the example of each batch taken from it."""

    def wrapped(batches: Any, mesh: Any) -> Iterator[Any]:
        for item in prefetch(batches, mesh):
            seen.append(int(item[0]["example_id"][0]))
            yield item

    return wrapped


class SharedStep(jaxfold.step.CompiledStep):
    """One compilation serves every run: they differ in nothing that the program contains."""

    programs: dict[str, Any] = {}

    def __call__(self, state: Any, batch: Any) -> Any:
        self._program = self.programs.get("step")
        result = super().__call__(state, batch)
        self.programs["step"] = self._program
        return result


# JAX's configuration is the process's own: other tests in it have theirs
JAX_OPTIONS = ("jax_compilation_cache_dir", "jax_default_matmul_precision", "jax_enable_x64")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Both tracks alone, both changes of track, and runs that start half an ulp apart."""
    found = Runs(tmp_path_factory.mktemp("runs"))
    before = {option: getattr(jax.config, option) for option in JAX_OPTIONS}
    torch.set_num_threads(TORCH_THREADS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("TWINFOLD_CACHE", str(found.folder / "cache"))
        patch.setattr(jaxfold.train, "CompiledStep", SharedStep)
        patch.setattr(jaxfold.step, "_compiler_options", lambda config: FAST_COMPILE)
        for track, other in (("jax", "torch"), ("torch", "jax")):
            found.train(track, track, HALF)
            found.branch(track, f"{track}_{other}")
            if track == "jax":
                found.branch(track, "half")
            found.train(track, track, WHOLE)
            found.train(other, f"{track}_{other}", WHOLE)
        for number in range(PERTURBED):
            start = perturbed_start(found.folder, number)
            found.train("jax", f"floor_{number}", WHOLE, f"train.initial_params={start}")
        yield found
    for option, value in before.items():
        jax.config.update(option, value)


def perturbed_start(folder: Path, number: int) -> Path:
    """Initial weights of which each moves by one unit in the last place with probability 1/2."""
    config = load(CONFIG)
    network = jaxfold.step.Network(config.model)
    weights, draw = network.initialize(config.train.seed), np.random.default_rng(number)
    towards = draw.choice(np.float32([-np.inf, np.inf]), weights.size)
    moved = np.where(draw.random(weights.size) < 0.5, np.nextafter(weights, towards), weights)
    path = folder / f"start_{number}"
    return checkpoint.write(path, 0, {"ema": moved}, network.layout, {})


def distance(one: checkpoint.Checkpoint, two: checkpoint.Checkpoint, section: str) -> float:
    """Length of the difference of two flat buffers."""
    names = sorted(name for name in two.tensors if name.startswith(f"{section}/"))
    return float(
        np.sqrt(sum(np.square(one.tensors[n] - two.tensors[n], dtype=float).sum() for n in names))
    )


def drift(runs: Runs, name: str, metric: str) -> float:
    """How far a run comes off the one in JAX alone: a section of its state, or a curve."""
    if metric in SECTIONS:
        return distance(runs.state(name), runs.state("jax"), metric)
    return float(np.abs(runs.curve(name, metric) - runs.curve("jax", metric)).max())


def drift_in_floors(runs: Runs, name: str, metric: str) -> float:
    floor = max(drift(runs, f"floor_{number}", metric) for number in range(PERTURBED))
    return drift(runs, name, metric) / floor


OTHERS = ("jax_torch", "torch", "torch_jax")


def test_the_tracks_see_the_same_examples(runs: Runs) -> None:
    examples = runs.examples["jax"]
    assert len(set(examples)) == len(examples) == WHOLE
    for name in OTHERS:
        assert runs.examples[name] == examples
        np.testing.assert_array_equal(
            runs.curve(name, "recycling"), runs.curve("jax", "recycling"), name
        )
        assert runs.state(name).metadata["loader"] == runs.state("jax").metadata["loader"]
    assert len(set(runs.curve("jax", "recycling"))) == 4


@pytest.mark.parametrize("name", OTHERS)
def test_curves_stay_within_the_noise_floor(runs: Runs, name: str) -> None:
    config = load(runs.folder / name / "config.toml")
    assert config.train.dropout and config.model.pair_dropout and config.model.msa_dropout
    for metric in ("loss/total", "grad_norm"):
        assert len(runs.curve(name, metric)) == WHOLE
        assert drift_in_floors(runs, name, metric) < FLOORS, metric


@pytest.mark.parametrize("name", OTHERS)
def test_states_stay_within_the_noise_floor(runs: Runs, name: str) -> None:
    for section in SECTIONS:
        assert drift_in_floors(runs, name, section) < FLOORS, section


@pytest.mark.parametrize("lost", ["mu", "nu", "loader"])
def test_what_a_checkpoint_would_lose_is_noticed(runs: Runs, lost: str) -> None:
    """The same comparison fails for a run that continues from half a checkpoint."""
    name = f"without_{lost}"
    runs.branch("half", name)
    path = runs.folder / name / "checkpoints" / checkpoint.step_name(HALF)
    found = checkpoint.read(path)
    layout = jaxfold.step.Network(load(CONFIG).model).layout
    sections = {section: found.flat(section, layout) for section in SECTIONS}
    metadata = found.metadata
    if lost == "loader":
        earlier = {key: metadata["loader"][key] - 1 for key in ("step", "position")}
        metadata = metadata | {"loader": metadata["loader"] | earlier}
    else:
        sections[lost][:] = 0
    checkpoint.write(path, HALF, sections, layout, metadata)
    runs.train("jax", name, WHOLE)
    assert drift_in_floors(runs, name, "loss/total") > FLOORS
    assert drift_in_floors(runs, name, "params") > FLOORS
