"""How fast both tracks train: the step time of each by the number of recycling passes.

    python -m parity.throughput [options] [section.key=value ...]

Each track runs in a process of its own, with its real ``train_step`` on one batch of the embedded
chains cut to the configuration's sizes (time does not depend on what the batch holds). Rows go to a
JSON file, a page with bars beside it, and a table to the terminal. Overrides are those of the
training programs; the batch size is 1 unless they say otherwise.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from foldcore.config import Config, load
from foldcore.data.loader import open_loader
from parity import flops, throughput_page

TRACKS = ("jax", "torch")
COLUMNS = (
    "track config recycling step_ms step_ms_p10 step_ms_p90 examples_per_s mfu peak_gib compile_s"
)
BASE = ("train.batch_size=1", "data.accept_unknown=true", "data.workers=0", "data.prefetch=1")
TOP = 60  # kernels listed by --profile


def main(argv: Sequence[str]) -> int:
    """Measure as the command line says; 1 if a track failed."""
    options = _parser().parse_args(argv)
    if options.worker:
        Path(options.out).write_text(json.dumps(measure(options.track, options)))
        return 0
    tracks = TRACKS if options.track == "both" else (options.track,)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows, failed = [], []
    for track in tracks:
        part = out.with_suffix(f".{track}.json")
        command = [sys.executable, "-m", "parity.throughput", *argv]
        command += ["--track", track, "--out", str(part), "--worker"]
        if subprocess.run(command).returncode:
            failed.append(track)
            continue
        rows += json.loads(part.read_text())
        part.unlink()
        out.write_text(json.dumps(rows, indent=1))
        operations = flops.forward(read_config(options.config, options.overrides))
        page = throughput_page.render(rows, COLUMNS.split(), operations)
        out.with_suffix(".html").write_text(page, encoding="utf-8")
        print(table(rows), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parity.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--track", choices=(*TRACKS, "both"), default="both")
    parser.add_argument(
        "--config", default="initial_training", help="a name in configs/, or a path"
    )
    parser.add_argument("--recycling", default="0,1,2,3", help="numbers of extra passes")
    parser.add_argument("--steps", type=int, default=10, help="timed steps for each number")
    parser.add_argument("--out", default="runs/parity/throughput.json")
    parser.add_argument("--profile", action="store_true", help="also list the slowest kernels")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def read_config(name: str, overrides: Sequence[str]) -> Config:
    """The configuration measured: a file or the name of one of ours, with overrides."""
    path = Path(name)
    if not path.suffix:
        path = Path(__file__).resolve().parent.parent / "configs" / f"{name}.toml"
    return load(path, [*BASE, *overrides])


class Trainer:
    """One track's training step on one batch."""

    def __init__(self, track: str, config: Config) -> None:
        step, train, distributed = (
            import_module(f"{track}fold.{name}") for name in ("step", "train", "distributed")
        )
        step.configure(config)
        distributed.initialize()
        self.mesh = distributed.make_mesh(config.train.batch_size)
        network = step.Network(config.model)
        function = partial(train.train_step, network, config)
        self._step = step.CompiledStep(function, config, self.mesh, donate=True)
        self._fetch, self._place = step.fetch, distributed.place
        self._state = distributed.replicate(self.mesh, train.make_state(config, network))
        with open_loader(config, rank=0, world=1, warn=print) as loader:
            self._batch = next(loader)
        self.device, self.versions = distributed.describe_devices(), step.versions()
        self.peak_memory = step.peak_memory

    def batch(self, recycling: int) -> Any:
        """The batch on the device."""
        count = np.full_like(self._batch["num_iter_recycling"], recycling)
        return self._place(self.mesh, {**self._batch, "num_iter_recycling": count})

    def seconds(self, batch: Any) -> tuple[float, float]:
        """Duration of a step, to the arrival of its results, and its loss."""
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, batch)
        loss = float(self._fetch(metrics["loss/total"]))
        return time.perf_counter() - start, loss


def measure(track: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one track."""
    config = read_config(options.config, options.overrides)
    trainer = Trainer(track, config)
    passes = [int(number) for number in options.recycling.split(",")]
    first, loss = trainer.seconds(trainer.batch(passes[0]))
    rows = []
    for recycling in passes:
        batch = trainer.batch(recycling)
        trainer.seconds(batch)
        times = np.array([trainer.seconds(batch)[0] for _ in range(options.steps)]) * 1e3
        rows.append(
            {
                "track": track,
                "config": options.config,
                "recycling": recycling,
                **step_times(times, config, recycling, trainer.device),
                "peak_gib": float(trainer.peak_memory().split()[0]),
                "compile_s": round(max(first - float(np.median(times)) / 1e3, 0), 1),
                "first_loss": loss,
                "overrides": list(options.overrides),
                "device": trainer.device,
                "versions": trainer.versions,
            }
        )
        print(table(rows[-1:]), flush=True)
    if options.profile:
        batch = trainer.batch(passes[-1])
        kernels = PROFILERS[track](lambda: trainer.seconds(batch))
        rows[-1] |= summarize(kernels)
        path = Path(options.out).with_suffix(f".profile_{passes[-1]}.txt")
        path.write_text(describe(rows[-1]))
        print(path.read_text())
    return rows


def step_times(
    milliseconds: np.ndarray, config: Config, recycling: int, device: str
) -> dict[str, Any]:
    """Median and spread of the steps, and the share of the device's matrix rate they reach."""
    middle, low, high = (float(np.percentile(milliseconds, part)) for part in (50, 10, 90))
    operations = flops.step(config, recycling)
    share = flops.utilization(operations, middle / 1e3, device)
    return {
        "step_ms": round(middle, 2),
        "step_ms_p10": round(low, 2),
        "step_ms_p90": round(high, 2),
        "examples_per_s": round(config.train.batch_size / middle * 1e3, 3),
        "tflop": round(operations / 1e12, 2),
        "mfu": share and round(share, 4),
    }


Kernels = dict[str, tuple[float, int]]  # name -> milliseconds, calls


def profile_torch(step: Callable[[], Any]) -> Kernels:
    """Time on the device by kernel; on a CPU, by operation."""
    import torch

    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as found:
        step()
    kernels: Kernels = {}
    for event in found.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent:
            kernels[event.key] = spent / 1e3, event.count
    return kernels


def profile_jax(step: Callable[[], Any]) -> Kernels:
    """Time on the device by kernel; nothing on a CPU."""
    import tempfile

    import jax

    kernels: Kernels = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        total, count = kernels.get(event.name, (0.0, 0))
                        kernels[event.name] = total + event.duration_ns / 1e6, count + 1
    return kernels


PROFILERS = {"jax": profile_jax, "torch": profile_torch}


def summarize(kernels: Kernels) -> dict[str, Any]:
    """Launches, time in kernels, and the slowest of them."""
    slowest = sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "launches": sum(count for _, count in kernels.values()),
        "busy_ms": round(sum(total for total, _ in kernels.values()), 3),
        "kernels": [
            {"name": name[:150], "ms": round(total, 3), "calls": count}
            for name, (total, count) in slowest
        ],
    }


def describe(row: dict[str, Any]) -> str:
    """The slowest kernels, and how much of the step they fill."""
    busy, launches = row["busy_ms"], row["launches"]
    lines = [
        f"step {row['step_ms']:.1f} ms; {launches} kernels take {busy:.1f} ms of it",
        f"{'ms':>9} {'share':>6} {'calls':>6}  kernel",
    ]
    for kernel in row["kernels"]:
        ms, calls, name = kernel["ms"], kernel["calls"], kernel["name"]
        lines.append(f"{ms:9.3f} {ms / max(busy, 1e-9):6.1%} {calls:6d}  {name}")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A dash where there is none."""
    return "-" if value is None else str(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    columns = COLUMNS.split()
    cells = [columns, *([shown(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in cells
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
