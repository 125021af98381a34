"""The optional tables beside a data set: what is known of a chain without opening its files.

All of them are optional: ``chain_data_cache.json``, ``mmcif_cache.json``, cluster files by chain or
by entity, ``duplicate_pdb_chains.txt``, ``index.tsv``, ``split.tsv``, ``chains.csv`` (the processed
form of MLPerf HPC).
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from foldcore.data.layout import normal_id
from foldcore.errors import DataError

SPLITS = ("train", "validation")


@dataclass(frozen=True, slots=True)
class ChainInfo:
    """What the filters need. Resolution: None = unknown, 0 = the method has none (NMR)."""

    sequence: str
    resolution: float | None  # angstrom
    release_date: str | None  # YYYY-MM-DD
    cluster_size: int | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """A group of similar chains, named by its first member."""

    name: str
    size: int


@dataclass
class Caches:
    """The tables that were found; an absent one is empty."""

    chains: dict[str, ChainInfo] = field(default_factory=dict)
    clusters_by_chain: dict[str, Cluster] = field(default_factory=dict)  # upper-case chain id
    clusters_by_entity: dict[str, Cluster] = field(default_factory=dict)  # upper-case entity id
    duplicates: list[list[str]] = field(default_factory=list)
    entities: dict[str, str] = field(default_factory=dict)  # chain id -> entity id
    linkage: dict[str, str] = field(default_factory=dict)  # chain id -> linkage group
    split: dict[str, str] = field(default_factory=dict)  # chain id -> train or validation

    def cluster(self, chain_id: str) -> Cluster | None:
        """The 40 % cluster of a chain, by its own id or by its entity's."""
        by_chain = self.clusters_by_chain.get(chain_id.upper())
        return by_chain or self.clusters_by_entity.get(self.entities.get(chain_id, "").upper())


def read_caches(root: str | Path) -> Caches:
    """Read whichever tables lie in ``root``; a malformed one is a :class:`DataError`."""
    root = Path(root)
    caches = Caches(
        chains={**_chains_csv(root), **_mmcif_cache(root), **_chain_data_cache(root)},
        clusters_by_chain=_clusters(root / "clusters-by-chain-40.txt"),
        clusters_by_entity=_clusters(root / "clusters-by-entity-40.txt"),
        duplicates=[words for _, words in _lines(root / "duplicate_pdb_chains.txt")],
    )
    for row in _table(root / "index.tsv", ("chain",)):
        chain_id = normal_id(row["chain"])
        if row.get("entity"):
            caches.entities[chain_id] = row["entity"]
        if row.get("linkage40"):
            caches.linkage[chain_id] = row["linkage40"]
    for row in _table(root / "split.tsv", ("chain", "split")):
        if row["split"] not in SPLITS:
            where = root / "split.tsv"
            raise DataError(where, None, f"{row['chain']}: {row['split']!r} is not in {SPLITS}")
        caches.split[normal_id(row["chain"])] = row["split"]
    return caches


def _chain_data_cache(root: Path) -> dict[str, ChainInfo]:
    path = root / "chain_data_cache.json"
    chains = {}
    for name, entry in _json(path).items():
        try:
            size = entry.get("cluster_size")
            chains[normal_id(name)] = ChainInfo(
                sequence=str(entry["seq"]),
                resolution=_number(entry.get("resolution")),
                release_date=entry.get("release_date") or None,
                cluster_size=size if size is not None and int(size) > 0 else None,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(path, None, f"{name}: not a chain record ({error!r})") from None
    return chains


def _mmcif_cache(root: Path) -> dict[str, ChainInfo]:
    path = root / "mmcif_cache.json"
    chains = {}
    for name, entry in _json(path).items():
        try:
            date, resolution = entry.get("release_date") or None, _number(entry.get("resolution"))
            for chain, sequence in zip(entry["chain_ids"], entry["seqs"], strict=True):
                chains[normal_id(f"{name}_{chain}")] = ChainInfo(str(sequence), resolution, date)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(path, None, f"{name}: not an entry record ({error!r})") from None
    return chains


def _chains_csv(root: Path) -> dict[str, ChainInfo]:
    path = root / "chains.csv"
    if not path.is_file():
        return {}
    chains = {}
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = Counter(row.get("pdb_cluster_id") for row in rows)
    for number, row in enumerate(rows, 2):
        try:
            resolution = _number(row["resolution"] or None)
            cluster = row["pdb_cluster_id"]  # -1 = in no cluster
            chains[normal_id(row["pdb_chain_id"])] = ChainInfo(
                sequence=row["sequence"],
                resolution=None if resolution is None or isnan(resolution) else resolution,
                release_date=row["release_date"] or None,
                cluster_size=None if cluster in ("", "-1") else sizes[cluster],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(path, number, f"not a chain record ({error!r})") from None
    return chains


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(path, error.lineno, f"not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(path, None, f"not text: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(path, 1, f"expected an object of chains, got a {type(tree).__name__}")
    return tree


def _clusters(path: Path) -> dict[str, Cluster]:
    clusters: dict[str, Cluster] = {}
    for _, words in _lines(path):
        cluster = Cluster(words[0], len(words))
        for name in words:  # ids that differ in case only are one here, as in OpenFold
            clusters.setdefault(name.upper(), cluster)
    return clusters


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if words := line.split():
                yield number, words


def _table(path: Path, required: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated table with a header line."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        header = file.readline().rstrip("\n").split("\t")
        if missing := [name for name in required if name not in header]:
            raise DataError(path, 1, f"no column {missing[0]!r} in the header")
        for number, line in enumerate(file, 2):
            cells = line.rstrip("\n").split("\t")
            if len(cells) != len(header):
                raise DataError(path, number, f"{len(cells)} columns, the header has {len(header)}")
            yield dict(zip(header, cells, strict=True))
