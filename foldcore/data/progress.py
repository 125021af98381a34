"""How far a preparation is: a live bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0


class Meter:
    """``with Meter("alignments", tasks)``: follows the files that the tasks leave behind.

    A finished task has its part; one in work has a small file with a count. So progress is seen
    whichever engine runs the tasks.
    """

    def __init__(self, what: str, tasks: Sequence[Any], quiet: bool = False) -> None:
        self._what, self._tasks, self._quiet = what, tasks, quiet
        self._total = sum(task.units for task in tasks)
        self._stop = threading.Event()
        self._finished: set[str] = set()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Meter":
        self._start, self._begun = time.monotonic(), self.done()
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if not self._quiet:
            self._thread.join()

    def done(self) -> int:
        """Units that are done."""
        count = 0
        for task in self._tasks:
            if task.part in self._finished or Path(task.part).is_file():
                self._finished.add(task.part)
                count += task.units
            else:
                count += _count(Path(task.part).with_suffix(".progress"))
        return count

    def line(self) -> str:
        """Done, rate and time left, as text."""
        done, elapsed = self.done(), time.monotonic() - self._start
        rate = (done - self._begun) / max(elapsed, 1e-9)
        left = f", {(self._total - done) / rate:.0f} s left" if rate > 0 else ""
        return f"{self._what}: {done}/{self._total}, {rate:.1f}/s{left}"

    def _follow(self) -> None:
        if sys.stderr.isatty():
            self._live()
            return
        while not self._stop.wait(LINE_SECONDS):
            print(self.line(), file=sys.stderr, flush=True)

    def _live(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(self._what, total=self._total, rate="")
            while True:
                ended = self._stop.wait(POLL_SECONDS)
                done = self.done()
                rate = (done - self._begun) / max(time.monotonic() - self._start, 1e-9)
                progress.update(bar, completed=done, rate=f"{rate:.1f}/s")
                if ended:
                    return


def _count(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return 0
