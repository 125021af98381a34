"""The parity suite as tests run it: once for each precision, in a process of its own."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from parity import ladder, trajectory
from parity.options import Options
from tests.conftest import ROOT


@functools.cache
def report(dtype: str, *arguments: str) -> dict[str, Any]:
    """What the suite reports of one precision."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "parity.compare", "--dtype", dtype, "--out", folder]
        command += ["--quick", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        path = Path(folder) / "report.json"
        assert path.exists(), done.stdout[-2000:] + done.stderr[-4000:]
        found = json.loads(path.read_text())
        found["status"], found["page"] = done.returncode, (path.parent / "index.html").read_text()
    return found


def names(dtype: str) -> list[str]:
    """Of all cases in a precision."""
    options = Options(dtype, quick=True)
    run = [trajectory.NAME] * ladder.trains(options)
    return [case.name for case in ladder.cases(options) if dtype in case.dtypes] + run


def entries(dtype: str, name: str) -> list[dict[str, Any]]:
    """What is reported of the variants of a case."""
    cases = report(dtype)["cases"]
    return [case for case in cases if case["name"].partition(": ")[0] == name]


def check(dtype: str, name: str) -> None:
    """The tracks agree, and the comparison noticed that one of them was broken."""
    found = entries(dtype, name)
    assert found, f"{name} was not compared"
    for entry in found:
        assert "reason" not in entry, entry["reason"]
        worst = f"{entry['name']}: {entry['ratio']:.3g} of {entry['limit']:g} at {entry['worst']}"
        assert entry["ratio"] <= entry["limit"], worst
        assert entry["mutation_noticed"], f"{entry['name']} does not notice a broken track"
        assert entry["passed"] and entry["seconds"] >= 0
