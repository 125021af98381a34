"""What of a command line cannot work: refused before any process starts or anything is written."""

import ctypes
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foldcore.config import Config, load
from foldcore.kernels.launch import NEEDS_GPU
from parity.options import FEWEST_STEPS, FULL_SIZE_LEVELS, IMPLEMENTATION, Options, configuration

DRIVER = "libcuda.so.1"
SHOWN = 8  # names, where none was found


class Refused(ValueError):
    """What a user can mend; one line."""


def check(jobs: Sequence[Options], out: Path) -> None:
    """Raise Refused or ConfigError for what cannot work; the jobs differ in precision alone."""
    job = jobs[0]
    check_pattern(job.pattern)
    check_configuration(job)
    if job.steps < FEWEST_STEPS:
        raise Refused(f"--steps {job.steps}: the training run needs at least {FEWEST_STEPS}")
    check_device(job)
    check_folder(out)


def refuse(reason: str) -> int:
    """One line, and the exit status of what a user can mend."""
    print("error:", " ".join(reason.split()), file=sys.stderr)
    return 2


def check_throughput(config: Config, out: Path) -> None:
    """Kernels need a GPU; the results need a folder, which is made."""
    if config.model.implementation == "triton" and not gpus():
        raise Refused(f"{NEEDS_GPU}; --config demo is small enough for a CPU")
    check_folder(out.parent)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {out}: {error.strerror}") from None


def check_pattern(pattern: str) -> None:
    """It has to be a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise Refused(f"--case {pattern!r}: not a regular expression: {error}") from None


def check_configuration(job: Options) -> None:
    """The file, every override, and that each of them counts."""
    if job.config:
        if not FULL_SIZE_LEVELS.issuperset(job.levels):
            raise Refused("--config: only levels 2 and 3 have the size of a configuration")
        configuration(job.config, job.overrides)
        return
    load(os.devnull, job.overrides)
    for override in job.overrides:
        if override.partition("=")[0].strip() != IMPLEMENTATION:
            raise Refused(f"{override}: without --config only {IMPLEMENTATION} can be set")


def check_device(job: Options) -> None:
    """The GPU has to be there, and kernels need it."""
    kernels = job.implementation == "triton"
    if job.device == "cpu" and not kernels:
        return
    if not gpus():
        raise Refused(NEEDS_GPU if kernels else "--device gpu: there is no NVIDIA GPU here")
    if job.device == "cpu":
        raise Refused(f'{IMPLEMENTATION}="triton" needs --device gpu')


def gpus() -> int:
    """How many GPUs the driver shows this process; no framework is loaded."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def check_folder(out: Path) -> None:
    """It has to be a folder that can be written, or made."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise Refused(f"--out {out}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise Refused(f"--out {out}: {there} cannot be written")


def nothing_found(
    pattern: str, dtypes: Sequence[str], levels: Sequence[int], parts: Sequence[dict[str, Any]]
) -> str:
    """What was asked for, and names that exist there."""
    asked = f"no case matches {pattern!r}" if pattern else "there is no case"
    if dtypes:
        asked += f" in {' or '.join(dtypes)}"
    if levels:
        asked += f" at level {' or '.join(map(str, sorted(levels)))}"
    names = list(dict.fromkeys(name for part in parts for name in part.get("names", ())))
    if not names:
        return asked
    close = difflib.get_close_matches(pattern, names, n=SHOWN, cutoff=0.4)
    return (
        f"{asked}; of {len(names)} there are: {', '.join(dict.fromkeys([*close, *names][:SHOWN]))}"
    )
