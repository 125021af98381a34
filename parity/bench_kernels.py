"""Times and errors of every kernel beside its peers: ``python -m parity.bench_kernels [ARGS]``.

Arguments: ``op=NAME`` and ``implementation=NAME`` keep rows whose names contain these;
``json=PATH`` says where the rows go. ``sweep=LABEL`` tries launch sizes instead, of kernels and
shapes whose label contains it, such as "bias_grad triangle", and prints the best.
"""

import json
import os
import sys
from pathlib import Path

# PyTorch and JAX share the device here
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch

from parity import bench_attention, bench_rows
from parity.benchmark import Row
from parity.sweep import sweep
from parity.timing import measure_ceilings

BENCHMARKS = (bench_attention.benchmarks, bench_rows.benchmarks)
CANDIDATES = (bench_attention.candidates, bench_rows.candidates)


def main(arguments: list[str]) -> None:
    """Run the benchmarks, or a sweep of launch sizes, that the command line names."""
    options = dict(argument.split("=", 1) for argument in arguments)
    if "sweep" in options:
        sweep((c for make in CANDIDATES for c in make()), options["sweep"])
        return
    ceilings = measure_ceilings()
    print(
        f"{ceilings.name}: {ceilings.bandwidth / 1e12:.2f} TB/s, "
        f"{ceilings.rate / 1e12:.0f} TFLOP/s in bfloat16"
    )
    path = Path(options.get("json", "runs/bench_kernels.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for benchmark in (b for make in BENCHMARKS for b in make()):
        if options.get("op", "") not in f"{benchmark.op} {benchmark.shape}":
            continue
        for row in benchmark.rows(ceilings, options.get("implementation")):
            rows.append({"device": ceilings.name, **row})
            print(line(row), flush=True)
            path.write_text(json.dumps(rows, indent=1) + "\n")  # what follows may fail
    print(f"wrote {path}")


def line(row: Row) -> str:
    """One row of the table: milliseconds forward and both, shares of the roofline, worst error."""
    head = f"{row['op']:<18} {row['shape']:<30} {row['implementation']:<20}"
    if "failed" in row:
        return f"{head} failed: {row['failed']}"
    name, error = max(row["errors"].items(), key=lambda item: item[1])
    return (
        f"{head} {row['forward_ms']:8.4f} ms ({row['forward_share']:4.0%} of {row['bound']}) "
        f"both {row['both_ms']:8.4f} ms ({row['both_share']:4.0%}) error {error:.1e} ({name})"
    )


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main(sys.argv[1:])
