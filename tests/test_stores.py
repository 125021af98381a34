"""The stores that training packs for itself: when, where, once, and with the same examples."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_sets import CHAINS, build, msa, write

from foldcore.config import Config, DataConfig, TrainConfig
from foldcore.data import stores
from foldcore.data.loader import Loader, open_loader
from foldcore.data.store import MANIFEST, WORK, Store
from foldcore.data.stores import find_store
from foldcore.errors import DataError
from tests.conftest import ROOT

DATA = DataConfig(
    accept_unknown=True,
    crop_size=16,
    num_msa_clusters=4,
    num_extra_msa=4,
    num_templates=1,
    distillation_min_plddt=-1.0,
    workers=0,
)
ALWAYS = replace(DATA, pack="always")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWINFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


def silent(line: str) -> None:
    raise AssertionError(f"nothing to say, but: {line}")


def loader(said: list[str], **data: object) -> Loader:
    config = Config(data=replace(DATA, **data), train=TrainConfig(batch_size=2))  # type: ignore
    return open_loader(config, warn=said.append)


def test_small_sets_and_stores_are_read_as_they_are(tmp_path: Path, cache: Path) -> None:
    raw = str(build(tmp_path / "raw", ("1ubq_A",)))
    assert find_store(raw, DATA, silent) == raw
    assert find_store("embedded", DATA, silent) == "embedded"
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / MANIFEST).touch()
    assert find_store(str(tmp_path / "store"), ALWAYS, silent) == str(tmp_path / "store")
    assert not cache.exists()


def test_a_large_source_is_packed_once_and_trains_the_same(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, said = str(build(tmp_path / "raw")), list[str]()
    monkeypatch.setattr(stores, "PACK_ABOVE", len(CHAINS) - 1)
    theirs = loader(said, path=raw, distillation_path=raw, pack="never")
    assert not said and not cache.exists()
    ours = loader(said, path=raw, distillation_path=raw)
    (store,) = cache.glob("*/")
    assert said[0] == f"{raw}: packing 4 alignments into {store}, once"
    assert f"{store}: 4 chains in 5 files" in said
    assert said[-2:] == [f"{raw}: training from its packed store {store}"] * 2
    assert not (store / WORK).exists()
    assert [dataset.store is not None for dataset in ours.datasets] == [True, True]
    assert ours.plan.fingerprint() == theirs.plan.fingerprint()
    for _ in range(3):
        batch = next(ours)
        for name, value in next(theirs).items():
            np.testing.assert_array_equal(batch[name], value, err_msg=name)
    again: list[str] = []
    assert find_store(raw, replace(DATA, max_msa_rows=10), again.append) == str(store)
    assert again == said[-1:]


def test_a_changed_source_or_more_rows_is_another_store(tmp_path: Path, cache: Path) -> None:
    raw = build(tmp_path / "raw", ("1ubq_A",))
    found = {find_store(str(raw), ALWAYS, print)}
    write(raw / "alignments" / "1ubq_A" / "bfd_hits.a3m", msa("1ubq_A"))
    found.add(find_store(str(raw), ALWAYS, print))
    found.add(find_store(str(raw), replace(ALWAYS, max_msa_rows=20_000), print))
    assert len(found) == 3 and all(Path(store, MANIFEST).is_file() for store in found)


def test_what_cannot_be_read_directly_is_packed_however_small(tmp_path: Path, cache: Path) -> None:
    raw = build(tmp_path / "raw", ("1ubq_A",))
    (raw / "mmcif").rename(raw / "structures")  # a name that only the walk over all files finds
    assert loader([], path=str(raw)).datasets[0].chains == ("1ubq_A",)
    assert len(list(cache.glob(f"*/{MANIFEST}"))) == 1
    with pytest.raises(DataError, match=r"no such folder \(data.path\)"):
        find_store(str(tmp_path / "nowhere"), ALWAYS, silent)


def test_of_several_processes_one_packs_and_the_others_wait(tmp_path: Path, cache: Path) -> None:
    raw = str(build(tmp_path / "raw", ("1ubq_A",)))
    said, found = list[str](), list[str]()
    ranks = [
        threading.Thread(target=lambda: found.append(find_store(raw, ALWAYS, said.append)))
        for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert len(found) == 3 and len(set(found)) == 1
    assert sum("packing 1 alignments" in line for line in said) == 1
    assert sum("waiting: another process packs" in line for line in said) == 2


def test_what_goes_wrong_is_one_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, said = build(tmp_path / "raw", ("1ubq_A",)), list[str]()
    write(raw / "mmcif" / "1ubq.cif", "data_1UBQ\nloop_\n")
    with pytest.raises(DataError, match="could not be packed: error: .*no chain could be packed"):
        find_store(str(raw), ALWAYS, said.append)
    write(tmp_path / "file", "")
    monkeypatch.setenv("TWINFOLD_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be made or locked: .*; set TWINFOLD_CACHE"):
        find_store(str(raw), ALWAYS, silent)


# A training run -----------------------------------------------------------------------------------


def start(folder: Path, pack: str) -> subprocess.Popen[str]:
    """The training program, two steps of the tiny configuration."""
    command = [sys.executable, "-m", "torchfold.train", "tests/data/tiny.toml"]
    command += [f"train.out={folder}", f"data.pack={pack}", "train.steps=2", "train.log_every=1"]
    command += ["train.eval_every=2", "data.workers=1", "data.ordered=true"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def losses(folder: Path) -> list[float]:
    lines = (folder / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [row["loss/total"] for row in map(json.loads, lines) if "loss/total" in row]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run on the files as they are."""
    folder = tmp_path_factory.mktemp("unpacked")
    process = start(folder, "never")
    process.communicate(timeout=120)
    assert process.returncode == 0
    return losses(folder)


@pytest.mark.parametrize("killed", ["all of its processes", "the run alone"])
def test_a_run_killed_while_it_packs_continues(
    unpacked: list[float], tmp_path: Path, cache: Path, killed: str
) -> None:
    process = start(tmp_path, "always")
    deadline = time.monotonic() + 60
    while not list(cache.glob(f"*/{WORK}/structures/*.arrow")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    if killed == "the run alone":  # what packs holds the lock, and goes on or ends
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
        assert not list(cache.glob(f"*/{MANIFEST}"))
    said, _ = process.communicate()
    assert "packing 48 alignments" in said and "step 1" not in said
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()

    process = start(tmp_path, "always")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    (store,) = (path.parent for path in cache.glob(f"*/{MANIFEST}"))
    assert f"embedded: training from its packed store {store}" in said
    assert not (store / WORK).exists()
    assert len(list(Store(store).verify())) == 5
    assert losses(tmp_path) == unpacked and len(unpacked) == 2
