"""The packed store: the same examples as the raw files, whole or not at all, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from small_sets import build, content, msa, write

from foldcore.config import DataConfig
from foldcore.data import pack
from foldcore.data.dataset import Dataset, split
from foldcore.data.engine import EngineError, run_tasks
from foldcore.data.prepare import Settings, main, prepare
from foldcore.data.store import MANIFEST, WORK, Store
from foldcore.data.transforms import make_example
from foldcore.errors import DataError

CONFIG = DataConfig(
    accept_unknown=True, crop_size=64, num_msa_clusters=16, num_extra_msa=32, num_templates=2
)
HERE = Settings(jobs=1, quiet=True)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(["embedded"], tmp_path_factory.mktemp("store") / "embedded", HERE)


def assert_same_examples(
    raw: Dataset, packed: Dataset, chains: tuple[str, ...], examples: bool = True
) -> None:
    """Everything that is read and made of these chains, bit for bit."""
    for number, chain_id in enumerate(chains):
        ours, theirs = packed.raw(chain_id), raw.raw(chain_id)
        assert ours.resolution == theirs.resolution
        for name in ("aatype", "residue_index", "positions", "mask", "msa", "deletions"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert mine.dtype == other.dtype and mine.tobytes() == other.tobytes(), name
        for name, array in theirs.templates.items():
            assert array.tobytes() == ours.templates[name].tobytes(), name
        if examples:
            made = [make_example(r, raw.config, (1, number)) for r in (ours, theirs)]
            assert made[0].keys() == made[1].keys()
            for name, array in made[1].items():
                assert array.tobytes() == made[0][name].tobytes(), name
    for report in (raw.report, packed.report):  # a note of the set, not of its examples
        report.notes.pop("cluster size unknown, taken as 1", None)
    assert raw.report.notes == packed.report.notes


def assert_same_set(raw: Dataset, packed: Dataset) -> None:
    """Chains, what is known of them, weights, split and rejects."""
    assert packed.chains == raw.chains
    for chain_id, record in raw.records.items():
        ours = packed.records[chain_id]
        assert replace(ours, place=record.place) == record
        assert (ours.place.entry, ours.place.chain) == (record.place.entry, record.place.chain)
    assert (packed.weights() == raw.weights()).all()
    assert split(packed) == split(raw)
    assert packed.report.rejected == raw.report.rejected


def test_the_embedded_set_is_the_same(embedded: Path) -> None:
    raw, packed = Dataset("embedded", CONFIG), Dataset(str(embedded), CONFIG)
    assert_same_set(raw, packed)
    assert_same_examples(raw, packed, raw.chains[::2])


@pytest.mark.parametrize("rows", [1, 2, 30, 100])
def test_fewer_rows_are_merged_as_from_the_files(tmp_path: Path, rows: int) -> None:
    """Two databases that share rows, one of them with other deletions."""
    build(tmp_path / "raw", ("1ubq_A",))
    records = [">" + record for record in msa("1ubq_A").split(">")[1:]]
    changed = [record.replace("\n", "\nacd", 1) for record in records[20:60:2]]
    text = records[0] + "".join(changed) + "".join(records[10:30])
    write(tmp_path / "raw" / "alignments" / "1ubq_A" / "bfd_hits.a3m", text)
    store = prepare([str(tmp_path / "raw")], tmp_path / "store", HERE)
    config = replace(CONFIG, max_msa_rows=rows)
    raw, packed = Dataset(str(tmp_path / "raw"), config), Dataset(str(store), config)
    assert_same_examples(raw, packed, ("1ubq_A",))


def test_rows_beyond_those_stored_cannot_be_asked_for(tmp_path: Path) -> None:
    build(tmp_path / "raw", ("1ubq_A",))
    settings = replace(HERE, max_msa_rows=40)
    store = prepare([str(tmp_path / "raw")], tmp_path / "store", settings)
    config = replace(CONFIG, max_msa_rows=40)
    raw, packed = Dataset(str(tmp_path / "raw"), config), Dataset(str(store), config)
    assert len(packed.raw("1ubq_A").msa) <= 41
    assert_same_examples(raw, packed, ("1ubq_A",))
    assert "alignment rows beyond data.max_msa_rows" in packed.report.notes
    with pytest.raises(DataError, match="prepared with 40 rows .* asks for 41"):
        Dataset(str(store), replace(CONFIG, max_msa_rows=41))


@pytest.mark.parametrize(
    "change",
    [
        {"max_template_hits": 1},
        {"accept_unknown": False},
        {"max_template_date": "1990-01-01"},
        {"num_templates": 0},
    ],
)
def test_template_filters_are_those_of_the_run(
    shared_data: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    """Own entry, dates, unknown dates and counts are decided when an example is read."""
    chains = ("1a3a_C", "3b02_A", "102m_A", "4wfi_A")
    build_from_mini(shared_data / "mini", tmp_path / "raw", chains)
    store = prepare([str(tmp_path / "raw")], tmp_path / "store", HERE)
    config = replace(CONFIG, **change)  # type: ignore[arg-type]
    raw, packed = Dataset(str(tmp_path / "raw"), config), Dataset(str(store), config)
    assert_same_set(raw, packed)
    assert_same_examples(raw, packed, packed.chains, examples=False)


def build_from_mini(mini: Path, root: Path, chains: tuple[str, ...]) -> None:
    """These chains, and the structures of all hits of the first of them."""
    hits = (mini / "alignments" / chains[1] / "pdb70_hits.hhr").read_text()
    named = {line[1:5].lower() for line in hits.split("\n") if line.startswith(">")}
    for entry in named | {chain[:4] for chain in chains}:
        write(root / "mmcif" / f"{entry}.cif", (mini / "mmcif" / f"{entry}.cif").read_text())
    for chain in chains:
        shutil.copytree(mini / "alignments" / chain, root / "alignments" / chain)
    write(root / "chain_data_cache.json", (mini / "chain_data_cache.json").read_text())


def test_identical_chains_share_one_alignment(tmp_path: Path) -> None:
    build(tmp_path / "raw", ("1bd2_A",))
    write(tmp_path / "raw" / "duplicate_pdb_chains.txt", "1bd2_A 1bd2_C 1zzz_A\n")
    write(tmp_path / "raw" / "mmcif" / "1zzz.cif", content("mmcif/1bd2.cif"))
    store = prepare([str(tmp_path / "raw")], tmp_path / "store", HERE)
    packed = Dataset(str(store), CONFIG)
    assert {"1bd2_A", "1zzz_A"} <= set(packed.chains)
    assert packed.records["1bd2_A"].place.folder == packed.records["1zzz_A"].place.folder
    rows = pa.ipc.open_file(store / "alignments-00000.arrow").read_all()
    assert rows.num_rows == 1
    assert_same_examples(Dataset(str(tmp_path / "raw"), CONFIG), packed, packed.chains)


@pytest.mark.parametrize("zipped", [False, True])
def test_loose_files_and_wwpdb_folders(tmp_path: Path, zipped: bool) -> None:
    """mmCIF files in two-letter folders; alignments named after their chain, beside each other."""
    root = tmp_path / "raw"
    for chain in ("1ubq_A", "5pti_A"):
        entry = chain[:4]
        write(root / "raw" / entry[1:3] / f"{entry}.cif", content(f"mmcif/{entry}.cif"), zipped)
        write(root / "msas" / f"{chain}.a3m", msa(chain), zipped)
        hits = content(f"alignments/{chain}/pdb70_hits.hhr")
        write(root / "msas" / f"{chain}.pdb70.hhr", hits, zipped)
    packed = Dataset(str(prepare([str(root)], tmp_path / "store", HERE)), CONFIG)
    assert packed.chains == ("1ubq_A", "5pti_A")
    assert_same_examples(Dataset("embedded", CONFIG), packed, packed.chains)


def make_database(root: Path, chains: tuple[str, ...]) -> None:
    """An alignment database with a super index, and a key for an identical chain."""
    index, data = {}, b""
    for chain in chains:
        files = []
        for name in ("swissprot_hits.a3m", "pdb70_hits.hhr"):
            piece = content(f"alignments/{chain}/{name}").encode()
            files.append([name, len(data), len(piece)])
            data += piece
        index[chain] = {"db": "0.db", "files": files}
    write(root / "super.index", json.dumps(index))
    (root / "0.db").write_bytes(data)


def test_alignment_databases_and_mlperf_tables(tmp_path: Path) -> None:
    chains = ("1bd2_A", "1ubq_A", "5pti_A")
    make_database(tmp_path / "pdb_alignments", chains)
    header = "pdb_chain_id,release_date,resolution,pdb_cluster_id,sequence"
    rows = [header]
    for entry in ("1bd2", "1ubq", "5pti"):
        folder = tmp_path / "pdb_mmcif" / "original" / "raw" / entry[1:3]
        write(folder / f"{entry}.cif", content(f"mmcif/{entry}.cif"), zipped=True)
    rows.append(f"1ubq_A,1987-04-16,1.8,4,{'M' * 3}{'ACDEFGHIKL' * 3}")
    rows.append(f"9xyz_A,1999-01-01,,4,{'ACDEFGHIKL' * 3}")
    write(tmp_path / "pdb_mmcif" / "processed" / "chains.csv", "\n".join(rows) + "\n")
    write(tmp_path / "pdb_mmcif" / "processed" / "dicts" / "ub.pkl", "\x80")
    index = json.loads((tmp_path / "pdb_alignments" / "super.index").read_text())
    index["1bd2_D"] = {"db": "0.db", "files": [["x.a3m", 10**9, 5]]}
    (tmp_path / "pdb_alignments" / "super.index").write_text(json.dumps(index))
    store = prepare([str(tmp_path)], tmp_path / "store", HERE)
    packed = Dataset(str(store), CONFIG)
    assert packed.chains == chains
    assert packed.records["1ubq_A"].cluster_size == 2
    assert packed.records["1ubq_A"].length == 33
    rejects = {reject.subject: reject for reject in Store(store).rejects()}
    assert "it could run code" in rejects["ub.pkl"].reason
    assert "ends at byte 1000000005" in rejects["1bd2_D"].reason
    reference = Dataset("embedded", CONFIG)
    for chain in ("1bd2_A", "5pti_A"):
        assert packed.raw(chain).msa.tobytes() == reference.raw(chain).msa.tobytes()


def test_several_sources_and_object_stores(tmp_path: Path) -> None:
    """Structures on this disk, alignments in another file system."""
    build(tmp_path / "raw", ("1ubq_A",), layout="openproteinset")
    system = fsspec.filesystem("memory")
    for file in (tmp_path / "raw" / "pdb").rglob("*.*"):
        system.pipe(f"/bucket/{file.relative_to(tmp_path / 'raw')}", file.read_bytes())
    shutil.rmtree(tmp_path / "raw" / "pdb")
    sources = [str(tmp_path / "raw" / "mmcif"), "memory://bucket"]
    packed = Dataset(str(prepare(sources, tmp_path / "store", HERE)), CONFIG)
    assert packed.chains == ("1ubq_A",)
    assert_same_examples(Dataset("embedded", CONFIG), packed, packed.chains)
    system.rm("/bucket", recursive=True)


def test_what_is_left_out_has_its_file_line_and_reason(tmp_path: Path) -> None:
    root = build(tmp_path / "raw")
    write(root / "alignments" / "1bd2_B" / "uniref90_hits.a3m", msa("1ubq_A"))
    broken = root / "alignments" / "5pti_A" / "uniref90_hits.a3m"
    write(broken, msa("5pti_A").replace("\n", "\n1", 1))
    write(root / "mmcif" / "9xyz.cif", "data_9XYZ\nloop_\n")
    write(root / "alignments" / "7abc_A" / "uniref90_hits.a3m", msa("1ubq_A"))
    store = prepare([str(root)], tmp_path / "store", HERE)
    rejects = {reject.subject: reject for reject in Store(store).rejects()}
    assert rejects["1bd2_B"].rule == "unreadable alignment"
    assert "columns, but the query" in rejects["1bd2_B"].reason
    assert (rejects["5pti_A"].file, rejects["5pti_A"].line) == (str(broken), 2)
    assert rejects["9xyz"].rule == "unreadable structure"
    assert rejects["7abc_A"].rule == "alignment without structure"
    assert rejects["1bd2_D"].rule == "structure without alignment"
    packed = Dataset(str(store), CONFIG)
    assert packed.chains == ("1bd2_A", "1ubq_A")
    assert packed.report.rejected["5pti_A"][0] == "unreadable alignment"


def run(sources: list[str], store: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "foldcore.data.prepare", *sources, "--out", str(store), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def test_a_killed_preparation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it works: no store is seen, finished parts are kept, the result is the same."""
    store = tmp_path / "store"
    process = run(["embedded"], store, "--jobs", "1")
    deadline = time.monotonic() + 60
    while not list(store.glob(f"{WORK}/structures/*.arrow")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (store / MANIFEST).exists()
    with pytest.raises(DataError, match="an unfinished store"):
        Dataset(str(store), CONFIG)
    parsed: list[str] = []
    read = pack.read_structure
    monkeypatch.setattr(pack, "read_structure", lambda p, d: (parsed.append(p), read(p, d))[1])
    prepare(["embedded"], store, HERE)
    assert parsed == []  # the entries were done
    assert not (store / WORK).exists()
    raw, packed = Dataset("embedded", CONFIG), Dataset(str(store), CONFIG)
    assert_same_set(raw, packed)
    assert_same_examples(raw, packed, raw.chains[:2])


def test_stopped_at_any_step_it_ends_the_same(
    embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails before each file gets its name, one after another, and is started again each time."""
    replaced = os.replace
    budget = [0]

    def fail_later(source: str, target: str) -> None:
        if budget[0] == 0:
            raise KeyboardInterrupt
        budget[0] -= 1
        replaced(source, target)

    monkeypatch.setattr("foldcore.data.shards.os.replace", fail_later)
    store, attempts = tmp_path / "store", 0
    while not (store / MANIFEST).exists():
        budget[0] = 1  # each attempt gets one file further, or redoes what it must
        budget[0] += attempts
        attempts += 1
        try:
            prepare(["embedded"], store, HERE)
        except KeyboardInterrupt:
            assert not (store / MANIFEST).exists()
    assert attempts > 3
    for path in embedded.glob("*.arrow"):
        if path.name != "entries.arrow":  # its notes name the inputs' times
            assert path.read_bytes() == (store / path.name).read_bytes(), path.name


def test_a_finished_store_is_left_as_it_is(embedded: Path, tmp_path: Path) -> None:
    before = (embedded / MANIFEST).read_bytes()
    assert prepare(["embedded"], embedded, HERE) == embedded
    assert (embedded / MANIFEST).read_bytes() == before
    build(tmp_path / "raw", ("1ubq_A",))
    with pytest.raises(DataError, match="a finished store of other inputs"):
        prepare([str(tmp_path / "raw")], embedded, HERE)


def test_several_processes_make_the_same_store(embedded: Path, tmp_path: Path) -> None:
    process = run(["embedded"], tmp_path / "store", "--jobs", "2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    for name in ("alignments-00000.arrow", "structures-00000.arrow", "chains.arrow"):
        assert (tmp_path / "store" / name).read_bytes() == (embedded / name).read_bytes()


def test_a_store_goes_to_loader_processes_as_its_path(embedded: Path) -> None:
    import pickle

    packed = Dataset(str(embedded), CONFIG)
    packed.raw(packed.chains[0])
    sent = pickle.dumps(packed)
    assert len(sent) < 40_000
    arrived = pickle.loads(sent)
    again = arrived.raw(packed.chains[0])
    assert again.msa.tobytes() == packed.raw(packed.chains[0]).msa.tobytes()


def test_the_command_speaks_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent"), "--out", str(tmp_path / "store")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", "/proc/absent"):
        assert main(["embedded", "--out", str(out), "--jobs", "1"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {out}")
    assert main(["embedded", "--out", str(tmp_path / "store"), "--jobs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "48 chains" in shown and "chains a second and core" in shown
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), "--out", str(tmp_path / "other")]) == 2
    assert "no chain has both a structure and an alignment" in capsys.readouterr().err


def test_an_engine_that_is_not_installed_says_what_to_install() -> None:
    with pytest.raises(EngineError, match="engine 'slurm' is none of local, ray, dask"):
        run_tasks(print, [1], "slurm", 1, None)
    for engine, package in (("dask", "distributed"), ("ray", "ray")):
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(EngineError, match=rf"pip install 'twinfold\[{engine}\]'"):
                run_tasks(print, [1], engine, 1, None)


def test_mini_is_the_same(shared_data: Path, tmp_path: Path) -> None:
    """Fifteen chains of the contributors' larger set, with templates, deep and shallow."""
    mini = shared_data / "mini"
    chains = tuple(sorted(p.name for p in (mini / "alignments").iterdir()))[::60]
    build_from_mini(mini, tmp_path / "raw", chains)
    store = prepare([str(tmp_path / "raw")], tmp_path / "store", HERE)
    raw, packed = Dataset(str(tmp_path / "raw"), CONFIG), Dataset(str(store), CONFIG)
    assert_same_set(raw, packed)
    assert_same_examples(raw, packed, raw.chains)
