"""Access to DeepMind's published functions for the data tests."""

import pytest

from parity.oracle import shim


def load() -> None:
    """Make ``alphafold.*`` importable; skips, by name, where the package is absent."""
    if not shim.available():
        pytest.skip(shim.MISSING)
    shim.install()
