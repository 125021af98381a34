"""Pack raw inputs into a store: ``python -m foldcore.data.prepare SOURCE... --out STORE``.

Structures are parsed first, then alignments, whose template hits need the structures; the index
comes last. A preparation that was stopped, at any point, continues when the same command is run
again, and a store is not there before it is whole. docs/data.md lists the forms of input.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldcore import __version__
from foldcore.config import DataConfig
from foldcore.data.caches import Caches, ChainInfo, read_caches
from foldcore.data.engine import ENGINES, EngineError, available_cores, run_tasks
from foldcore.data.inventory import Input, Inventory, take_inventory
from foldcore.data.join import Place, describe, join
from foldcore.data.layout import Layout
from foldcore.data.pack import (
    ALIGNMENTS,
    UNREADABLE_ALIGNMENT,
    AlignmentTask,
    StructureTask,
    pack_alignments,
    pack_structures,
)
from foldcore.data.progress import Meter
from foldcore.data.report import Reject, Report
from foldcore.data.shards import Address, ArrowFile, atomic, merge_parts, write_rows
from foldcore.data.store import (
    CHAINS,
    FORMAT,
    MANIFEST,
    REJECT_COLUMNS,
    REJECTS,
    VERSION,
    WORK,
    digest,
)
from foldcore.data.structures import ENTRIES, STRUCTURES, Structures
from foldcore.errors import DataError, file_trouble

TASK_UNITS = 64  # entries or alignments of one task: what a killed worker has to do again


@dataclass(frozen=True)
class Settings:
    """How a store is made; none of it but ``max_msa_rows`` changes what is in it."""

    engine: str = "local"
    jobs: int = 0  # processes; 0 = one for each core
    address: str | None = None  # of a cluster
    max_msa_rows: int = DataConfig().max_msa_rows
    quiet: bool = False


def prepare(sources: Sequence[str], out: str | Path, settings: Settings | None = None) -> Path:
    """Pack the sources into the store ``out``; returns its folder. Continues what was begun."""
    settings = settings or Settings()
    root = Path(out).expanduser().absolute()
    inventory = take_inventory(sources)
    key = fingerprint(inventory, settings)
    (root / WORK).mkdir(parents=True, exist_ok=True)
    with _only_one(root / WORK):
        if (root / MANIFEST).is_file():
            _same_inputs(root, key)
        else:
            _Preparation(root, inventory, key, settings).run()
    shutil.rmtree(root / WORK)
    return root


class _Preparation:
    """One store in the making."""

    def __init__(
        self, root: Path, inventory: Inventory, fingerprint: str, settings: Settings
    ) -> None:
        self.root, self.work = root, root / WORK
        self.inventory, self.fingerprint, self.settings = inventory, fingerprint, settings
        self.jobs = settings.jobs or available_cores()
        self.rejects = list(inventory.rejects)
        self.caches = read_tables(inventory, self.work)
        self.effort: dict[str, float] = {"seconds": 0.0}  # of all processes together

    def run(self) -> None:
        started = time.monotonic()
        structures = self._pack_structures()
        report = Report(", ".join(self.inventory.roots))
        places, infos = self._join(structures, report)
        addresses = self._pack_alignments(structures, places)
        rows = list(self._chain_rows(places, infos, addresses, report))
        write_rows(self.root / "chains.arrow", CHAINS, rows, {"chains": len(rows)})
        self._add_report(report)
        _write_rejects(self.root / REJECTS, self.rejects)
        if not rows:
            raise DataError(self.root, None, f"no chain could be packed; see {REJECTS}")
        self._finish(len(rows), time.monotonic() - started)

    def _pack_structures(self) -> Structures:
        """Parse all entries, unless an earlier run has."""
        with_entities = bool(self.caches.clusters_by_entity) and not self.caches.clusters_by_chain
        units = sorted(self.inventory.structures.items())
        tasks = [
            StructureTask(str(self._part("structures", block)), block, with_entities)
            for block in _blocks(units)
        ]
        self._run("structures", tasks, pack_structures)
        parts = [Path(task.part) for task in tasks]
        addresses = merge_parts(parts, STRUCTURES, self.root, "structures")
        rows = []
        for part, places in zip(parts, addresses, strict=True):
            notes = self._notes(part, STRUCTURES)
            for entry in notes["entries"]:
                row = entry.pop("row")
                at = places[row] if entry["count"] else Address(0, 0, 0)
                rows.append(entry | at._asdict())
        write_rows(self.root / "entries.arrow", ENTRIES, rows, {"fingerprint": self.fingerprint})
        return Structures(self.root)

    def _join(
        self, structures: Structures, report: Report
    ) -> tuple[dict[str, Place], dict[str, ChainInfo]]:
        """Chains with both a structure and an alignment, as a folder read directly has them."""
        files = {entry: file.label for entry, file in self.inventory.structures.items()}
        layout = Layout(report.path, files, self.inventory.alignments)
        places = join(layout, self.caches, report)
        for entry, row in structures.rows.items():
            del row
            known = structures.entry(entry)
            for chain, entity in zip(structures.names(entry), known["entities"], strict=True):
                if entity:
                    self.caches.entities.setdefault(f"{entry}_{chain}", entity)
        return places, describe(places, self.caches, report, structures.scan)

    def _pack_alignments(
        self, structures: Structures, places: dict[str, Place]
    ) -> dict[str, Address]:
        """Pack each alignment once for each query sequence; addresses by chain id."""
        units: dict[tuple[str, str], list[str]] = {}  # (folder, sequence) -> chains
        for chain_id, place in places.items():
            try:
                sequence = structures.sequence(place.entry, place.chain)
            except DataError as error:
                if place.entry in structures.rows:  # else the entry is among the rejects
                    self.rejects.append(
                        Reject(error.path, None, chain_id, "chain absent", error.reason)
                    )
                continue
            units.setdefault((place.folder, sequence), []).append(chain_id)
        items = [
            (folder, sequence, tuple(self.inventory.folders[folder])) for folder, sequence in units
        ]
        keyed = [
            (f"{number}", sequence, files) for number, (_, sequence, files) in enumerate(items)
        ]
        tasks = [
            AlignmentTask(
                str(self._part("alignments", block)),
                str(self.root),
                block,
                self.settings.max_msa_rows,
            )
            for block in _blocks(keyed)
        ]
        self._run("alignments", tasks, pack_alignments)
        return self._merge_alignments([Path(task.part) for task in tasks], list(units.values()))

    def _merge_alignments(self, parts: list[Path], chains: list[list[str]]) -> dict[str, Address]:
        addresses: dict[str, Address] = {}
        known = len(self.rejects)
        merged = merge_parts(parts, ALIGNMENTS, self.root, "alignments")
        for part, places in zip(parts, merged, strict=True):
            keys = self._notes(part, ALIGNMENTS)["keys"]
            for key, at in zip(keys, places, strict=True):
                addresses |= dict.fromkeys(chains[int(key)], at)
        failed = self.rejects[known:]
        self.rejects[known:] = [
            Reject(r.file, r.line, chain_id, UNREADABLE_ALIGNMENT, r.reason)
            for r in failed
            for chain_id in chains[int(r.subject)]
        ]
        return addresses

    def _chain_rows(
        self,
        places: dict[str, Place],
        infos: dict[str, ChainInfo],
        addresses: dict[str, Address],
        report: Report,
    ) -> Iterator[dict[str, Any]]:
        for chain_id in sorted(infos.keys() & addresses.keys()):
            place, info = places[chain_id], infos[chain_id]
            cluster = self.caches.cluster(chain_id)
            yield {
                "chain_id": chain_id,
                "entry": place.entry,
                "chain": place.chain,
                "sequence": info.sequence,
                "resolution": info.resolution,
                "release_date": info.release_date,
                "cluster_size": info.cluster_size,
                "cluster": cluster.name if cluster else None,
                "cluster_members": cluster.size if cluster else None,
                "linkage": self.caches.linkage.get(chain_id),
                "split": self.caches.split.get(chain_id),
                **addresses[chain_id]._asdict(),
            }

    def _add_report(self, report: Report) -> None:
        """What the join left out, unless it has a row of its own with the file's error."""
        known = {reject.subject for reject in self.rejects}
        for subject, (rule, reason) in report.rejected.items():
            if not known & {subject, subject.rpartition("_")[0]}:
                self.rejects.append(Reject(self._file_of(subject), None, subject, rule, reason))

    def _finish(self, chains: int, seconds: float) -> None:
        """The manifest: with it, and not before, the folder is a store."""
        shards = [*self.root.glob("structures-*.arrow"), *self.root.glob("alignments-*.arrow")]
        paths = [self.root / "chains.arrow", self.root / "entries.arrow", self.root / REJECTS]
        files = {p.name: {"bytes": p.stat().st_size, "blake2b": digest(p)} for p in paths + shards}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "program": f"twinfold {__version__}",
            "chains": chains,
            "rejects": dict(Counter(reject.rule for reject in self.rejects).most_common()),
            "max_msa_rows": self.settings.max_msa_rows,
            "sources": list(self.inventory.roots),
            "source_bytes": self.inventory.size,
            "core_seconds": round(self.effort["seconds"], 3),
            "wall_seconds": round(seconds, 3),  # of the run that finished it
            "fingerprint": self.fingerprint,
            "files": files,
        }
        with atomic(self.root / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _run(self, what: str, tasks: Sequence[Any], work: Any) -> None:
        """Do what is not done yet, with a progress line."""
        left = [task for task in tasks if not Path(task.part).is_file()]
        with Meter(what, tasks, quiet=self.settings.quiet):
            run_tasks(work, left, self.settings.engine, self.jobs, self.settings.address)

    def _notes(self, part: Path, schema: Any) -> dict[str, Any]:
        """Notes of a finished task; its rejects and its effort are added up."""
        notes = ArrowFile(part, schema).notes()
        self.rejects += [Reject(**reject) for reject in notes["rejects"]]
        self.effort["seconds"] += notes["seconds"]
        return notes

    def _part(self, what: str, block: tuple[Any, ...]) -> Path:
        """The file of a task; its name changes with the task's inputs."""
        text = f"{self.fingerprint} {what} {block!r}"
        name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return self.work / what / f"{name}.arrow"

    def _file_of(self, subject: str) -> str:
        entry = subject.rpartition("_")[0] or subject
        structure = self.inventory.structures.get(entry.lower())
        folder = self.inventory.alignments.get(subject, "")
        return structure.label if structure else folder


def _blocks(units: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(units), TASK_UNITS):
        yield tuple(units[start : start + TASK_UNITS])


def fingerprint(inventory: Inventory, settings: Settings) -> str:
    """Changes with the inputs and with whatever changes the contents of the store."""
    hasher = hashlib.blake2b(f"{VERSION} {settings.max_msa_rows}".encode(), digest_size=16)
    groups: list[Iterable[tuple[str, Input]]] = [
        inventory.structures.items(),
        ((name, file) for name, files in inventory.folders.items() for file in files),
        (item for tables in inventory.tables for item in tables.items()),
    ]
    for group in groups:
        for name, file in group:
            hasher.update(
                f"{name}\0{file.url}\0{file.start}\0{file.size}\0{file.version}\n".encode()
            )
    hasher.update(repr(sorted(inventory.alignments.items())).encode())
    return hasher.hexdigest()


def _same_inputs(root: Path, fingerprint: str) -> None:
    known = json.loads((root / MANIFEST).read_text(encoding="utf-8")).get("fingerprint")
    if known != fingerprint:
        reason = "a finished store of other inputs or settings is there; choose another --out"
        raise DataError(root, None, f"{reason}, or remove it")


@contextlib.contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Two preparations must not write the same store."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(work.parent, None, "another preparation is writing it") from None
        yield


def read_tables(inventory: Inventory, work: Path) -> Caches:
    """The tables of all sources; where two say something of one chain, the first counts."""
    merged = Caches()
    for number, tables in reversed(list(enumerate(inventory.tables))):
        folder = work / "tables" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in tables.items():
            (folder / name).write_bytes(file.read())
        caches = read_caches(folder)
        merged.chains |= caches.chains
        merged.clusters_by_chain |= caches.clusters_by_chain
        merged.clusters_by_entity |= caches.clusters_by_entity
        merged.duplicates = caches.duplicates + merged.duplicates
        merged.entities |= caches.entities
        merged.linkage |= caches.linkage
        merged.split |= caches.split
    return merged


def _write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    rows: list[tuple[Any, ...]] = [REJECT_COLUMNS]
    rows += [(r.file, r.line or "", r.subject, r.rule, r.reason) for r in rejects]
    with atomic(path) as temporary:
        text = "".join("\t".join(" ".join(str(c).split()) for c in row) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")


def _summary(root: Path) -> str:
    manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    size = sum(file["bytes"] for file in manifest["files"].values())
    rate = manifest["chains"] / max(manifest["core_seconds"], 1e-9)
    lines = [
        f"{root}: {manifest['chains']} chains in {len(manifest['files'])} files",
        f"  {size / 1e6:.1f} MB, the inputs have {manifest['source_bytes'] / 1e6:.1f} MB",
        f"  {rate:.1f} chains a second and core",
    ]
    lines += [f"  left out: {count} {rule}" for rule, count in manifest["rejects"].items()]
    if manifest["rejects"]:
        lines.append(f"  every one of them, with its reason: {root / REJECTS}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m foldcore.data.prepare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", nargs="+", help="folder or URL (s3://, gs://, ...); or embedded")
    parser.add_argument("--out", required=True, metavar="STORE", help="folder of the store")
    parser.add_argument("--jobs", type=int, default=0, help="processes; default: one for each core")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where the work runs")
    parser.add_argument("--address", help="of a running Ray or Dask cluster")
    parser.add_argument(
        "--max-msa-rows",
        type=int,
        default=DataConfig().max_msa_rows,
        help="rows kept of each alignment file (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    arguments = _parser().parse_args(argv)
    settings = Settings(arguments.engine, arguments.jobs, arguments.address, arguments.max_msa_rows)
    try:
        root = prepare(arguments.source, arguments.out, settings)
    except (DataError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (words := file_trouble(error, arguments.out)) is None:
            raise
        print(f"error: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    print(_summary(root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
