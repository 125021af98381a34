"""The loader: batches in the order of the plan, prepared ahead by worker processes, resumable.

What a step trains on depends on the seed and the step alone. Workers, their number and their
timing change nothing, and neither does the number of ranks that share a batch: rank ``k`` of ``n``
takes the ``k``-th part of each step's positions.
"""

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from foldcore.config import Config, ConfigError, DataConfig
from foldcore.data.dataset import Dataset, split
from foldcore.data.examples import MAX_ATTEMPTS, Prepared, Preparer
from foldcore.data.sampler import Plan, recycling_iters
from foldcore.data.transforms import collate
from foldcore.data.worker import WorkerPool
from foldcore.features import Batch

_log = logging.getLogger(__name__)


class LoaderError(RuntimeError):
    """The loader cannot go on, or cannot resume; the message says what to do."""


class Loader(Iterator[Batch]):
    """An endless iterator over this rank's batches; ``state()`` and ``restore()`` resume it.

    Batches are validated numpy dicts of ``features.py``, with the step's recycling count. Processes
    start with the first batch, or with ``iter(loader)``, and end with ``close()``.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        config: DataConfig,
        *,
        batch_size: int,
        max_recycling_iters: int,
        rank: int = 0,
        world: int = 1,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        if not 0 <= rank < world or batch_size < 1:
            raise ValueError(f"rank {rank} of {world} with {batch_size} examples")
        self.datasets, self.plan = tuple(datasets), plan
        self.wait_seconds = 0.0  # time spent waiting for batches, ever growing
        self._preparer = Preparer(datasets, plan)
        self._workers, self._prefetch = config.workers, config.prefetch
        self._first, self._local, self._global = rank * batch_size, batch_size, batch_size * world
        self._max_recycling_iters = max_recycling_iters
        self._warn = warn
        self._step = self._position = 0  # of the next batch: its step, and its first position
        self._ahead = 0  # batches submitted and not yet taken
        self._pool: WorkerPool | None = None
        self._end: Callable[[], object] = lambda: None

    def __iter__(self) -> "Loader":
        self._submit_ahead()
        return self

    def __next__(self) -> Batch:
        start = time.monotonic()
        try:
            self._submit_ahead()
            batch = collate([self._features(p) for p in self._positions(0)])
        except BaseException:
            self.close()  # what was taken of this batch is prepared again if one tries again
            raise
        self._step += 1
        self._position += self._global
        self._ahead = max(self._ahead - 1, 0)
        self._submit_ahead()
        self.wait_seconds += time.monotonic() - start
        return batch

    def state(self) -> dict[str, int]:
        """Where the next batch is: JSON numbers, the same on every rank."""
        return {
            "step": self._step,
            "position": self._position,
            "plan": self.plan.fingerprint(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a saved state of the same plan; batch size and ranks may be others."""
        if state["plan"] != self.plan.fingerprint():
            raise LoaderError(
                "the training chains, their weights or the seed are not those of the saved run, so "
                "its order of examples cannot be continued; restore the data, or start a new run "
                "with train.initial_params set to the old run's checkpoint"
            )
        self.close()
        self._step, self._position = int(state["step"]), int(state["position"])

    def close(self) -> None:
        """End the worker processes; iterating again starts new ones at the next batch."""
        self._end()
        self._pool, self._ahead = None, 0

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _positions(self, ahead: int) -> range:
        """This rank's positions of the batch that many steps after the next."""
        start = self._position + ahead * self._global + self._first
        return range(start, start + self._local)

    def _recycling(self, ahead: int) -> int:
        return recycling_iters(self.plan.seed, self._step + ahead, self._max_recycling_iters)

    def _submit_ahead(self) -> None:
        if self._workers == 0:
            return
        if self._pool is None:
            self._pool = WorkerPool(self._preparer, self._workers)
            # an abandoned loader ends its processes too
            self._end = weakref.finalize(self, self._pool.close)
        for ahead in range(self._ahead, self._prefetch):
            for position in self._positions(ahead):
                self._pool.submit(position, self._recycling(ahead))
        self._ahead = self._prefetch

    def _features(self, position: int) -> Batch:
        if self._pool is None:
            prepared = self._preparer.prepare(position, self._recycling(0))
        else:
            prepared = self._pool.take(position)
        self._record(prepared)
        if prepared.features is None:
            last = prepared.failures[-1]
            raise LoaderError(
                f"{MAX_ATTEMPTS} chains in a row could not be prepared, the last {last.chain_id}: "
                f"{last.reason}. Something is wrong with the whole data set (moved or unreadable "
                "files?) or with the data settings"
            )
        return prepared.features

    def _record(self, prepared: Prepared) -> None:
        for dataset, notes in zip(self.datasets, prepared.notes, strict=True):
            dataset.report.add_notes(notes)
        for failure in prepared.failures:
            report = self.datasets[failure.source].report
            if report.fail(failure.chain_id, failure.reason):
                self._warn(f"replaced in training: {failure.chain_id}: {failure.reason}")


def open_loader(
    config: Config,
    *,
    rank: int = 0,
    world: int = 1,
    warn: Callable[[str], None] = _log.warning,
) -> Loader:
    """The training loader of a run: its data sets, without the held-out chains."""
    if config.train.batch_size % world:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} cannot be divided over {world} ranks"
        )
    dataset = Dataset(config.data.path, config.data)
    datasets, sources = [dataset], [dataset.source(split(dataset)[0])]
    if config.data.distillation_path:
        predicted = Dataset(config.data.distillation_path, config.data, distillation=True)
        datasets.append(predicted)
        sources.append(predicted.source())
    return Loader(
        datasets,
        Plan(sources, config.train.seed, config.data.distillation_probability),
        config.data,
        batch_size=config.train.batch_size // world,
        max_recycling_iters=config.train.max_recycling_iters,
        rank=rank,
        world=world,
        warn=warn,
    )
