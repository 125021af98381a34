"""The loader on real examples: any number of workers and ranks, exact resume, clean ends."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_sets import build, write

from foldcore.config import Config, ConfigError, DataConfig, TrainConfig
from foldcore.data import pool as pool_module
from foldcore.data.dataset import Dataset
from foldcore.data.examples import Preparer
from foldcore.data.loader import Loader, LoaderError, open_loader
from foldcore.data.order import merge
from foldcore.data.pool import WorkerError
from foldcore.data.sampler import ExampleKey, Plan, example_id, recycling_iters
from foldcore.data.slots import Slots, SlotsError
from foldcore.features import Batch, dimensions, validate

SMALL = {
    "accept_unknown": True,
    "crop_size": 16,
    "num_msa_clusters": 4,
    "num_extra_msa": 4,
    "num_templates": 1,
    "prefetch": 3,
}


def config(workers: int = 0, batch_size: int = 2, **data: object) -> Config:
    settings = DataConfig(**{**SMALL, "workers": workers, **data})  # type: ignore[arg-type]
    return Config(data=settings, train=TrainConfig(batch_size=batch_size, seed=5))


def take(loader: Loader, steps: int) -> list[Batch]:
    return list(itertools.islice(loader, steps))


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def reference() -> list[Batch]:
    """The first ten batches of two, prepared in this process."""
    return take(open_loader(config()), 10)


def test_batches_obey_the_schema_and_the_plan(reference: list[Batch]) -> None:
    loader = open_loader(config())
    assert len(loader.plan.sources[0].chains) == 40
    for step, batch in enumerate(reference):
        validate(batch, dimensions(loader.datasets[0].config, 2))
        assert (batch["num_iter_recycling"] == recycling_iters(5, step, 3)).all()
        keys = [loader.plan[2 * step + slot] for slot in range(2)]
        assert batch["example_id"].tolist() == [example_id(0, k.epoch, k.index) for k in keys]
    lengths = [loader.datasets[0].records[loader.plan[p].chain_id].length for p in range(20)]
    crops = np.concatenate([batch["seq_length"] for batch in reference])
    assert crops.tolist() == [min(length, 16) for length in lengths]
    assert len({batch["msa_feat"].tobytes() for batch in reference}) == 10


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_in_order(reference: list[Batch], workers: int) -> None:
    with open_loader(config(workers, ordered=True)) as loader:
        assert_equal(take(loader, 6), reference[:6])
        assert loader.wait_seconds > 0
        assert loader.state()["position"] == 12


def test_resume_at_every_position(reference: list[Batch]) -> None:
    loader = open_loader(config())
    states = []
    for _ in range(6):
        states.append(json.loads(json.dumps(loader.state())))
        next(loader)
    for step, state in enumerate(states):
        resumed = open_loader(config())
        resumed.restore(state)
        assert_equal(take(resumed, 2), reference[step : step + 2])


def test_restore_in_the_middle_of_prefetching(reference: list[Batch]) -> None:
    with open_loader(config(workers=1)) as loader:
        take(loader, 2)
        state = loader.state()
        take(loader, 3)
        loader.restore(state)
        assert_equal(take(loader, 2), reference[2:4])


def test_ranks_divide_the_stream_of_one(reference: list[Batch]) -> None:
    ranks = [take(open_loader(config(), rank=rank, world=2), 4) for rank in range(2)]
    for step, whole in enumerate(reference[:4]):
        for name, value in whole.items():
            parts = [ranks[rank][step][name] for rank in range(2)]
            np.testing.assert_array_equal(np.concatenate(parts), value, err_msg=name)


def test_a_resumed_run_may_change_batch_size_and_ranks(reference: list[Batch]) -> None:
    loader = open_loader(config())
    take(loader, 3)
    parts = {}
    for rank in range(2):
        resumed = open_loader(config(batch_size=4), rank=rank, world=2)
        resumed.restore(loader.state())
        batch = next(resumed)
        parts[rank] = batch, resumed.state()
        assert (batch["num_iter_recycling"] == recycling_iters(5, 3, 3)).all()
    found = sorted(batch["msa_feat"].tobytes() for batch, _ in parts.values())
    assert found == sorted(batch["msa_feat"].tobytes() for batch in reference[3:5])
    state = merge([parts[1][1], parts[0][1]])
    assert state == {**loader.state(), "step": 4, "position": 10}


def test_another_plan_cannot_be_resumed(tmp_path: Path) -> None:
    state = open_loader(config()).state()
    other = open_loader(config(path=str(build(tmp_path))))
    with pytest.raises(LoaderError, match="train.initial_params"):
        other.restore(state)
    assert other.state()["position"] == 0


def test_a_batch_must_divide_over_the_ranks() -> None:
    words = "train.batch_size=2 cannot be divided over 3 ranks: set .* to a multiple of 3$"
    with pytest.raises(ConfigError, match=words):
        open_loader(config(), world=3)


def test_some_chains_must_be_left_to_train_on(tmp_path: Path) -> None:
    path = str(build(tmp_path))  # without split.tsv
    assert open_loader(config(path=path, validation_fraction=0.0)).state()["position"] == 0
    with pytest.raises(ConfigError, match="no chains to sample from: .*data.validation_fraction"):
        open_loader(config(path=path, validation_fraction=1.0))


def test_two_sources_are_mixed_by_their_share() -> None:
    settings = config(distillation_path="embedded", distillation_probability=0.25)
    loader = open_loader(settings)
    taken = take(loader, 32)
    sources = np.array([loader.plan[p].source for p in range(64)])
    assert sources.sum() == 16
    resolution = np.concatenate([batch["resolution"] for batch in taken])
    known = [loader.datasets[0].raw(loader.plan[p].chain_id).resolution for p in range(64)]
    np.testing.assert_array_equal(resolution, np.where(sources == 0, np.float32(known), 0))
    assert (resolution > 0).sum() > 10


def broken_set(root: Path, spoilt: tuple[str, ...]) -> Path:
    """Four chains, of which some have an alignment that cannot be read."""
    build(root, tables=True)
    for chain_id in spoilt:
        write(root / "alignments" / chain_id / "uniref90_hits.a3m", ">q\nAC\n>r\nACD\n")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_chain_is_replaced_counted_and_told_once(tmp_path: Path, workers: int) -> None:
    whole = config(path=str(build(tmp_path / "whole", tables=True)), validation_fraction=0.0)
    spoilt = broken_set(tmp_path / "broken", ("1ubq_A",))
    broken = config(workers, path=str(spoilt), validation_fraction=0.0, ordered=True)
    warned: list[str] = []
    expected = take(open_loader(whole), 12)
    with open_loader(broken, warn=warned.append) as loader:
        batches = take(loader, 12)
        plan, report = loader.plan, loader.datasets[0].report
    failing = [p for p in range(24) if plan[p].chain_id == "1ubq_A"]
    assert 2 < len(failing) < 12
    for position in range(24):
        step, slot = divmod(position, 2)
        same = all((batches[step][n][slot] == expected[step][n][slot]).all() for n in expected[0])
        assert same == (position not in failing)
    times, reason = report.failed["1ubq_A"]
    assert times >= len(failing)
    assert "1ubq_A/uniref90_hits.a3m:3: ragged" in reason
    assert warned == [f"replaced in training: 1ubq_A: {reason}"]


def test_replacements_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    path = str(broken_set(tmp_path, ("1ubq_A", "1bd2_B")))
    batches = []
    for workers in (0, 2):
        settings = config(workers, path=path, validation_fraction=0.0, ordered=True)
        with open_loader(settings, warn=lambda line: None) as loader:
            batches.append(take(loader, 4))
    assert_equal(*batches)


def test_an_unexpected_exception_counts_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Dataset.raw

    def raw(self: Dataset, chain_id: str) -> object:
        if chain_id == bad:
            raise ZeroDivisionError("boom")
        return original(self, chain_id)

    warned: list[str] = []
    loader = open_loader(config(), warn=warned.append)
    bad = loader.plan[0].chain_id
    monkeypatch.setattr(Dataset, "raw", raw)
    next(loader)
    assert len(warned) == 1
    assert f"{bad}: ZeroDivisionError: boom (test_loader.py:" in warned[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_failures_stops_the_loader(tmp_path: Path, workers: int) -> None:
    chains = ("1bd2_A", "1bd2_B", "1ubq_A", "5pti_A")
    settings = config(workers, path=str(broken_set(tmp_path, chains)), validation_fraction=0.0)
    with open_loader(settings, warn=lambda line: None) as loader:
        for _ in range(2):  # trying again neither hangs nor skips
            with pytest.raises(LoaderError, match="20 chains in a row could not be prepared"):
                next(loader)
        assert loader.state()["position"] == 0


def test_what_workers_note_reaches_the_report() -> None:
    with open_loader(config(workers=1, max_msa_rows=5)) as loader:
        take(loader, 3)
        beyond = loader.datasets[0].report.notes["alignment rows beyond data.max_msa_rows"]
        assert set(beyond) <= set(loader.datasets[0].chains)
        assert {loader.plan[p].chain_id for p in range(6)} <= set(beyond)


def test_no_more_than_prefetch_batches_are_ahead() -> None:
    with open_loader(config(workers=1)) as loader:
        iter(loader)
        source = loader._source
        wait_until(lambda: source.depth() == 7)  # type: ignore[union-attr]
        time.sleep(0.1)
        assert source.depth() == 7  # 3 batches of 2, and 1 in work  # type: ignore[union-attr]
        assert loader.is_ready()


def test_too_little_memory_is_an_error_that_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr("foldcore.data.slots.available_memory", lambda: 1000.0)
    with pytest.raises(SlotsError, match=r"7 examples .* lower data.prefetch or data.workers"):
        next(open_loader(config(workers=1)))

    def no_space(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr("os.posix_fallocate", no_space)
    with pytest.raises(SlotsError, match="No space left on device"):
        next(open_loader(config(workers=1)))


def test_slots_hold_examples_apart(reference: list[Batch]) -> None:
    sizes = dimensions(config().data)
    slots = Slots.create(sizes, 2)
    examples = [{k: v[i] for k, v in reference[0].items()} for i in range(2)]
    for slot in (1, 0):
        slots.begin(slot, slot + 7)
        for name, array in slots.room(slot).items():
            assert not array.any()
            array[...] = examples[slot][name]
        slots.finish(slot)
    again = Slots(slots.descriptor, sizes, 2)
    for slot in range(2):
        assert again.begun(slot) == slot + 7
        for name, value in examples[slot].items():
            np.testing.assert_array_equal(again[slot][name], value, err_msg=name)
    whole = again.room(0)  # as it was made; an attempt that is given up here leaves its slot blank
    np.testing.assert_array_equal(whole["msa_feat"], examples[0]["msa_feat"])
    assert not any(array.any() for array in slots.room(0).values())
    np.testing.assert_array_equal(slots.room(1)["msa_feat"], examples[1]["msa_feat"])


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_what_fails_half_way_leaves_nothing_behind(
    reference: list[Batch], tmp_path: Path, how: str
) -> None:
    preparer = Spoiler(open_loader(config())._preparer, tmp_path, how)
    data = replace(config().data, workers=1, ordered=True)
    warned: list[str] = []
    with Loader(preparer, data, batch_size=2, max_recycling_iters=3, warn=warned.append) as loader:
        found = take(loader, 3)
    assert sum("is tried again" in line for line in warned) == (2 if how == "dies" else 0)
    if how == "dies":
        assert_equal(found, reference[:3])
    else:  # the replacements of the chains that raised
        assert len(warned) == 2 and all("ZeroDivisionError" in line for line in warned)
        expected = [preparer.prepare(p, 1 if p in (1, 4) else 0).features for p in range(6)]
        for position, example in enumerate(expected):
            assert example is not None
            for name in example.keys() - {"num_iter_recycling"}:
                value = found[position // 2][name][position % 2]
                np.testing.assert_array_equal(value, example[name], err_msg=name)


class Spoiler(Preparer):
    """The first attempt at two positions fails when it has written half of its example."""

    def __init__(self, inner: Preparer, folder: Path, how: str) -> None:
        super().__init__(inner.datasets, inner.plan)
        self.victims = {self.plan[p] for p in (1, 4)}
        self.folder, self.how = folder, how

    def example(self, key: ExampleKey, out: Batch | None = None) -> Batch:
        marker = self.folder / f"{key.epoch}_{key.index}"
        if out is not None and key in self.victims and not marker.exists():
            marker.touch()
            for name, array in out.items():
                if name != "msa_row_mask":
                    array.fill(3)
            if self.how == "raises":
                raise ZeroDivisionError
            os.kill(os.getpid(), signal.SIGKILL)
        return super().example(key, out)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


def pids(loader: Loader) -> list[int]:
    return loader._source.pool.process_ids()  # type: ignore[union-attr]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_ignore_signals_of_the_group_and_end_with_the_loader() -> None:
    loader = open_loader(config(workers=2))
    next(loader)
    started = pids(loader)
    for pid in started:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in environment
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    take(loader, 4)
    loader.close()
    loader.close()
    assert not any(map(is_running, started))
    take(loader, 1)
    again = pids(loader)
    assert loader.state()["step"] == 6
    del loader
    gc.collect()
    assert not any(map(is_running, again))


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match="loader process 0 ended with exit status 1 while start"):
        next(open_loader(config(workers=1)))


def test_what_a_worker_says_before_it_dies_is_in_the_error(monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "setup_message", lambda preparer, slots: b"nonsense")
    with pytest.raises(WorkerError, match="UnpicklingError"):
        next(open_loader(config(workers=1)))


SCRIPT = """
import sys, time
import numpy
sys.path.insert(0, {tests!r})
from test_loader import config, pids
from foldcore.data.loader import open_loader
loader = open_loader(config(workers=2))
next(loader)
print(*pids(loader), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    """The script has no ``if __name__ == "__main__"`` either: workers do not run it again."""
    script = write(tmp_path / "script.py", SCRIPT.format(tests=str(Path(__file__).parent)))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(map(is_running, workers))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(map(is_running, workers)))


def test_workers_import_neither_framework() -> None:
    code = "import sys, foldcore.data.worker; print(sorted({'jax', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plan_and_data_sets_must_match() -> None:
    dataset = Dataset("embedded", config().data)
    plan = Plan([dataset.source(), dataset.source()], 0, 0.5)
    with pytest.raises(ValueError, match="1 data sets, but the plan has 2"):
        Preparer([dataset], plan)
    preparer = Preparer([dataset] * 2, plan)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Loader(preparer, config().data, batch_size=1, rank=2, world=2)
