"""Access to DeepMind's published code, the oracle of the feature tests."""

import sys
from pathlib import Path

import pytest


def load(shared_data: Path) -> None:
    """Make ``alphafold.*`` importable; skips, by name, where the package or its shim is absent."""
    pytest.importorskip("alphafold", reason="alphafold 2.0.0 is not installed (make oracle)")
    shim = shared_data.parent / "reference" / "af2_oracle.py"
    if not shim.is_file():
        pytest.skip(f"the shim that lets alphafold 2.0.0 import is not at {shim}")
    if str(shim.parent) not in sys.path:
        sys.path.append(str(shim.parent))
    import af2_oracle

    if "alphafold.common.residue_constants" not in sys.modules:
        af2_oracle.install()
