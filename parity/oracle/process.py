"""Comparisons run in processes of their own: the precision is a setting of the whole process."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from parity.oracle import compare, shim
from parity.oracle.compare import Comparison

# compilation takes most of the time, and the programs are small
_FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_ROOT = Path(__file__).resolve().parent.parent.parent


@functools.cache
def table(module: str, precision: str) -> dict[str, Comparison]:
    """What ``python -m parity.oracle.MODULE PRECISION`` says; skips without the oracle."""
    if not shim.available():
        pytest.skip(shim.MISSING)
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": _FAST_COMPILATION,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        command = [sys.executable, "-m", f"parity.oracle.{module}", precision, str(path)]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr.decode()[-4000:]}")
        return compare.read(path)


def rows(module: str, precision: str, prefix: str) -> dict[str, Comparison]:
    """The rows whose name begins so, at least one."""
    found = {n: row for n, row in table(module, precision).items() if n.startswith(prefix)}
    assert found, f"parity.oracle.{module} compares nothing called {prefix!r}"
    return found


def check(found: dict[str, Comparison], but: tuple[str, ...] = ()) -> None:
    """Both codes agree, and would not if one thing were broken (``but`` for zero gradients)."""
    wrong = [
        f"{n}: off by {x.error:.2e}, {x.limit:.2e} allowed"
        for n, x in found.items()
        if not x.agrees()
    ]
    assert not wrong, "\n".join(wrong)
    blind = [n for n, x in found.items() if not x.can_fail() and not n.endswith(but)]
    assert not blind, f"these comparisons did not notice a mutation: {blind}"
