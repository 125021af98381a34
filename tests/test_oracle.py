"""DeepMind's code beside ours where no network is run: labels of real chains, parameter files.

Modules, losses and the network are compared by the parity suite.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foldcore.deepmind import read_npz, write_npz
from parity import module_cases
from parity.noise import FLOAT64
from parity.oracle import shim
from tests.conftest import ROOT


def test_labels_of_real_chains() -> None:
    if not shim.available():
        pytest.skip(shim.MISSING)
    command = [sys.executable, "-m", "tests.oracle_labels"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # float64 is a setting of the process
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 30
    for name, (error, broken) in found.items():
        assert error < FLOAT64 < broken, name


def test_parameter_files_pass_between_both_codes_unchanged(tmp_path: Path) -> None:
    if not shim.available():
        pytest.skip(shim.MISSING)
    from parity.oracle import published

    params = module_cases.make_parameters()
    write_npz(tmp_path / "ours.npz", params)
    theirs = published.read_npz(tmp_path / "ours.npz")
    assert theirs.keys() == published.nest(params).keys()
    flat = published.flatten(theirs)
    assert all(flat[name].tobytes() == params[name].tobytes() for name in params)

    published.write_npz(tmp_path / "theirs.npz", theirs)
    again = read_npz(tmp_path / "theirs.npz")
    assert again.keys() == params.keys()
    assert all(again[name].tobytes() == params[name].tobytes() for name in params)
