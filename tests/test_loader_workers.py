"""The loader under fire: slow, dying and hanging examples, killed runs, replay, memory."""

import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foldcore.config import DataConfig
from foldcore.data import pool as pool_module
from foldcore.data.loader import Loader, LoaderError
from foldcore.data.order import merge
from foldcore.data.pool import WorkerError
from foldcore.data.sampler import example_id
from foldcore.features import Batch
from tests.conftest import ROOT
from tests.loader_run import SAVE_EVERY, STEPS
from tests.synthetic_examples import Synthetic


def loader(preparer: Synthetic, workers: int = 2, batch_size: int = 1, **more: Any) -> Loader:
    options = {k: more.pop(k) for k in ("rank", "world", "folder", "warn") if k in more}
    config = DataConfig(**{"workers": workers, "prefetch": 4, **more})
    return Loader(preparer, config, batch_size=batch_size, max_recycling_iters=3, **options)


def take(source: Loader, steps: int) -> list[Batch]:
    return list(itertools.islice(source, steps))


def ids(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch["example_id"]]


def warm(source: Loader, depth: int) -> Loader:
    """Started, with every process at hand and so many examples ready."""
    iter(source)
    pool = source._source.pool  # type: ignore[union-attr]
    end = time.monotonic() + 60
    while pool.depth() < depth or not all(worker.ready for worker in pool._workers):
        assert time.monotonic() < end
        time.sleep(0.01)
    return source


def chain_of(preparer: Synthetic, position: int) -> str:
    return preparer.plan[position].chain_id


# Slow examples ------------------------------------------------------------------------------------


def test_a_slow_example_holds_up_nobody_and_comes_later() -> None:
    preparer = Synthetic(seconds=0.005)
    preparer.slow = {chain_of(preparer, 8): 1.5}
    with loader(preparer) as source:
        take(warm(source, 6), 1)
        waits = []
        for _ in range(30):
            start = time.monotonic()
            next(source)
            waits.append(time.monotonic() - start)
        assert max(waits) < 1.0
        assert source.state()["position"] == 8
        distance = source.incidents.metrics()["loader/reorder_distance"]
        assert distance == 23  # 31 are taken, and 8 is not among them
        time.sleep(1.5)
        assert next(source)["seq_length"][0] == int(chain_of(preparer, 8)[1:])
        metrics = source.incidents.metrics()
        assert metrics["loader/slowest_s"] > 1.4 and metrics["loader/slowest_position"] == 8
        assert source.incidents.summary().startswith(
            f"slowest examples to prepare: {chain_of(preparer, 8)} 1.5"
        )


def test_in_order_everyone_waits_for_it() -> None:
    preparer = Synthetic(seconds=0.001)
    preparer.slow = {chain_of(preparer, 6): 0.5}
    with loader(preparer, ordered=True) as source:
        expected = ids(take(loader(preparer, workers=0), 12))
        assert ids(take(source, 12)) == expected
        assert source.incidents.metrics()["loader/reorder_distance"] == 0


def test_the_window_bounds_the_wait_of_a_slow_example() -> None:
    preparer = Synthetic(seconds=0.001)
    preparer.slow = {chain_of(preparer, 8): 0.7}
    with loader(preparer, reorder_window=5) as source:
        batches = take(warm(source, 5), 18)
        place = ids(batches).index(ids(take(loader(preparer, workers=0), 9))[8])
        assert 8 < place <= 8 + 5
        assert source.incidents.metrics()["loader/reorder_distance"] < 5


def test_a_loader_that_is_fast_enough_keeps_the_order_of_the_plan() -> None:
    preparer = Synthetic(seconds=0.01)
    with loader(preparer, workers=3) as source:
        found = take(source, 2)  # the first ones are waited for
        while len(found) < 12:
            while source.incidents._depths and source._source.depth() < 7:  # type: ignore
                time.sleep(0.01)  # a trainer at work
            found += take(source, 1)
    assert ids(found) == ids(take(loader(preparer, workers=0), 12))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Batch]]:
    """A run of 25 steps in two parts, in which slow examples were overtaken."""
    folder = tmp_path_factory.mktemp("recorded")
    preparer = Synthetic(seconds=0.002)
    preparer.slow = {chain_of(preparer, 12): 0.7, chain_of(preparer, 31): 0.3}
    with loader(preparer, workers=3, batch_size=2, folder=folder) as source:
        batches = take(warm(source, 11), 10)
        state = source.state()
        assert state["position"] == 12 and state["taken"]
    with loader(preparer, workers=2, batch_size=2, folder=folder) as source:
        source.restore(state)  # the run continues, and its ledger with it
        batches += take(source, 15)
    return folder, batches


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 2)])
def test_a_ledger_replays_a_run(
    recorded: tuple[Path, list[Batch]], workers: int, world: int
) -> None:
    folder, batches = recorded
    ranks = [
        loader(Synthetic(), workers, 2 // world, rank=r, world=world, replay=str(folder))
        for r in range(world)
    ]
    for batch in batches:
        parts = [next(rank) for rank in ranks]
        for name, value in batch.items():
            again = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(again, value, err_msg=name)
    followed = [int(i) for rank in ranks for i in next(rank)["example_id"]]
    assert not set(followed) & set(ids(batches))  # beyond its end: what is left, none repeated
    for rank in ranks:
        rank.close()


def test_another_ledger_cannot_be_replayed(tmp_path: Path) -> None:
    with loader(Synthetic(), workers=0, folder=tmp_path) as source:
        take(source, 3)
    with pytest.raises(LoaderError, match="of other data, or of another train.seed"):
        next(loader(Synthetic(seed=4), workers=0, replay=str(tmp_path)))
    with pytest.raises(LoaderError, match=r"1 examples a step, but train.batch_size=2"):
        next(loader(Synthetic(), workers=0, batch_size=2, replay=str(tmp_path)))
    spoilt = Synthetic(behaviour={chain_of(Synthetic(), 1): "raise"})
    with pytest.raises(LoaderError, match="position 1 could not be prepared as before: .*boom"):
        take(loader(spoilt, workers=0, replay=str(tmp_path)), 3)


def test_a_batch_is_rebuilt_from_the_ledger(tmp_path: Path) -> None:
    draw = random.Random(2)
    preparer = Synthetic(slow={f"c{i}": draw.choice((0, 0.03)) for i in range(40)})
    with loader(preparer, batch_size=2, folder=tmp_path) as source:
        batches = take(source, 12)
        for step in (1, 7, 12):
            again = source.rebuild(step)
            for name, value in batches[step - 1].items():
                np.testing.assert_array_equal(again[name], value, err_msg=name)


# Killed runs --------------------------------------------------------------------------------------


def run_until_killed(folder: Path, seconds: float) -> bool:
    """Start the run and kill it after that long, unless it has finished."""
    command = [sys.executable, "-m", "tests.loader_run", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    assert process.returncode == 0
    return "finished" in out


def check_no_example_is_lost_or_repeated(folder: Path) -> int:
    """Every line of the run, kills included; how many of its steps were taken again."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    final: dict[int, dict[str, Any]] = {}
    written = set[int]()  # steps that the ledger has, should they be taken again
    again = 0
    for line in lines:
        if line["step"] == 0:  # a start; another number of ranks gives up what was not saved
            written = {step for step in written if final[step]["world"] == line["world"]}
            continue
        if line["step"] in written:
            assert line["examples"] == final[line["step"]]["examples"], line["step"]
            again += 1
        written.add(line["step"])
        final[line["step"]] = line
    assert sorted(final) == list(range(1, STEPS + 1))
    state = json.loads((folder / "state.json").read_text())
    taken = set(range(state["position"]))
    taken |= {p for first, last in state["taken"] for p in range(first, last)}
    plan = Synthetic(300).plan
    names = {ids_of(plan, position): position for position in range(4 * STEPS + 200)}
    positions = [names[example] for line in final.values() for example in line["examples"]]
    assert len(positions) == len(set(positions)) and set(positions) == taken
    return again


def ids_of(plan: Any, position: int) -> int:
    key = plan[position]
    return example_id(key.source, key.epoch, key.index)


@pytest.mark.parametrize(
    "kills", [6, pytest.param(40, marks=pytest.mark.slow, id="many")], ids=["few", "many"]
)
def test_runs_killed_at_random_lose_and_repeat_nothing(tmp_path: Path, kills: int) -> None:
    draw = random.Random()
    killed = 0
    while killed < kills:
        if run_until_killed(tmp_path, draw.uniform(0.8, 2.0)):
            check_no_example_is_lost_or_repeated(tmp_path)
            for name in ("steps.jsonl", "state.json"):  # that was quick: once more
                (tmp_path / name).unlink()
            for path in (tmp_path / "ledger").iterdir():
                path.unlink()
        killed += 1
    for _ in range(3):
        if run_until_killed(tmp_path, 60):
            break
    check_no_example_is_lost_or_repeated(tmp_path)


# Processes that die or hang -----------------------------------------------------------------------


def test_an_example_whose_process_was_killed_is_tried_again(tmp_path: Path) -> None:
    preparer, warned = Synthetic(), list[str]()
    victim = chain_of(preparer, 4)
    expected = take(loader(preparer, workers=0), 10)
    preparer.behaviour = {victim: f"die once {tmp_path / 'marker'}"}
    with loader(preparer, ordered=True, warn=warned.append, folder=tmp_path) as source:
        assert ids(take(source, 10)) == ids(expected)
        assert len(source._source.pool.process_ids()) == 2  # type: ignore[union-attr]
    assert warned == [
        f"{victim} is tried again: its process was killed by SIGKILL "
        "(out of memory? fewer data.workers need less)"
    ]
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("behaviour", "cause", "trace"),
    [
        ("die", "was killed by SIGKILL", ""),
        ("crash", "was killed by SIGSEGV", "in misbehave"),
        ("hang", "took longer than", "in misbehave"),
    ],
)
def test_a_chain_that_ends_its_process_is_quarantined(
    tmp_path: Path, behaviour: str, cause: str, trace: str
) -> None:
    preparer, warned = Synthetic(chains=8), list[str]()
    victim = chain_of(preparer, 4)
    expected = take(loader(preparer, workers=0), 24)
    preparer.behaviour = {victim: behaviour}
    options = {"example_timeout": 0.5} if behaviour == "hang" else {}
    with loader(
        preparer, workers=1, ordered=True, warn=warned.append, folder=tmp_path, **options
    ) as source:
        found = take(source, 24)  # three epochs: it would come three times
        summary = source.incidents.summary()
    assert ids(found) == ids(expected)
    for position, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        shown = chain_of(preparer, position)
        if shown == victim:
            shown = preparer.plan.replacement(position, 1).chain_id
        assert ours["seq_length"][0] == int(shown[1:])
        assert ours["num_iter_recycling"] == theirs["num_iter_recycling"]
    assert [w.split(":")[0] for w in warned] == [f"{victim} is tried again"] + [
        f"{victim} is quarantined"
    ]
    assert all(cause in line and trace in line for line in warned)
    (entry,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (entry["chain"], entry["position"], entry["rank"]) == (victim, 4, 0)
    assert cause in entry["cause"] and trace in entry["trace"]
    assert "1 chains were quarantined" in summary and f"{victim} (rank 0): its process" in summary
    assert cause in preparer.datasets[0].report.failed[victim][1]

    preparer.behaviour = {}  # what happened is in the ledger: a replay repeats it
    again = take(loader(preparer, workers=0, replay=str(tmp_path)), 24)
    assert [int(b["seq_length"][0]) for b in again] == [int(b["seq_length"][0]) for b in found]


def quarantine(folder: Path, steps: int, state_at: int) -> tuple[str, dict[str, Any], list[Batch]]:
    """A run in which the chain of position 4 is quarantined: its name, a state, all batches."""
    preparer = Synthetic(chains=8)
    victim = chain_of(preparer, 4)
    preparer.behaviour = {victim: "die"}
    with loader(preparer, workers=1, ordered=True, folder=folder, warn=lambda line: None) as source:
        found = take(source, state_at)
        state = json.loads(json.dumps(source.state()))
        return victim, state, found + take(source, steps - state_at)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("folder", ["same", "another"])
def test_what_was_quarantined_stays_so_when_a_run_is_resumed(
    tmp_path: Path, workers: int, folder: str
) -> None:
    victim, state, whole = quarantine(tmp_path / "same", 24, 7)
    assert [entry["chain"] for entry in state["quarantined"]] == [victim]
    # in another folder there is no file of it, nor a ledger: the state alone
    resumed = Synthetic(chains=8, behaviour={victim: "die"})
    options = {"ordered": True, "folder": tmp_path / folder, "warn": pytest.fail}
    with loader(resumed, workers=workers, **options) as source:
        source.restore(state)
        assert ids(take(source, 17)) == ids(whole[7:])
        assert source.state()["quarantined"] == state["quarantined"]
        summary = source.incidents.summary()
    assert "1 chains were quarantined" in summary and f"{victim} (rank 0): its process" in summary
    again = take(loader(Synthetic(chains=8), workers=0, replay=str(tmp_path / "same")), 24)
    for name in ("example_id", "seq_length"):
        assert [int(b[name][0]) for b in again] == [int(b[name][0]) for b in whole]


def test_what_was_quarantined_after_the_last_checkpoint_is_known_too(tmp_path: Path) -> None:
    """Killed before its first one, in fact; a line of the file was being written."""
    victim, _, whole = quarantine(tmp_path, 6, 0)
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"chain": "c')
    fresh = Synthetic(chains=8, behaviour={victim: "die"})
    with loader(fresh, workers=1, ordered=True, folder=tmp_path, warn=pytest.fail) as source:
        found = take(source, 24)
        assert ids(found[:6]) == ids(whole)
        assert victim in source.incidents.summary()
    other = Synthetic(chains=8, seed=9)  # a plan of its own
    with loader(other, workers=0, folder=tmp_path) as source:
        next(source)
        assert source.state()["quarantined"] == [] and victim not in source.incidents.summary()


def test_an_example_from_before_its_chain_was_quarantined_is_prepared_again(tmp_path: Path) -> None:
    preparer = Synthetic(chains=8)
    victim = chain_of(preparer, 4)
    with loader(preparer, workers=1, ordered=True, folder=tmp_path) as source:
        start = source.state()
        whole = take(source, 7)
    preparer.behaviour = {victim: "die"}  # its data have changed for the worse, and back
    with loader(
        preparer, workers=1, ordered=True, folder=tmp_path, warn=lambda line: None
    ) as source:
        source.restore({**start, "step": 7, "position": 7})
        take(source, 9)
    with loader(
        Synthetic(chains=8), workers=1, ordered=True, folder=tmp_path, warn=pytest.fail
    ) as source:
        source.restore(start)
        found = take(source, 24)
    assert [int(b["seq_length"][0]) for b in found[:7]] == [int(b["seq_length"][0]) for b in whole]
    assert int(victim[1:]) not in [int(b["seq_length"][0]) for b in found[7:]]


def test_the_quarantine_of_all_ranks_is_in_the_merged_state() -> None:
    entries = [{"source": 0, "chain": name, "rank": 0, "position": 1, "cause": ""} for name in "ab"]
    parts = []
    for rank in range(2):
        source = loader(Synthetic(), workers=0, batch_size=1, rank=rank, world=2)
        next(source)
        source.incidents.restore(entries[: rank + 1])
        parts.append(source.state())
    assert merge(parts)["quarantined"] == merge(parts[::-1])["quarantined"] == entries


def test_where_every_chain_ends_its_process_the_run_ends() -> None:
    preparer = Synthetic(chains=3, behaviour={f"c{i}": "die" for i in range(3)})
    with loader(preparer, workers=1, warn=lambda line: None) as source:
        with pytest.raises(LoaderError, match="20 chains in a row could not be prepared"):
            take(source, 2)


def test_an_unexpected_error_is_told_with_its_traceback() -> None:
    preparer, warned = Synthetic(), list[str]()
    victim = chain_of(preparer, 1)
    preparer.behaviour = {victim: "raise"}
    with loader(preparer, warn=warned.append) as source:
        take(source, 5)
    (line,) = warned
    assert line.startswith(f"replaced in training: {victim}: ZeroDivisionError: boom (synthetic")
    assert 'in misbehave\n    raise ZeroDivisionError("boom")' in line


def test_nothing_but_deaths_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_DEATHS_IN_A_ROW", 3)
    preparer = Synthetic(chains=9, behaviour={f"c{i}": "die" for i in range(9)})
    with loader(preparer, warn=lambda line: None) as source:
        with pytest.raises(WorkerError, match="3 loader processes in a row died at work; the last"):
            take(source, 2)


# Memory -------------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Bytes of a process's own memory."""
    _, pages, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
    return (int(pages) - int(shared)) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("examples", [3000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow(examples: int) -> None:
    with loader(Synthetic(chains=500), batch_size=10) as source:
        sizes = []
        for _ in range(examples // 1000):
            take(source, 100)
            processes = [*source._source.pool.process_ids(), "self"]  # type: ignore[union-attr]
            sizes.append([resident(pid) for pid in processes])  # type: ignore[arg-type]
    growth = (np.array(sizes[-1]) - np.array(sizes[1])) / 2**20
    print(f"MiB after 2,000: {np.array(sizes[1]) / 2**20}; growth to {examples}: {growth}")
    assert growth[:2].max() < 2  # of the workers; of this process, with its ledger:
    assert growth[2] < 8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_holds_too_much_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MEMORY_LIMIT", 1 << 20)
    preparer = Synthetic()
    with loader(preparer, workers=1, ordered=True, warn=pytest.fail) as source:
        first = next(source)
        before = source._source.pool.process_ids()  # type: ignore[union-attr]
        found = [first, *take(source, 2)]
        assert Counter(source._source.pool.process_ids()) != Counter(before)  # type: ignore
    assert ids(found) == ids(take(loader(preparer, workers=0), 3))


assert STEPS % SAVE_EVERY == 0  # the last state is that of the last step
