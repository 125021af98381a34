"""The doctor: what a data set holds and lacks, its distributions, times and workers."""

import html.parser
from pathlib import Path

import numpy as np
import pytest
from small_sets import build, content, msa, write
from test_store import HERE, make_database

from foldcore.config import DataConfig
from foldcore.data import doctor
from foldcore.data.doctor import main
from foldcore.data.doctor_page import render
from foldcore.data.examine import Timing, examine
from foldcore.data.histogram import histogram
from foldcore.data.prepare import prepare

CONFIG = DataConfig(crop_size=64, num_msa_clusters=16, num_extra_msa=32, accept_unknown=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good chains, one with another's alignment, and a structure and an alignment alone."""
    root = build(tmp_path_factory.mktemp("doctor") / "raw", ("1ubq_A", "5pti_A", "1bd2_A"))
    write(root / "alignments" / "1bd2_A" / "uniref90_hits.a3m", msa("1ubq_A"))
    write(root / "mmcif" / "19hc.cif", content("mmcif/19hc.cif"))
    write(root / "alignments" / "9xyz_A" / "uniref90_hits.a3m", msa("1ubq_A"))
    return root


def test_a_folder_and_its_store_are_explained(folder: Path, tmp_path: Path) -> None:
    raw = examine([str(folder)], CONFIG)
    packed = examine([str(prepare([str(folder)], tmp_path / "store", HERE))], CONFIG)
    assert (raw.kind, packed.kind) == ("folder of files", "packed store")
    assert (raw.accepted, packed.accepted) == (3, 2)  # a store has only what can be read
    (failure,) = raw.failed
    assert failure[0] == "1bd2_A" and "uniref90_hits.a3m" in failure[1]
    unreadable = next(rule for rule in packed.rules if rule.name == "unreadable alignment")
    assert unreadable.count == 1 and unreadable.subjects[0].startswith("1bd2_A")
    for findings in (raw, packed):
        rules = {rule.name: rule for rule in findings.rules}
        assert rules["alignment without structure"].subjects == ("9xyz_A",)
        assert "19hc" in rules["structure without alignment"].subjects
        assert findings.values["MSA depth (rows, of a sample)"].min() > 16
        assert findings.timing is not None and len(findings.timing.seconds) == 2
    assert packed.values["length (residues)"].tolist() == [76, 58]


def test_filters_are_counted_and_a_way_out_is_named() -> None:
    findings = examine(["embedded"], DataConfig(crop_size=32, num_extra_msa=8), sample=2)
    assert findings.accepted == 26
    assert {rule.name: rule.count for rule in findings.rules} == {"unknown resolution": 22}
    assert any("data.accept_unknown=true" in advice for advice in findings.advice)


def test_inputs_that_only_prepare_reads_are_joined(tmp_path: Path) -> None:
    make_database(tmp_path / "db", ("1ubq_A", "5pti_A"))
    write(tmp_path / "cif" / "1ubq.cif", content("mmcif/1ubq.cif"))
    findings = examine([str(tmp_path / "db"), str(tmp_path / "cif")], CONFIG)
    assert findings.accepted == 1 and findings.timing is None
    assert findings.rules[0].subjects == ("5pti_A",)
    assert "foldcore.data.prepare" in findings.advice[-1]


def test_an_empty_intersection_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "mmcif" / "1ubq.cif", content("mmcif/1ubq.cif"))
    write(tmp_path / "alignments" / "9xyz_A" / "hits.a3m", msa("1ubq_A"))
    assert main([str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert "no chain has both a structure and an alignment: 1 structures (1ubq) and 1" in line


def test_workers_follow_from_the_mean_time() -> None:
    timing = Timing(np.array([0.01, 0.01, 0.1]), ())
    assert timing.workers(gpus=1, step_seconds=0.05) == 1
    assert timing.workers(gpus=8, step_seconds=0.05) == 7  # 8 * 40 ms / 50 ms
    assert "8 GPUs at 50 ms a step and one example each: 7 loader" in timing.advice(8, 50.0)


def test_the_command_writes_a_page_of_its_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    more = ["data.accept_unknown=true", "data.crop_size=32", "data.num_extra_msa=8"]
    assert main([str(folder), *more, "--gpus", "4", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "3 chains to train on" in shown and "4 GPUs at 500 ms a step" in shown
    text = page.read_text()
    assert "<svg" in text and "9xyz_A" in text and "4 GPUs at 500 ms" in text
    for outside in ("http:", "https:", "<script", "src=", "@import", "url("):
        assert outside not in text
    open_tags: list[str] = []

    class Check(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "rect"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag != "rect":
                assert open_tags.pop() == tag

    Check().feed(text)
    assert open_tags == []


def test_a_page_that_cannot_be_written_is_said_before_the_examination(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", pytest.fail)
    for page, reason in (
        (tmp_path / "absent" / "page.html", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        assert main(["embedded", "--html", str(page)]) == 2
        assert capsys.readouterr().err == f"error: {page}: {reason}\n"


def test_stopped_early_it_is_one_line_and_leaves_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    (tmp_path / "old.html").write_text("an earlier page")
    for name in ("old.html", "new.html"):
        assert main(["embedded", "--html", str(tmp_path / name)]) == 130
        assert capsys.readouterr().err == "stopped; nothing was changed\n"
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]
    assert (tmp_path / "old.html").read_text() == "an earlier page"


def test_names_from_outside_cannot_break_the_page(folder: Path) -> None:
    findings = examine([str(folder)], CONFIG, sample=2)
    findings.failed.append(("<script>alert(1)</script>", "[bold]x"))
    assert "<script>" not in render(findings, 1, 500.0)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 1, 3], ["1", "2", "3"]),
        ([1, 2, 5, 6, 9, 700], ["1", "2-3", "4-7", "8-15", "16-31", "32-63"]),
        ([50, 470], ["50-99", "100-149"]),
        ([1.1, 3.6], ["1-1.25", "1.25-1.5"]),
    ],
)
def test_classes_of_a_distribution(values: list[float], labels: list[str]) -> None:
    bins = histogram(np.array(values))
    assert [label for label, _ in bins][: len(labels)] == labels
    assert sum(count for _, count in bins) == len(values)


def test_every_value_is_in_a_class() -> None:
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0, 1e4):
        for values in (rng.lognormal(0, 2, 100) * scale, rng.integers(0, 10**6, 50), np.ones(3)):
            assert sum(count for _, count in histogram(values)) == len(values)
    for value in np.round(rng.random(300) * 10, 2):  # one value, or nearly
        assert histogram(np.array([value] * 3)) == [(f"{value:.3g}", 3)]
        near = value + np.array([0, 1e-9, 3e-8])
        assert sum(count for _, count in histogram(near)) == 3
