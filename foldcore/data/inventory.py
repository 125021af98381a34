"""What lies in the inputs of a packed store: files found by name, local or in an object store.

One walk over each source finds structures, alignments, alignment databases and tables, whichever of
the usual forms it has (``docs/data.md`` lists them). Only indices and tables are opened here.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec

from foldcore.data.files import MAX_BYTES, read_text
from foldcore.data.layout import (
    ALIGNMENT_FOLDERS,
    NOT_AN_MSA,
    STRUCTURE_FOLDERS,
    database_rank,
    find_layout,
    structure_stem,
)
from foldcore.data.report import Reject
from foldcore.errors import DataError

TABLES = (
    "chain_data_cache.json",
    "mmcif_cache.json",
    "clusters-by-chain-40.txt",
    "clusters-by-entity-40.txt",
    "duplicate_pdb_chains.txt",
    "index.tsv",
    "split.tsv",
    "chains.csv",
)
PICKLES = (".pickle", ".pkl", ".pkl.gz", ".pickle.gz", ".pkl.lz4")
_LEVELS = ("a3m", "hhr", "sto")  # folders between a chain's folder and its files
_CONTAINERS = (*ALIGNMENT_FOLDERS, "msa", "msas", "mmcif", "mmcif_files")


@dataclass(frozen=True, slots=True)
class Input:
    """A file of a source, or a piece of one; ``label`` names it in errors and tells its kind."""

    url: str
    label: str
    size: int  # bytes
    start: int | None = None  # where the piece begins; None = the whole file
    version: str = ""  # changes when the file does, as far as its storage tells

    def read(self) -> bytes:
        """Its bytes as stored (perhaps gzipped)."""
        if self.size > MAX_BYTES:
            raise DataError(self.label, None, f"larger than the limit of {MAX_BYTES} bytes")
        system, path = _open_url(self.url)
        start = self.start or 0
        try:
            data: bytes = system.cat_file(path, start=start, end=start + self.size)
        except (OSError, ValueError) as error:
            raise DataError(self.label, None, f"cannot read: {error}") from None
        if len(data) != self.size:
            raise DataError(self.label, None, f"{len(data)} of {self.size} bytes: truncated")
        return data


@dataclass
class Inventory:
    """The inputs of a store, by what they are."""

    roots: tuple[str, ...]
    structures: dict[str, Input] = field(default_factory=dict)  # entry, lower case
    folders: dict[str, list[Input]] = field(default_factory=dict)  # folder -> alignment files
    alignments: dict[str, str] = field(default_factory=dict)  # chain's name -> folder
    tables: list[dict[str, Input]] = field(default_factory=list)  # of each source, by name
    rejects: list[Reject] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of the structures and alignments, as stored."""
        files = [*self.structures.values(), *(f for fs in self.folders.values() for f in fs)]
        return sum({(file.url, file.start): file.size for file in files}.values())


def take_inventory(sources: Sequence[str]) -> Inventory:
    """List every source; of what two of them have, the first counts."""
    inventory = Inventory(tuple(resolve(source) for source in sources))
    for root in inventory.roots:
        found = _Walk(root, list(_list(root))).result()
        repeated = found.structures.keys() & inventory.structures.keys()
        inventory.rejects += [
            Reject(found.structures[e].label, None, e, "repeated", "an earlier source has it")
            for e in sorted(repeated)
        ]
        inventory.structures = found.structures | inventory.structures
        inventory.folders |= found.folders
        inventory.alignments = found.alignments | inventory.alignments
        inventory.tables += found.tables
        inventory.rejects += found.rejects
    return inventory


def resolve(source: str) -> str:
    """A source as a URL or an absolute path; ``embedded`` is the set of the package."""
    if source == "embedded":
        return find_layout(source).root
    return source.rstrip("/") if "://" in source else str(Path(source).expanduser().resolve())


def alignment_inputs(files: Sequence[Input]) -> tuple[list[Input], list[Input]]:
    """(MSAs in stacking order, template hits) among the files of one chain."""
    found: dict[str, Input] = {}  # name without .gz; the plain file wins
    for file in sorted(files, key=lambda file: _name(file.label)):
        name = _name(file.label)
        if name.removesuffix(".gz") == name or name.removesuffix(".gz") not in found:
            found[name.removesuffix(".gz")] = file
    msas = [n for n in found if n.endswith((".a3m", ".sto")) and n not in NOT_AN_MSA]
    hits = sorted(n for n in found if n.endswith(".hhr"))
    return [found[n] for n in sorted(msas, key=database_rank)], [found[n] for n in hits]


@lru_cache(maxsize=64)
def _file_system(protocol: str) -> Any:
    return fsspec.filesystem(protocol)


def _open_url(url: str) -> tuple[Any, str]:
    """File system and path in it; settings come from fsspec's configuration and environment."""
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        system = _file_system(protocol)
    except (ImportError, ValueError) as error:
        raise DataError(url, None, f"no file system for {protocol}://: {error}") from None
    return system, system._strip_protocol(url)


def _list(root: str) -> Iterator[Input]:
    """Every file below a source, in the order of their paths."""
    system, path = _open_url(root)
    if not system.isdir(path):
        raise DataError(root, None, "no such folder")
    for name, info in sorted(system.find(path, detail=True).items()):
        relative = name[len(path) :].lstrip("/")
        version = str(info.get("mtime") or info.get("ETag") or info.get("etag") or "")
        joined = f"{root}/{relative}"
        yield Input(joined, joined, int(info.get("size") or 0), version=version)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


class _Walk:
    """Sorting the files of one source."""

    def __init__(self, root: str, files: Sequence[Input]) -> None:
        self.root, self.files = root, files
        self.inventory = Inventory((root,), tables=[{}])
        self.with_structures = {self._folder(f) for f in files if structure_stem(_name(f.url))}

    def result(self) -> Inventory:
        for file in sorted(self.files, key=self._rank):
            self._sort(file)
        for file in self._indices():
            self._database(file)
        return self.inventory

    def _sort(self, file: Input) -> None:
        name = _name(file.url)
        base = name.removesuffix(".gz")
        if entry := structure_stem(name):
            self.inventory.structures[entry] = file
        elif base.endswith((".a3m", ".sto", ".hhr")):
            chain, folder = self._chain(file)
            self.inventory.alignments[chain] = folder
            self.inventory.folders.setdefault(folder, []).append(file)
        elif name in TABLES:
            self.inventory.tables[0].setdefault(name, file)
        elif name.endswith(PICKLES):
            reason = "pickled: it could run code when loaded; give the files it was made from"
            self.inventory.rejects.append(Reject(file.label, None, name, "pickle", reason))

    def _rank(self, file: Input) -> tuple[int, str]:
        """Of two files of one entry or chain the later counts, as in a folder read directly."""
        folder = self._folder(file)
        for rank, known in enumerate((*STRUCTURE_FOLDERS, *ALIGNMENT_FOLDERS)):
            if folder == known or folder.startswith(f"{known}/"):
                return rank, file.url
        return -1, file.url

    def _folder(self, file: Input) -> str:
        return os.path.dirname(file.url[len(self.root) + 1 :])

    def _chain(self, file: Input) -> tuple[str, str]:
        """Name of the chain that an alignment file belongs to, and what holds its files.

        A folder has its chain's name; among structures, or loose in a source, the file has it.
        """
        folder = self._folder(file)
        if _name(folder) in _LEVELS:
            folder = os.path.dirname(folder)
        if not folder or _name(folder) in _CONTAINERS or folder in self.with_structures:
            name = _name(file.url).partition(".")[0]
            return name, "/".join(part for part in (self.root, folder, name) if part)
        return _name(folder), f"{self.root}/{folder}"

    def _indices(self) -> list[Input]:
        """Indices of alignment databases; a super index stands for all others beside it."""
        indices = [f for f in self.files if f.url.endswith(".index")]
        super_folders = {self._folder(f) for f in indices if _name(f.url) == "super.index"}
        return [
            f
            for f in indices
            if _name(f.url) == "super.index" or self._folder(f) not in super_folders
        ]

    def _database(self, index: Input) -> None:
        sizes = {f.url: f for f in self.files if f.url.endswith(".db")}
        tree = _json(index)
        folder = os.path.dirname(index.url)
        own = f"{_name(index.url).removesuffix('.index')}.db"
        for chain, entry in tree.items():
            try:
                database, pieces = (
                    (entry["db"], entry["files"]) if isinstance(entry, dict) else (own, entry)
                )
                inputs = [_piece(sizes, f"{folder}/{database}", chain, *p) for p in pieces]
            except (KeyError, TypeError, ValueError) as error:
                reason = f"its entry in the index cannot be used: {error}"
                rule = "unreadable alignment"
                self.inventory.rejects.append(Reject(index.label, None, chain, rule, reason))
                continue
            if inputs:
                key = f"{inputs[0].url}:{inputs[0].start}"
                self.inventory.alignments[chain] = key  # identical chains are keys to one place
                self.inventory.folders[key] = inputs


def _piece(
    databases: Mapping[str, Input], url: str, chain: str, name: str, start: int, size: int
) -> Input:
    if url not in databases:
        raise ValueError(f"{url} is not there")
    if type(start) is not int or type(size) is not int or start < 0 or size < 0:
        raise ValueError(f"{name}: start {start!r}, size {size!r}")
    if start + size > databases[url].size:
        raise ValueError(f"{name} ends at byte {start + size} of {databases[url].size}")
    label = f"{url}:{chain}/{_name(str(name))}"
    return Input(url, label, size, start, databases[url].version)


def _json(index: Input) -> dict[str, Any]:
    try:
        tree = json.loads(read_text(index.label, index.read()))
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise DataError(index.label, line, f"not a readable index: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(index.label, 1, "expected an object of chains")
    return tree
