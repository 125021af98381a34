"""The parity suite itself: it fails where it should, and reports what it saw."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity import compare, page, records, report, workers
from parity.case import Case, Run, Setting, flip, scale
from parity.examination import examine
from parity.judge import Verdict
from parity.noise import ADDED_RUNS, FLOORS, ROUNDING, perturb
from parity.options import Options
from parity.tracks import Arrays
from tests import parity_runs

SIZE = 64
Fault = Callable[[np.ndarray], np.ndarray]


def product(dtype: str, fault: Fault = lambda y: y) -> Run:
    """A track that multiplies inputs and parameters, and may do it wrong."""

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        w, x = (array.astype(dtype) for array in (parameters["w"], inputs["x"]))
        weights = np.cos(np.arange(SIZE)).astype(dtype)
        steps = (x > 0).astype(np.int32)
        return {"output y": fault(w * x), "gradient w": weights * x, "steps sign": steps}

    return run


def case(jax: Fault = lambda y: y, torch: Fault = lambda y: y, **changes: Any) -> Case:
    """Of such tracks; faults are those of the precision in question, not of the reference."""

    def make() -> tuple[Arrays, dict[str, Arrays]]:
        random = np.random.default_rng(0)
        w, x = (random.standard_normal(SIZE).astype(np.float32) for _ in range(2))
        return {"w": w}, {"": {"x": x}}

    def track(fault: Fault) -> Callable[[Setting], Run]:
        return lambda setting: product(setting.wide, fault)

    broken = Case("product", 1, make, track(jax), track(torch), flip("w"))
    return replace(broken, **changes)


def judged(case: Case, dtype: str, with_oracle: bool = False) -> Verdict:
    (verdict,) = examine(case, Setting(dtype), with_oracle)
    return verdict


def off_by(share: float) -> Fault:
    return lambda y: (y * (1 + share)).astype(y.dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_equal_tracks_pass(dtype: str) -> None:
    verdict = judged(case(), dtype)
    assert verdict.passed and not verdict.unnoticed


@pytest.mark.parametrize("share", [1e-8, -1e-8])
@pytest.mark.parametrize("track", ["jax", "torch"])
def test_a_track_that_is_off_in_float64_fails(track: str, share: float) -> None:
    failed = judged(case(**{track: off_by(share)}), "float64")
    assert not failed.passed
    assert [row["name"] for row in failed.entry()["failed"]] == [failed.worst.name]
    right = judged(case(**{track: off_by(share / 100)}), "float64")
    assert right.passed and right.entry()["failed"] == []


def test_both_tracks_off_in_the_same_way_fail_against_the_oracle() -> None:
    both = case(off_by(1e-8), off_by(1e-8), oracle=lambda: product("float64"))
    assert judged(both, "float64").passed
    assert not judged(both, "float64", with_oracle=True).passed


def test_an_error_of_a_few_noise_floors_fails_in_float32() -> None:
    def in_float32_only(share: float) -> Fault:
        return lambda y: off_by(share)(y) if y.dtype == np.float32 else y

    assert judged(case(in_float32_only(1e-7)), "float32").passed
    assert not judged(case(in_float32_only(2e-6)), "float32").passed
    assert not judged(case(torch=in_float32_only(2e-6)), "float32").passed


def total(dtype: str, fault: Fault = lambda y: y) -> Run:
    """A track that adds many numbers one after another, and may do it wrong."""

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        terms = np.abs(np.tile(parameters["w"], 50)).astype(dtype)
        return {f"output sum {i}": fault(np.cumsum(terms[i:])[-1]) for i in range(3)}

    return run


def test_the_rounding_of_a_long_sum_is_noise() -> None:
    def tracks(fault: Fault) -> Case:
        makes = dict.fromkeys(("jax", "torch"), lambda s: total(s.wide, fault))
        return replace(case(), mutate=scale(1.25, "w"), **makes)

    def in_float32(y: np.ndarray) -> np.ndarray:
        return off_by(1e-4)(y) if y.dtype == np.float32 else y

    verdict = judged(tracks(lambda y: y), "float32")
    errors = [row.error_jax or 0 for row in verdict.rows]
    assert max(errors) > FLOORS * ROUNDING["float32"]  # half a unit alone would not let it pass
    assert verdict.passed
    assert not judged(tracks(in_float32), "float32").passed


def kink(dtype: str, crossed: bool, needed: slice) -> Run:
    """Activations, one of which is at its kink: crossed where these parameters all move up."""

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        w = parameters["w"]
        up = np.all((w > inputs["x"])[needed])
        gradient = np.ones(SIZE, dtype) + (w - inputs["x"]).astype(dtype)
        gradient[0] = 1.0 if up or crossed else 0.0
        return {"gradient w": gradient}

    return run


@pytest.mark.parametrize("track", ["jax", "torch"])
def test_a_kink_that_few_moved_runs_cross_is_noise(track: str) -> None:
    def tracks(needed: slice) -> Case:
        def made(who: str) -> Callable[[Setting], Run]:
            return lambda s: kink(s.wide, who == track and s.dtype == "float32", needed)

        def make() -> tuple[Arrays, dict[str, Arrays]]:
            w = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
            return {"w": w}, {"": {"x": w}}

        return replace(case(), make=make, jax=made("jax"), torch=made("torch"))

    verdict = judged(tracks(needed=slice(9, 11)), "float32")
    assert verdict.passed and 0 < verdict.added < ADDED_RUNS
    assert verdict.entry()["added"] == verdict.added
    never = judged(tracks(needed=slice(None)), "float32")
    assert not never.passed and never.added == ADDED_RUNS
    assert [row.name for row in never.failed] == ["gradient w"]


@pytest.mark.parametrize("first", [0, 3])
def test_moved_runs_that_are_not_finite_excuse_nothing(first: int) -> None:
    """From the first on, or among those that are added."""

    def torch(setting: Setting) -> Run:
        if setting.dtype != "float64":
            return product(setting.wide, off_by(1e-3))
        runs = itertools.count()

        def run(parameters: Arrays, inputs: Arrays) -> Arrays:
            found, lost = product("float64")(parameters, inputs), next(runs) > first
            return {name: x * np.nan if lost else x for name, x in found.items()}

        return run

    verdict = judged(replace(case(), torch=torch), "float32")
    assert "output y" in {row.name for row in verdict.failed}


def test_variants_are_chosen_by_name() -> None:
    names = ("one", "two")
    parameters, inputs = case().make()
    some = case(variants=names, make=lambda: (parameters, dict.fromkeys(names, inputs[""])))
    found = list(examine(some, Setting("float64"), False, re.compile("two|nothing").search))
    assert [verdict.name for verdict in found] == ["product: two"]
    with pytest.raises(ValueError, match="product: one is made as product: uno"):
        spelt = replace(some, make=lambda: (parameters, {"uno": inputs[""], "two": inputs[""]}))
        list(examine(spelt, Setting("float64"), False))


def test_values_that_are_not_finite_fail() -> None:
    assert not judged(case(lambda y: y * np.nan), "float64").passed
    assert not judged(case(torch=lambda y: np.full_like(y, np.inf)), "float32").passed


def test_a_case_that_cannot_fail_does_not_pass() -> None:
    verdict = judged(case(mutate=lambda parameters, inputs: (parameters, inputs)), "float64")
    assert not verdict.passed and verdict.unnoticed == ["jax", "torch"]


def test_steps_are_counted() -> None:
    def one_more(run: Run) -> Run:
        def wrapped(parameters: Arrays, inputs: Arrays) -> Arrays:
            found = run(parameters, inputs)
            return found | {"steps sign": found["steps sign"] + (np.arange(SIZE) == 0)}

        return wrapped

    flipped = replace(case(), jax=lambda setting: one_more(product(setting.wide)))
    verdict = judged(flipped, "float64")
    assert not verdict.passed and verdict.entry()["flips"] == 1


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 2.0**-23), ("bfloat16", 2.0**-7)])
def test_perturbed_parameters_move_by_half_a_unit(dtype: str, unit: float) -> None:
    ones = np.ones(4000, np.float32)
    moves = perturb(ones, dtype, np.random.default_rng(0)) - ones
    assert set(np.unique(moves)) == {-unit, 0, unit}
    assert abs(np.abs(moves).mean() - unit / 2) < unit / 20


# The report ---------------------------------------------------------------------------------------


def test_a_wrong_case_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = judged(case(off_by(1e-3)), "float64").entry()
    part = {"dtype": "float64", "cases": [entry], "curves": {}, "environment": {"oracle": None}}
    monkeypatch.setattr(compare, "run", lambda *_, **__: [part])
    assert compare.main(["--out", str(tmp_path)]) == 1
    entry["passed"] = True
    assert compare.main(["--out", str(tmp_path)]) == 0
    part["cases"] = []
    assert compare.main(["--out", str(tmp_path), "--case", "nothing"]) == 2


def test_what_a_process_wrote_before_it_died_is_reported(tmp_path: Path) -> None:
    entry = judged(case(), "float32").entry()
    part = {"cases": [entry], "curves": {}, "environment": {}}
    (path := tmp_path / "float32.json").write_text(json.dumps(part))
    job = Options("float32")
    going = workers.written(job, path, "")
    assert going["cases"] == [entry] and going["dtype"] == "float32"
    dead = workers.written(job, path, "it died")
    assert [each["passed"] for each in dead["cases"]] == [True, False]
    report.write_json(report.merge([going], 1.0, complete=False), tmp_path)
    assert not json.loads((tmp_path / "report.json").read_text())["environment"]["complete"]


def test_report_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [judged(case(), dtype).entry() for dtype in ("float64", "float32")]
    loss = {"jax": [3.0, 2.0], "torch": [3.0, 2.5], "drift": [0.0, 0.1], "recycling": [0, 3]}
    part = {"cases": entries, "curves": {"training run float32": loss}, "environment": {"x": "1"}}
    report.write(report.merge([part], 1.0), tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.keys() >= {"cases", "environment"}
    assert all(set(records.KEYS) - {"seconds"} <= entry.keys() for entry in written["cases"])
    text = (tmp_path / "index.html").read_text()
    assert text.count("<svg") == 2 and "product" in text and "training run float32" in text
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)  # nothing is loaded
    assert "2 of 2 cases passed" in capsys.readouterr().out


def test_the_page_names_what_failed() -> None:
    entry = judged(case(off_by(1e-3)), "float64").entry()
    result = {"cases": [entry], "curves": {}, "environment": {}}
    assert "failed: product (float64)" in page.render(result)


@pytest.mark.slow
def test_full_size_comparison_of_a_small_configuration() -> None:
    found = parity_runs.report("float32", "--config", "tests/data/tiny.toml")
    names = [case["name"] for case in found["cases"]]
    assert names == [
        *(f"tiny network: {n} recycling passes" for n in range(4)),
        "tiny optimiser step",
    ]
    assert found["status"] == 0 and found["environment"]["complete"]
