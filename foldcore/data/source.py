"""Where a loader's examples come from: this process, processes of its own, or a neighbour's."""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from foldcore.config import DataConfig
from foldcore.data.examples import Prepared, first_attempt
from foldcore.data.pool import Casualty, WorkerPool
from foldcore.data.slots import Slots
from foldcore.features import Batch, dimensions

MAX_AHEAD = 64  # examples; more take memory and no longer help


@dataclass(frozen=True)
class Taken:
    """An example taken: its features lie in the slot, if it has one, until it is released."""

    prepared: Prepared
    features: Batch | None
    slot: int = -1


class Source(Protocol):
    """What a loader takes examples from."""

    def has_room(self) -> bool:
        """Whether one more position may be submitted."""

    def make_room(self) -> bool:
        """Wait until there is room; false where another process submits."""

    def submit(self, position: int, attempt: int | None) -> None:
        """Have a position prepared, by this attempt or the first that is not in quarantine."""

    def take(self, wanted: int, patience: float) -> Taken:
        """The wanted position, or the lowest that is ready when patience (seconds) has run out."""

    def can_take(self, wanted: int, count: int, patience: float) -> bool:
        """Whether that many could be taken at once, the wanted one first if need be."""

    def lend(self, batch: Sequence[Taken]) -> None:
        """Let the processes that share these examples have the batch."""

    def release(self, slot: int) -> None:
        """The features in a slot are no longer needed."""

    def depth(self) -> int:
        """How many examples are ready."""

    def casualties(self) -> Sequence[Casualty]:
        """The processes that ended at work since the last call."""

    def close(self) -> None:
        """End whatever runs."""


class InProcess:
    """Prepares each example when it is asked for: always in order."""

    def __init__(
        self, preparer: Any, batch_size: int, quarantined: Collection[tuple[int, str]]
    ) -> None:
        self._preparer, self._room, self._quarantined = preparer, batch_size, quarantined
        self._submitted: dict[int, int] = {}  # position -> attempt

    def has_room(self) -> bool:
        return len(self._submitted) < self._room

    def make_room(self) -> bool:
        return True

    def submit(self, position: int, attempt: int | None) -> None:
        if attempt is None:
            attempt = first_attempt(self._preparer.plan, position, self._quarantined)
        self._submitted[position] = attempt

    def take(self, wanted: int, patience: float) -> Taken:
        prepared = self._preparer.prepare(wanted, self._submitted.pop(wanted))
        return Taken(prepared, prepared.features)

    def can_take(self, wanted: int, count: int, patience: float) -> bool:
        return True

    def lend(self, batch: Sequence[Taken]) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def depth(self) -> int:
        return 0

    def casualties(self) -> Sequence[Casualty]:
        return ()

    def close(self) -> None:
        pass


class Workers:
    """Processes that prepare ahead, ``data.prefetch`` batches beyond what is in work.

    Of large batches it is fewer: no more than 64 examples, or two batches.
    """

    def __init__(
        self,
        preparer: Any,
        config: DataConfig,
        batch_size: int,
        quarantined: Collection[tuple[int, str]],
    ) -> None:
        ahead = min(config.prefetch * batch_size, max(MAX_AHEAD, 2 * batch_size))
        count = ahead + config.workers
        slots = Slots.create(dimensions(preparer.config), count)
        limits = config.workers, slots, config.example_timeout
        self.pool = WorkerPool(preparer, *limits, quarantined)
        self._room = count
        self._changed = threading.Condition()  # processes that share examples release from threads

    def has_room(self) -> bool:
        return self._room > 0

    def make_room(self) -> bool:
        with self._changed:
            return self._changed.wait_for(self.has_room)

    def submit(self, position: int, attempt: int | None) -> None:
        with self._changed:
            self._room -= 1
        self.pool.submit(position, attempt)

    def take(self, wanted: int, patience: float) -> Taken:
        prepared, slot = self.pool.take(wanted, patience)
        usable = prepared.attempt >= 0
        return Taken(prepared, self.pool.slots[slot] if usable else None, slot)

    def can_take(self, wanted: int, count: int, patience: float) -> bool:
        return self.pool.can_take(wanted, count, patience)

    def lend(self, batch: Sequence[Taken]) -> None:
        pass

    def release(self, slot: int) -> None:
        self.pool.release(slot)
        with self._changed:
            self._room += 1
            self._changed.notify_all()

    def depth(self) -> int:
        return self.pool.depth()

    def casualties(self) -> Sequence[Casualty]:
        found = []
        while self.pool.casualties:
            found.append(self.pool.casualties.popleft())
        return found

    def close(self) -> None:
        self.pool.close()
