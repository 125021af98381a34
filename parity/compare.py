"""Prove that both tracks compute the same: the ladder of comparisons, and its report.

    python -m parity.compare [--case PATTERN] [--dtype float64|float32|bfloat16] [--level 1..4]
                             [--device cpu|gpu] [--steps N] [--quick] [--out FOLDER]
                             [--config CONFIG] [section.key=value ...]

Every precision has a process of its own. The report is a table, report.json and index.html in the
folder of --out: runs/parity for the full run, runs/parity/part for anything else. The exit status
is 0 if every case passed, 1 if one did not, 2 for what cannot be compared, 130 after Ctrl-C; in
report.json is what was done, should the run be cut short. On a GPU, levels 2 and 3 run at the full
size of CONFIG (configs/initial_training.toml by default), in float32 and bfloat16.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from foldcore.config import ConfigError
from parity import report
from parity.checks import Refused, check, nothing_found, refuse
from parity.options import DTYPES, FEWEST_STEPS, FULL_SIZE_LEVELS, LEVELS, Options
from parity.workers import Parts, collect, run

STEPS, QUICK_STEPS = 100, 12
FULL_SIZE = "configs/initial_training.toml"
WHOLE, PART = "runs/parity", "runs/parity/part"
INTERRUPTED = 128 + signal.SIGINT


def main(argv: list[str]) -> int:
    """Compare what the command line says; the exit status."""
    arguments = parse(argv)
    jobs, out = plan(arguments), Path(arguments.out or default_folder(arguments))
    try:
        check(jobs, out)
    except (Refused, ConfigError) as error:
        return refuse(str(error))
    result, parts = compare(jobs, out)
    complete = result["environment"]["complete"]
    if not result["cases"] and complete:
        asked = (arguments.case, arguments.dtype or (), arguments.level or ())
        return refuse(nothing_found(*asked, parts))
    if result["cases"]:
        report.write(result, out)
    if not complete:
        done = "the report has what was done" if result["cases"] else "no case was done"
        print(f"interrupted: {done}", file=sys.stderr)
        return INTERRUPTED
    return 0 if all(case["passed"] for case in result["cases"]) else 1


def compare(jobs: list[Options], out: Path) -> tuple[dict[str, Any], Parts]:
    """The whole report and its parts; after Ctrl-C, what was done till then."""
    start = time.perf_counter()

    def merged(parts: Parts, complete: bool) -> dict[str, Any]:
        return report.merge(parts, time.perf_counter() - start, complete)

    def publish(parts: Parts) -> None:
        if any(part["cases"] for part in parts):
            report.write_json(merged(parts, complete=False), out)

    with tempfile.TemporaryDirectory() as folder:
        at_once, complete = 1 if jobs[0].device == "gpu" else cores(), True
        try:
            parts = run(jobs, Path(folder), at_once, publish)
        except KeyboardInterrupt:
            parts, complete = collect(jobs, Path(folder), {}), False
    return merged(parts, complete), parts


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m parity.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", default="", help="a regular expression found in the names")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--level", action="append", type=int, choices=tuple(LEVELS))
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of the training run of level 4 ({STEPS}; at least {FEWEST_STEPS})",
    )
    parser.add_argument("--quick", action="store_true", help="what make test runs")
    parser.add_argument("--out", help=f"{WHOLE}; of anything but the full run {PART}")
    parser.add_argument("--config", default="", help="compare levels 2 and 3 at this size")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def default_folder(arguments: argparse.Namespace) -> str:
    """A part, or another comparison, never replaces the report of a full run."""
    given = {key for key, value in vars(arguments).items() if value and key != "out"}
    return WHOLE if given == {"device"} else PART


def plan(arguments: argparse.Namespace) -> list[Options]:
    """One process for each precision."""
    config, on_gpu = arguments.config, arguments.device == "gpu"
    if on_gpu and not config and FULL_SIZE_LEVELS.issuperset(arguments.level or ()):
        config = FULL_SIZE
    dtypes = arguments.dtype or (DTYPES[1:] if config else DTYPES)
    steps = QUICK_STEPS if arguments.quick else STEPS
    steps = steps if arguments.steps is None else arguments.steps
    levels = arguments.level or (FULL_SIZE_LEVELS if config else LEVELS)
    return [
        Options(
            dtype=dtype,
            device=arguments.device,
            pattern=arguments.case,
            levels=tuple(sorted(levels)),
            steps=steps,
            quick=arguments.quick,
            config=config,
            overrides=tuple(arguments.overrides),
        )
        for dtype in dict.fromkeys(dtypes)
    ]


def cores() -> int:
    """How many processes may work at once."""
    return max(1, len(os.sched_getaffinity(0)))


def entry() -> int:
    """The program: without a traceback, should it be interrupted anywhere."""
    # so that the processes end as well, if this one is asked to
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(entry())
