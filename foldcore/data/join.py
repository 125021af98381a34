"""Joining structures with alignments, and the filters of the training set (supplement 1.2.5)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from foldcore.config import DataConfig
from foldcore.data.caches import Caches, ChainInfo
from foldcore.data.layout import Layout, normal_id
from foldcore.data.report import EXAMPLES_SHOWN, Report
from foldcore.data.scan import entity_ids, progress
from foldcore.errors import DataError

# The rules under which the report counts what is not trained on.
NO_ALIGNMENT = "structure without alignment"
NO_STRUCTURE = "alignment without structure"
UNREADABLE = "unreadable structure"
CHAIN_ABSENT = "chain absent from its entry"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of one chain are."""

    entry: str
    chain: str  # "" = the only chain of its file
    folder: str  # of its alignments; identical chains share one


@dataclass(frozen=True, slots=True)
class Record:
    """One accepted chain."""

    place: Place
    length: int  # residues
    release_date: str  # YYYY-MM-DD; "" = unknown
    cluster_size: int  # chains in its 40 % cluster; 1 where unknown
    group: str  # linkage group: never divided between training and validation


def join(layout: Layout, caches: Caches, report: Report) -> dict[str, Place]:
    """Chains that have both a structure and an alignment, by chain id."""
    places: dict[str, Place] = {}
    folders = {normal_id(name): folder for name, folder in layout.alignments.items()}
    shared = dict(_shared_folders(caches.duplicates, folders))
    for name, folder in (folders | shared).items():
        if located := layout.locate(name):
            chain_id, entry, chain = located
            places[chain_id] = Place(entry, chain, folder)
    used = {place.folder for place in places.values()}
    if not places:
        raise _nothing_joined(layout)
    for name, folder in folders.items():
        if folder not in used:
            report.reject(name, NO_STRUCTURE)
    _reject_unaligned(layout, caches, places, report)
    return places


def describe(
    places: Mapping[str, Place],
    caches: Caches,
    report: Report,
    scan: Callable[[Iterable[str]], Iterable[tuple[str, dict[str, ChainInfo] | DataError]]],
) -> dict[str, ChainInfo]:
    """What is known of each joined chain: from the tables, else from one scan of its entry."""
    infos = {c: caches.chains[c] for c in places if c in caches.chains}
    missing: dict[str, dict[str, str]] = {}  # entry -> chain -> chain id
    for chain_id, place in places.items():
        if chain_id not in infos:
            missing.setdefault(place.entry, {})[place.chain] = chain_id
    for entry, found in scan(missing):
        wanted = missing[entry]
        if isinstance(found, DataError):
            for chain_id in wanted.values():
                report.reject(chain_id, UNREADABLE, str(found))
            continue
        if list(wanted) == [""] and len(found) == 1:
            found = {"": next(iter(found.values()))}
        for chain, chain_id in wanted.items():
            if chain in found:
                infos[chain_id] = found[chain]
            else:
                report.reject(chain_id, CHAIN_ABSENT, f"there are: {', '.join(found)}")
        for chain in found.keys() - wanted.keys():
            if f"{entry}_{chain}" not in places:
                report.reject(f"{entry}_{chain}", NO_ALIGNMENT)
    return infos


def rejection(info: ChainInfo, config: DataConfig, distillation: bool) -> tuple[str, str] | None:
    """(rule, detail) by which a chain is filtered out, or None; predictions have no resolution."""
    if not distillation:
        if info.resolution is None and not config.accept_unknown:
            return "unknown resolution", ""
        if info.release_date is None and not config.accept_unknown:
            return "unknown release date", ""
        if (info.resolution or 0.0) > config.max_resolution:
            return "resolution", f"{info.resolution:g} > {config.max_resolution:g} angstrom"
    if len(info.sequence) < config.min_length:
        return "length", f"{len(info.sequence)} < {config.min_length} residues"
    letter, count = Counter(info.sequence).most_common(1)[0]
    if count > config.max_single_residue_fraction * len(info.sequence):
        return "composition", f"{count / len(info.sequence):.0%} {letter}"
    return None


def find_entities(layout: Layout, caches: Caches, places: Mapping[str, Place]) -> None:
    """Read the entity of each chain from its file, where only an entity cluster file is there."""
    if caches.clusters_by_chain or not caches.clusters_by_entity:
        return
    unknown = {p.entry for c, p in places.items() if c not in caches.entities}
    for entry in progress(sorted(unknown), "reading entity numbers"):
        try:
            found = entity_ids(layout.structures[entry], entry)
        except DataError:
            continue  # reported with its reason when the structure itself is read
        caches.entities |= {f"{entry}_{chain}": entity for chain, entity in found.items()}


def make_record(
    chain_id: str, place: Place, info: ChainInfo, caches: Caches, report: Report
) -> Record:
    """The record of an accepted chain; an unknown cluster size counts as 1 and is noted."""
    cluster = caches.cluster(chain_id)
    size = info.cluster_size or (cluster.size if cluster else None)
    if size is None:
        report.note("cluster size unknown, taken as 1", chain_id)
    group = caches.linkage.get(chain_id) or (cluster.name if cluster else info.sequence)
    return Record(place, len(info.sequence), info.release_date or "", size or 1, group)


def _shared_folders(
    duplicates: Iterable[list[str]], folders: Mapping[str, str]
) -> Iterable[tuple[str, str]]:
    """Identical chains that have no folder of their own use the folder of one that has."""
    for names in duplicates:
        ids = [normal_id(name) for name in names]
        folder = next((folders[i] for i in ids if i in folders), None)
        if folder is not None:
            yield from ((i, folder) for i in ids if i not in folders)


def _reject_unaligned(
    layout: Layout, caches: Caches, places: Mapping[str, Place], report: Report
) -> None:
    """Chains (where a table lists them) and whole entries that have no alignment."""
    entries = {place.entry for place in places.values()}
    for chain_id in caches.chains:
        located = layout.locate(chain_id)
        if located and located[0] not in places:
            entries.add(located[1])
            report.reject(located[0], NO_ALIGNMENT)
    for entry in layout.structures.keys() - entries:
        report.reject(entry, NO_ALIGNMENT)


def _nothing_joined(layout: Layout) -> DataError:
    sides = []
    for number, what, names in (
        (len(layout.structures), "structures", layout.structures),
        (len(layout.alignments), "alignments", layout.alignments),
    ):
        some = ", ".join(list(names)[:EXAMPLES_SHOWN])
        sides.append(f"{number} {what} ({some or 'none'}{' ...' if number > 3 else ''})")
    reason = (
        f"no chain has both a structure and an alignment: {sides[0]} and {sides[1]}. An alignment "
        "folder is named after its chain, alignments/1abc_A, and its structure mmcif/1abc.cif"
    )
    return DataError(layout.root, None, reason)
