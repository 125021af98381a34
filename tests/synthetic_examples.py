"""A preparer of blank examples that take a given time, or misbehave: the loader without data."""

import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foldcore.config import DataConfig
from foldcore.data.examples import Preparer
from foldcore.data.report import Report
from foldcore.data.sampler import ExampleKey, Plan, Source, example_id
from foldcore.features import FEATURES, Batch, dimensions, shape

TINY = DataConfig(crop_size=4, num_msa_clusters=1, num_extra_msa=1, num_templates=1, prefetch=4)


@dataclass
class FakeDataset:
    config: DataConfig
    report: Report = field(default_factory=lambda: Report("synthetic"))


class Synthetic(Preparer):
    """Chains ``c0``, ``c1``, ...; ``seq_length`` tells which one an example shows."""

    def __init__(
        self,
        chains: int = 40,
        *,
        config: DataConfig = TINY,
        seconds: float = 0.0,
        slow: Mapping[str, float] | None = None,
        behaviour: Mapping[str, str] | None = None,
        seed: int = 3,
    ) -> None:
        source = Source(tuple(f"c{i}" for i in range(chains)), np.ones(chains))
        super().__init__([FakeDataset(config)], Plan([source], seed))  # type: ignore[list-item]
        self.seconds, self.slow, self.behaviour = seconds, slow or {}, behaviour or {}

    def example(self, key: ExampleKey, out: Batch | None = None) -> Batch:
        if seconds := self.slow.get(key.chain_id, self.seconds):
            time.sleep(seconds)
        misbehave(self.behaviour.get(key.chain_id, ""))
        sizes = dimensions(self.config)
        example = out or {n: np.zeros(shape(n, sizes)[1:], f.dtype) for n, f in FEATURES.items()}
        example["example_id"][...] = example_id(key.source, key.epoch, key.index)
        example["seq_length"][...] = int(key.chain_id[1:])
        return example


def misbehave(how: str) -> None:
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how.startswith("die once "):
        marker = Path(how.removeprefix("die once "))
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif how == "crash":
        faulthandler._sigsegv()  # type: ignore[attr-defined]
    elif how == "hang":
        time.sleep(1000)
    elif how == "raise":
        raise ZeroDivisionError("boom")
