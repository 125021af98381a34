"""What Triton makes of the kernels for an H100, without one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(program: str, folder: Path) -> str:
    """What a program of this folder says is wrong."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(folder), PYTHONPATH=str(ROOT))
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", f"tests.{program}"]
    made = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0 or made.stderr
    return made.stderr if made.returncode else ""


def test_no_buffer_is_overwritten_while_it_is_read(tmp_path: Path) -> None:
    assert not run("compiled_kernels", tmp_path)


def test_kernels_wait_for_the_launch_before_ahead_of_all_else(tmp_path: Path) -> None:
    assert not run("waiting_kernels", tmp_path)
