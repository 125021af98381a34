"""What happened while loading: failures, processes that died, and how long everything took."""

import heapq
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldcore.data.dataset import Dataset
from foldcore.data.examples import Prepared
from foldcore.data.pool import Casualty
from foldcore.data.sampler import Plan

if TYPE_CHECKING:
    from foldcore.data.source import Taken

Chain = tuple[int, str]  # source, id
SLOWEST = 3  # examples that are named at the end


class Incidents:
    """Collects what a loader's user should know; ``quarantine.jsonl`` has it from all ranks."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: Plan,
        folder: Path | None,
        rank: int,
        warn: Callable[[str], None],
    ) -> None:
        self._datasets, self._plan, self._rank, self._warn = datasets, plan, rank, warn
        self._path = folder / "quarantine.jsonl" if folder else None
        self._quarantined: dict[Chain, dict[str, Any]] = {}
        self._slowest: list[tuple[float, str]] = []
        self._seconds: list[tuple[float, int]] = []  # of examples since the last metrics, position
        self._depths: list[int] = []
        self._distance = 0

    def quarantined(self) -> frozenset[Chain]:
        """What is not to be tried again: in this run, before it was resumed, and on any rank."""
        if self._path and self._path.exists():
            entries = _read(self._path)
            self.restore([e for e in entries if e.get("plan") == self._plan.fingerprint()])
        return frozenset(self._quarantined)

    def state(self) -> list[dict[str, Any]]:
        """What this rank knows to be quarantined, for its state; without the tracebacks."""
        names = ("source", "chain", "rank", "position", "cause")
        return [{name: entry[name] for name in names} for entry in self._quarantined.values()]

    def restore(self, entries: Sequence[dict[str, Any]]) -> None:
        """Take in what was quarantined before."""
        for entry in entries:
            self._quarantined.setdefault((int(entry["source"]), str(entry["chain"])), entry)

    def note(self, prepared: Prepared, casualties: Sequence[Casualty]) -> None:
        """Take in what the preparation of an example, and processes that died, have to say."""
        for casualty in casualties:
            self._casualty(casualty)
        for dataset, notes in zip(self._datasets, prepared.notes, strict=False):
            dataset.report.add_notes(notes)
        for failure in prepared.failures:
            report = self._datasets[failure.source].report
            if report.fail(failure.chain_id, failure.reason):
                trace = f"\n{failure.trace}" if failure.trace else ""
                self._warn(f"replaced in training: {failure.chain_id}: {failure.reason}{trace}")

    def taken(self, taken: "Sequence[Taken]", distance: int, depth: int) -> None:
        """Take in one batch, how far it hurried ahead, and how many examples are left ready."""
        self._depths.append(depth)
        self._distance = max(self._distance, distance)
        for prepared in (t.prepared for t in taken):
            self._seconds.append((prepared.seconds, prepared.position))
            if len(self._slowest) < SLOWEST or prepared.seconds > self._slowest[0][0]:
                key = self._plan.replacement(prepared.position, prepared.attempt)
                heapq.heappush(self._slowest, (prepared.seconds, key.chain_id))
                if len(self._slowest) > SLOWEST:
                    heapq.heappop(self._slowest)

    def metrics(self) -> dict[str, float]:
        """Numbers about the batches since the last call, for the log."""
        seconds, self._seconds = self._seconds, []
        depths, self._depths = self._depths, []
        distance, self._distance = self._distance, 0
        if not seconds:
            return {}
        slowest, position = max(seconds)
        return {
            "loader/queue_depth": sum(depths) / len(depths),
            "loader/reorder_distance": float(distance),
            "loader/prepare_s": math.fsum(s for s, _ in seconds) / len(seconds),
            "loader/slowest_s": slowest,
            "loader/slowest_position": float(position),
        }

    def summary(self) -> str:
        """The slowest examples, and what was quarantined on any rank; for the end of a run."""
        lines = []
        if self._slowest:
            named = ", ".join(f"{c} {s:.2f} s" for s, c in sorted(self._slowest, reverse=True))
            lines.append(f"slowest examples to prepare: {named}")
        if self.quarantined():
            found = self._quarantined.values()
            lines.append(f"{len(found)} chains were quarantined: they ended their loader process")
            lines += [f"  {q['chain']} (rank {q['rank']}): {q['cause']}" for q in found]
        return "\n".join(lines)

    def _casualty(self, casualty: Casualty) -> None:
        what = "quarantined" if casualty.quarantined else "tried again"
        trace = f"\n{casualty.trace}" if casualty.trace else ""
        self._warn(f"{casualty.chain_id} is {what}: {casualty.cause}{trace}")
        if not casualty.quarantined:
            return
        self._datasets[casualty.source].report.fail(casualty.chain_id, casualty.cause)
        entry = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "plan": self._plan.fingerprint(),
            "rank": self._rank,
            "position": casualty.position,
            "source": casualty.source,
            "chain": casualty.chain_id,
            "cause": casualty.cause,
            "trace": casualty.trace,
        }
        self.restore([entry])
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:  # one write: ranks share it
                file.write(json.dumps(entry).encode() + b"\n")


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, but for one that was cut short by a kill."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
