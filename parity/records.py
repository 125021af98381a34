"""What stands in report.json of a case that could not be judged, and of the machine."""

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from parity.oracle import shim

PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton", "numpy")
# of a case, as docs/parity.md lists them
KEYS = (
    *("name", "level", "dtype", "passed", "error_jax", "error_torch", "difference", "ratio"),
    *("limit", "worst", "failed", "arrays", "oracle", "zero", "flips", "added"),
    *("mutation_noticed", "blind", "seconds"),
)


def unjudged(name: str, level: int, dtype: str, reason: str) -> dict[str, Any]:
    """The record of a case that failed before it was compared: null is what nobody knows."""
    known = {"name": name, "level": level, "dtype": dtype, "passed": False, "arrays": 0}
    return {**dict.fromkeys(KEYS), **known, "reason": reason}


def environment() -> dict[str, Any]:
    """Versions, this machine, and whether DeepMind's code is there; loads no framework."""
    return {
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "jax devices": None,
        "torch device": None,
        "oracle": f"alphafold {metadata.version('alphafold')}" if shim.available() else None,
    }


def version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The model of the CPU, as Linux names it."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = re.findall(r"model name\s*:\s*(.*)", text)
    return f"{len(names)} x {names[0]}" if names else platform.processor()
