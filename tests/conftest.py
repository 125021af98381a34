"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the contributors' data sets (mini, formats); skips where it is absent."""
    path = Path(os.environ.get("TWINFOLD_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"contributors' data not found at {path} (set TWINFOLD_DATA)")
    return path
