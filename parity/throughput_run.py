"""One track's steps, timed in a process of its own, and what the rows of the result hold."""

import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from foldcore.config import Config, load
from foldcore.data.loader import open_loader
from parity import flops
from parity.throughput_trace import TRACERS, summarize

BASE = ("train.batch_size=1", "data.accept_unknown=true", "data.workers=0", "data.prefetch=1")
ALONE = 3  # steps timed with nothing before them on the device
Row = dict[str, Any]


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
        state = distributed.replicate(self.mesh, train.make_state(config, network))
        self._state = network.with_rounded(state)
        with open_loader(config, rank=0, world=1, warn=print) as loader:
            self.host_batch = next(loader)
        self.device, self.versions = distributed.describe_devices(), step.versions()
        self.peak_memory = step.peak_memory

    def batch(self, recycling: int) -> Any:
        """The batch on the device."""
        count = np.full_like(self.host_batch["num_iter_recycling"], recycling)
        return self._place(self.mesh, {**self.host_batch, "num_iter_recycling": count})

    def start(self, batch: Any) -> Any:
        """Start a step; its metrics, which may still be on their way."""
        self._state, self._metrics = self._step(self._state, batch)
        return self._metrics

    def first_step(self) -> str:
        """What the step just made cost, if it was the first."""
        return str(self._step.first_step(self._metrics))

    def seconds(self, batch: Any) -> tuple[float, float]:
        """Duration of a step alone, from its call to the arrival of its results, and its loss."""
        start = time.perf_counter()
        loss = self._loss(self.start(batch))
        return time.perf_counter() - start, loss

    def intervals(self, batch: Any, steps: int) -> list[float]:
        """Seconds from one step's results to the next one's, each started before the other ended.

        So training runs them: the host prepares a step while the device is at the one before.
        """
        ahead, arrivals = self.start(batch), []
        for _ in range(steps + 1):
            current, ahead = ahead, self.start(batch)
            self._loss(current)
            arrivals.append(time.perf_counter())
        self._loss(ahead)
        return list(np.diff(arrivals))

    def _loss(self, metrics: Any) -> float:
        """Once it has arrived."""
        return float(self._fetch(metrics["loss/total"]))


def measure(track: str, options: Any, show: Callable[[Sequence[Row]], None]) -> None:
    """Time one track; all that is known is in ``options.out`` at any time, whatever comes then."""
    config, out = read_config(options.config, options.overrides), Path(options.out)
    rows: list[Row] = []

    def keep() -> None:
        out.write_text(json.dumps(rows))

    trainer = Trainer(track, config)
    passes = options.recycling
    first, loss = trainer.seconds(trainer.batch(passes[0]))
    print(trainer.first_step(), flush=True)
    for recycling in passes:
        batch = trainer.batch(recycling)
        trainer.seconds(batch)
        alone = [trainer.seconds(batch)[0] * 1e3 for _ in range(ALONE)]
        times = np.array(trainer.intervals(batch, options.steps)) * 1e3
        row = {"track": track, "config": options.config, "recycling": recycling}
        row |= step_times(times, config, recycling, trainer.device)
        row["alone_ms"] = round(float(np.median(alone)), 2)
        row["peak_gib"] = float(trainer.peak_memory().split()[0])
        row["compile_s"] = round(max(first - float(np.median(times)) / 1e3, 0), 1)
        row |= {"first_loss": loss, "batch_size": config.train.batch_size}
        row |= {"overrides": list(options.overrides), "versions": trainer.versions}
        rows.append(row | {"device": trainer.device})
        keep()
        show(rows[-1:])
    if options.profile and "gpu" in trainer.device:
        rows[-1] |= profile(track, trainer, trainer.batch(passes[-1]))
        keep()
    if options.modules:
        host_batch = trainer.host_batch
        del trainer
        gc.collect()
        _time_modules(track, config, host_batch, options.module, rows, keep)


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


def profile(track: str, trainer: Trainer, batch: Any) -> Row:
    """What a step does, or why that could not be found out: the times are there already."""
    try:
        return summarize(TRACERS[track](lambda: trainer.start(batch)))
    except Exception as error:
        return {"profile_failed": f"{type(error).__name__}: {error}"[:300]}


def _time_modules(
    track: str, config: Config, batch: Any, only: str, rows: list[Row], keep: Callable[[], None]
) -> None:
    """The same list of modules in every row: what a step makes of them depends on its passes."""
    from parity.throughput_time import module_times  # imports both frameworks

    modules: list[Row] = []
    for row in rows:
        row["modules"] = modules
    start = time.perf_counter()
    for module in module_times(track, config, batch, only):
        modules.append(module)
        keep()
        print(f"{time.perf_counter() - start:6.1f} s  {_words(module)}", flush=True)
    if not modules:
        raise SystemExit(f"error: --module {only}: no module's name contains this")


def _words(module: Row) -> str:
    if "failed" in module:
        return f"{module['module']}: {module['failed']}"
    forward, backward = module["forward_ms"], module["backward_ms"]
    return f"{module['module']}: {forward:.4f} ms forward, {backward:.4f} ms backward"
