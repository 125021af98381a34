"""Processes that share their examples: each prepared once, the same batches and states in all."""

import hashlib
import itertools
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foldcore.config import DataConfig
from foldcore.data import share
from foldcore.data.loader import Loader
from foldcore.data.sampler import ExampleKey
from foldcore.data.share import ShareError
from foldcore.features import Batch
from tests.synthetic_examples import Synthetic

CONFIG = DataConfig(workers=2, prefetch=2)


def loader(folder: Path, number: int, count: int, seconds: float = 0.002) -> Loader:
    preparer = Synthetic(seconds=seconds, slow={f"c{i}": 0.05 for i in range(0, 40, 9)})
    return Loader(preparer, CONFIG, batch_size=2, folder=folder, share=(number, count))


def run(source: Loader, steps: int, found: list[tuple[Batch, object]]) -> None:
    for batch in itertools.islice(source, steps):
        found.append((batch, source.state()))


def run_all(loaders: list[Loader], steps: int) -> list[list[tuple[Batch, object]]]:
    found: list[list[tuple[Batch, object]]] = [[] for _ in loaders]
    threads = [
        threading.Thread(target=run, args=(source, steps, rows), daemon=True)
        for source, rows in zip(loaders, found, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def assert_equal(found: list[list[tuple[Batch, object]]], steps: int) -> None:
    first, *others = found
    for other in others:
        assert len(first) == len(other) == steps
        for (batch, state), (same_batch, same_state) in zip(first, other, strict=True):
            assert state == same_state
            for name, value in batch.items():
                np.testing.assert_array_equal(same_batch[name], value, err_msg=name)


def test_all_get_the_same_and_continue_together(tmp_path: Path) -> None:
    loaders = [loader(tmp_path, number, 3) for number in range(3)]
    found = run_all(loaders, 15)  # far more than there are slots
    assert_equal(found, 15)
    state = found[0][6][1]
    for source in loaders:
        source.restore(state)  # type: ignore[arg-type]
    again = run_all(loaders, 12)
    assert_equal(again, 12)
    for (batch, _), (before, _) in zip(again[0], found[0][7:], strict=False):
        np.testing.assert_array_equal(batch["example_id"], before["example_id"])
    for source in loaders:
        assert (source._source is None) or source._source.depth() >= 0
        source.close()
    assert len(list((tmp_path / "ledger").iterdir())) == 1


def test_one_that_leaves_does_not_stop_the_first(tmp_path: Path) -> None:
    first, second = loader(tmp_path, 0, 2), loader(tmp_path, 1, 2)
    run_all([first, second], 3)
    second.close()
    found: list[tuple[Batch, object]] = []
    run(first, 20, found)
    assert len(found) == 20
    first.close()


def test_a_slow_one_is_waited_for(tmp_path: Path) -> None:
    """The first runs ahead until all memory is lent, and goes on when the other has read."""
    first, second = loader(tmp_path, 0, 2, 0.0), loader(tmp_path, 1, 2)
    read: list[tuple[Batch, object]] = []

    def slowly() -> None:
        for _ in range(12):
            time.sleep(0.05)
            run(second, 1, read)

    found: list[tuple[Batch, object]] = []
    threads = [
        threading.Thread(target=slowly, daemon=True),
        threading.Thread(target=run, args=(first, 12, found), daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert_equal([found, read], 12)
    for source in (first, second):
        source.close()


def test_the_others_notice_when_the_first_is_gone(tmp_path: Path) -> None:
    first, second = loader(tmp_path, 0, 2), loader(tmp_path, 1, 2)
    run_all([first, second], 3)
    first.close()
    with pytest.raises(ShareError, match="that prepares these examples is gone"):
        run(second, 3, [])


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "MEETING_SECONDS", 0.2)
    with pytest.raises(ShareError, match="0 of 1 processes came"):
        next(loader(tmp_path, 0, 2))
    with pytest.raises(ShareError, match="never came"):
        next(loader(tmp_path, 1, 2))
    with pytest.raises(ValueError, match="by the run's folder"):
        Loader(Synthetic(), CONFIG, batch_size=1, share=(0, 2))


def test_the_meeting_place_is_the_users_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = share.meeting_place("a")
    assert place.parent.stat().st_mode & 0o777 == 0o700 and place != share.meeting_place("b")
    place.parent.chmod(0o755)
    with pytest.raises(ShareError, match="not a folder of this user alone"):
        share.meeting_place("a")


# Processes ----------------------------------------------------------------------------------------


class Counted(Synthetic):
    """Notes each preparation, and by which process, in a file; a few take longer."""

    def __init__(self, path: Path) -> None:
        super().__init__(slow={f"c{i}": 0.03 for i in range(0, 40, 9)})
        self.path = path

    def example(self, key: ExampleKey, out: Batch | None = None) -> Batch:
        with self.path.open("ab", buffering=0) as file:
            file.write(f"{key.epoch} {key.index} {os.getpid()}\n".encode())
        return super().example(key, out)


def digest(batch: Batch) -> str:
    parts = [name.encode() + np.ascontiguousarray(batch[name]).tobytes() for name in sorted(batch)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def work(folder: Path, place: tuple[int, int], state: Any, steps: int, at_end: str) -> None:
    """What each process of a host does: it writes down the batches it gets, and its states."""
    preparer = Counted(folder / "prepared.txt")
    source = Loader(preparer, CONFIG, batch_size=2, folder=folder, share=place)
    if state is not None:
        source.restore(state)
    with (folder / f"process_{place[0]}.jsonl").open("a", buffering=1) as lines:
        for batch in itertools.islice(source, steps):
            row = {"batch": digest(batch), "state": source.state(), "pid": os.getpid()}
            lines.write(json.dumps(row) + "\n")
    if at_end == "killed":
        os.kill(os.getpid(), 9)
    source.close()


def host(folder: Path, state: Any, steps: int, at_end: str = "") -> list[list[dict[str, Any]]]:
    """Three processes, each a fresh interpreter, of one replica; what each has written."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work, args=(folder, (number, 3), state, steps, at_end))
        for number in range(3)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
            assert process.exitcode == (-9 if at_end == "killed" else 0)
    finally:
        for process in processes:
            process.kill()
    texts = [(folder / f"process_{number}.jsonl").read_text() for number in range(3)]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def test_processes_of_a_host_get_the_same_prepared_once(tmp_path: Path) -> None:
    """They are killed together, and start again from a state of before."""
    first, *others = host(tmp_path, None, 12, "killed")
    prepared = [line.split() for line in (tmp_path / "prepared.txt").read_text().splitlines()]
    times = Counter((epoch, index) for epoch, index, _ in prepared)
    assert set(times.values()) == {1} and len(times) >= 24
    pids = {rows[0]["pid"] for rows in (first, *others)}
    assert len(pids) == 3 and not pids & {int(pid) for _, _, pid in prepared}
    again = host(tmp_path, first[6]["state"], 10)
    for rows in (first, *others):
        assert [(r["batch"], r["state"]) for r in rows] == [(r["batch"], r["state"]) for r in first]
    for rows in again:
        taken = [(r["batch"], r["state"]) for r in rows[12:]]
        assert len(taken) == 10
        assert taken[:5] == [(r["batch"], r["state"]) for r in first[7:]]  # as the ledger says
        assert taken == [(r["batch"], r["state"]) for r in again[0][12:]]
    assert len({r["batch"] for r in again[0]}) == 17  # none but those five comes twice
    assert len(list((tmp_path / "ledger").iterdir())) == 1
