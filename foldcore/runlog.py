"""What a run leaves behind in ``<out>/<name>/``, and what it shows while it runs.

    config.toml      everything that identifies the run
    metrics.jsonl    one row a log step and an evaluation; cut back to the checkpoint on resume
    tensorboard/     the same numbers as TensorBoard events
    ledger/          which examples each step took (see docs/loader.md)
    quarantine.jsonl examples that ended their loader process, if any did
    run.log          every line printed, with its time
    data_report.tsv  what became of every chain of the data set
    checkpoints/     see foldcore/checkpoint.py

A terminal shows live progress; anywhere else a plain line a log step appears. With
``enabled=False`` (every process but the first) nothing is written or shown.
"""

import fcntl
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from foldcore.checkpoint import list_checkpoints
from foldcore.config import Config, ConfigError, dumps, load
from foldcore.data.loader import Loader

# Fields that may change when a run continues: none of them alters a number that was already logged.
# Data may move; the loader refuses other chains.
FREE_FIELDS = frozenset(
    "train.out train.name train.steps train.log_every train.eval_every train.save_every train.keep "
    "data.path data.distillation_path data.workers data.prefetch data.ordered data.reorder_window "
    "data.example_timeout data.replay".split()
)
SHOWN = {  # of a row, on the terminal
    "loss/total": "loss {:.4g}",
    "grad_norm": "grad_norm {:.3g}",
    "learning_rate": "learning_rate {:.2g}",
    "examples_per_s": "{:.3g} examples/s",
    "data_wait": "data_wait {:.0%}",
    "eval/lddt_ca": "held-out chains: lddt_ca {:.3f}",
    "eval/drmsd": "drmsd {:.2f} A",
    "eval/gdt_ts": "gdt_ts {:.3f}",
    "eval/loss/total": "loss {:.4g}",
}


class NonFiniteError(ArithmeticError):
    """A step produced a value that is not finite; its update was skipped."""

    def __init__(self, step: int, name: str) -> None:
        super().__init__(f"{name} is not finite at step {step}; that update was skipped")
        self.step, self.name = step, name


class RunLog:
    """The files and the display of one run, appended to if the run continues."""

    def __init__(self, folder: str | Path, total_steps: int, enabled: bool = True) -> None:
        self.folder = Path(folder)
        self._total = total_steps
        self._enabled = enabled
        self._progress: Progress | None = None
        self._said: set[str] = set()
        if enabled:
            self._text = _open_log(self.folder)
            try:  # held until this process ends, however it ends
                fcntl.flock(self._text, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{folder}: another process is at work in this run folder"
                ) from None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        if error is not None:
            self._note(f"stopped by {type(error).__name__}: {error}")
        if self._progress:
            self._progress.stop()
        self._text.close()

    def begin(self, step: int, config: Config) -> None:
        """Open the metrics of a run that stands at ``step``: rows of later steps are dropped."""
        if not self._enabled:
            return
        _replace(self.folder / "config.toml", dumps(config))
        path = self.folder / "metrics.jsonl"
        _truncate(path, step)
        self._rows = path.open("a", encoding="utf-8")
        self._events = _Events(self.folder / "tensorboard", step)
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._task = self._progress.add_task("training", total=self._total, completed=step)
            self._progress.start()

    def lacks(self, step: int, prefix: str) -> bool:
        """Whether this run was at ``step`` but has no value of that prefix; any process may ask."""
        rows = _whole_rows(self.folder / "metrics.jsonl")
        names = [name for at, _, row in rows if at == step for name in row]
        return step > 0 and not any(name.startswith(prefix) for name in names)

    def say(self, line: str) -> None:
        """Print one line, and keep it in ``run.log``."""
        if not self._enabled:
            return
        self._note(line)
        if self._progress:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def data(self, loader: Loader) -> None:
        """Say what became of the data sets, unless just said, and write it chain by chain."""
        if not self._enabled:
            return
        for number, dataset in enumerate(loader.datasets):
            name = f"data_report_{number}.tsv" if number else "data_report.tsv"
            dataset.report.write(self.folder / name)
            if (summary := dataset.report.summary()) not in self._said:
                self._said.add(summary)
                self.say(summary)
        if summary := loader.incidents.summary():
            self.say(summary)

    def keep_batch(self, loader: Loader, step: int) -> Path:
        """Rebuild the loader's batch of an earlier step, and write it as ``.npz``.

        Each process writes its own examples, named by the first of them.
        """
        batch = loader.rebuild(step)
        name = f"non_finite_step_{step:08d}_example_{batch['example_id'][0]}.npz"
        np.savez_compressed(self.folder / name, allow_pickle=False, **batch)
        return self.folder / name

    def tick(self, step: int) -> None:
        """Move the live progress to ``step``; nothing is shown where there is no terminal."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row of numbers to every file and show its most telling ones."""
        if not self._enabled:
            return
        row = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        self._rows.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._rows.flush()
        self._events.scalars(step, {k: v for k, v in row.items() if v is not None})
        self.say(f"step {step}/{self._total}  {_shown(values)}")

    def _note(self, line: str) -> None:
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self._text.flush()


class Window:
    """The metrics of the steps since the last log step, and how that time was spent.

    Metrics may be values still on the device. The pending ones go into checkpoints, so that the row
    which follows a resume is the mean over the same steps as without the interruption.
    """

    def __init__(self, pending: Sequence[Mapping[str, float]] = ()) -> None:
        self.pending: list[Mapping[str, float]] = list(pending)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time so far, such as a compilation or an evaluation."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def add(self, metrics: Mapping[str, float], waited: float) -> None:
        """Append one step; ``waited`` is how long it waited for its batch, in seconds."""
        self.pending.append(metrics)
        self._steps += 1
        self._waited += waited

    def land(self, fetch: Callable[[Any], Any], step: int) -> None:
        """Bring the pending metrics to the host; ``step`` is that of the last one.

        Raises :class:`NonFiniteError` for the first value that is not finite.
        """
        self.pending = [{k: float(v) for k, v in m.items()} for m in fetch(self.pending)]
        if bad := first_non_finite(self.pending):
            position, name = bad
            raise NonFiniteError(step - len(self.pending) + 1 + position, name)

    def close(self, batch_size: int) -> dict[str, float]:
        """The mean over the pending steps, which must have landed, and the rates; then restart."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        names = self.pending[0]
        row = {k: math.fsum(m[k] for m in self.pending) / len(self.pending) for k in names}
        row["learning_rate"] = float(self.pending[-1]["learning_rate"])
        # no step was timed where only the first one, which compiles, came before
        row["examples_per_s"] = self._steps * batch_size / seconds if self._steps else math.nan
        row["data_wait"] = min(self._waited / seconds, 1.0) if self._steps else math.nan
        self.pending = []
        self.restart_clock()
        return row


def due(step: int, last: int, every: int) -> bool:
    """Whether what is done each ``every`` steps (0: only at the last) is done at this one."""
    return step == last or (every > 0 and step % every == 0)


def _open_log(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "run.log").open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write there: {error.strerror} (train.out)") from None


def closing_words(folder: Path, command: str, finished: bool) -> str:
    """Where everything is, and what to do next."""
    found = list_checkpoints(folder / "checkpoints")
    reason = "finished" if finished else "stopped by a signal"
    if not found:  # in a process that writes none, and may be ahead of the one that does
        return reason
    more = "train more: the same with a larger train.steps" if finished else "continue"
    return (
        f"{reason} after step {found[0][0]}\n"
        f"  everything is in {folder}; numbers in metrics.jsonl, weights in {found[0][1]}\n"
        f"  curves: tensorboard --logdir {folder.parent}\n"
        f"  {more}: {command}"
    )


def first_non_finite(pending: Sequence[Mapping[str, float]]) -> tuple[int, str] | None:
    """(position, name) of the first value that is not finite: a loss term before the total."""
    for position, metrics in enumerate(pending):
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        for name in sorted(bad, key=lambda n: (not n.startswith("loss/"), n == "loss/total", n)):
            return position, name
    return None


def check_config(folder: str | Path, config: Config) -> None:
    """Refuse to continue a run with another configuration, naming the fields that differ."""
    path = Path(folder) / "config.toml"
    before, now = _fields(load(path)), _fields(config)
    changed = sorted(k for k in now.keys() - FREE_FIELDS if before[k] != now[k])
    if changed:
        differences = "\n".join(f"  {k}: {before[k]!r} there, {now[k]!r} now" for k in changed)
        raise ConfigError(
            f"{folder} holds a run with another configuration:\n{differences}\n"
            "start a new run with train.name=NAME, or delete that folder"
        )


class _Events:
    """A TensorBoard event file; a resumed run tells TensorBoard to forget the later steps."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self._write(Event(file_version="brain.Event:2"))
        if step:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event with every value as a scalar."""
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._write(Event(step=step, summary=summary))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def _shown(values: Mapping[str, float]) -> str:
    shown = (name for name in SHOWN if math.isfinite(values.get(name, math.nan)))
    return "  ".join(SHOWN[name].format(values[name]) for name in shown)


def _truncate(path: Path, step: int) -> None:
    """Drop the rows after ``step``, and a last line that was cut short by a kill."""
    if path.exists():
        _replace(path, "".join(line + "\n" for at, line, _ in _whole_rows(path) if at <= step))


def _whole_rows(path: Path) -> Iterator[tuple[int, str, dict[str, float]]]:
    """(step, line, row) of each line that is whole."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            yield int(row["step"]), line, row
        except (ValueError, KeyError, TypeError):
            continue


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _fields(config: Config) -> dict[str, object]:
    return {f"{s}.{k}": v for s, values in asdict(config).items() for k, v in values.items()}
