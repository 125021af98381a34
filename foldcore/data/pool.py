"""The loader's processes as one: positions go in, prepared examples come out as they get ready.

A process that dies or hangs is replaced and its example tried again; a chain that ends a process
twice is quarantined: for the rest of the run its positions go to the plan's replacements. Nothing
here waits for ever: whatever cannot be mended is raised by ``take``.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait
from typing import Any

from foldcore.data.examples import MAX_ATTEMPTS, Prepared, first_attempt
from foldcore.data.slots import Slots
from foldcore.data.worker import Task, Worker, setup_message

START_SECONDS = 300.0  # for a process to start up, imports over a busy network included
MAX_DEATHS = 2  # processes that a chain may end before it is quarantined
MAX_DEATHS_IN_A_ROW = 2 * MAX_ATTEMPTS  # without a single example in between
MAX_FAILED_STARTS = 3  # in a row
MEMORY_LIMIT = 4 << 30  # bytes a worker may hold between examples; then a fresh one takes its place


class WorkerError(RuntimeError):
    """The loader's processes cannot go on; the message says why."""


@dataclass(frozen=True)
class Casualty:
    """A process that ended at work, and what became of its example."""

    position: int
    source: int
    chain_id: str
    cause: str
    trace: str
    quarantined: bool


class WorkerPool:
    """Processes that prepare positions in any order; results wait here until they are taken."""

    def __init__(
        self,
        preparer: Any,
        workers: int,
        slots: Slots,
        timeout: float,
        quarantined: Collection[tuple[int, str]] = (),
    ) -> None:
        self.casualties: deque[Casualty] = deque()  # for the one who takes, who empties it
        self.slots = slots
        self._preparer, self._timeout = preparer, timeout
        self._setup = setup_message(preparer, slots)
        self._free = deque(range(slots.count))
        self._pending: deque[Task] = deque()
        self._ready: dict[int, tuple[Prepared, int]] = {}
        self._deaths: Counter[tuple[int, str]] = Counter()  # by chain
        self._quarantined = set(quarantined)  # by chain, those of before a resume included
        self._failed_starts = self._deaths_in_a_row = 0
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._stop, self._stopped = Pipe()
        self._workers = [Worker(number, self._setup, slots) for number in range(workers)]
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def submit(self, position: int, attempt: int | None) -> None:
        """Have a position prepared, from this attempt on: what is prescribed was possible before.

        Where none is given it is the first one whose chain is not in quarantine.
        """
        with self._changed:
            if attempt is None:
                attempt = first_attempt(self._preparer.plan, position, self._quarantined)
            self._pending.append(Task(position, attempt))
            self._hand_out()

    def take(self, wanted: int, patience: float) -> tuple[Prepared, int]:
        """(a prepared example, its slot): the wanted one, or the lowest that is ready.

        Others are taken only where the wanted one is not ready within ``patience`` seconds.
        """
        with self._changed:
            limit = None if patience == math.inf else patience
            self._changed.wait_for(lambda: wanted in self._ready or self._error, limit)
            self._changed.wait_for(lambda: self._ready or self._error)
            if self._error and wanted not in self._ready:
                raise self._error
            return self._ready.pop(wanted if wanted in self._ready else min(self._ready))

    def release(self, slot: int) -> None:
        """A taken example's slot may be used again."""
        with self._changed:
            self._free.append(slot)
            self._hand_out()

    def can_take(self, wanted: int, count: int, patience: float) -> bool:
        """Whether that many examples could be taken now, the wanted one first if need be."""
        with self._changed:
            return len(self._ready) >= count and (patience == 0 or wanted in self._ready)

    def depth(self) -> int:
        """How many examples are ready."""
        return len(self._ready)

    def process_ids(self) -> list[int]:
        """Of the processes, in order."""
        with self._changed:
            return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the processes at once; they hold nothing that could be lost."""
        if not self._stop.closed:
            self._stop.send(None)
            self._receiver.join()
            self._stop.close()
            self._stopped.close()
            for worker in self._workers:
                worker.end()
            self.slots.close()

    def _hand_out(self) -> None:
        # one at a time: what waits behind a slow example could be prepared by another process
        for worker in self._workers:
            if not self._pending:
                return
            if not worker.ready or worker.task:
                continue
            task = self._pending[0]
            if task.slot < 0:
                if not self._free:
                    return
                task.slot = self._free.popleft()
            self.slots.begin(task.slot, task.first_attempt)
            worker.give(self._pending.popleft())

    def _receive(self) -> None:
        try:
            while not self._error:
                by_connection = {worker.connection: worker for worker in self._workers}
                arrived = wait([self._stopped, *by_connection], self._until_a_limit())
                if self._stopped in arrived:
                    return
                for connection in arrived:
                    self._hear(by_connection[connection])  # type: ignore[index]
                self._end_hung()
        except Exception as error:  # whoever waits for an example must not wait for ever
            self._fail(error)

    def _hear(self, worker: Worker) -> None:
        task = worker.task
        try:
            message = worker.receive()
        except (EOFError, OSError):
            self._bury(worker, worker.cause())
            return
        if message and message[1] > MEMORY_LIMIT:
            self._renew(worker)
        with self._changed:
            self._failed_starts = 0
            if message and task:
                self._deaths_in_a_row = 0
                self._ready[task.position] = (message[0], task.slot)
                self._changed.notify_all()
            self._hand_out()

    def _until_a_limit(self) -> float | None:
        """Seconds until the next worker has taken too long."""
        limits = [self._limit(w) for w in self._workers if w.task or not w.ready]
        return max(min(limits) - time.monotonic(), 0.0) if limits else None

    def _limit(self, worker: Worker) -> float:
        return worker.since + (self._timeout if worker.ready else START_SECONDS)

    def _end_hung(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if (worker.task or not worker.ready) and now > self._limit(worker):
                worker.dump()
                self._bury(worker, f"took longer than {now - worker.since:.0f} s")

    def _bury(self, worker: Worker, cause: str) -> None:
        """Replace a worker that died or hung, and decide about the example it had in work."""
        ended = worker.end()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                words = f"loader process {worker.number} {cause} while starting up"
                self._fail(WorkerError(f"{words}\n{worker.last_words()}".strip()))
                return
        if worker.task:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
                words = f"{self._deaths_in_a_row} loader processes in a row died at work"
                self._fail(WorkerError(f"{words}; the last {cause}\n{worker.last_words()}"))
                return
            again = self._blame(worker.task, f"its process {cause}", worker.last_words())
            if not ended:  # it may write there yet: this slot is lost
                again.slot = -1
            with self._changed:
                self._pending.appendleft(again)
        self._renew(worker)

    def _blame(self, task: Task, cause: str, trace: str) -> Task:
        """The task that a process died of, to be tried again, or without the chain at fault."""
        attempt, plan = self.slots.begun(task.slot), self._preparer.plan
        key = plan.replacement(task.position, attempt)
        chain = key.source, key.chain_id
        self._deaths[chain] += 1
        quarantined = self._deaths[chain] >= MAX_DEATHS
        if quarantined:
            self._quarantined.add(chain)
            attempt = first_attempt(plan, task.position, self._quarantined, attempt + 1)
        self.casualties.append(Casualty(task.position, *chain, cause, trace, quarantined))
        return Task(task.position, attempt, task.slot)

    def _renew(self, worker: Worker) -> None:
        """A fresh process in the place of a worker."""
        worker.end()
        fresh = Worker(worker.number, self._setup, self.slots)
        with self._changed:
            self._workers[worker.number] = fresh

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
