"""Examples that take a given time to prepare without using a core, for ``bench_loader``."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foldcore.config import DataConfig
from foldcore.data.examples import Preparer
from foldcore.data.report import Report
from foldcore.data.sampler import ExampleKey, Plan, Source, example_id
from foldcore.features import FEATURES, Batch, dimensions, shape


@dataclass
class Blank:
    """Stands where a data set does."""

    config: DataConfig
    report: Report = field(default_factory=lambda: Report("blank"))


class Sleeper(Preparer):
    """Position ``p`` takes ``seconds[p]``, of which nothing but the copying is work."""

    def __init__(self, config: DataConfig, seconds: Float[np.ndarray, " n"]) -> None:
        source = Source(tuple(map(str, range(len(seconds)))), np.ones(len(seconds)))
        super().__init__([Blank(config)], Plan([source], seed=0))  # type: ignore[list-item]
        self._seconds = {self.plan[p].chain_id: float(s) for p, s in enumerate(seconds)}

    def example(self, key: ExampleKey, out: Batch | None = None) -> Batch:
        """An example of zeros, after its time."""
        time.sleep(self._seconds[key.chain_id])
        sizes = dimensions(self.config)
        example = out or {n: np.empty(shape(n, sizes)[1:], f.dtype) for n, f in FEATURES.items()}
        for array in example.values():
            array.fill(0)
        example["example_id"][...] = example_id(key.source, key.epoch, key.index)
        return example


class AsTorch(torch.utils.data.Dataset[Tensor]):
    """The same examples for ``torch.utils.data.DataLoader``.

    An example is a single tensor of bytes: sending some 50 of them costs it several times as much.
    """

    def __init__(self, preparer: Preparer, count: int) -> None:
        self._preparer, self._count = preparer, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> Tensor:
        features = self._preparer.prepare(position).features
        assert features is not None
        flat = [np.asarray(array).reshape(-1).view(np.uint8) for array in features.values()]
        return torch.from_numpy(np.concatenate(flat))
