"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Test programs are tiny and run a few times, so nearly all their time is compilation: ask XLA for
# less of it. Read when jax starts, here and in the processes that tests start.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)


# Without a GPU Triton's kernels run in its interpreter; read when a kernel is defined.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the contributors' data sets (mini, formats); skips where it is absent."""
    path = Path(os.environ.get("TWINFOLD_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"contributors' data not found at {path} (set TWINFOLD_DATA)")
    return path
