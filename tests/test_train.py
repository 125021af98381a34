"""The training program: one update by hand, and whole runs that are killed, stopped and spoilt."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foldcore import checkpoint
from foldcore.checkpoint import SECTIONS
from foldcore.features import validate
from foldcore.layout import make_layout
from tests import small_step
from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("training")

CONFIG = "tests/data/tiny.toml"
# these programs run a few steps: compiling them fast matters more than running them fast
FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
TIMED = ("examples_per_s", "data_wait", "loader/")  # all that may differ between equal runs


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"{FAST_COMPILE} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


# One update ---------------------------------------------------------------------------------------


def update_by_hand(clip: str) -> dict[str, Any]:
    """The first update of ``small_step`` in numpy and float64."""
    batch, state, config = small_step.make_batch(0), small_step.start(), small_step.settings(clip)
    shape, maximum = (small_step.IN, small_step.OUT), config.optimizer.clip_norm
    weights = state.params.reshape(shape)
    residual = batch["x"] @ weights - batch["y"]
    gradients = np.einsum("bni,bno->bio", batch["x"], residual) * 2 / residual[0].size
    norms = np.sqrt(np.square(gradients).sum((1, 2)))
    if clip == "example":
        gradients *= np.minimum(1, maximum / norms)[:, None, None]
    gradient, norm = gradients.mean(0).ravel(), norms.mean()
    if clip == "global":
        norm = np.sqrt(np.square(gradient).sum())
        gradient *= min(1, maximum / norm)
    params = state.params - 1e-3 * gradient / (np.abs(gradient) + 1e-6)
    return {
        "params": params,
        "mu": 0.1 * gradient,
        "nu": 0.001 * gradient**2,
        "ema": state.params * 2 / 11 + params * 9 / 11,
        "step": 1,
        "loss/total": np.square(residual).mean(),
        "grad_norm": norm,
        "learning_rate": 1e-3,
        "recycling": 3.0,
        "param_norm": np.sqrt(np.square(params).sum()),
        "update_norm": np.sqrt(np.square(params - state.params).sum()),
    }


@pytest.fixture(scope="module", params=["example", "global"])
def steps_by_devices(request) -> tuple[str, dict[int, list[dict[str, Any]]]]:
    """Two steps in float64, by one device and by eight; for each kind of clipping."""
    found = {}
    for devices in (1, 8):
        command = [sys.executable, "-m", "tests.small_step", request.param]
        output = subprocess.run(
            command, env=environment(devices), cwd=ROOT, check=True, capture_output=True
        ).stdout
        result = json.loads(output)
        assert result["devices"] == devices
        found[devices] = result["steps"]
    return request.param, found


def test_one_update_is_what_the_formulas_say(steps_by_devices) -> None:
    clip, found = steps_by_devices
    expected = update_by_hand(clip)
    assert found[1][0].keys() == expected.keys()
    for name, value in expected.items():
        # rates and decays are float32 numbers: 6e-8 of the update
        np.testing.assert_allclose(found[1][0][name], value, rtol=2e-7, err_msg=name)


def test_eight_devices_make_the_same_update_as_one(steps_by_devices) -> None:
    _, found = steps_by_devices
    for one, eight in zip(found[1], found[8], strict=True):
        for name in one:
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("clip", ["example", "global"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_non_finite_update_leaves_the_state_as_it_was(clip: str, bad: float) -> None:
    spoilt = small_step.make_batch(1)
    spoilt["y"][3, 0, 0] = bad  # 1e30: its square is too large for float32
    good = small_step.make_batch(0)
    first, second = small_step.run(clip, [good, spoilt])
    assert not np.isfinite(second["loss/total"])
    for name in (*SECTIONS, "step"):
        assert second[name] == first[name], name
    third = small_step.run(clip, [good, spoilt, small_step.make_batch(2)])[2]
    assert third["step"] == 2 and np.isfinite(third["params"]).all()


# Whole runs ---------------------------------------------------------------------------------------


class Program:
    """Starts ``python -m jaxfold.train`` on the tiny configuration in a folder of its own."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self._environment = {"TWINFOLD_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}

    def start(
        self, name: str, *overrides: str, devices: int = 1, code: str = "", **variables: str
    ) -> subprocess.Popen[str]:
        """``code`` stands in for the program."""
        program = ["-c", code] if code else ["-m", "jaxfold.train"]
        command = [sys.executable, *program, CONFIG]
        command += [f"train.out={self.folder}", f"train.name={name}", *overrides]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(devices) | self._environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, name: str, *overrides: str, devices: int = 1, code: str = ""
    ) -> tuple[int, str, str]:
        process = self.start(name, *overrides, devices=devices, code=code)
        out, errors = process.communicate()
        return process.returncode, out, errors

    def rows(self, name: str) -> list[dict[str, float]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in found]

    def last(self, name: str) -> checkpoint.Checkpoint:
        found = checkpoint.restore(self.folder / name / "checkpoints", pytest.fail)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def program(tmp_path_factory, pytestconfig) -> Program:
    cache = pytestconfig.cache.mkdir("twinfold-programs")  # compiled once, kept between sessions
    return Program(tmp_path_factory.mktemp("runs"), cache)


@pytest.fixture(scope="module")
def uninterrupted(program: Program) -> str:
    status, out, errors = program.run("uninterrupted")
    assert status == 0, errors
    assert "finished after step 60" in out
    return "uninterrupted"


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    assert process.stderr is not None
    pytest.fail(f"{text!r} never appeared; {process.stderr.read()}")


def interrupt(
    program: Program, name: str, number: signal.Signals, text: str, *overrides: str
) -> int:
    """Start the run, signal its whole process group some time after ``text``; its status."""
    process = program.start(name, *overrides)
    wait_for(process, text)
    time.sleep(random.uniform(0, 0.2))
    os.killpg(process.pid, number)
    process.communicate()
    return process.returncode


def assert_equal_runs(program: Program, name: str, other: str) -> None:
    assert program.rows(name) == program.rows(other)
    one, two = program.last(name), program.last(other)
    assert one.step == two.step and one.tensors.keys() == two.tensors.keys()
    for tensor in one.tensors:
        np.testing.assert_array_equal(one.tensors[tensor], two.tensors[tensor], err_msg=tensor)
    assert one.metadata["loader"] == two.metadata["loader"]


def test_a_run_leaves_everything_behind(program: Program, uninterrupted: str) -> None:
    folder = program.folder / uninterrupted
    for name in ("config.toml", "metrics.jsonl", "run.log", "data_report.tsv", "tensorboard"):
        assert (folder / name).exists(), name
    rows = program.rows(uninterrupted)
    assert [r["step"] for r in rows if "loss/total" in r] == list(range(3, 61, 3))
    assert [r["step"] for r in rows if "eval/lddt_ca" in r] == [30, 60]
    terms = "backbone_fape sidechain_fape chi angle_norm distogram masked_msa plddt".split()
    assert {f"loss/{term}" for term in terms} < rows[0].keys()
    assert {f"eval/loss/{term}" for term in terms} < rows[-1].keys()
    assert {"grad_norm", "learning_rate", "recycling"} < rows[0].keys()
    last = program.last(uninterrupted)
    assert last.step == 60 and last.metadata["loader"]["position"] == 60
    assert {"config", "versions"} < last.metadata.keys()


def test_killed_and_stopped_runs_resume_bit_for_bit(program: Program, uninterrupted: str) -> None:
    assert interrupt(program, "killed", signal.SIGKILL, "step 3/60") == -signal.SIGKILL
    # to the whole group, as a terminal or a scheduler does: the loader's processes get it too
    assert interrupt(program, "killed", signal.SIGTERM, "first step:") == 0
    assert program.last("killed").step < 60
    status, out, errors = program.run("killed")
    assert status == 0, errors
    assert "continuing after step" in out
    assert_equal_runs(program, "killed", uninterrupted)


@pytest.mark.slow  # the PyTorch track's test of the same lines is fast
def test_a_run_in_bfloat16_resumes_bit_for_bit(program: Program) -> None:
    narrow = "model.dtype=bfloat16"
    assert program.run("narrow", narrow)[0] == 0
    status = interrupt(program, "narrow_killed", signal.SIGKILL, "step 33/60", narrow)
    assert status == -signal.SIGKILL and program.last("narrow_killed").step < 60
    status, out, errors = program.run("narrow_killed", narrow)
    assert status == 0, errors
    assert "continuing after step" in out
    assert_equal_runs(program, "narrow_killed", "narrow")


@pytest.mark.slow
def test_killed_again_and_again(program: Program, uninterrupted: str) -> None:
    moments = ["parameters", "first step:", "first step:", "parameters", "first step:"]
    for moment in moments:
        assert interrupt(program, "killed_often", signal.SIGKILL, moment) == -signal.SIGKILL
    assert program.run("killed_often")[0] == 0
    assert_equal_runs(program, "killed_often", uninterrupted)


@pytest.mark.slow  # the PyTorch track's test of the same lines is fast
def test_a_kill_while_evaluating_loses_nothing(program: Program, uninterrupted: str) -> None:
    """Neither the step, which is saved before, nor the evaluation, which the next run makes."""
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    die = f"lambda predict, state, run: (run.writer.wait(), {kill})"
    code = f"import os, signal, sys\nfrom jaxfold import train\ntrain.evaluate = {die}\n"
    code += "train.main(sys.argv[1:])"
    assert program.run("killed_at_evaluation", code=code)[0] == -signal.SIGKILL
    assert program.last("killed_at_evaluation").step == 30
    status, _, errors = program.run("killed_at_evaluation")
    assert status == 0, errors
    assert_equal_runs(program, "killed_at_evaluation", uninterrupted)


def test_a_changed_configuration_is_refused_in_one_line(
    program: Program, uninterrupted: str
) -> None:
    status, _, errors = program.run(uninterrupted, "train.seed=1")
    assert status == 2 and "train.seed: 0 there, 1 now" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.sed=1", "did you mean 'train.seed'"),
        ("data.path=/absent", "no such folder"),
        ("model.implementation=triton", "needs an NVIDIA GPU"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(program: Program, override: str, message: str) -> None:
    status, _, errors = program.run("mistake", override)
    assert status == 2 and message in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_non_finite_stops_the_run_and_keeps_the_batch(
    program: Program, uninterrupted: str, tmp_path: Path
) -> None:
    good = program.last(uninterrupted)
    names = [n.removeprefix("ema/") for n in good.tensors if n.startswith("ema/")]
    layout = make_layout({name: good.tensors[f"ema/{name}"].shape for name in names})
    spoilt = good.flat("ema", layout)
    layout.unflatten(spoilt)["predicted_lddt_head/logits//bias"][:] = np.nan
    path = checkpoint.write(tmp_path / "step_00000001", 1, {"ema": spoilt}, layout, {})

    status, _, errors = program.run("spoilt", f"train.initial_params={path}")
    assert status == 2 and "loss/plddt is not finite at step 1" in errors
    assert "Traceback" not in errors
    folder = program.folder / "spoilt"
    assert not checkpoint.list_checkpoints(folder / "checkpoints")
    (kept,) = folder.glob("non_finite_step_00000001_*.npz")
    with np.load(kept, allow_pickle=False) as batch:
        validate(dict(batch))


@pytest.mark.slow
def test_the_whole_model_makes_the_same_update_on_eight_devices(program: Program) -> None:
    common = ("train.steps=1", "train.batch_size=8", "train.eval_chains=8")
    for name, devices in (("one_device", 1), ("eight_devices", 8)):
        status, _, errors = program.run(name, *common, devices=devices)
        assert status == 0, errors
    one, eight = program.last("one_device"), program.last("eight_devices")
    gradient, other = (
        np.concatenate([t.ravel() for n, t in sorted(c.tensors.items()) if n.startswith("mu/")])
        for c in (one, eight)
    )
    # float32 sums in another order
    assert np.linalg.norm(gradient - other) < 1e-5 * np.linalg.norm(gradient)
    for row, row_of_eight in zip(
        program.rows("one_device"), program.rows("eight_devices"), strict=True
    ):
        assert row_of_eight == pytest.approx(row, rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_devices(program: Program) -> None:
    common = ("train.steps=4", "train.batch_size=2", "train.eval_chains=3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        program.start(
            "two_processes",
            *common,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    status, _, errors = program.run("two_devices", *common, devices=2)
    assert status == 0, errors
    assert_equal_runs(program, "two_processes", "two_devices")
