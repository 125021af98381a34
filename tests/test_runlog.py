"""The run folder: rows survive kills and resumes, and a changed configuration is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from foldcore.config import Config, ConfigError, load
from foldcore.runlog import NonFiniteError, RunLog, Window, check_config, first_non_finite


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder: Path, first: int, last: int) -> None:
    with RunLog(folder, 100) as log:
        log.begin(first, Config())
        for step in range(first + 10, last + 1, 10):
            log.row(step, {"loss/total": 100.0 - step, "grad_norm": 1.0})


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    run(tmp_path, 0, 60)
    run(tmp_path, 40, 80)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 30, 40, 50, 60, 70, 80]
    run(tmp_path, 0, 20)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]


def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, 0, 30)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    run(tmp_path, 20, 30)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 30]


def test_what_a_step_lacks_is_known_after_a_kill(tmp_path: Path) -> None:
    assert RunLog(tmp_path, 100).lacks(10, "eval/")
    run(tmp_path, 0, 30)
    with RunLog(tmp_path, 100) as log:
        log.begin(30, Config())
        log.row(30, {"eval/lddt_ca": 0.5})
    path = tmp_path / "metrics.jsonl"
    for log in (RunLog(tmp_path, 100, enabled=False), RunLog(tmp_path, 100)):
        assert [log.lacks(step, "eval/") for step in (0, 20, 30)] == [False, True, False]
        assert not log.lacks(20, "loss/")
    path.write_text(path.read_text()[:-9])
    assert RunLog(tmp_path, 100, enabled=False).lacks(30, "eval/")


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    run(tmp_path, 0, 60)
    run(tmp_path, 40, 80)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("loss/total")]
    assert found == [(s, 100.0 - s) for s in range(10, 90, 10)]


def test_a_plain_line_a_row_where_there_is_no_terminal(tmp_path: Path, capsys) -> None:
    run(tmp_path, 0, 10)
    assert capsys.readouterr().out == "step 10/100  loss 90  grad_norm 1\n"
    assert (tmp_path / "run.log").read_text().endswith("step 10/100  loss 90  grad_norm 1\n")


def test_a_terminal_shows_progress(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with RunLog(tmp_path, 100) as log:
        log.begin(0, Config())
        log.row(10, {"loss/total": 90.0})
        log.tick(10)
    out = capsys.readouterr().out
    assert "step 10/100  loss 90" in out and " 10/100" in out.rsplit("loss 90")[1]


def test_an_error_is_kept_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunLog(tmp_path, 100) as log:
        log.begin(0, Config())
        raise RuntimeError("the reason")
    assert "stopped by RuntimeError: the reason" in (tmp_path / "run.log").read_text()


def test_a_disabled_log_touches_nothing(tmp_path: Path, capsys) -> None:
    with RunLog(tmp_path / "run", 100, enabled=False) as log:
        log.begin(0, Config())
        log.say("nothing")
        log.row(10, {"loss/total": 1.0})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_an_undefined_metric_is_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, 100) as log:
        log.begin(0, Config())
        log.row(10, {"eval/lddt_ca": float("nan"), "eval/drmsd": 3.0})
    assert rows(tmp_path) == [{"step": 10, "eval/lddt_ca": None, "eval/drmsd": 3.0}]


def test_a_window_means_over_its_steps_also_across_a_resume() -> None:
    steps = [{"loss/total": x, "learning_rate": x / 8} for x in (1.0, 2.5, 4.0)]
    whole, resumed = Window(), Window(steps[:2])
    for metrics in steps:
        whole.add(metrics, 0.0)
    resumed.add(steps[2], 0.0)
    expected, found = whole.close(4), resumed.close(4)
    assert (expected["loss/total"], expected["learning_rate"]) == (2.5, 0.5)
    assert found["loss/total"] == 2.5 and found["learning_rate"] == 0.5
    assert whole.pending == []


def test_a_window_measures_rate_and_waiting(monkeypatch) -> None:
    now = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    window = Window()
    for _ in range(2):
        window.add({"loss/total": 1.0, "learning_rate": 1.0}, 0.5)
    row = window.close(batch_size=8)
    assert row["examples_per_s"] == 4.0 and row["data_wait"] == 0.25


def test_a_window_without_a_timed_step_has_no_rate() -> None:
    window = Window()
    window.add({"loss/total": 1.0, "learning_rate": 1.0}, 0.5)
    window.restart_clock()  # as after the first step, which compiles
    row = window.close(batch_size=8)
    assert row["loss/total"] == 1.0
    assert math.isnan(row["examples_per_s"]) and math.isnan(row["data_wait"])


def test_the_first_non_finite_value_is_named_by_its_term() -> None:
    fine = {"loss/total": 1.0, "loss/chi": 1.0, "grad_norm": 1.0}
    bad = {"loss/total": float("nan"), "loss/chi": float("inf"), "grad_norm": float("nan")}
    assert first_non_finite([fine, bad, bad]) == (1, "loss/chi")
    assert first_non_finite([{**bad, "loss/chi": 1.0}]) == (0, "loss/total")
    assert first_non_finite([{**fine, "grad_norm": float("inf")}]) == (0, "grad_norm")
    assert first_non_finite([fine]) is None


def test_landing_brings_values_to_the_host_and_stops_at_the_step_that_is_not_finite() -> None:
    window = Window()
    for value in (1.0, 2.0, float("nan"), 4.0):
        window.add({"loss/chi": value}, 0.0)
    with pytest.raises(NonFiniteError, match="loss/chi is not finite at step 19") as error:
        window.land(lambda tree: tree, step=20)
    assert error.value.step == 19


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    with RunLog(tmp_path, 100), pytest.raises(ConfigError, match="another process"):
        RunLog(tmp_path, 100)


def test_another_configuration_is_refused_by_field(tmp_path: Path) -> None:
    config = Config()
    run(tmp_path, 0, 10)
    assert load(tmp_path / "config.toml") == config
    check_config(tmp_path, config)
    check_config(tmp_path, replace(config, train=replace(config.train, steps=5, save_every=1)))
    changed = replace(
        config,
        train=replace(config.train, seed=1, steps=5),
        optimizer=replace(config.optimizer, learning_rate=5e-4),
    )
    with pytest.raises(ConfigError) as error:
        check_config(tmp_path, changed)
    message = str(error.value)
    assert "optimizer.learning_rate: 0.001 there, 0.0005 now" in message
    assert "train.seed: 0 there, 1 now" in message
    assert "train.steps" not in message and "train.name=NAME" in message


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: cannot write there: .* \(train.out\)$"):
        RunLog(tmp_path / "file" / "run", 10)
