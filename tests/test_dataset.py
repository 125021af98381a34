"""Data sets: every layout, the tables beside it, filters, weights, split, report, bad input."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gemmi
import numpy as np
import pytest
from small_sets import CHAINS, EMBEDDED, build, content, msa, write

from foldcore.config import DataConfig
from foldcore.data.dataset import Dataset, open_validation, split
from foldcore.data.layout import alignment_files, find_layout
from foldcore.data.scan import progress
from foldcore.data.stores import find_store
from foldcore.errors import DataError

CONFIG = DataConfig(accept_unknown=True)


def rules(dataset: Dataset) -> dict[str, str]:
    return {chain: rule for chain, (rule, _) in dataset.report.rejected.items()}


def test_the_embedded_set_is_read_whole() -> None:
    dataset = Dataset("embedded", CONFIG)
    assert len(dataset.chains) == 48
    assert dataset.report.rejected == {}
    train, validation = split(dataset)
    assert (len(train), len(validation)) == (40, 8)
    assert sorted(train + validation) == list(dataset.chains)
    for chain_id in dataset.chains:
        raw = dataset.raw(chain_id)
        assert len(raw.aatype) == dataset.records[chain_id].length
        assert (raw.msa[0] == raw.aatype).all()
        assert raw.mask.any()
    assert dataset.report.failed == {}
    assert {what.partition(":")[0] for what in dataset.report.notes} <= {"template hits not used"}


def test_unknown_resolution_and_date_are_filtered_unless_accepted() -> None:
    known = Dataset("embedded", DataConfig())
    cache = json.loads((EMBEDDED / "chain_data_cache.json").read_text())
    expected = {c for c, v in cache.items() if v["resolution"] and v["release_date"]}
    assert set(known.chains) == expected
    assert known.report.counts()["unknown resolution"] == 22


def test_mini_joins_wholly(shared_data: Path) -> None:
    dataset = Dataset(str(shared_data / "mini"), CONFIG)
    assert len(dataset.chains) + len(dataset.report.rejected) == 894
    assert rules(dataset) == dict.fromkeys(("3iyd_A", "3iyd_E", "3iyd_G"), "resolution")
    train, validation = split(dataset)
    groups = [{dataset.records[c].group for c in part} for part in (train, validation)]
    assert not groups[0] & groups[1]
    assert 0.07 < len(groups[1]) / len(groups[0] | groups[1]) < 0.13
    assert dataset.records["1mqk_H"].cluster_size == 21
    for chain_id in dataset.chains[::60]:
        dataset.raw(chain_id)


@pytest.mark.slow
def test_every_chain_of_mini_is_readable(shared_data: Path) -> None:
    dataset = Dataset(str(shared_data / "mini"), CONFIG)
    for chain_id in dataset.chains:
        raw = dataset.raw(chain_id)
        assert len(raw.aatype) == dataset.records[chain_id].length


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", ["openfold", "openproteinset"])
def test_every_layout_gives_the_same_examples(
    tmp_path: Path, layout: str, zipped: bool, tables: bool
) -> None:
    dataset = Dataset(str(build(tmp_path, CHAINS, layout, zipped, tables)), CONFIG)
    reference = Dataset("embedded", CONFIG)
    assert dataset.chains == CHAINS
    others = {} if tables else {f"1bd2_{c}": "structure without alignment" for c in "DE"}
    assert rules(dataset) == others
    assert (dataset.weights() == reference.weights(CHAINS)).all()
    for chain_id in CHAINS:
        ours, theirs = dataset.raw(chain_id), reference.raw(chain_id)
        assert (ours.msa == theirs.msa).all() and (ours.deletions == theirs.deletions).all()
        assert (ours.positions == theirs.positions).all()
        assert ours.resolution == theirs.resolution
        record = dataset.records[chain_id]
        assert record.release_date == reference.records[chain_id].release_date


def test_what_the_tables_lack_is_read_from_the_files(tmp_path: Path) -> None:
    dataset = Dataset(str(build(tmp_path, ("1bd2_A", "1ubq_A"))), DataConfig())
    assert set(dataset.chains) == {"1bd2_A", "1ubq_A"}
    assert dataset.records["1ubq_A"].release_date == "1987-04-16"
    assert dataset.records["1ubq_A"].length == 76
    assert set(dataset.report.notes["cluster size unknown, taken as 1"]) == set(dataset.chains)


def test_mmcif_cache_and_clusters_by_entity(tmp_path: Path) -> None:
    build(tmp_path, ("1ubq_A", "5pti_A"))
    cache = {
        "1ubq": {"release_date": "1987-04-16", "chain_ids": ["A"], "seqs": ["M" * 5 + "ACDEFG"]},
        "5pti": {"release_date": None, "chain_ids": ["A"], "seqs": ["RPDFCLEPPY"]},
    }
    cache = {k: {**v, "no_chains": 1, "resolution": 1.8} for k, v in cache.items()}
    write(tmp_path / "mmcif_cache.json", json.dumps(cache))
    write(tmp_path / "clusters-by-entity-40.txt", "9ABC_1 1UBQ_1 9ABC_2 9ABC_3\n")
    dataset = Dataset(str(tmp_path), DataConfig())
    assert dataset.chains == ("1ubq_A",)
    assert rules(dataset) == {"5pti_A": "unknown release date"}
    assert dataset.records["1ubq_A"].length == 11
    assert dataset.records["1ubq_A"].cluster_size == 4
    assert dataset.records["1ubq_A"].group == "9ABC_1"
    assert dataset.weights()[0] == pytest.approx(0.25 * 256 / 512)


def test_identical_chains_share_an_alignment(tmp_path: Path) -> None:
    build(tmp_path, ("1bd2_A",))
    write(tmp_path / "duplicate_pdb_chains.txt", "7xyz_Q 1bd2_D 1bd2_A\n1bd2_B\n")
    dataset = Dataset(str(tmp_path), CONFIG)
    assert dataset.chains == ("1bd2_A", "1bd2_D")
    assert dataset.records["1bd2_D"].place.folder == dataset.records["1bd2_A"].place.folder
    assert rules(dataset) == dict.fromkeys(("1bd2_B", "1bd2_E"), "structure without alignment")


def test_alignments_are_stacked_in_the_published_order(tmp_path: Path) -> None:
    names = ["zeta.a3m", "mgnify_hits.sto", "bfd_uniref_hits.a3m.gz", "uniref90_hits.a3m"]
    names += ["alpha.a3m", "uniprot_hits.sto", "hmm_output.sto", "pdb70_hits.hhr", "README"]
    for name in (*names, "alpha.a3m.gz"):
        write(tmp_path / name, "")
    msas, hits = alignment_files(str(tmp_path))
    assert [Path(m).name for m in msas] == [
        *("uniref90_hits.a3m", "bfd_uniref_hits.a3m.gz", "mgnify_hits.sto"),
        *("alpha.a3m", "zeta.a3m"),
    ]
    assert [Path(h).name for h in hits] == ["pdb70_hits.hhr"]


def test_rows_of_several_databases_are_merged_without_repeats(tmp_path: Path) -> None:
    build(tmp_path, ("5pti_A",))
    folder = tmp_path / "alignments" / "5pti_A"
    query = msa("5pti_A").split("\n")[1]
    new = "-" * (len(query) - 1) + "W"
    write(folder / "mgnify_hits.sto", f"# STOCKHOLM 1.0\nq {query}\nother {new}\n//\n")
    raw, reference = Dataset(str(tmp_path), CONFIG).raw("5pti_A"), Dataset("embedded", CONFIG)
    assert len(raw.msa) == len(reference.raw("5pti_A").msa) + 1
    assert (raw.msa[:-1] == reference.raw("5pti_A").msa).all()
    assert (raw.msa[-1][:-1] == 21).all()


def test_rows_beyond_the_limit_are_counted() -> None:
    dataset = Dataset("embedded", DataConfig(accept_unknown=True, max_msa_rows=10))
    rows = len(Dataset("embedded", CONFIG).raw("1ubq_A").msa)
    assert len(dataset.raw("1ubq_A").msa) <= 10 < rows
    assert dataset.report.notes["alignment rows beyond data.max_msa_rows"]["1ubq_A"] >= rows - 10


def test_a_divided_archive_and_upper_case_names(tmp_path: Path) -> None:
    write(tmp_path / "mmcif" / "pt" / "5pti.cif", content("mmcif/5pti.cif"), zipped=True)
    write(tmp_path / "alignments" / "5PTI_A" / "uniref90_hits.a3m", msa("5pti_A"))
    assert Dataset(str(tmp_path), CONFIG).chains == ("5pti_A",)


def predicted(root: Path, suffix: str, plddt: Sequence[float], zipped: bool = False) -> Path:
    """A data set of one predicted structure: 5PTI, with each residue's pLDDT in the B-factors."""
    structure = gemmi.make_structure_from_block(
        gemmi.cif.read_string(content("mmcif/5pti.cif")).sole_block()
    )
    structure.setup_entities()
    residues = structure[0][0].get_polymer()
    for residue, value in zip(residues, plddt, strict=True):
        for atom in residue:
            atom.b_iso = value
    text = structure.make_pdb_string()
    if suffix == "cif":
        text = structure.make_mmcif_document().as_string()
    write(root / "pdb" / f"P00974.{suffix}", text, zipped)
    write(root / "alignments" / "P00974" / "uniclust30.a3m", msa("5pti_A"))
    return root


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", ["pdb", "cif"])
def test_only_confident_residues_of_predicted_structures_have_atoms(
    tmp_path: Path, suffix: str, zipped: bool
) -> None:
    plddt = np.full(58, 90.0)
    plddt[[0, 7, 57]] = 50.0, 49.99, 50.01  # not confident, not confident, confident
    root = str(predicted(tmp_path, suffix, plddt, zipped))
    dataset = Dataset(root, DataConfig(), distillation=True)
    assert dataset.chains == ("P00974",)
    raw, experiment = dataset.raw("P00974"), Dataset("embedded", CONFIG).raw("5pti_A")
    assert raw.is_distillation
    confident = plddt > 50
    assert (raw.mask[confident] == experiment.mask[confident]).mean() > 0.99
    np.testing.assert_allclose(raw.positions[confident], experiment.positions[confident], atol=2e-3)
    assert not raw.mask[~confident].any() and not raw.positions[~confident].any()
    assert len(raw.aatype) == 58  # the residues stay

    whole = dataset.structure("p00974").chain("A")  # remembered as the file has it
    assert whole.mask[0].any() and whole.b_factors[0] == 50
    for setting, distillation in ((-1.0, True), (90.0, False)):
        config = DataConfig(accept_unknown=True, distillation_min_plddt=setting)
        other = Dataset(root, config, distillation).raw("P00974")
        assert (other.mask == whole.mask).all() and (other.positions == whole.positions).all()
    stricter = Dataset(root, DataConfig(distillation_min_plddt=49.99), distillation=True)
    assert np.flatnonzero(~stricter.raw("P00974").mask.any(axis=1)).tolist() == [7]


def test_a_predicted_structure_without_confidence_is_refused(tmp_path: Path) -> None:
    """Such as one whose pLDDT runs from 0 to 1."""
    root = str(predicted(tmp_path, "pdb", np.full(58, 0.93)))
    dataset = Dataset(root, DataConfig(), distillation=True)
    with pytest.raises(DataError, match=r"P00974\.pdb: .*above 50: the highest is 0\.93"):
        dataset.raw("P00974")


def test_filters_by_length_and_composition(tmp_path: Path) -> None:
    build(tmp_path, tables=True)
    cache = json.loads((tmp_path / "chain_data_cache.json").read_text())
    cache["1ubq_A"]["seq"] = "A" * 81 + "G" * 19
    cache["5pti_A"]["resolution"] = 9.5
    cache["1bd2_A"]["resolution"] = 0.0  # NMR, as the field writes it
    write(tmp_path / "chain_data_cache.json", json.dumps(cache))
    config = DataConfig(accept_unknown=True, min_length=101)
    dataset = Dataset(str(tmp_path), config)
    assert dataset.report.rejected == {
        "1bd2_B": ("length", "100 < 101 residues"),
        "1ubq_A": ("length", "100 < 101 residues"),
        "5pti_A": ("resolution", "9.5 > 9 angstrom"),
    }
    assert Dataset(str(tmp_path), CONFIG).report.rejected["1ubq_A"] == ("composition", "81% A")
    assert dataset.chains == ("1bd2_A",)


@pytest.mark.parametrize(("weighting", "share"), [("inverse", 0.25), ("inverse_sqrt", 0.5)])
def test_weights_follow_cluster_and_length(tmp_path: Path, weighting: str, share: float) -> None:
    build(tmp_path, ("1ubq_A", "1bd2_A"), tables=True)
    cache = json.loads((tmp_path / "chain_data_cache.json").read_text())
    cache["1ubq_A"]["cluster_size"] = 4
    cache["1bd2_A"]["seq"] = "ACDEFGHIKL" * 40
    write(tmp_path / "chain_data_cache.json", json.dumps(cache))
    dataset = Dataset(str(tmp_path), DataConfig(accept_unknown=True, cluster_weighting=weighting))
    expected = {"1ubq_A": share * 0.5, "1bd2_A": 400 / 512}
    assert dict(zip(dataset.chains, dataset.weights(), strict=True)) == expected
    plain = Dataset(str(tmp_path), DataConfig(accept_unknown=True, cluster_weighting="none"))
    assert plain.weights(["1ubq_A"]) == [0.5]


def test_split_by_linkage_group_keeps_groups_together(tmp_path: Path) -> None:
    build(tmp_path)
    rows = ["chain\tlinkage40", "1ubq_A\tx", "5pti_A\tx", "1bd2_A\ty", "1bd2_B\tz"]
    write(tmp_path / "index.tsv", "\n".join(rows) + "\n")
    for fraction in (0.0, 0.01, 0.3, 0.6, 1.0):
        config = DataConfig(accept_unknown=True, validation_fraction=fraction)
        train, validation = split(Dataset(str(tmp_path), config))
        assert sorted(train + validation) == list(CHAINS)
        assert ("1ubq_A" in train) == ("5pti_A" in train)
        assert bool(validation) == (fraction > 0)
        assert bool(train) == (fraction < 1)


def test_another_validation_set_leaves_all_for_training(tmp_path: Path) -> None:
    config = DataConfig(accept_unknown=True, validation_path=str(build(tmp_path, ("1ubq_A",))))
    dataset = Dataset("embedded", config)
    assert split(dataset) == (list(dataset.chains), [])
    other, chains = open_validation(config, dataset)
    assert chains == ["1ubq_A"] and other.layout.root == str(tmp_path)
    held_out = open_validation(CONFIG, dataset := Dataset("embedded", CONFIG))
    assert held_out == (dataset, split(dataset)[1])


def test_report_is_written_and_summed_up(tmp_path: Path) -> None:
    build(tmp_path / "set", ("1bd2_A",))
    write(tmp_path / "set" / "alignments" / "9zzz_A" / "uniref90_hits.a3m", ">q\nACD\n")
    report = Dataset(str(tmp_path / "set"), CONFIG).report
    assert report.fail("1bd2_A", "the\tdisk") and not report.fail("1bd2_A", "the\tdisk")
    assert report.counts() == {"structure without alignment": 3, "alignment without structure": 1}
    lines = report.summary().split("\n")
    assert lines[0].endswith("1 chains accepted, 4 rejected")
    assert "  1 alignment without structure: 9zzz_A" in lines
    assert "  failed 2x while loading: 1bd2_A: the\tdisk" in lines
    report.write(tmp_path / "report.json")
    tree = json.loads((tmp_path / "report.json").read_text())
    assert tree["rejected"]["9zzz_A"]["rule"] == "alignment without structure"
    assert tree["failed"] == {"1bd2_A": {"times": 2, "reason": "the\tdisk"}}
    report.write(tmp_path / "report.tsv")
    table = [line.split("\t") for line in (tmp_path / "report.tsv").read_text().splitlines()]
    assert {len(row) for row in table} == {4}
    assert ["1bd2_A", "failed", "2 times", "the disk"] in table
    with pytest.raises(ValueError, match="written as .json or .tsv"):
        report.write(tmp_path / "report.txt")


def test_a_pickled_data_set_reads_the_same_without_its_memory() -> None:
    dataset = Dataset("embedded", CONFIG)
    raw = dataset.raw("1ubq_A")
    text = pickle.dumps(dataset)
    assert len(text) < 100_000
    assert (pickle.loads(text).raw("1ubq_A").msa == raw.msa).all()


def test_memory_is_bounded_and_used() -> None:
    dataset = Dataset("embedded", CONFIG, cache_bytes=400_000)
    first = dataset.raw("5pti_A")
    assert dataset.raw("5pti_A") is first
    for chain_id in dataset.chains[:10]:
        dataset.raw(chain_id)
    again = dataset.raw("5pti_A")
    assert again is not first and (again.msa == first.msa).all()


def error_of(action: object) -> str:
    with pytest.raises(DataError) as caught:
        action()  # type: ignore[operator]
    return str(caught.value)


def test_empty_intersection_shows_both_sides(tmp_path: Path) -> None:
    build(tmp_path, ("1ubq_A", "5pti_A"))
    (tmp_path / "mmcif" / "1ubq.cif").rename(tmp_path / "mmcif" / "2ubq.cif")
    (tmp_path / "mmcif" / "5pti.cif").unlink()
    text = error_of(lambda: Dataset(str(tmp_path), CONFIG))
    assert text.startswith(f"{tmp_path}: no chain has both a structure and an alignment: ")
    assert "1 structures (2ubq) and 2 alignments (1ubq_A, 5pti_A)" in text


def test_openproteinset_as_stored_without_structures(shared_data: Path) -> None:
    text = error_of(lambda: Dataset(str(shared_data / "formats" / "openproteinset"), CONFIG))
    assert "0 structures (none) and 5 alignments (1a00_A, 1a02_F, 1a0g_A ...)" in text


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere")
    assert error_of(lambda: Dataset(path, CONFIG)) == f"{path}: no such folder (data.path)"
    other = replace(CONFIG, distillation_path=path)
    for use in (lambda: Dataset(path, other), lambda: find_store(path, other, print)):
        assert error_of(use) == f"{path}: no such folder (data.distillation_path)"


def test_nothing_left_says_by_which_rule(tmp_path: Path) -> None:
    build(tmp_path, ("1ubq_A",), tables=True)
    cache = json.loads((tmp_path / "chain_data_cache.json").read_text())
    cache["1ubq_A"]["resolution"] = None
    write(tmp_path / "chain_data_cache.json", json.dumps(cache))
    text = error_of(lambda: Dataset(str(tmp_path), DataConfig()))
    assert "every chain was filtered out" in text and "1 unknown resolution: 1ubq_A" in text
    assert "data.accept_unknown=true" in text


def test_bad_structures_are_rejected_by_the_scan(tmp_path: Path) -> None:
    build(tmp_path)
    text = content("mmcif/1ubq.cif")
    path = write(tmp_path / "mmcif" / "1ubq.cif", text[: len(text) // 2])
    source = tmp_path / "alignments" / "5pti_A"
    source.rename(source.with_name("5pti_Z"))
    report = Dataset(str(tmp_path), CONFIG).report
    rule, detail = report.rejected["1ubq_A"]
    assert rule == "unreadable structure" and detail.startswith(f"{path}:")
    assert report.rejected["5pti_Z"] == ("chain absent from its entry", "there are: A")


def test_bad_files_behind_tables_fail_when_read(tmp_path: Path) -> None:
    build(tmp_path, tables=True)
    text = content("mmcif/1ubq.cif")
    cut = write(tmp_path / "mmcif" / "1ubq.cif", text[: len(text) // 2])
    a3m = tmp_path / "alignments" / "1bd2_A" / "uniref90_hits.a3m"
    write(a3m, msa("1bd2_A") + ">ragged\nACDEF\n")
    write(tmp_path / "alignments" / "1bd2_B" / "uniref90_hits.a3m", msa("5pti_A"))
    (tmp_path / "alignments" / "5pti_A" / "uniref90_hits.a3m").unlink()
    dataset = Dataset(str(tmp_path), CONFIG)
    assert error_of(lambda: dataset.raw("1ubq_A")).startswith(f"{cut}:")
    line = msa("1bd2_A").count("\n") + 1
    assert error_of(lambda: dataset.raw("1bd2_A")).startswith(f"{a3m}:{line}: ragged: 'ragged'")
    other = error_of(lambda: dataset.raw("1bd2_B"))
    assert "1bd2_B/uniref90_hits.a3m: " in other and "the query" in other
    folder = tmp_path / "alignments" / "5pti_A"
    nothing = f"{folder}: no alignment (.a3m or .sto) in this folder"
    assert error_of(lambda: dataset.raw("5pti_A")) == nothing


def test_chain_absent_behind_a_table_lists_the_chains(tmp_path: Path) -> None:
    build(tmp_path, ("1ubq_A",), tables=True)
    cache = json.loads((tmp_path / "chain_data_cache.json").read_text())
    write(tmp_path / "chain_data_cache.json", json.dumps({"1ubq_Q": cache["1ubq_A"]}))
    folder = tmp_path / "alignments" / "1ubq_A"
    folder.rename(folder.with_name("1ubq_Q"))
    dataset = Dataset(str(tmp_path), CONFIG)
    message = f"{tmp_path / 'mmcif' / '1ubq.cif'}: no protein chain 'Q' (there are: A)"
    assert error_of(lambda: dataset.raw("1ubq_Q")) == message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("chain_data_cache.json", '{\n"a": ', ":2: not valid JSON: "),
        ("chain_data_cache.json", "[]", ":1: expected an object of chains, got a list"),
        ("chain_data_cache.json", '{"1ubq_A": {"seq": "A", "resolution": "x"}}', "1ubq_A: not a"),
        ("mmcif_cache.json", '{"1ubq": {"chain_ids": ["A"], "seqs": []}}', "1ubq: not an entry"),
        ("index.tsv", "name\tentity\n", ":1: no column 'chain' in the header"),
        ("index.tsv", "chain\tentity\n1ubq_A\n", ":2: 1 columns, the header has 2"),
        ("split.tsv", "chain\tsplit\n1ubq_A\ttest\n", "1ubq_A: 'test' is not in"),
    ],
)
def test_malformed_tables(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(build(tmp_path, ("1ubq_A",)) / name, text)
    found = error_of(lambda: Dataset(str(tmp_path), CONFIG))
    assert found.startswith(str(path)) and message in found


def test_two_chains_in_a_file_of_one(tmp_path: Path) -> None:
    write(tmp_path / "mmcif" / "predicted.cif", content("mmcif/1bd2.cif"))
    write(tmp_path / "alignments" / "predicted" / "x.a3m", msa("1bd2_A"))
    with pytest.raises(DataError, match="every chain was filtered out"):
        Dataset(str(tmp_path), CONFIG)


def test_a_long_scan_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 4))  # seconds
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert list(progress(list("abcdef"), "reading")) == list("abcdef")
    assert capsys.readouterr().err == "reading: 3/6\nreading: 6/6\n"
    assert list(progress(list("ab"), "reading")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_the_embedded_set_lies_in_the_package() -> None:
    layout = find_layout("embedded")
    assert len(layout.alignments) == 48 and len(layout.structures) == 40
    size = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file())
    assert size < 3_000_000
    assert np.isfinite(Dataset("embedded", CONFIG).weights()).all()
