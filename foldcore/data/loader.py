"""The loader: batches prepared ahead by worker processes, taken as they get ready, resumable.

The trainer takes the first examples of the plan that are ready, so a slow one holds up nobody: it
comes in a later step. Contents depend only on the seed and the place in the plan, and the order
taken goes to a ledger, so a run can be repeated exactly, with any number of workers. Where the
loader is faster than the trainer, the order is the plan's. See docs/loader.md.
"""

import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from foldcore.config import Config, ConfigError, DataConfig
from foldcore.data.dataset import Dataset, split
from foldcore.data.examples import MAX_ATTEMPTS, Preparer
from foldcore.data.incidents import Incidents
from foldcore.data.ledger import Head, Ledger, continue_ledger, read_ledger
from foldcore.data.order import Order, Script
from foldcore.data.sampler import Plan, recycling_iters
from foldcore.data.share import Borrower, Lender, meeting_place
from foldcore.data.source import InProcess, Source, Taken, Workers
from foldcore.data.stores import find_store
from foldcore.features import FEATURES, Batch

_log = logging.getLogger(__name__)

START_STEPS = 2  # steps after a start that are taken in order: nothing is ready yet,
START_PATIENCE = 5.0  # seconds, and what is ready first would be chance


class LoaderError(RuntimeError):
    """The loader cannot go on, or cannot resume; the message says what to do."""


class Loader(Iterator[Batch]):
    """An endless iterator over this rank's batches; ``state()`` and ``restore()`` resume it.

    Batches are validated numpy dicts of ``features.py``, with the step's recycling count. Processes
    start with the first batch, or with ``iter(loader)``, and end with ``close()``. With a
    ``folder``, the run's, the ledger and what was quarantined are written there. ``share`` is this
    process's place (number, count) among those of its host that work on the same examples: the
    first prepares them for all. ``allocate`` makes the arrays of a batch.
    """

    def __init__(
        self,
        preparer: Any,
        config: DataConfig,
        *,
        batch_size: int,
        max_recycling_iters: int = 0,
        rank: int = 0,
        world: int = 1,
        folder: Path | None = None,
        share: tuple[int, int] = (0, 1),
        warn: Callable[[str], None] = _log.warning,
        allocate: Callable[[Sequence[int], str], np.ndarray] = np.empty,
    ) -> None:
        if not 0 <= rank < world or batch_size < 1:
            raise ValueError(f"rank {rank} of {world} with {batch_size} examples")
        if share[1] > 1 and folder is None:
            raise ValueError("processes that share examples find each other by the run's folder")
        self.datasets, self.plan = tuple(preparer.datasets), preparer.plan
        self.wait_seconds = 0.0  # time spent waiting for batches, ever growing
        self.incidents = Incidents(self.datasets, self.plan, folder, rank, warn)
        self._preparer, self._config = preparer, config
        self._order = Order(batch_size, rank, world, config.reorder_window)
        self._base = 0  # the first position not taken when the last state was restored
        self._step = 0  # steps taken
        self._started_at = 0
        self._max_recycling_iters = max_recycling_iters
        self._folder, self._warn, self._allocate = folder, warn, allocate
        self._share = share
        self._ledger: Ledger | None = None
        self._source: Source | None = None
        self._end: Callable[[], object] = lambda: None

    def __iter__(self) -> "Loader":
        self._start()
        return self

    def __next__(self) -> Batch:
        start = time.monotonic()
        try:
            source, ledger = self._start()
            while self._order.outstanding() < self._order.batch_size and source.make_room():
                self._submit_ahead(source)
            taken: list[Taken] = []
            while len(taken) < self._order.batch_size:
                taken.append(self._take(source, taken))
            source.lend(taken)
            batch = self._stack(taken)
        except BaseException:
            self.close()  # what was taken of this batch is prepared again if one tries again
            raise
        ledger.append(self._step + 1, [(t.prepared.position, t.prepared.attempt) for t in taken])
        self._step += 1
        distance = self._order.take([t.prepared.position for t in taken])
        self.incidents.taken(taken, distance, source.depth())
        for example in taken:
            source.release(example.slot)
        self._submit_ahead(source)
        self.wait_seconds += time.monotonic() - start
        return batch

    def is_ready(self) -> bool:
        """Whether the next batch would be had without waiting."""
        source, _ = self._start()
        wanted, patience = self._wanted([])
        return source.can_take(wanted, self._order.batch_size, patience)

    def state(self) -> dict[str, Any]:
        """What this rank has taken, as JSON; of several ranks, ``order.merge`` makes one state."""
        state = {"step": self._step, "plan": self.plan.fingerprint(), **self._order.state()}
        return state | {"quarantined": self.incidents.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a saved state of the same plan; batch size and ranks may be others."""
        if state["plan"] != self.plan.fingerprint():
            raise LoaderError(
                "the training chains, their weights or the seed are not those of the saved run, so "
                "its order of examples cannot be continued; restore the data, or start a new run "
                "with train.initial_params set to the old run's checkpoint"
            )
        if "world" in state:
            raise ValueError("this is the state of one of several ranks: merge them first")
        self.close()
        self._step, self._base = int(state["step"]), int(state["position"])
        self._order.follow(None)
        self._order.restore(self._base, state.get("taken", ()))
        self.incidents.restore(state.get("quarantined", ()))

    def rebuild(self, step: int) -> Batch:
        """This rank's batch of an earlier step again, from the ledger and the seed."""
        _, ledger = self._start()
        prepared = [
            self._preparer.prepare(position, attempt) for position, attempt in ledger.read(step)
        ]
        return self._stack([Taken(p, p.features) for p in prepared], step - 1)

    def close(self) -> None:
        """End the worker processes; iterating again starts new ones at the next batch."""
        self._end()
        if self._ledger is not None:
            self._ledger.close()
        self._source = self._ledger = None
        self._order.rewind()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> tuple[Source, Ledger]:
        if self._source is None or self._ledger is None:
            self._ledger = self._open_ledger()
            self._source = self._open_source()
            # an abandoned loader ends its processes too
            self._end = weakref.finalize(self, self._source.close)
            self._started_at = self._step
            self._started_time = time.monotonic()
            self._submit_ahead(self._source)
        return self._source, self._ledger

    def _open_source(self) -> Source:
        quarantined = self.incidents.quarantined()
        if self._config.workers == 0:
            return InProcess(self._preparer, self._order.batch_size, quarantined)
        number, count = self._share
        place = meeting_place(f"{self._folder} {self._order.rank}")
        if number > 0:
            return Borrower(place, self._step)
        workers = Workers(self._preparer, self._config, self._order.batch_size, quarantined)
        return Lender(workers, place, count - 1, self._step) if count > 1 else workers

    def _open_ledger(self) -> Ledger:
        order = self._order
        head = Head(
            order.rank,
            order.world,
            order.batch_size,
            self._step,
            self._base,
            self.plan.fingerprint(),
        )
        folder = self._folder if self._share[0] == 0 else None  # one of them writes
        ledger = continue_ledger(head, folder / "ledger" if folder else None)
        if order.script is None or not order.script.left:
            order.follow(self._replayed() if self._config.replay else self._own_script(ledger))
        return ledger

    def _own_script(self, ledger: Ledger) -> Script | None:
        """The steps that this run has taken before, beyond the checkpoint it continues from."""
        steps = ledger.after(self._step)
        if not len(steps.positions):
            return None
        return Script(steps.positions, steps.attempts, steps.positions)

    def _replayed(self) -> Script | None:
        """This rank's part of the ledger of another run."""
        folder, size = Path(self._config.replay), self._order.batch_size
        plan, steps = read_ledger(folder / "ledger" if (folder / "ledger").is_dir() else folder)
        if plan != self.plan.fingerprint():
            raise LoaderError(f"{folder}: the ledger of other data, or of another train.seed")
        if steps.positions.shape[1] != size * self._order.world:
            raise LoaderError(
                f"{folder}: a ledger of {steps.positions.shape[1]} examples a step, but "
                f"train.batch_size={size * self._order.world}"
            )
        if steps.step > self._step:
            raise LoaderError(f"{folder}: the ledger begins after step {steps.step}")
        steps = steps.after(self._step)
        if not len(steps.positions):
            return None
        own = slice(self._order.rank * size, (self._order.rank + 1) * size)
        return Script(steps.positions[:, own], steps.attempts[:, own], steps.positions)

    def _submit_ahead(self, source: Source) -> None:
        while source.has_room() and (task := self._order.submit()):
            source.submit(*task)

    def _wanted(self, taken: Sequence[Taken]) -> tuple[int, float]:
        """The position that comes next, and how long it is waited for while others are ready."""
        position, prescribed = self._order.wanted([t.prepared.position for t in taken])
        if prescribed is not None or self._config.ordered:
            return position, math.inf
        if self._step - self._started_at >= START_STEPS:
            return position, 0.0
        return position, max(self._started_time + START_PATIENCE - time.monotonic(), 0.0)

    def _take(self, source: Source, before: Sequence[Taken]) -> Taken:
        _, prescribed = self._order.wanted([t.prepared.position for t in before])
        taken = source.take(*self._wanted(before))
        self.incidents.note(taken.prepared, source.casualties())
        if taken.features is None:
            raise self._nothing_usable(taken)
        if prescribed is not None and taken.prepared.attempt != prescribed:
            self._not_as_before(taken)
        return taken

    def _not_as_before(self, taken: Taken) -> None:
        failures = "; ".join(f"{f.chain_id}: {f.reason}" for f in taken.prepared.failures)
        words = f"position {taken.prepared.position} could not be prepared as before: {failures}"
        if self._config.replay:
            raise LoaderError(f"{self._config.replay} cannot be replayed: {words}")
        self._warn(words)

    def _nothing_usable(self, taken: Taken) -> LoaderError:
        last = taken.prepared.failures[-1:]
        words = f", the last {last[0].chain_id}: {last[0].reason}" if last else ""
        return LoaderError(
            f"{MAX_ATTEMPTS} chains in a row could not be prepared{words}. Something is wrong with "
            "the whole data set (moved or unreadable files?) or with the data settings"
        )

    def _stack(self, taken: Sequence[Taken], step: int | None = None) -> Batch:
        """The examples as one batch, which a step (by default the next one) makes its own."""
        examples = [t.features for t in taken if t.features is not None]
        batch = {}
        for name, array in examples[0].items():
            batch[name] = self._allocate((len(examples), *array.shape), FEATURES[name].dtype)
            for i, example in enumerate(examples):
                batch[name][i] = example[name]
        step = self._step if step is None else step
        passes = recycling_iters(self.plan.seed, step, self._max_recycling_iters)
        batch["num_iter_recycling"][:] = passes
        return batch


def open_loader(
    config: Config,
    *,
    rank: int = 0,
    world: int = 1,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
    warn: Callable[[str], None] = _log.warning,
    allocate: Callable[[Sequence[int], str], np.ndarray] = np.empty,
) -> Loader:
    """The training loader of a run: its data sets, without the held-out chains.

    ``rank`` of ``world`` is the replica of the model that this process works for.
    """
    _check_batch_size(config.train.batch_size, world)
    if config.data.workers > (cores := os.cpu_count() or 1):
        warn(f"data.workers={config.data.workers}, but there are {cores} cores: fewer do as well")
    dataset = Dataset(find_store(config.data.path, config.data, warn), config.data)
    datasets, sources = [dataset], [dataset.source(split(dataset)[0])]
    if config.data.distillation_path:
        path = find_store(config.data.distillation_path, config.data, warn)
        predicted = Dataset(path, config.data, distillation=True)
        datasets.append(predicted)
        sources.append(predicted.source())
    plan = Plan(sources, config.train.seed, config.data.distillation_probability)
    return Loader(
        Preparer(datasets, plan),
        config.data,
        batch_size=config.train.batch_size // world,
        max_recycling_iters=config.train.max_recycling_iters,
        rank=rank,
        world=world,
        folder=folder,
        share=share,
        warn=warn,
        allocate=allocate,
    )


def _check_batch_size(batch_size: int, world: int) -> None:
    if batch_size % world:
        raise ConfigError(
            f"train.batch_size={batch_size} cannot be divided over {world} ranks: "
            f"set train.batch_size to a multiple of {world}"
        )
