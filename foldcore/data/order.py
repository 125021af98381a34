"""Which positions of the plan a rank takes, and in which order: what a run resumes from.

Position ``p`` belongs to the rank that holds slot ``p mod batch`` of every global batch, whatever
has happened before. A rank takes its positions roughly in ascending order: none is taken that lies
``window`` or more of its own beyond the first one not taken. So the whole state is that first
position and the few beyond it that were taken early, over all ranks; any number of ranks continues
from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int


@dataclass
class Script:
    """Steps whose examples are prescribed, as by a ledger; one row a step."""

    positions: Int[np.ndarray, "steps own"]  # for this rank
    attempts: Int[np.ndarray, "steps own"]
    everyone: Int[np.ndarray, "steps any"]  # positions that are known to be taken in that step
    row: int = 0  # of the next step

    @property
    def left(self) -> int:
        """Steps still prescribed."""
        return len(self.positions) - self.row


@dataclass
class Order:
    """The positions that one rank has taken and takes next, ``batch_size`` a step."""

    batch_size: int
    rank: int
    world: int
    window: int  # own positions
    script: Script | None = None
    _first: int = 0  # own positions before it are all taken
    _early: set[int] = field(default_factory=set)  # taken beyond it
    _cursor: int = 0  # the next to submit, where nothing is prescribed
    _row: int = 0  # the same in the script, counted in examples

    def restore(self, position: int, taken: Sequence[Sequence[int]]) -> None:
        """Begin where all positions before ``position`` and in these ranges are taken."""
        self._first, self._early = self._from(position), set()
        for start, stop in taken:
            self._early.update(range(self._from(start), self._from(stop)))
        self._advance()
        self.rewind()

    def follow(self, script: Script | None) -> None:
        """Prescribe the next steps; nothing may be submitted at that time."""
        self.script = script
        self.rewind()

    def rewind(self) -> None:
        """Submit again what was not taken."""
        self._cursor = self._first
        self._row = self.script.row * self.batch_size if self.script else 0

    def submit(self) -> tuple[int, int | None] | None:
        """(position, prescribed attempt or None) to prepare next; None while the window is full."""
        script = self.script
        if script is not None and self._row < script.positions.size:
            self._row += 1
            return int(script.positions.flat[self._row - 1]), int(
                script.attempts.flat[self._row - 1]
            )
        prescribed = set(script.everyone[script.row :].flat) if script is not None else ()
        self._cursor = max(self._cursor, self._first)
        while self._cursor < self._first + self.window or self._ahead() < self.batch_size:
            self._cursor += 1
            position = self._position(self._cursor - 1)
            if self._cursor - 1 not in self._early and position not in prescribed:
                return position, None
        return None

    def outstanding(self) -> int:
        """Positions submitted and not taken; the next batch needs ``batch_size`` of them."""
        prescribed = self._row - self.script.row * self.batch_size if self.script else 0
        return max(prescribed, 0) + max(self._ahead(), 0)

    def _ahead(self) -> int:
        """The same where nothing is prescribed."""
        early = sum(index < self._cursor for index in self._early)
        return self._cursor - self._first - early

    def wanted(self, already: Sequence[int]) -> tuple[int, int | None]:
        """(position, prescribed attempt or None) of the next example of a batch begun so."""
        if self.script is not None and self.script.left:
            row, slot = self.script.row, len(already)
            return int(self.script.positions[row, slot]), int(self.script.attempts[row, slot])
        index = self._first
        while index in self._early or self._position(index) in already:
            index += 1
        return self._position(index), None

    def take(self, positions: Sequence[int]) -> int:
        """One step with these positions; how far ahead of the first one left out they go."""
        if self.script is not None and self.script.left:
            positions = [int(p) for p in self.script.everyone[self.script.row]]
            self.script.row += 1
        own = [
            i
            for i, p in zip(map(self._from, positions), positions, strict=True)
            if self._position(i) == p
        ]
        self._early.update(own)
        self._advance()
        return max([index - self._first for index in own if index > self._first], default=0)

    def state(self) -> dict[str, Any]:
        """What this rank has taken, as JSON: the first position not taken, and ranges beyond."""
        taken = [self._position(index) for index in sorted(self._early)]
        part = {"position": self._position(self._first), "taken": _ranges(taken)}
        if self.world > 1:
            part |= {"rank": self.rank, "world": self.world}
            part["batch_size"] = self.batch_size * self.world
        return part

    def _position(self, index: int) -> int:
        step, slot = divmod(index, self.batch_size)
        return (step * self.world + self.rank) * self.batch_size + slot

    def _from(self, position: int) -> int:
        """The first own index whose position is not below this one."""
        step, slot = divmod(position, self.batch_size * self.world)
        own = min(max(slot - self.rank * self.batch_size, 0), self.batch_size)
        return step * self.batch_size + own

    def _advance(self) -> None:
        while self._first in self._early:
            self._early.remove(self._first)
            self._first += 1


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a run from the states of all its ranks, which have taken equally many steps."""
    common = {k: v for k, v in parts[0].items() if k not in ("rank", "world", "batch_size")}
    found = {(q["source"], q["chain"]): q for part in parts for q in part.get("quarantined", ())}
    common["quarantined"] = [found[chain] for chain in sorted(found)]
    by_rank = {part.get("rank", 0): part for part in parts}
    world, size = parts[0].get("world", 1), parts[0].get("batch_size", 1)
    if sorted(by_rank) != list(range(world)) or len({part["step"] for part in parts}) > 1:
        raise ValueError(f"states of ranks {sorted(by_rank)} of {world} at different steps")
    start = min(part["position"] for part in parts)
    end = max(max([part["position"], *(b for _, b in part["taken"])]) for part in parts)
    taken = np.zeros(end - start, bool)
    owner = (np.arange(start, end) % size) // (size // world)
    for rank, part in by_rank.items():
        taken[: part["position"] - start] |= owner[: part["position"] - start] == rank
        for first, last in part["taken"]:
            taken[first - start : last - start] |= owner[first - start : last - start] == rank
    early = np.flatnonzero(taken) + start
    missing = np.flatnonzero(~taken)
    position = int(missing[0]) + start if missing.size else end
    return {**common, "position": position, "taken": _ranges([p for p in early if p > position])}


def _ranges(positions: Sequence[int]) -> list[list[int]]:
    """Ascending positions as [first, beyond the last] of each run."""
    found: list[list[int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1][1] += 1
        else:
            found.append([int(position), int(position) + 1])
    return found
