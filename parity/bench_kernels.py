"""Times and errors of the kernels beside their peers, on an NVIDIA GPU.

    python -m parity.bench_kernels [options]

A line for each operation, shape and implementation: milliseconds of the forward pass and with the
gradient, the share of them that the roofline explains (each array read or written once, or the
matrix products at the measured rate), the largest error of an array against float64, and multiples
of the best times known of others. Whole modules come first, then operations, then single kernels.
Our modules are given what a stack derives from parameters of all its blocks at once; that by itself
is a row of ``parity.throughput``, its kernels of 48 layers are rows here.
Plain JAX and PyTorch, torch.compile, SDPA, FlexAttention and, where it is installed, cuEquivariance
run beside ours, on the same arrays. What compiles quickly is timed first, and what has a best time;
what has not begun when the time is up is left out, by name.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# PyTorch and JAX share the device here
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch

from parity import (
    bench_attention,
    bench_modules,
    bench_rows,
    bench_state,
    peers,
    sweep_attention,
    sweep_rows,
)
from parity.benchmark import Benchmark, Row, compile_kernels
from parity.checks import refuse
from parity.sweep import launch_rows, sweep
from parity.timing import Ceilings, measure_ceilings

SOURCES = (bench_modules, bench_attention, bench_rows, bench_state)
QUICK = ("triton, torch", "torch", "torch SDPA")  # compiled in no time, or not at all


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks, or a sweep of launch sizes, as the command line says."""
    options = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        return refuse("kernels are timed on an NVIDIA GPU, and there is none here")
    if options.sweep:
        every = (c for module in (sweep_attention, sweep_rows) for c in module.candidates())
        sweep(every, options.sweep)
        return 0
    ends = time.monotonic() + options.seconds
    ceilings = measure_ceilings()
    print(
        f"{ceilings.name}: {ceilings.bandwidth / 1e12:.2f} TB/s, "
        f"{ceilings.rate / 1e12:.0f} TFLOP/s in bfloat16"
    )
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for row in measure(options, ceilings, ends):
        rows.append({"device": ceilings.name, **row})
        print(line(row), flush=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")  # what follows may fail
    print("\n" + table(rows))
    print(f"wrote {path} after {time.monotonic() - ends + options.seconds:.0f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parity.bench_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", default="", help="part of the name of an operation and its shape")
    parser.add_argument("--implementation", default="", help='part of a name, such as "triton"')
    parser.add_argument("--json", default="runs/bench_kernels.json", help="where the rows go")
    parser.add_argument("--seconds", type=float, default=180, help="no new row after this time")
    parser.add_argument(
        "--sweep",
        metavar="LABEL",
        help='try launch sizes instead, of kernels and shapes such as "bias_grad triangle"',
    )
    return parser


def measure(options: argparse.Namespace, ceilings: Ceilings, ends: float) -> Iterator[Row]:
    """Rows of all that is asked for: first what is quick."""
    missing = peers.absent()
    for name, why in missing.items():
        print(f"{name} is left out: {why}")
    chosen = [b for module in SOURCES for b in module.benchmarks() if options.op in b.title]
    if options.implementation in QUICK[0]:
        compile_kernels(chosen)
    for quick in (True, False):
        for benchmark in sorted(chosen, key=lambda b: b.best is None):
            names = _names(benchmark, quick, options.implementation, missing)
            if time.monotonic() < ends:
                yield from benchmark.rows(ceilings, names)
            else:
                yield from (_left_out(benchmark, name, options.seconds) for name in names)
        if quick and options.implementation in QUICK[0]:
            every = [c for module in (sweep_attention, sweep_rows) for c in module.in_use()]
            yield from launch_rows(
                [c for c in every if options.op in f"kernel {c.label}"], ceilings
            )


def _names(benchmark: Benchmark, quick: bool, part: str, missing: dict[str, str]) -> list[str]:
    names = (*benchmark.versions, *benchmark.jax_versions)
    return [n for n in names if part in n and (n in QUICK) == quick and n not in missing]


def _left_out(benchmark: Benchmark, name: str, seconds: float) -> Row:
    head = {"op": benchmark.op, "shape": benchmark.shape, "implementation": name}
    return head | {"failed": f"left out, for {seconds:.0f} s are over"}


def table(rows: Sequence[Row]) -> str:
    """The rows by operation, the fastest implementation first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"]), []).append(row)
    head = f"{'operation':<50} {'implementation':<20} {'forward ms':>19} {'with gradient':>14}"
    lines = [f"{head} {'best known':>12} {'error':>8}"]
    for group in groups.values():
        lines += [line(row) for row in sorted(group, key=_time)]
    return "\n".join(lines)


def _time(row: Row) -> float:
    return float(row.get("both_ms") or row.get("forward_ms") or "inf")


def line(row: Row) -> str:
    """One row of the table: milliseconds, shares of the roofline, multiples, worst error."""
    head = f"{row['op'] + ' ' + row['shape']:<50} {row['implementation']:<20}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    forward = f"{row['forward_ms']:.4f} {row['forward_share']:4.0%} of {row['bound'][:5]}"
    both = f"{row['both_ms']:.4f} {row['both_share']:4.0%}" if "both_ms" in row else "-"
    best = "/".join(f"{multiple:.2f}" for multiple in row.get("of_best", ())) or "-"
    text = f"{head} {forward:>19} {both:>14} {best:>12}"
    if "errors" not in row:
        return text
    name, error = max(row["errors"].items(), key=lambda item: item[1])
    return f"{text} {error:8.1e} ({name})"


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(main(sys.argv[1:]))
