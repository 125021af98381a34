"""Prove that both tracks compute the same: the ladder of comparisons, and its report.

    python -m parity.compare [--case PATTERN] [--dtype float64|float32|bfloat16] [--level 1..4]
                             [--device cpu|gpu] [--steps N] [--quick] [--out runs/parity]
                             [--config CONFIG] [section.key=value ...]

Every precision has a process of its own. The report is a table, report.json and index.html in the
folder of --out; the exit status is 0 if every case passed. report.json has what is done at any
moment, should the run be cut short. On a GPU, levels 2 and 3 run at the full size of CONFIG
(configs/initial_training.toml by default), in float32 and bfloat16.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity import report
from parity.options import DTYPES, LEVELS, Options

# compiling takes most of the time, and the programs are small; one thread each, as the processes
# of two precisions share the cores
FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# on a GPU most of the time goes into looking for the quickest of several products that are as good
UNTUNED = "--xla_gpu_autotune_level=0"
STEPS, QUICK_STEPS = 100, 12
FULL_SIZE = "configs/initial_training.toml"
FULL_SIZE_LEVELS = {2, 3}


def main(argv: list[str]) -> int:
    """Compare what the command line says; the exit status."""
    arguments = parse(argv)
    jobs, out, start = plan(arguments), Path(arguments.out), time.perf_counter()

    def publish(parts: list[dict[str, Any]]) -> None:
        result = report.merge(parts, time.perf_counter() - start, complete=False)
        report.write_json(result, out)

    with tempfile.TemporaryDirectory() as folder:
        at_once = 1 if arguments.device == "gpu" else cores()
        parts = run(jobs, Path(folder), at_once, publish)
    result = report.merge(parts, time.perf_counter() - start)
    if not result["cases"]:
        print(f"no case is called {arguments.case!r} in this precision, level and size")
        return 2
    report.write(result, out)
    return 0 if all(case["passed"] for case in result["cases"]) else 1


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
    parser.add_argument("--steps", type=int, help="of the training run of level 4 (100)")
    parser.add_argument("--quick", action="store_true", help="what make test runs")
    parser.add_argument("--out", default="runs/parity")
    parser.add_argument("--config", default="", help="compare levels 2 and 3 at this size")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def plan(arguments: argparse.Namespace) -> list[Options]:
    """One process for each precision."""
    config, on_gpu = arguments.config, arguments.device == "gpu"
    if on_gpu and not config and FULL_SIZE_LEVELS.issuperset(arguments.level or ()):
        config = FULL_SIZE
    dtypes = arguments.dtype or (DTYPES[1:] if config else DTYPES)
    levels = arguments.level or (FULL_SIZE_LEVELS if config else LEVELS)
    return [
        Options(
            dtype=dtype,
            device=arguments.device,
            pattern=arguments.case,
            levels=tuple(sorted(levels)),
            steps=arguments.steps or (QUICK_STEPS if arguments.quick else STEPS),
            quick=arguments.quick,
            config=config,
            overrides=tuple(arguments.overrides),
        )
        for dtype in dtypes
    ]


def cores() -> int:
    """How many processes may work at once."""
    return max(1, len(os.sched_getaffinity(0)))


def run(
    jobs: list[Options],
    folder: Path,
    at_once: int,
    publish: Callable[[list[dict[str, Any]]], None] = lambda parts: None,
) -> list[dict[str, Any]]:
    """What the processes report; they print as they go, and what they have is published."""
    waiting = list(jobs)
    published: dict[Options, int] = {}  # when each process wrote what is published
    paths = {job: folder / f"{job.dtype}.json" for job in jobs}
    running: dict[Options, subprocess.Popen[bytes]] = {}
    failed: dict[Options, dict[str, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job] = start(job, paths[job])
            for job in [job for job, process in running.items() if process.poll() is not None]:
                if status := running.pop(job).returncode:
                    failed[job] = died(job, status)
            there = {job: path.stat().st_mtime_ns for job, path in paths.items() if path.exists()}
            if there != published:
                publish([written(job, paths[job], failed.get(job)) for job in jobs])
                published = there
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.kill()
    return [written(job, paths[job], failed.get(job)) for job in jobs]


def start(job: Options, path: Path) -> subprocess.Popen[bytes]:
    """Start one precision."""
    options = json.dumps({**asdict(job), "report": str(path)})
    return subprocess.Popen([sys.executable, "-m", "parity.worker", options], env=settings(job))


def settings(job: Options) -> dict[str, str]:
    """The environment of a process."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    if job.device == "cpu":
        own |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        own |= {"XLA_FLAGS": FAST_COMPILE}
    else:
        own |= {"XLA_FLAGS": UNTUNED}
    return {**os.environ, **own}


def written(job: Options, path: Path, failed: dict[str, Any] | None) -> dict[str, Any]:
    """What a process has written so far, and the case that it is if it died."""
    part: dict[str, Any] = {"cases": [], "curves": {}, "environment": {}}
    if path.exists():
        part = json.loads(path.read_text(encoding="utf-8"))
    return {**part, "dtype": job.dtype, "cases": [*part["cases"], *([failed] if failed else [])]}


def died(job: Options, status: int) -> dict[str, Any]:
    """A process that died is a case that failed."""
    unknown = dict.fromkeys(("error_jax", "error_torch", "difference", "ratio"))
    case = {"name": f"all of {job.dtype}", "level": min(job.levels), "dtype": job.dtype}
    return {**case, "passed": False, **unknown, "reason": f"the process ended with status {status}"}


if __name__ == "__main__":
    # so that the processes end as well, if this one is asked to
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
