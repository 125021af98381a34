"""The command line of the parity suite: what it refuses, where it writes, how it ends."""

import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foldcore.kernels.launch import NEEDS_GPU
from parity import (
    bench_loader,
    bench_store,
    checks,
    compare,
    records,
    report,
    throughput,
    workers,
)
from parity.options import FEWEST_STEPS, Options
from tests.conftest import ROOT

RECORD = dict.fromkeys(records.KEYS) | {
    **{"name": "op a", "level": 1, "dtype": "float64", "passed": True, "arrays": 3},
    **{"difference": 1e-16, "ratio": 0.1, "limit": 1.0, "seconds": 0.5},
}
PART = {"dtype": "float64", "cases": [RECORD], "curves": {}, "environment": {}, "names": ["op a"]}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "gpus", lambda: 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "("], "--case '(': not a regular expression: missing )"),
        (["--config", "absent.toml"], "absent.toml: cannot read"),
        (["--config", "README.md"], "README.md: not valid TOML"),
        (["--config", "configs/demo.toml", "model.c_zz=3"], "unknown key 'model.c_zz'"),
        (["--config", "configs/demo.toml", "model.c_z=-3"], "must be at least 1"),
        (["--config", "configs/demo.toml", "--level", "4"], "only levels 2 and 3"),
        (["model.c_zz=3"], "did you mean 'model.c_z'?"),
        (["model.c_z=wide"], "expected int"),
        (["model.c_z=64"], "without --config only model.implementation can be set"),
        (["notanoverride"], "write section.key=value"),
        (["model.implementation=tritn"], "'tritn' is not one of"),
        (["model.implementation=triton"], NEEDS_GPU),
        (["--device", "gpu", "model.implementation=triton"], NEEDS_GPU),
        (["--device", "gpu"], "there is no NVIDIA GPU here"),
        (["--steps", "9"], "needs at least 10"),
        (["--steps", "0"], "needs at least 10"),
        (["--out", "README.md/report"], "README.md is not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("a process was started"))
    out = tmp_path / "report"
    given = arguments if "--out" in arguments else [*arguments, "--out", str(out)]
    assert compare.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], f"{NEEDS_GPU}; --config demo"),
        (["--config", "nope"], "nope.toml: cannot read"),
        (["--config", "demo", "train.batchsize=2"], "did you mean 'train.batch_size'?"),
        (["--config", "demo", "--out", "README.md/x/report.json"], "README.md is not a folder"),
        (["--config", "demo", "--recycling", "0,7"], "'0,7': 0 to 3, separated by commas"),
        (["--config", "demo", "--steps", "0"], "'0': at least 1"),
    ],
)
def test_timings_that_cannot_work_are_refused_as_well(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(throughput, "_run", lambda *_: pytest.fail("a process was started"))
    given = arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path / "x.json")]
    try:
        status = throughput.main(given)
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (bench_loader, ["absent.toml"], "absent.toml: cannot read"),
        (bench_store, ["/absent"], "/absent"),
    ],
)
def test_benchmarks_of_what_is_not_there_are_refused(
    module: Any, arguments: list[str], words: str, capsys: Any
) -> None:
    assert module.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_on_a_gpu_the_same_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "gpus", lambda: 1)
    triton = ("model.implementation=triton",)
    steps = FEWEST_STEPS
    checks.check([Options("float32", device="gpu", overrides=triton, steps=steps)], tmp_path)
    with pytest.raises(checks.Refused, match="needs --device gpu"):
        checks.check([Options("float32", overrides=triton)], tmp_path)


class Driver:
    """A driver that shows ``count`` GPUs, or cannot start."""

    def __init__(self, count: int, status: int = 0) -> None:
        self.count, self.status = count, status

    def cuInit(self, _: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, pointer: Any) -> int:  # noqa: N802
        pointer._obj.value = self.count
        return 0


def test_gpus_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for driver, count in ((Driver(2), 2), (Driver(0), 0), (Driver(2, status=100), 0)):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        assert checks.gpus() == count
    monkeypatch.undo()
    monkeypatch.setattr(checks, "DRIVER", "libabsent.so")
    assert checks.gpus() == 0


def test_without_a_case_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    names = [f"op {letter}" for letter in "abcdefghijklm"]

    def run(jobs: Any, folder: Path, at_once: int, publish: Any) -> list[dict[str, Any]]:
        publish([PART | {"cases": [], "names": []}])
        return [PART | {"cases": [], "names": names}]

    monkeypatch.setattr(compare, "run", run)
    for name in ("report.json", "index.html"):
        (tmp_path / name).write_text("old")
    assert compare.main(["--case", "op m$", "--level", "1", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no case matches 'op m$' at level 1; of 13 there are: op m, ")
    assert error.count(", ") == 7 and "float" not in error
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "runs/parity"),
        (["--device", "cpu"], "runs/parity"),
        (["--case", "a"], "runs/parity/part"),
        (["--level", "1"], "runs/parity/part"),
        (["--dtype", "float32"], "runs/parity/part"),
        (["--quick"], "runs/parity/part"),
        (["--device", "gpu"], "runs/parity"),
        (["--device", "gpu", "--level", "2"], "runs/parity/part"),
        (["--steps", "12"], "runs/parity/part"),
    ],
)
def test_only_the_full_run_replaces_its_report(
    arguments: list[str], folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "gpus", lambda: 1)
    monkeypatch.setattr(checks, "check_configuration", lambda job: None)
    monkeypatch.setattr(compare, "run", lambda *_: [PART])
    monkeypatch.chdir(tmp_path)
    assert compare.main(arguments) == 0
    found = [str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("report.json")]
    assert found == [folder]


def fake_jax(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Processes that start from now on import this in place of JAX."""
    (folder / "jax.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(ROOT)


def test_a_process_that_dies_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    fake_jax(tmp_path, monkeypatch, "raise RuntimeError('no jaxlib here')")
    monkeypatch.setattr(records.shim, "available", lambda: False)
    out = tmp_path / "out"
    assert compare.main(["--dtype", "float32", "--out", str(out)]) == 1
    found = json.loads((out / "report.json").read_text())
    (record,) = found["cases"]
    assert record["reason"] == "the process ended with status 1: RuntimeError: no jaxlib here"
    assert record.keys() == {*records.KEYS, "reason"}
    assert found["environment"]["torch"] and found["environment"]["python"]
    assert "no jaxlib here" in (out / "index.html").read_text()
    assert report.ABSENT in " ".join(capsys.readouterr().out.split())


def test_a_process_that_is_killed_names_the_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_jax(tmp_path, monkeypatch, "import os\nos.kill(os.getpid(), 9)")
    (part,) = workers.run([Options("float32")], tmp_path, at_once=1)
    assert part["cases"][0]["reason"] == "the process ended with signal SIGKILL"


def test_the_environment_says_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records.shim, "available", lambda: True)
    monkeypatch.setattr(records.metadata, "version", lambda name: f"{name} 1")
    dead = PART | {"environment": {}}
    assert report.merge([dead], 1.0)["environment"]["oracle"] == "alphafold alphafold 1"
    assert records.version("torch") == "torch 1"
    monkeypatch.undo()
    assert records.version("a-package-that-is-not-there") is None


def test_an_interrupted_run_reports_what_was_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def run(jobs: Any, folder: Path, at_once: int, publish: Any) -> None:
        (folder / "float64.json").write_text(json.dumps(PART))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", run)
    assert compare.main(["--out", str(tmp_path)]) == 130
    found = json.loads((tmp_path / "report.json").read_text())
    assert [case["name"] for case in found["cases"]] == ["op a"]
    assert not found["environment"]["complete"] and (tmp_path / "index.html").exists()
    assert capsys.readouterr().err == "interrupted: the report has what was done\n"


def test_the_documented_keys_are_those_of_a_record() -> None:
    text = (ROOT / "docs/parity.md").read_text().partition('{"cases": [{')[2].partition("}")[0]
    assert re.findall(r'"(\w+)"', text) == list(records.KEYS)


def test_the_page_of_an_earlier_run_does_not_stay(tmp_path: Path) -> None:
    (page := tmp_path / "index.html").write_text("old")
    report.write_json(report.merge([PART], 1.0), tmp_path)
    assert page.exists()
    report.write_json(report.merge([PART], 1.0, complete=False), tmp_path)
    assert not page.exists()


def test_ctrl_c_while_a_process_starts_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupted(command: list[str], **options: Any) -> Any:
        started.append(popen([sys.executable, "-c", "import time\ntime.sleep(60)"], **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    monkeypatch.setattr(workers.subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            workers.run([Options("float32")], tmp_path, at_once=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].poll() == -signal.SIGKILL


def test_ctrl_c_ends_all_processes_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    fake_jax(tmp_path, monkeypatch, waits)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "parity.compare", "--dtype", "float32", "--out", str(out)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # whatever the suite was started with: in the background a shell lets programs ignore it
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    started = subprocess.Popen(command, start_new_session=True, preexec_fn=default, **pipes)
    worker = int(started.stdout.readline())  # type: ignore[union-attr]
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to every process
    _, errors = started.communicate(timeout=10)
    assert started.returncode == 130 and errors == "interrupted: no case was done\n"
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert not out.exists()
