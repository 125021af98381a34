"""How fast both tracks train: the step time of each by the number of recycling passes, and why.

    python -m parity.throughput [options] [section.key=value ...]

Each track runs in a process of its own, with its real ``train_step`` on one batch of the embedded
chains cut to the configuration's sizes (time does not depend on what the batch holds). Afterwards,
on a GPU, it profiles a step with the most passes, for its gaps and its slowest kernels, and times
every module by itself, to compare it with the roofline. Rows go to a JSON file, a page with bars
beside it, and tables to the terminal. Overrides are those of the training programs; the batch size
is 1 unless they say otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foldcore.config import ConfigError
from parity import flops, throughput_page
from parity import throughput_tables as tables
from parity.checks import Refused, check_throughput, refuse
from parity.throughput_run import measure, read_config

TRACKS = ("jax", "torch")
PASSES = range(4)  # of recycling, beside the last


def main(argv: Sequence[str]) -> int:
    """Measure as the command line says; 1 if a part of it failed, 2 if none can work."""
    options = _parser().parse_intermixed_args(argv)
    if options.worker:
        return _work(options)
    out = Path(options.out)
    try:
        check_throughput(read_config(options.config, options.overrides), out)
    except (Refused, ConfigError) as reason:
        return refuse(str(reason))
    rows: list[dict[str, Any]] = []
    failed, roofline = [], None
    if options.modules:
        roofline, error = _run("roofline", argv, options.track, out)
        failed += error
    for track in TRACKS if options.track == "both" else (options.track,):
        found, error = _run("steps", argv, track, out)
        failed += error
        if found:
            tables.add_rooflines(found, roofline)
            rows += found
            _write(rows, options)
            print(_report(rows, found, out.with_suffix(f".{track}.txt")), flush=True)
    failed += [line for row in rows for line in tables.failures(row)]
    if failed:
        print("failed:", *failed, sep="\n  ", file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parity.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, yes_or_no = parser.add_argument, argparse.BooleanOptionalAction
    add("--track", choices=(*TRACKS, "both"), default="both")
    add("--config", default="initial_training", help="a name in configs/, or a path")
    add("--recycling", type=_passes, default="0,1,2,3", help="numbers of extra passes")
    add("--steps", type=_at_least_one, default=10, help="timed steps for each number")
    add("--out", default="runs/parity/throughput.json")
    add("--profile", action=yes_or_no, default=True, help="gaps and kernels of a step, on a GPU")
    add("--modules", action=yes_or_no, default=True, help="times of all modules by themselves")
    add("--module", default="", help="only of modules whose name contains this")
    add("--worker", choices=("steps", "roofline"), help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="section.key=value")
    return parser


def _passes(text: str) -> list[int]:
    """What is written: 0 to 3, separated by commas."""
    if not set(text.split(",")) <= {*map(str, PASSES)}:
        raise argparse.ArgumentTypeError(f"{text!r}: 0 to {PASSES[-1]}, separated by commas")
    return [int(number) for number in text.split(",")]


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1")
    return int(text)


def _run(worker: str, argv: Sequence[str], track: str, out: Path) -> tuple[Any, list[str]]:
    """What a process left behind, even if it did not come to its end; and its failure."""
    part = out.with_suffix(f".{worker}.{track}.json")
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "parity.throughput", *argv]
    command += ["--track", track, "--out", str(part), "--worker", worker]
    # JAX tells the shapes of parameters everywhere; of a GPU it would keep nearly all memory
    setting = {} if (worker, track) == ("steps", "jax") else {"JAX_PLATFORMS": "cpu"}
    status = subprocess.run(command, env={**os.environ, **setting}).returncode
    found = json.loads(part.read_text()) if part.exists() else None
    part.unlink(missing_ok=True)
    return found, [f"{worker} {track}: exit status {status}"] if status else []


def _work(options: argparse.Namespace) -> int:
    """In a process of its own: one track, or the roofline."""
    if options.worker == "steps":
        measure(options.track, options, lambda rows: print(tables.steps(rows), flush=True))
    else:
        from parity.throughput_roofline import roofline  # imports both frameworks

        config = read_config(options.config, options.overrides)
        Path(options.out).write_text(json.dumps(roofline(config)))
    return 0


def _write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """All rows so far, and the page."""
    out = Path(options.out)
    out.write_text(json.dumps(rows, indent=1))
    operations = flops.forward(read_config(options.config, options.overrides))
    page = throughput_page.render(rows, operations)
    out.with_suffix(".html").write_text(page, encoding="utf-8")


def _report(rows: Sequence[Any], track: Sequence[Any], path: Path) -> str:
    """Tables of the step times, and of the track's step with the most passes; these are kept."""
    row = max(track, key=lambda row: row["recycling"])
    described = tables.describe(row)
    slowest = f"\n{tables.kernels(row)}\n" if "kernels" in row else ""
    if described:
        path.write_text(described + slowest)
    return f"{tables.steps(rows)}\n\n{described}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
