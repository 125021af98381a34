"""Training on two GPUs makes the updates of one, in both tracks, with kernels and graphs."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.test_torch_train import arguments, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs"),
]

COMMON = (
    *("train.steps=4", "train.batch_size=2", "train.eval_every=2", "train.eval_chains=2"),
    "model.implementation=triton",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(
    folder: Path, name: str, gpus: str, program: Sequence[str], **more: str
) -> subprocess.Popen[str]:
    """A training run that sees these GPUs; it logs every step."""
    command = [sys.executable, *program, *arguments(folder, name, *COMMON)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": "1"} | more
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    kept = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=kept, stderr=kept, text=True)


def finish(*processes: subprocess.Popen[str]) -> str:
    """What the first of them printed, once all have ended well."""
    printed = [process.communicate() for process in processes]
    for process, (out, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, out[-2000:] + errors[-4000:]
    return printed[0][0]


def compare(folder: Path, name: str) -> None:
    one, two = rows(folder, "one"), rows(folder, name)
    assert len(one) >= 4
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_torch_captures_its_all_reduce(tmp_path: Path) -> None:
    finish(start(tmp_path, "one", "0", ["-m", "torchfold.train"]))
    printed = finish(start(tmp_path, "two", "0,1", [*TORCHRUN, "-m", "torchfold.train"]))
    assert "2 x gpu" in printed
    compare(tmp_path, "two")


def test_jax_on_two_gpus_of_one_and_of_two_processes(tmp_path: Path) -> None:
    program = ["-m", "jaxfold.train"]
    finish(start(tmp_path, "one", "0", program))
    assert "2 x gpu" in finish(start(tmp_path, "two", "0,1", program))
    compare(tmp_path, "two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    run = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    each = [start(tmp_path, "both", str(i), program, **run, JAX_PROCESS_ID=str(i)) for i in (0, 1)]
    assert "2 x gpu" in finish(*each)
    compare(tmp_path, "both")
