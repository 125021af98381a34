"""The processes of the suite: one for each precision, a few at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parity import records
from parity.options import Options

# compiling takes most of the time, and the programs are small; one thread each, as the processes
# of two precisions share the cores
FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# on a GPU most of the time goes into looking for the quickest of several products that are as good
UNTUNED = "--xla_gpu_autotune_level=0"
Parts = list[dict[str, Any]]


class Worker:
    """A running process; what it writes to stderr is passed on, and the last line is kept."""

    def __init__(self, job: Options, path: Path) -> None:
        options = json.dumps({**asdict(job), "report": str(path)})
        command = [sys.executable, "-m", "parity.worker", options]
        self.process = subprocess.Popen(command, env=settings(job), stderr=subprocess.PIPE)
        self.last_line = ""
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def _pass_on(self) -> None:
        for line in self.process.stderr or ():
            text = line.decode(errors="replace")
            sys.stderr.write(text)
            sys.stderr.flush()
            self.last_line = text.strip() or self.last_line

    def end(self) -> str:
        """Why it ended, if it has not done its work; empty otherwise. Kills it if it runs."""
        self.process.kill()
        status = self.process.wait()
        self.reader.join(timeout=5)
        if not status:
            return ""
        how = f"status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
        return f"the process ended with {how}" + (f": {self.last_line}" if self.last_line else "")


def run(
    jobs: list[Options],
    folder: Path,
    at_once: int,
    publish: Callable[[Parts], None] = lambda parts: None,
) -> Parts:
    """What the processes report; they print as they go, and what they have is published."""
    waiting = list(jobs)
    published: dict[Path, int] = {}  # when each process wrote what is published
    running: dict[Options, Worker] = {}
    failed: dict[Options, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                with no_interrupts():
                    running[job] = Worker(job, path_of(job, folder))
            for job in [j for j, worker in running.items() if worker.process.poll() is not None]:
                if reason := running.pop(job).end():
                    failed[job] = reason
            there = written_at(jobs, folder)
            if there != published:
                publish(collect(jobs, folder, failed))
                published = there
            time.sleep(0.1)
    finally:
        for worker in running.values():
            worker.end()
    return collect(jobs, folder, failed)


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Ctrl-C waits: no process starts unknown. It is for the parent, which ends its processes.

    They inherit that it is blocked; here another thread could still take it.
    """
    noted: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if noted:
        signal.raise_signal(signal.SIGINT)


def path_of(job: Options, folder: Path) -> Path:
    """Where its process writes."""
    return folder / f"{job.dtype}.json"


def written_at(jobs: list[Options], folder: Path) -> dict[Path, int]:
    """When the files that are there were written, in nanoseconds."""
    paths = (path_of(job, folder) for job in jobs)
    return {path: path.stat().st_mtime_ns for path in paths if path.exists()}


def collect(jobs: list[Options], folder: Path, failed: dict[Options, str]) -> Parts:
    """What every process has written so far, and why those ended that died."""
    return [written(job, path_of(job, folder), failed.get(job, "")) for job in jobs]


def written(job: Options, path: Path, died: str) -> dict[str, Any]:
    """What a process has written so far, and the case that it is if it died."""
    part: dict[str, Any] = {"cases": [], "curves": {}, "environment": {}}
    if path.exists():
        part = json.loads(path.read_text(encoding="utf-8"))
    # a process that died is a case that failed
    name, level = f"all of {job.dtype}", min(job.levels)
    dead = [records.unjudged(name, level, job.dtype, died)] if died else []
    return {**part, "dtype": job.dtype, "cases": [*part["cases"], *dead]}


def settings(job: Options) -> dict[str, str]:
    """The environment of a process."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    if job.device == "cpu":
        own |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        own |= {"XLA_FLAGS": FAST_COMPILE}
    else:
        own |= {"XLA_FLAGS": UNTUNED}
    return {**os.environ, **own}
