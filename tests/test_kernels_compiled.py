"""What Triton makes of the kernels for an H100, without one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_no_buffer_is_overwritten_while_it_is_read(tmp_path: Path) -> None:
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.compiled_kernels"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
