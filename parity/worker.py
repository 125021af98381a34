"""One process of the suite: the chosen cases in one precision, a setting of the whole process.

python -m parity.worker OPTIONS    OPTIONS is the JSON of ``parity.options``; see parity.compare
"""

import gc
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import torch

from parity import ladder, records, trajectory
from parity.case import Case, Setting
from parity.examination import examine
from parity.options import Options
from parity.oracle import shim


def main(options: Options) -> None:
    """Judge every case, print a line for each; the report has all that are done."""
    configure(options)
    gc.freeze()
    gc.set_threshold(100_000)  # tracing makes many objects that stay: looking for others takes long
    entries: list[dict[str, Any]] = []
    curves: dict[str, Any] = {}
    result = {"cases": entries, "curves": curves, "environment": environment()}
    result["names"] = names(options)
    write(options, result)
    start = time.perf_counter()
    for entry in verdicts(options, curves):
        entry["seconds"], start = round(time.perf_counter() - start, 2), time.perf_counter()
        entries.append(entry)
        print(line(entry), flush=True)
        write(options, result)


def write(options: Options, result: dict[str, Any]) -> None:
    """Write the report, whole at any moment."""
    path = Path(options.report)
    half = path.with_suffix(".half")
    half.write_text(json.dumps(result), encoding="utf-8")
    os.replace(half, path)


def configure(options: Options) -> None:
    """Settings of the whole process; products of float32 numbers are exact ones in both tracks."""
    if options.device == "gpu":
        # a network of full size takes minutes to compile, and only once
        cache = Path(os.environ.get("TWINFOLD_CACHE", "~/.cache/twinfold")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "jax"))
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if options.device == "cpu":
        # several threads would wait for each other longer than such small arrays take
        torch.set_num_threads(1)


def chosen(options: Options) -> list[Case]:
    """The cases of these levels and this precision."""
    found = ladder.cases(options)
    return [case for case in found if case.level in options.levels and options.dtype in case.dtypes]


def names(options: Options) -> list[str]:
    """Of all that a pattern can choose from."""
    run = [trajectory.NAME] if ladder.trains(options) else []
    return [name for case in chosen(options) for name in case.names()] + run


def verdicts(options: Options, curves: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The report's entries; one that says why, where a case breaks down. Fills ``curves``."""
    setting = Setting(options.dtype, options.device, options.implementation)
    wanted, say = re.compile(options.pattern).search, progress if options.config else str
    for case in chosen(options):
        try:
            for verdict in examine(case, setting, shim.available(), wanted, say):
                yield verdict.entry()
        except Exception as error:  # the other cases still have something to say
            yield failure(case.name, case.level, options.dtype, error)
    if ladder.trains(options) and wanted(trajectory.NAME):
        try:
            runs = trajectory.QUICK_RUNS if options.quick else trajectory.PERTURBED_RUNS
            verdict, drawn = trajectory.Trajectory(setting, options.steps, runs).judge()
            curves.update(drawn)
            yield verdict.entry()
        except Exception as error:
            yield failure(trajectory.NAME, 4, options.dtype, error)


def failure(name: str, level: int, dtype: str, error: Exception) -> dict[str, Any]:
    """The entry of a case that could not be judged."""
    traceback.print_exception(error)
    return records.unjudged(name, level, dtype, f"{type(error).__name__}: {error}")


def progress(text: str) -> None:
    """One run of a large network on one line."""
    print(f"       {text}", flush=True)


def line(entry: dict[str, Any]) -> str:
    """One verdict on one line."""
    word = "ok    " if entry["passed"] else "FAILED"
    start = f"{word} {entry['dtype']:8} {entry['name']}: "
    if "reason" in entry:
        return start + entry["reason"]
    more = f" and {len(entry['failed']) - 1} more" if len(entry["failed"]) > 1 else ""
    found = f"{entry['ratio']:.2g} of {entry['limit']:g} ({entry['worst']}{more})"
    added = f", {entry['added']} runs added" if entry["added"] else ""
    return f"{start}{found}{added}, {entry['seconds']:.1f} s"


def environment() -> dict[str, Any]:
    """Versions and hardware of this process, and whether DeepMind's code took part."""
    return records.environment() | {
        "jax devices": sorted({f"{d.platform} {d.device_kind}" for d in jax.devices()}),
        "torch device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    lists: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    main(Options(**lists))
