"""Preparing the example of one position of the plan, in whichever process: a pure function."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foldcore.data.dataset import Dataset
from foldcore.data.sampler import ExampleKey, Plan, example_id
from foldcore.data.transforms import make_example
from foldcore.errors import DataError
from foldcore.features import dimensions, validate

MAX_ATTEMPTS = 20  # chains tried for one position before giving up


@dataclass(frozen=True)
class Failure:
    """A chain that could not be made into an example."""

    source: int
    chain_id: str
    reason: str


@dataclass
class Prepared:
    """What became of one position; ``features`` is None where every attempt failed."""

    position: int
    features: dict[str, np.ndarray] | None = None
    failures: list[Failure] = field(default_factory=list)
    notes: list[dict[str, dict[str, int]]] = field(default_factory=list)  # of each source


class Preparer:
    """The data sets and the plan: all that a loader process needs."""

    def __init__(self, datasets: Sequence[Dataset], plan: Plan) -> None:
        if len(datasets) != len(plan.sources):
            raise ValueError(f"{len(datasets)} data sets, but the plan has {len(plan.sources)}")
        self.datasets = tuple(datasets)
        self.plan = plan

    def prepare(self, position: int, num_iter_recycling: int) -> Prepared:
        """The position's example; where its chain fails, the plan's replacements for it in turn."""
        prepared = Prepared(position)
        for attempt in range(MAX_ATTEMPTS):
            plan = self.plan
            key = plan.replacement(position, attempt) if attempt else plan[position]
            try:
                prepared.features = self._example(key, num_iter_recycling)
                break
            except Exception as error:
                prepared.failures.append(Failure(key.source, key.chain_id, _reason(error)))
        prepared.notes = [dataset.report.take_notes() for dataset in self.datasets]
        return prepared

    def _example(self, key: ExampleKey, num_iter_recycling: int) -> dict[str, np.ndarray]:
        dataset = self.datasets[key.source]
        chance = (self.plan.seed, key.epoch, key.index, key.source)
        example = make_example(dataset.raw(key.chain_id), dataset.config, chance)
        name = example_id(key.source, key.epoch, key.index)
        example["example_id"] = np.asarray(name, np.int32)
        example["num_iter_recycling"] = np.asarray(num_iter_recycling, np.int32)
        validate({k: v[None] for k, v in example.items()}, dimensions(dataset.config))
        return example


def _reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
