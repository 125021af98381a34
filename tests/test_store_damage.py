"""A store from outside: damage and lies are named, never believed and never run."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sets import build

from foldcore.config import DataConfig
from foldcore.data import codec
from foldcore.data.dataset import Dataset
from foldcore.data.hits import PackedTemplates, load_hits
from foldcore.data.prepare import Settings, prepare
from foldcore.data.shards import Address
from foldcore.data.store import MANIFEST, Store
from foldcore.data.structures import Atoms
from foldcore.data.transforms import RawExample
from foldcore.errors import DataError

CONFIG = DataConfig(accept_unknown=True)
CHAINS = ("1bd2_A", "1ubq_A")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    raw = build(folder / "raw", CHAINS)
    return prepare([str(raw)], folder / "store", Settings(jobs=1, quiet=True))


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def read(store: Path) -> list[RawExample]:
    dataset = Dataset(str(store), CONFIG)
    return [dataset.raw(chain_id) for chain_id in CHAINS]


def contents(example: RawExample) -> bytes:
    arrays = [example.positions, example.mask, example.msa, example.deletions, example.aatype]
    arrays += [example.templates[name] for name in example.templates]
    return b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)


ARRAYS = [
    np.arange(70, dtype=np.int32),
    np.array([5, 2**31 - 1, -(2**31), 0], np.int32),
    np.zeros((0, 4), np.uint8),
    np.zeros((3, 0, 3), np.float32),
    np.random.default_rng(0).integers(0, 22, (40, 30)).astype(np.uint8),
    (np.random.default_rng(1).random((9, 37)) < 0.3).astype(np.float32),
    np.random.default_rng(2).random(11).astype(np.float32),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_an_array_comes_back(array: np.ndarray) -> None:
    back = codec.decode(codec.encode(array))
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("kind", ["decimals", "far", "extreme", "noise", "few"])
def test_coordinates_come_back(kind: str) -> None:
    rng = np.random.default_rng(3)
    mask = (rng.random((20, 37)) < (0.01 if kind == "few" else 0.4)).astype(np.float32)
    positions = np.round(rng.normal(0, 30, (20, 37, 3)), 3)
    if kind == "far":
        positions[7] += 9e5
    if kind == "extreme":  # a step that only wraps into 32 bits
        positions[7], positions[8] = -2e6, 2e6
    if kind == "noise":
        positions += rng.random(positions.shape) * 1e-4
    positions = np.where(mask[..., None] > 0, positions, 0).astype(np.float32)
    blob = codec.encode(positions, mask)
    assert codec.decode(blob, mask).tobytes() == positions.tobytes()
    coding = blob[4]
    assert coding == (codec.MASKED if kind == "noise" else codec.DECIMALS)
    with pytest.raises(ValueError, match="mask"):
        codec.decode(blob, np.ones((20, 37), np.float32))
    with pytest.raises(ValueError, match="mask"):
        codec.decode(blob)


def test_negative_zeros_come_back() -> None:
    mask = np.ones((3, 37), np.float32)
    positions = np.full((3, 37, 3), -0.0, np.float32)
    assert codec.decode(codec.encode(positions, mask), mask).tobytes() == positions.tobytes()
    assert codec.decode(codec.encode(positions, 0 * mask)).tobytes() == positions.tobytes()


def test_deletions_come_back() -> None:
    rng = np.random.default_rng(4)
    deletions = (rng.poisson(0.02, (50, 33)) * rng.integers(1, 60_000, (50, 33))).astype(np.uint16)
    for matrix in (deletions, np.zeros_like(deletions), deletions[:0]):
        assert codec.decode(codec.encode_sparse(matrix)).tobytes() == matrix.tobytes()


BLOBS = [
    codec.encode(ARRAYS[0]),
    codec.encode(ARRAYS[4]),
    codec.encode_sparse(np.eye(9, dtype="u2")),
]


@given(st.sampled_from(BLOBS), st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_noticed(blob: bytes, at: int, change: int) -> None:
    damaged = bytearray(blob)
    damaged[at % len(blob)] ^= change
    with pytest.raises(ValueError, match="checksum"):
        codec.decode(bytes(damaged))
    with pytest.raises(ValueError, match="truncated|checksum"):
        codec.decode(blob[: at % len(blob)])


@given(st.sampled_from(BLOBS), st.integers(4, 60), st.binary(min_size=1, max_size=5))
def test_a_forged_blob_is_an_error_or_an_array(blob: bytes, at: int, new: bytes) -> None:
    """Its checksum is right, but what it says need not be."""
    forged = blob[4:at] + new + blob[at + len(new) :]
    forged = struct.pack("<I", zlib.crc32(forged)) + forged
    try:
        assert codec.decode(forged).nbytes <= codec.MAX_BYTES
    except ValueError as error:
        assert str(error)


def test_sizes_that_do_not_agree_take_no_memory() -> None:
    head = struct.pack("<BBBB", codec.PLAIN, 0, 2, 1) + struct.pack("<II", 2**31, 2**31)
    for body in (head + struct.pack("<II", 0, 2**32 - 1), head + struct.pack("<II", 5, 25)):
        forged = struct.pack("<I", zlib.crc32(body + b"x")) + body + b"x"
        with pytest.raises(ValueError, match="sizes do not agree"):
            codec.decode(forged)


def test_every_damaged_byte_is_named_or_harmless(whole: Path, tmp_path: Path) -> None:
    """Flipped all over the files; the error names one of them, or the examples are the same."""
    expected = [contents(example) for example in read(whole)]
    rng = np.random.default_rng(5)
    named = 0
    for name in sorted(p.name for p in whole.iterdir()):
        data = (whole / name).read_bytes()
        for number in range(40):
            store = tmp_path / f"{name}-{number}"
            shutil.copytree(whole, store)
            damaged = bytearray(data)
            damaged[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
            (store / name).write_bytes(damaged)
            try:
                assert [contents(example) for example in read(store)] == expected
            except DataError as error:
                assert str(store) in str(error) and error.reason
                named += 1
            shutil.rmtree(store)
    assert named > 60


@pytest.mark.parametrize(
    "name",
    ["chains.arrow", "entries.arrow", "structures-00000.arrow", "alignments-00000.arrow"],
)
def test_a_file_cut_short_or_absent_is_named(store: Path, name: str) -> None:
    path = store / name
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(DataError, match=f"{name}: .*truncated"):
        read(store)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        read(store)
    path.write_bytes(b"x" * len(data))
    with pytest.raises(DataError, match=rf"{name}: (its contents|not a readable Arrow)"):
        read(store)
        list(Store(store).verify())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, "not a packed store"),
        ({"version": 99}, "format 99; this program reads 1: prepare it again"),
        ({"files": {}}, "lacks chains.arrow"),
        ({"files": None}, "list of files is missing"),
        ({"max_msa_rows": "many"}, "max_msa_rows is missing"),
    ],
)
def test_a_wrong_manifest_says_why(store: Path, change: dict[str, object], reason: str) -> None:
    manifest = json.loads((store / MANIFEST).read_text()) | change
    (store / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=reason):
        read(store)


def test_a_store_names_no_file_outside_of_itself(store: Path) -> None:
    manifest = json.loads((store / MANIFEST).read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1}
    (store / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="outside of the store: '../../etc/passwd'"):
        read(store)


@pytest.mark.parametrize(
    "hit",
    [
        ["n", "1abc", "1abc", "", 1.0, "", 0, 0, 0, 3],
        ["n", "1abc", "1abc", "", 1.0, "", 0, 0, 0, -1],
        ["n", "1abc", "1abc", "", 1.0, "free", 0, 0, 0, 2],
        ["n", "1abc", "1abc", "", "1", "", 0, 0, 0, 2],
        ["n", "1abc", "1abc"],
    ],
)
def test_hits_that_do_not_fit_are_refused(hit: list[object]) -> None:
    with pytest.raises(ValueError):
        list(load_hits(json.dumps([hit]), np.array([0, 1, 2, 3], np.int32)))


def test_residues_that_do_not_fit_are_refused() -> None:
    good = ["n", "1abc", "1abc", "", 1.0, "", 0, 0, 0, 2]
    with pytest.raises(ValueError, match="not of this format"):
        list(load_hits(json.dumps([good]), np.array([0, -9, 2, 3], np.int32)))
    for in_query, in_chain in (([0, 9], [0, 1]), ([0, 1], [0, 9])):
        residues = np.array(in_query + in_chain, np.int32)
        chain = Atoms("AAAAA", np.zeros((5, 37, 3), np.float32), np.ones((5, 37), np.float32))
        hits = list(load_hits(json.dumps([good]), residues))
        templates = PackedTemplates(hits, 5, {Address(0, 0, 0): chain}.__getitem__)
        with pytest.raises(DataError, match="aligned outside"):
            templates.pick(np.array([0]), slice(0, 5))
        with pytest.raises(DataError, match="aligned outside"):
            templates["template_aatype"]
