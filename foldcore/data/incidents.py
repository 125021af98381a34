"""What happened while loading: failures, processes that died, and how long everything took."""

import heapq
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foldcore.data.dataset import Dataset
from foldcore.data.examples import Prepared
from foldcore.data.pool import Casualty
from foldcore.data.sampler import Plan

if TYPE_CHECKING:
    from foldcore.data.source import Taken

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
        self._quarantined: list[dict[str, object]] = []
        self._slowest: list[tuple[float, str]] = []
        self._seconds: list[tuple[float, int]] = []  # of examples since the last metrics, position
        self._depths: list[int] = []
        self._distance = 0

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
        found = self._quarantined
        if self._path and self._path.exists():
            found = [json.loads(line) for line in self._path.read_text().splitlines()]
        if found:
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
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "rank": self._rank,
            "position": casualty.position,
            "chain": casualty.chain_id,
            "cause": casualty.cause,
            "trace": casualty.trace,
        }
        self._quarantined.append(entry)
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:  # one write: ranks share it
                file.write(json.dumps(entry) + "\n")
