"""Explain a data set: ``python -m foldcore.data.doctor STORE|SOURCE [section.key=value ...]``.

What joined, what did not and why, distributions, the time an example takes with its tail, and the
loader processes that a number of GPUs needs. ``--html`` writes the same as a page.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foldcore.config import Config, ConfigError, load
from foldcore.data.doctor_page import render
from foldcore.data.examine import Findings, Timing, examine
from foldcore.data.histogram import histogram
from foldcore.data.store import Store, is_store
from foldcore.errors import DataError, file_trouble

BAR = 40  # characters of the longest bar


def show(findings: Findings, console: Console, gpus: int, step_ms: float) -> None:
    """Print the findings."""
    console.print(f"[bold]{escape(findings.path)}[/bold]: {findings.kind}")
    console.print(f"{findings.accepted} chains to train on")
    for rule in findings.rules:
        console.print(f"  left out: {rule.count} {escape(_line(rule.name, rule.subjects))}")
    for note in findings.notes:
        console.print(f"  note: {escape(_line(note.name, note.subjects))} in {note.count} chains")
    for chain_id, reason in findings.failed:
        console.print(f"  [red]cannot be prepared[/red]: {escape(f'{chain_id}: {reason}')}")
    for name, values in findings.values.items():
        _bars(console, name, values, findings.unknown.get(name, 0))
    if findings.timing:
        _times(console, findings.timing, gpus, step_ms)
    for advice in findings.advice:
        console.print(f"hint: {escape(advice)}")


def _line(name: str, subjects: tuple[str, ...]) -> str:
    return f"{name}: {', '.join(subjects)}" if subjects else name


def _bars(console: Console, name: str, values: np.ndarray, unknown: int) -> None:
    if not len(values):
        console.print(f"\n{name}: unknown for all {unknown}")
        return
    median = f"median {np.median(values):g}, {values.min():g} to {values.max():g}"
    missing = f", unknown for {unknown}" if unknown else ""
    console.print(f"\n[bold]{name}[/bold]: {median}{missing}")
    bins = histogram(values)
    highest = max(count for _, count in bins)
    for label, count in bins:
        console.print(f"  {label:>13} {'█' * round(BAR * count / highest):<{BAR}} {count}")


def _times(console: Console, timing: Timing, gpus: int, step_ms: float) -> None:
    table = Table(title=f"milliseconds an example, one core, {len(timing.seconds)} chains")
    row = [f"{timing.seconds.mean() * 1e3:.1f}"]
    table.add_column("mean")
    for percent in (50, 90, 99, 100):
        table.add_column(f"{percent} %" if percent < 100 else "slowest")
        row.append(f"{timing.percentile(percent) * 1e3:.1f}")
    table.add_row(*row)
    console.print(table)
    slow = ", ".join(f"{chain} {seconds * 1e3:.0f} ms" for chain, seconds in timing.slowest)
    console.print(f"slowest: {slow}")
    console.print(timing.advice(gpus, step_ms))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; status 1 where nothing can be trained on, 2 where it was asked for wrongly."""
    arguments = _parser().parse_args(argv)
    overrides = [word for word in arguments.source if _is_override(word)]
    sources = [word for word in arguments.source if not _is_override(word)]
    if not sources:
        _parser().error("name a data set: a folder, a store, or embedded")
    try:
        config = load(arguments.config or os.devnull, overrides)
        _explain(arguments, sources, config)
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        return 130
    except OSError as error:
        if (words := file_trouble(error, arguments.html or "the temporary folder")) is None:
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _explain(arguments: argparse.Namespace, sources: Sequence[str], config: Config) -> None:
    if arguments.html:
        _try_page(Path(arguments.html))
    if arguments.verify:
        _verify(sources)
    findings = examine(sources, config.data, arguments.sample)
    show(findings, Console(highlight=False), arguments.gpus, arguments.step_ms)
    if arguments.html:
        page = render(findings, arguments.gpus, arguments.step_ms)
        Path(arguments.html).write_text(page, encoding="utf-8")
        print(f"page: {arguments.html}")


def _try_page(path: Path) -> None:
    """Raise OSError now, not after a long examination, where the page cannot be written."""
    is_new = not path.exists()
    path.open("a").close()
    if is_new:
        path.unlink()


def _verify(sources: Sequence[str]) -> None:
    for source in sources:
        if source != "embedded" and is_store(source):
            for name in Store(source).verify():
                print(f"{name}: whole")


def _is_override(word: str) -> bool:
    return "=" in word and word.partition(".")[0] in ("data", "train", "model", "loss", "optimizer")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m foldcore.data.doctor", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", nargs="+", help="a store, a folder or URLs; then section.key=value settings"
    )
    parser.add_argument("--config", help="settings of the run (a TOML file; default: the paper's)")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=500.0, help="of one training step")
    parser.add_argument("--sample", type=int, default=64, help="chains to make examples of")
    parser.add_argument("--verify", action="store_true", help="read a store whole: checksums")
    parser.add_argument("--html", metavar="FILE", help="write a page, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
