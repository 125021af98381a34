"""The training program of the PyTorch track: its update, and whole runs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import torchfold.distributed
import torchfold.step
import torchfold.train
from foldcore import checkpoint
from foldcore.checkpoint import SECTIONS
from foldcore.config import load
from foldcore.runlog import RunLog
from tests import small_step
from tests.conftest import ROOT
from tests.torch_twin import TORCH_THREADS
from torchfold import ops

CONFIG = "tests/data/tiny.toml"
TIMED = ("examples_per_s", "data_wait", "loader/")  # all that may differ between equal runs


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(TORCH_THREADS)
    yield
    torch.use_deterministic_algorithms(False)


def arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    own = [f"train.out={folder}", f"train.name={name}", "data.workers=0", "train.log_every=1"]
    return [CONFIG, *own, "train.eval_chains=1", *overrides]


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)} for line in lines
    ]


def last(folder: Path, name: str) -> checkpoint.Checkpoint:
    found = checkpoint.restore(folder / name / "checkpoints", pytest.fail)
    assert found is not None
    return found


# One update ---------------------------------------------------------------------------------------


def squared_error(params, network, config, batch, step):
    """Stands where ``loss_fn`` does."""
    loss = torch.square(batch["x"] @ params["weights"] - batch["y"]).mean((1, 2))
    return loss.mean(), {"loss/total": loss.mean()}


def torch_steps(clip: str, batches: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """As ``small_step.run``, in PyTorch."""
    config, results = small_step.settings(clip), []
    torchfold.distributed.initialize()
    mesh = torchfold.distributed.make_mesh(small_step.EXAMPLES)
    function = partial(torchfold.train.train_step, small_step.OneMatrix(), config)
    step = torchfold.step.CompiledStep(function, config, mesh, donate=True)
    start = torchfold.train.TrainState(**vars(small_step.start()))
    state = torchfold.distributed.replicate(mesh, start)
    addresses = [buffer.data_ptr() for buffer in state[:5]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchfold.train, "loss_fn", squared_error)
        for batch in batches:
            state, metrics = step(state, torchfold.distributed.place(mesh, batch))
            host = torchfold.step.fetch({**metrics, **state._asdict()})
            assert host.pop("rounded") is None
            results.append({name: np.array(value) for name, value in host.items()})
    assert addresses == [buffer.data_ptr() for buffer in state[:5]]  # as a captured graph needs it
    return results


@pytest.mark.parametrize("clip", ["example", "global"])
def test_two_updates_are_those_of_jax(clip: str) -> None:
    batches = [small_step.make_batch(0), small_step.make_batch(1)]
    with jax.enable_x64(True):
        ours = small_step.run(clip, batches)
    for one, two in zip(ours, torch_steps(clip, batches), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            # rates and decays are float32 numbers: 6e-8 of the update
            np.testing.assert_allclose(two[name], value, rtol=2e-7, err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_leaves_the_state_as_it_was(bad: float) -> None:
    spoilt = small_step.make_batch(1)
    spoilt["y"][3, 0, 0] = bad
    batches = [small_step.make_batch(0), spoilt, small_step.make_batch(2)]
    first, second, third = torch_steps("example", batches)
    assert not np.isfinite(second["loss/total"])
    for name in (*SECTIONS, "step"):
        np.testing.assert_array_equal(second[name], first[name], err_msg=name)
    assert third["step"] == 2 and np.isfinite(third["params"]).all()


# Whole runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch, capsys, dtype: str) -> None:
    def stop_at(log: RunLog, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    steps = "train.steps=6", "train.save_every=4", f"model.dtype={dtype}"
    assert torchfold.train.main(arguments(tmp_path, "whole", *steps)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "tick", stop_at)
        assert torchfold.train.main(arguments(tmp_path, "parts", *steps)) == 0
    assert last(tmp_path, "parts").step == 3  # the step under way is the last one
    assert torchfold.train.main(arguments(tmp_path, "parts", *steps)) == 0
    assert "continuing after step 3" in capsys.readouterr().out

    found = rows(tmp_path, "parts")
    assert found == rows(tmp_path, "whole")
    assert [r["step"] for r in found if "loss/total" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in found if "eval/lddt_ca" in r] == [6]
    one, two = last(tmp_path, "whole"), last(tmp_path, "parts")
    for name in one.tensors:
        np.testing.assert_array_equal(one.tensors[name], two.tensors[name], err_msg=name)


def test_a_kill_while_evaluating_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    """Neither the step, which is saved before, nor the evaluation, which the next run makes."""

    class Killed(BaseException):
        pass

    evaluate, met = torchfold.train.evaluate, set()

    def die_once_a_step(predict: Any, state: Any, run: Any) -> dict[str, float]:
        run.writer.wait()
        if int(state.step) in met:
            return evaluate(predict, state, run)
        met.add(int(state.step))
        raise Killed

    steps = "train.steps=4", "train.eval_every=2", "train.save_every=2"
    assert torchfold.train.main(arguments(tmp_path, "whole", *steps)) == 0
    monkeypatch.setattr(torchfold.train, "evaluate", die_once_a_step)
    for step in (2, 4):  # in the middle, and when all else is done
        with pytest.raises(Killed):
            torchfold.train.main(arguments(tmp_path, "parts", *steps))
        assert last(tmp_path, "parts").step == step
    assert torchfold.train.main(arguments(tmp_path, "parts", *steps)) == 0
    assert rows(tmp_path, "parts") == rows(tmp_path, "whole")


def test_non_finite_stops_the_run_and_keeps_the_batch(tmp_path: Path, capsys) -> None:
    network = torchfold.step.Network(load(CONFIG).model)
    spoilt = network.initialize(0)
    network.layout.unflatten(spoilt)["predicted_lddt_head/logits//bias"][:] = np.nan
    start = checkpoint.write(tmp_path / "step_00000001", 1, {"ema": spoilt}, network.layout, {})
    found = torchfold.train.main(arguments(tmp_path, "bad", f"train.initial_params={start}"))
    assert found == 2
    assert "loss/plddt is not finite at step 1" in capsys.readouterr().err
    assert not checkpoint.list_checkpoints(tmp_path / "bad" / "checkpoints")
    assert list((tmp_path / "bad").glob("non_finite_step_00000001_*.npz"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_without_a_gpu_are_refused_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    status = torchfold.train.main(arguments(tmp_path, "refused", "model.implementation=triton"))
    ops.use("reference")
    errors = capsys.readouterr().err
    assert status == 2 and errors.startswith("error: model.implementation=")
    assert "needs an NVIDIA GPU" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_precisions(tmp_path: Path, dtype: str) -> None:
    whole = "train.steps=1", "train.deterministic=true"
    for name in (dtype, "float32"):
        overrides = *whole, f"model.dtype={name}"
        assert torchfold.train.main(arguments(tmp_path, name, *overrides)) == 0
    other, single = (rows(tmp_path, name)[0]["loss/total"] for name in (dtype, "float32"))
    # bfloat16 has 8 bits
    assert other == pytest.approx(single, rel=1e-5 if dtype == "float64" else 3e-2)
    assert other != single


def test_two_processes_make_the_update_of_one(tmp_path: Path) -> None:
    common = "train.steps=2", "train.batch_size=2", "train.eval_chains=2"
    assert torchfold.train.main(arguments(tmp_path, "one", *common)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "torchfold.train", *arguments(tmp_path, "two", *common)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    for one, two in zip(rows(tmp_path, "one"), rows(tmp_path, "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
