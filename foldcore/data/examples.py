"""Preparing the example of one position of the plan, in whichever process: a pure function."""

import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foldcore.config import DataConfig
from foldcore.data.canvas import check_finite
from foldcore.data.dataset import Dataset
from foldcore.data.sampler import ExampleKey, Plan, example_id
from foldcore.data.transforms import make_example
from foldcore.errors import DataError
from foldcore.features import Batch

MAX_ATTEMPTS = 20  # chains tried for one position before giving up


@dataclass(frozen=True)
class Failure:
    """A chain that could not be made into an example."""

    source: int
    chain_id: str
    reason: str
    trace: str = ""  # of an error that is not the data's


@dataclass
class Prepared:
    """What became of one position; ``features`` is None where every attempt failed."""

    position: int
    attempt: int = 0  # 0: the plan's own chain; n: its n-th replacement
    features: Batch | None = None
    failures: list[Failure] = field(default_factory=list)
    notes: list[dict[str, dict[str, int]]] = field(default_factory=list)  # of each source
    seconds: float = 0.0


def first_attempt(
    plan: Plan, position: int, quarantined: Collection[tuple[int, str]], attempt: int = 0
) -> int:
    """The first attempt from this one on whose chain (source, id) is not in quarantine.

    ``MAX_ATTEMPTS`` where there is none: then the position cannot be prepared.
    """
    while attempt < MAX_ATTEMPTS and quarantined:
        key = plan.replacement(position, attempt)
        if (key.source, key.chain_id) not in quarantined:
            break
        attempt += 1
    return attempt


class Preparer:
    """The data sets and the plan: all that a loader process needs."""

    def __init__(self, datasets: Sequence[Dataset], plan: Plan) -> None:
        if len(datasets) != len(plan.sources):
            raise ValueError(f"{len(datasets)} data sets, but the plan has {len(plan.sources)}")
        self.datasets = tuple(datasets)
        self.plan = plan

    @property
    def config(self) -> DataConfig:
        """How examples are cut: their sizes."""
        return self.datasets[0].config

    def prepare(
        self,
        position: int,
        first_attempt: int = 0,
        begin: Callable[[int], Batch | None] = lambda attempt: None,
    ) -> Prepared:
        """The position's example; where its chain fails, the plan's replacements for it in turn.

        ``begin`` is told the number of each attempt before it is made, and returns where to: an
        earlier example or zeros, to be written over, or None. The recycling count belongs to the
        step, not to the example: it is 0 here.
        """
        prepared, start = Prepared(position), time.perf_counter()
        for attempt in range(first_attempt, MAX_ATTEMPTS):
            out = begin(attempt)
            key = self.plan.replacement(position, attempt)
            try:
                prepared.features, prepared.attempt = self.example(key, out), attempt
                break
            except Exception as error:
                prepared.failures.append(failure(key, error))
        prepared.notes = [dataset.report.take_notes() for dataset in self.datasets]
        prepared.seconds = time.perf_counter() - start
        return prepared

    def example(self, key: ExampleKey, out: Batch | None = None) -> Batch:
        """The features of one example, without a batch axis; in ``out``, if that is given."""
        dataset = self.datasets[key.source]
        chance = (self.plan.seed, key.epoch, key.index, key.source)
        example = make_example(dataset.raw(key.chain_id), dataset.config, chance, out=out)
        numbers = {"example_id": example_id(key.source, key.epoch, key.index)}
        for name, value in (numbers | {"num_iter_recycling": 0}).items():
            example.setdefault(name, np.zeros((), np.int32))[...] = value
        check_finite(example)  # names, types and shapes are those of what it was written into
        return example


def failure(key: ExampleKey, error: Exception) -> Failure:
    """What to say of a chain that raised; an error that is not the data's keeps its traceback."""
    if isinstance(error, DataError):
        return Failure(key.source, key.chain_id, str(error))
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return Failure(key.source, key.chain_id, reason, "".join(traceback.format_exception(error)))
