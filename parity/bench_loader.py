"""Our loader against ``torch.utils.data.DataLoader``: python -m parity.bench_loader [CONFIG] [...]

Both prepare the same examples with as many processes and as many examples ahead; a consumer takes a
batch and then a fixed time, in which it computes nothing. Two cases:

sleep  preparation sleeps for times with the spread measured on the configured data, and a few
       examples take 10 to 100 times longer, as deep alignments do; the number of cores is no limit
real   the configured data itself, each example prepared as in training

A stall is what ``next`` takes; a step waited if that was more than a tenth of the step's time. The
figures go to runs/bench_loader/report.json.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from foldcore.config import Config, ConfigError, load
from foldcore.data.examples import Preparer
from foldcore.data.loader import Loader, open_loader
from parity.checks import refuse
from parity.slow_examples import AsTorch, Sleeper

CONFIG = "configs/demo.toml"
REPORT = Path("runs/bench_loader/report.json")
WORKERS = 8  # of the sleeping case
MEAN_SECONDS = 0.2  # of an example there, without the injected tail
TAIL_SHARE = 0.02
HEADROOM = 1.3  # what the processes can prepare, over what the consumer takes
STEPS = 200
MEASURED = 60  # examples whose preparation is timed first


@dataclass(frozen=True)
class Row:
    """One loader in one case."""

    case: str
    loader: str
    workers: int
    step_ms: float  # the consumer's own time
    first_batch_s: float
    examples_per_s: float  # from the first batch on
    waited: float  # share of steps
    longest_stall_s: float
    lost_s: float  # all stalls together


def main(argv: Sequence[str]) -> int:
    """Run every case and print the table; 2 for a configuration that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m parity.bench_loader", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", nargs="?", default=CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config, arguments.overrides)
    except ConfigError as error:
        return refuse(str(error))
    measured = measure(config)
    print(
        f"{config.data.path}: an example takes {1e3 * measured.mean():.0f} ms on average "
        f"(median {1e3 * np.median(measured):.0f}, longest {1e3 * measured.max():.0f} ms)"
    )
    rows = [*sleep_case(config, measured), *real_case(config, measured)]
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }
    report = {"rows": [asdict(row) for row in rows], "environment": environment}
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    print(f"everything is in {REPORT}; {environment}")
    return 0


def measure(config: Config) -> Float[np.ndarray, " n"]:
    """Seconds to prepare each of the first examples of a run, from its files."""
    with open_loader(replace(config, data=replace(config.data, workers=0))) as loader:
        preparer = Preparer(loader.datasets, loader.plan)
        return np.array([preparer.prepare(position).seconds for position in range(MEASURED)])


def with_tail(seconds: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """A few of the examples take 10 to 100 times as long."""
    draw = np.random.default_rng(0)
    slow = draw.random(len(seconds)) < TAIL_SHARE
    return np.where(slow, seconds * 10 ** draw.uniform(1, 2, len(seconds)), seconds)


def sleep_case(config: Config, measured: Float[np.ndarray, " n"]) -> Iterator[Row]:
    """Times drawn from the measured ones, with and without the injected tail."""
    draw = np.random.default_rng(1)
    plain = draw.choice(measured, 4 * STEPS) * MEAN_SECONDS / measured.mean()
    seconds = with_tail(plain)
    step = HEADROOM * seconds.mean() / WORKERS
    tailed, untailed = (Sleeper(config.data, times) for times in (seconds, plain))
    print(
        f"sleep: {WORKERS} processes, mean {seconds.mean():.3f} s, {(seconds > plain).sum()} of "
        f"{len(seconds)} examples 10-100 times slower, longest {seconds.max():.1f} s"
    )
    print(heading())
    yield show("sleep", "ours", ours(tailed, config, WORKERS), step, WORKERS)
    for in_order in (False, True):
        batches = stock(tailed, WORKERS, in_order)
        yield show("sleep", f"DataLoader(in_order={in_order})", batches, step, WORKERS)
    name = "DataLoader(in_order=True), no tail"
    yield show("sleep", name, stock(untailed, WORKERS, True), step, WORKERS)


def real_case(config: Config, measured: Float[np.ndarray, " n"]) -> Iterator[Row]:
    """The configured data, by as many processes as there are cores."""
    with open_loader(replace(config, data=replace(config.data, workers=0))) as loader:
        preparer = Preparer(loader.datasets, loader.plan)
    workers = len(os.sched_getaffinity(0))
    step = HEADROOM * measured.mean() / workers
    print(f"real: {workers} processes")
    print(heading())
    yield show("real", "ours", ours(preparer, config, workers), step, workers)
    for in_order in (False, True):
        batches = stock(preparer, workers, in_order)
        yield show("real", f"DataLoader(in_order={in_order})", batches, step, workers)


def ours(preparer: Preparer, config: Config, workers: int) -> Iterator[Any]:
    """Batches of one example by our loader, with two examples ahead for each process."""
    settings = replace(config.data, workers=workers, prefetch=workers)
    with Loader(preparer, settings, batch_size=1) as loader:
        yield from loader


def stock(preparer: Preparer, workers: int, in_order: bool) -> Iterator[Any]:
    """The same by torch's, whose default is two examples ahead for each process as well."""
    loader = torch.utils.data.DataLoader(
        AsTorch(preparer, 4 * STEPS), batch_size=1, num_workers=workers, in_order=in_order
    )
    yield from loader


def show(case: str, name: str, batches: Iterator[Any], step: float, workers: int) -> Row:
    """Take the batches as a trainer would, and print what came of it."""
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    stalls = []
    start = time.perf_counter()
    for _ in range(STEPS):
        time.sleep(step)
        asked = time.perf_counter()
        next(batches)
        stalls.append(time.perf_counter() - asked)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    waited = float(np.mean(np.array(stalls) > step / 10))
    rate = STEPS / seconds
    row = Row(case, name, workers, 1e3 * step, first, rate, waited, max(stalls), sum(stalls))
    print(line(row), flush=True)
    return row


def heading() -> str:
    """Of the table."""
    names = ("loader", "step ms", "examples/s", "of possible", "waited", "longest", "lost")
    return f"  {names[0]:35}" + "".join(f"{name:>12}" for name in names[1:])


def line(row: Row) -> str:
    """Of the table."""
    possible = row.examples_per_s * row.step_ms / 1e3
    return (
        f"  {row.loader:35}{row.step_ms:12.1f}{row.examples_per_s:12.2f}{possible:12.1%}"
        f"{row.waited:12.1%}{row.longest_stall_s:10.2f} s{row.lost_s:10.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
