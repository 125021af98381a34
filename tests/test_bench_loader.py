"""The benchmark of the loader: what it compares, and that a tail of slow examples decides it."""

import json
from pathlib import Path

import numpy as np
import pytest

from foldcore.config import load
from parity import bench_loader
from parity.slow_examples import AsTorch, Sleeper


def test_both_loaders_get_the_same_examples() -> None:
    config = load("configs/demo.toml")
    sleeper = Sleeper(config.data, np.linspace(0, 1e-3, 8))
    packed = AsTorch(sleeper, 8)
    for position in range(len(packed)):
        features = sleeper.prepare(position).features
        assert features is not None
        flat = b"".join(np.asarray(array).tobytes() for array in features.values())
        assert packed[position].numpy().tobytes() == flat


def test_a_few_examples_are_much_slower() -> None:
    seconds = bench_loader.with_tail(np.ones(10_000))
    slow = seconds[seconds > 1]
    assert 0.015 < len(slow) / 10_000 < 0.025 and 10 <= slow.min() and 90 < slow.max() <= 100


@pytest.mark.slow
def test_ours_waits_for_no_slow_example(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_loader, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(bench_loader, "STEPS", 60)
    monkeypatch.setattr(bench_loader, "MEASURED", 10)
    assert bench_loader.main([]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    lost = {row["loader"]: row["lost_s"] for row in rows if row["case"] == "sleep"}
    assert lost["ours"] < 0.5 * lost["DataLoader(in_order=True)"]
