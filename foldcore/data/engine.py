"""Where the tasks of a preparation run: processes of this machine, or a Ray or Dask cluster."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")
ENGINES = ("local", "ray", "dask")


class EngineError(RuntimeError):
    """The tasks cannot be run there; the message says what to do."""


def run_tasks(
    work: Callable[[T], None], tasks: Sequence[T], engine: str, jobs: int, address: str | None
) -> None:
    """Run ``work`` on every task, in any order; the first failure ends the run."""
    if engine == "local":
        _run_local(work, tasks, jobs)
    elif engine in ENGINES:
        _run_joblib(work, tasks, engine, address)
    else:
        raise EngineError(f"engine {engine!r} is none of {', '.join(ENGINES)}")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_local(work: Callable[[T], None], tasks: Sequence[T], jobs: int) -> None:
    if jobs == 1 or len(tasks) <= 1:
        for task in tasks:
            work(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context)
    try:
        for future in as_completed([pool.submit(work, task) for task in tasks]):
            future.result()
    except BrokenProcessPool:
        reason = "a worker process died (out of memory? --jobs with fewer needs less)"
        raise EngineError(f"{reason}; run the same command again, it continues") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_joblib(
    work: Callable[[T], None], tasks: Sequence[T], engine: str, address: str | None
) -> None:
    try:
        import joblib

        client = _connect(engine, address)
    except ImportError as error:
        reason = f"--engine {engine} needs packages that are not installed ({error.name})"
        raise EngineError(f"{reason}: pip install 'twinfold[{engine}]'") from None
    try:
        with joblib.parallel_config(backend=engine):
            joblib.Parallel()(joblib.delayed(work)(task) for task in tasks)
    finally:
        client()


def _connect(engine: str, address: str | None) -> Callable[[], Any]:
    """Join a running cluster, or start one on this machine; returns how to leave it."""
    if engine == "dask":
        from distributed import Client

        here = {"threads_per_worker": 1, "dashboard_address": None}
        client = Client(address) if address else Client(**here)
        return client.close
    import ray
    from ray.util.joblib import register_ray

    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False)
    register_ray()
    return ray.shutdown if started else lambda: None
