"""Reading a packed store: the chains of a data set by random access, without parsing.

    store.json               what the store is, its files with sizes and checksums; written last
    chains.arrow             a row for every chain with a structure and an alignment
    entries.arrow            a row for every structure file
    structures-00000.arrow   chains in atom37 layout, as compressed blobs
    alignments-00000.arrow   merged alignments and resolved template hits, each stored once
    rejects.tsv              what did not make it: file, line, subject, rule, reason

A store may come from anywhere: sizes, offsets and checksums are verified before they are used, and
a damaged file is a :class:`DataError` that names it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, UInt8, UInt16

from foldcore.constants import num_msa_codes
from foldcore.data.caches import Caches, ChainInfo, Cluster
from foldcore.data.codec import decode, decode_text
from foldcore.data.hits import PackedHit, load_hits
from foldcore.data.join import Place
from foldcore.data.layout import Layout
from foldcore.data.mmcif import Chain, Structure
from foldcore.data.report import Reject, Report
from foldcore.data.shards import Address, ArrowFile, shard_path
from foldcore.data.structures import Structures
from foldcore.errors import DataError

MANIFEST = "store.json"
WORK = ".work"  # finished pieces of a store that is being prepared
REJECTS = "rejects.tsv"
FORMAT, VERSION = "twinfold-store", 1
REJECT_COLUMNS = ("file", "line", "subject", "rule", "reason")
CHAINS = pa.schema(
    [
        ("chain_id", pa.string()),
        ("entry", pa.string()),
        ("chain", pa.string()),  # author chain id; "" = the only one of its file
        ("sequence", pa.string()),
        ("resolution", pa.float64()),  # angstrom; null = unknown, 0 = the method has none
        ("release_date", pa.string()),  # YYYY-MM-DD; null = unknown
        ("cluster_size", pa.int32()),  # as chain_data_cache.json has it
        ("cluster", pa.string()),  # name of the 40 % cluster, from a cluster file
        ("cluster_members", pa.int32()),
        ("linkage", pa.string()),
        ("split", pa.string()),
        ("shard", pa.int32()),  # of its alignment
        ("batch", pa.int32()),
        ("row", pa.int32()),
    ]
)

ALIGNMENTS = pa.schema(
    [
        ("sequence", pa.string()),  # of the query
        ("msa", pa.binary()),  # the rows that merge() keeps, then those that repeat one of them
        ("deletions", pa.binary()),
        ("num_rows", pa.int32()),  # that merge() keeps
        ("counts", pa.binary()),  # of each code in each column of the kept rows
        ("order", pa.binary()),  # row of `msa` for every row of every file, end to end
        ("files", pa.binary()),  # JSON: [rows stored, rows left out] of each file
        ("hits", pa.binary()),  # JSON of foldcore.data.hits
        ("hit_residues", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """A merged alignment; row 0 is the query."""

    rows: UInt8[np.ndarray, "n r"]
    deletions: UInt16[np.ndarray, "n r"]
    profile: Float[np.ndarray, "r 22"] | None  # None: to be counted
    left_out: int  # rows of its files beyond the limit


def is_store(path: str | Path) -> bool:
    """Whether a folder is a packed store; an unfinished one is a :class:`DataError`."""
    root = Path(path).expanduser()
    if (root / MANIFEST).is_file():
        return True
    if (root / WORK).is_dir():
        reason = "an unfinished store: run foldcore.data.prepare again, it continues where it ended"
        raise DataError(root, None, reason)
    return False


class Store:
    """An open store; what is sent to another process is its path alone."""

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.root = Path(path).expanduser()
        self.manifest = _read_manifest(self.root)
        for name, known in self.manifest["files"].items():
            _check_file(self.root / name, known, verify and name in ("chains.arrow", REJECTS))
        if verify:
            _check_file(self.root / "entries.arrow", self.manifest["files"]["entries.arrow"], True)
        self.structures = Structures(self.root)
        self._alignments: dict[int, ArrowFile] = {}

    def __reduce__(self) -> tuple[Callable[..., "Store"], tuple[str, bool]]:
        return Store, (str(self.root), False)

    def verify(self) -> Iterator[str]:
        """Read every file whole and compare it with its checksum; yields the names."""
        for name, known in self.manifest["files"].items():
            _check_file(self.root / name, known, True)
            yield name

    def layout(self) -> Layout:
        """The store as a data set's folder: its entries, all in one place."""
        return Layout(str(self.root), dict.fromkeys(self.structures.rows, str(self.root)), {})

    def check_rows(self, max_msa_rows: int) -> None:
        """Rows that were left out in preparation cannot be asked for."""
        kept = self.manifest["max_msa_rows"]
        if max_msa_rows > kept:
            reason = f"prepared with {kept} rows of each alignment file, data.max_msa_rows asks for"
            raise DataError(
                self.root, None, f"{reason} {max_msa_rows}: prepare with --max-msa-rows"
            )

    def joined(self, report: Report) -> tuple[dict[str, Place], dict[str, ChainInfo], Caches]:
        """Places, descriptions and tables of all chains; the rejects go to the report."""
        places: dict[str, Place] = {}
        infos: dict[str, ChainInfo] = {}
        caches = Caches()
        for row in self.chains():
            name = row["chain_id"]
            address = "/".join(str(row[part]) for part in Address._fields)
            places[name] = Place(row["entry"], row["chain"], address)
            date, size = row["release_date"], row["cluster_size"]
            infos[name] = ChainInfo(row["sequence"], row["resolution"], date, size)
            if row["cluster"] is not None:
                cluster = Cluster(row["cluster"], row["cluster_members"])
                caches.clusters_by_chain.setdefault(name.upper(), cluster)
            if row["linkage"] is not None:
                caches.linkage[name] = row["linkage"]
            if row["split"] is not None:
                caches.split[name] = row["split"]
        for reject in self.rejects():
            report.reject(reject.subject, reject.rule, reject.reason)
        return places, infos, caches

    def chains(self) -> Iterator[dict[str, Any]]:
        """The rows of ``chains.arrow``."""
        file = ArrowFile(self.root / "chains.arrow", CHAINS)
        for number in range(file.num_batches):
            columns = [column.to_pylist() for column in file.batch(number).columns]
            for values in zip(*columns, strict=True):
                yield dict(zip(CHAINS.names, values, strict=True))

    def rejects(self) -> Iterator[Reject]:
        """The rows of the table of rejects."""
        path = self.root / REJECTS
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for number, line in enumerate(file, 1):
                cells = line.rstrip("\n").split("\t")
                if len(cells) != len(REJECT_COLUMNS):
                    raise DataError(path, number, f"{len(cells)} columns, expected 5")
                if number > 1:
                    name, at, subject, rule, reason = cells
                    where = int(at) if at.isdecimal() else None
                    yield Reject(name, where, subject, rule, reason)

    def chain(self, place: Place) -> tuple[Structure, Chain]:
        """The structure (without its other chains) and the chain at a place."""
        structure, address = self.structures.find(place.entry, place.chain)
        return structure, self.structures.chain(address)

    def alignment(self, place: Place, sequence: str, max_rows: int) -> Alignment:
        """The alignment at a place, as if ``max_rows`` rows of each of its files were read."""
        file, at = self._locate(place)
        try:
            return _alignment(file, at, sequence, max_rows)
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            where = f"row {at.row} of batch {at.batch}"
            raise DataError(file.path, None, f"{where} cannot be used: {error}") from None

    def hits(self, place: Place) -> Iterator[PackedHit]:
        """The template hits at a place, best first."""
        file, at = self._locate(place)
        try:
            residues = decode(file.cell(at.batch, at.row, "hit_residues"))
            yield from load_hits(decode_text(file.cell(at.batch, at.row, "hits")), residues)
        except (ValueError, TypeError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            where = f"row {at.row} of batch {at.batch}"
            raise DataError(file.path, None, f"{where}: its hits cannot be used: {error}") from None

    def _locate(self, place: Place) -> tuple[ArrowFile, Address]:
        at = Address(*(int(part) for part in place.folder.split("/")))
        if at.shard not in self._alignments:
            path = shard_path(self.root, "alignments", at.shard)
            self._alignments[at.shard] = ArrowFile(path, ALIGNMENTS)
        return self._alignments[at.shard], at


def digest(path: Path) -> str:
    """Checksum of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _alignment(file: ArrowFile, at: Address, sequence: str, max_rows: int) -> Alignment:
    cells = {name: file.cell(at.batch, at.row, name) for name in ALIGNMENTS.names[:7]}
    rows, deletions = decode(cells["msa"]), decode(cells["deletions"])
    count, length = cells["num_rows"], len(sequence)
    if cells["sequence"] != sequence:
        raise ValueError("it is the alignment of another sequence")
    if rows.dtype != np.uint8 or rows.shape != deletions.shape or rows.shape[1:] != (length,):
        raise ValueError(f"{length} residues, an alignment of shape {rows.shape}")
    if not 0 < count <= len(rows) or rows.max() >= num_msa_codes:
        raise ValueError(f"{count} of {len(rows)} rows, codes up to {rows.max(initial=0)}")
    files = json.loads(decode_text(cells["files"]))
    left_out = sum(left + max(stored - max_rows, 0) for stored, left in files)
    if any(stored > max_rows for stored, _ in files):
        kept = _merge_again(rows, decode(cells["order"]), [stored for stored, _ in files], max_rows)
        return Alignment(rows[kept], deletions[kept], None, left_out)
    counts = decode(cells["counts"])
    if counts.shape != (length, num_msa_codes):
        raise ValueError(f"{length} residues, counts of shape {counts.shape}")
    return Alignment(rows[:count], deletions[:count], counts / float(count), left_out)


def _merge_again(
    rows: UInt8[np.ndarray, "n r"], order: np.ndarray, stored: list[int], max_rows: int
) -> list[int]:
    """Rows that are left, without repeats, of the query and the first rows of each file."""
    if sum(stored) != len(order):
        raise ValueError("its files have other rows than the alignment")
    first = {rows[0].tobytes(): 0}
    start = 0
    for count in stored:
        for number in order[start : start + min(count, max_rows)].tolist():
            first.setdefault(rows[number].tobytes(), number)
        start += count
    return list(first.values())


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, None, f"not a readable store: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(path, None, "not a packed store of this program")
    if manifest.get("version") != VERSION:
        version = manifest.get("version")
        raise DataError(
            path, None, f"format {version!r}; this program reads {VERSION}: prepare it again"
        )
    files = manifest.get("files")
    names = ("chains.arrow", "entries.arrow", REJECTS)
    if not isinstance(files, dict) or not all(isinstance(v, dict) for v in files.values()):
        raise DataError(path, None, "its list of files is missing")
    if missing := [name for name in names if name not in files]:
        raise DataError(path, None, f"its list of files lacks {missing[0]}")
    if bad := [name for name in files if Path(name).name != name]:
        raise DataError(path, None, f"a file outside of the store: {bad[0]!r}")
    if type(manifest.get("max_msa_rows")) is not int:
        raise DataError(path, None, "max_msa_rows is missing")
    return manifest


def _check_file(path: Path, known: dict[str, Any], whole: bool) -> None:
    if not path.is_file():
        raise DataError(path, None, "missing: the store was not copied whole")
    if path.stat().st_size != known.get("bytes"):
        reason = f"{path.stat().st_size} bytes, the store lists {known.get('bytes')}: truncated?"
        raise DataError(path, None, reason)
    if whole and digest(path) != known.get("blake2b"):
        raise DataError(path, None, "its contents do not match their checksum: damaged")
