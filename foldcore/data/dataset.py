"""A data set on disk: structures joined with alignments, filtered, weighted, and read on demand."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int32

from foldcore import constants
from foldcore.config import DataConfig
from foldcore.data import templates
from foldcore.data.caches import Caches, ChainInfo, read_caches
from foldcore.data.hhr import read_hhr
from foldcore.data.hits import PackedTemplates, choose_hits
from foldcore.data.join import Place, Record, describe, find_entities, join, make_record, rejection
from foldcore.data.layout import alignment_files, find_layout, path_option
from foldcore.data.mmcif import Chain, Structure, read_structure
from foldcore.data.msa import Msa, merge, read_msa
from foldcore.data.report import Report
from foldcore.data.sampler import Source
from foldcore.data.scan import scan
from foldcore.data.store import Store, is_store
from foldcore.data.transforms import RawExample
from foldcore.errors import DataError

CACHE_BYTES = 256 << 20  # of parsed structures, and as much of whole chains, in each process
_CODES = np.full(256, constants.unknown_restype, np.int32)  # of each letter
_CODES[[ord(letter) for letter in constants.restype_order]] = list(constants.restype_order.values())
T = TypeVar("T")


class Dataset:
    """The chains of one folder that can be trained on, and why the others cannot.

    ``path`` is a folder in OpenFold's or OpenProteinSet's layout, or ``"embedded"``. Opening it
    lists folders and reads the tables beside them; ``raw(chain_id)`` opens the chain's own files.
    """

    def __init__(
        self,
        path: str,
        config: DataConfig,
        distillation: bool = False,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.config = config
        self.distillation = distillation
        self.store = Store(path) if is_store(path) else None
        option = path_option(path, config)
        self.layout = self.store.layout() if self.store else find_layout(path, option)
        self.report = Report(self.layout.root)
        self._structures = _Cache[Structure](cache_bytes)
        self._raws = _Cache[RawExample](cache_bytes)
        places, infos, caches = self._join()
        self.records: dict[str, Record] = {}
        for chain_id, info in sorted(infos.items()):
            if broken := rejection(info, config, distillation):
                self.report.reject(chain_id, *broken)
            else:
                place = places[chain_id]
                self.records[chain_id] = make_record(chain_id, place, info, caches, self.report)
        self.chains = tuple(self.records)
        self.resolutions = {chain_id: infos[chain_id].resolution for chain_id in self.chains}
        self.report.accepted = len(self.chains)
        self.assigned_split = {c: s for c, s in caches.split.items() if c in self.records}
        if not self.chains:
            raise DataError(self.layout.root, None, _nothing_left(self.report))

    def __getstate__(self) -> dict[str, Any]:
        """What a loader process gets: the records, without parsed files and past reports."""
        state = self.__dict__.copy()
        state["_structures"] = _Cache[Structure](self._structures.maximum)
        state["_raws"] = _Cache[RawExample](self._raws.maximum)
        state["report"] = Report(self.layout.root)
        state["resolutions"] = {}
        return state

    def _join(self) -> tuple[dict[str, Place], dict[str, ChainInfo], Caches]:
        """Every chain with a structure and an alignment, and what is known of it."""
        if self.store:
            self.store.check_rows(self.config.max_msa_rows)
            return self.store.joined(self.report)
        caches = read_caches(self.layout.root)
        places = join(self.layout, caches, self.report)
        infos = describe(places, caches, self.report, partial(scan, read=self.structure))
        find_entities(self.layout, caches, places)
        return places, infos, caches

    def weights(self, chains: Sequence[str] | None = None) -> Float[np.ndarray, " n"]:
        """Probability that an epoch keeps each chain (supplement 1.2.5; by default of all)."""
        records = [self.records[c] for c in (self.chains if chains is None else chains)]
        lengths = np.array([record.length for record in records])
        sizes = np.array([record.cluster_size for record in records], np.float64)
        power = {"inverse": -1.0, "inverse_sqrt": -0.5, "none": 0.0}[self.config.cluster_weighting]
        return sizes**power * np.clip(lengths, 256, 512) / 512

    def source(self, chains: Sequence[str] | None = None) -> Source:
        """These chains (by default all) with their weights, for a plan."""
        chosen = self.chains if chains is None else tuple(chains)
        return Source(chosen, self.weights(chosen))

    def structure(self, entry: str) -> Structure:
        """A parsed entry, by its id in lower case."""
        if self.store:
            return self.store.structures.structure(entry)
        if entry not in self.layout.structures:
            raise DataError(self.layout.root, None, f"no structure of entry {entry!r}")
        path = self.layout.structures[entry]
        return self._structures.get(entry, lambda: read_structure(path), _structure_bytes)

    def raw(self, chain_id: str) -> RawExample:
        """One whole chain, parsed now or remembered; :class:`DataError` names the file at fault."""
        if self.store:
            return self._unpack(self.store, chain_id)
        return self._raws.get(chain_id, lambda: self._read(chain_id), _raw_bytes)

    def _read(self, chain_id: str) -> RawExample:
        record = self.records[chain_id]
        structure = self.structure(record.place.entry)
        chain = _chain(structure, record.place.chain)
        structure, chain = self._finish_chain(chain_id, structure, chain)
        msas, hits = alignment_files(record.place.folder)
        msa = self._msa(chain_id, chain, msas)
        return RawExample(
            chain_id=chain_id,
            aatype=_aatype(chain.sequence),
            residue_index=chain.residue_index,
            positions=chain.positions,
            mask=chain.mask,
            msa=msa.rows,
            deletions=msa.deletions,
            templates=self._templates(chain_id, structure, chain, hits),
            resolution=structure.resolution,
            is_distillation=self.distillation,
        )

    def _unpack(self, store: Store, chain_id: str) -> RawExample:
        """One whole chain of a packed store; its templates are read when they are chosen."""
        record = self.records[chain_id]
        structure, chain = self._finish_chain(chain_id, *store.chain(record.place))
        msa = store.alignment(record.place, chain.sequence, self.config.max_msa_rows)
        self._note_left_out(chain_id, msa.left_out)
        return RawExample(
            chain_id=chain_id,
            aatype=_aatype(chain.sequence),
            residue_index=chain.residue_index,
            positions=chain.positions,
            mask=chain.mask,
            msa=msa.rows,
            deletions=msa.deletions,
            profile=msa.profile,
            templates=self._packed_templates(store, chain_id, structure, chain),
            resolution=structure.resolution,
            is_distillation=self.distillation,
        )

    def _packed_templates(
        self, store: Store, chain_id: str, structure: Structure, chain: Chain
    ) -> PackedTemplates:
        length = len(chain.sequence)
        if not self.config.num_templates:
            return PackedTemplates([], length, store.structures.atoms)
        place = self.records[chain_id].place
        chosen, rules = choose_hits(
            store.hits(place),
            place.entry,
            self._cutoff_date(chain_id, structure),
            self.config.accept_unknown,
            self.config.max_template_hits,
        )
        self._note_hits(chain_id, rules)
        return PackedTemplates(chosen, length, store.structures.atoms)

    def _finish_chain(
        self, chain_id: str, structure: Structure, chain: Chain
    ) -> tuple[Structure, Chain]:
        if structure.warnings:
            what = "departures from the structure file"
            self.report.note(what, chain_id, len(structure.warnings))
        if self.distillation:
            chain = _confident(chain, self.config.distillation_min_plddt, structure.path)
        return structure, chain

    def _cutoff_date(self, chain_id: str, structure: Structure) -> str:
        """Templates must have been released before this date, YYYY-MM-DD."""
        date = structure.release_date or self.records[chain_id].release_date
        return date or self.config.max_template_date

    def _note_left_out(self, chain_id: str, rows: int) -> None:
        if rows:
            self.report.note("alignment rows beyond data.max_msa_rows", chain_id, rows)

    def _note_hits(self, chain_id: str, rules: Counter[str]) -> None:
        for rule, count in rules.items():
            self.report.note(f"template hits not used: {rule}", chain_id, count)

    def _msa(self, chain_id: str, chain: Chain, paths: list[str]) -> Msa:
        if not paths:
            folder = self.records[chain_id].place.folder
            raise DataError(folder, None, "no alignment (.a3m or .sto) in this folder")
        msa = merge([read_msa(path, self.config.max_msa_rows) for path in paths], chain.sequence)
        self._note_left_out(chain_id, msa.left_out)
        return msa

    def _templates(
        self, chain_id: str, structure: Structure, chain: Chain, paths: list[str]
    ) -> dict[str, np.ndarray]:
        length = len(chain.sequence)
        if not self.config.num_templates:
            return templates.stack_templates([], 0, length)
        record = self.records[chain_id]
        found, rejects = templates.resolve_hits(
            [hit for path in paths for hit in read_hhr(path)],
            chain.sequence,
            record.place.entry,
            self._cutoff_date(chain_id, structure),
            self._template_chain,
            self.config.accept_unknown,
            max_templates=self.config.max_template_hits,
        )
        self._note_hits(chain_id, Counter(reject.rule for reject in rejects))
        return templates.stack_templates(found, len(found), length)

    def _template_chain(self, pdb_id: str, chain_id: str) -> tuple[Structure, Chain]:
        structure = self.structure(pdb_id)
        return structure, structure.chain(chain_id)


def split(dataset: Dataset) -> tuple[list[str], list[str]]:
    """(training, validation) chains: by ``split.tsv``, else a share of the linkage groups by hash.

    With ``data.validation_path`` everything here is for training: validation is another data set.
    """
    if dataset.config.validation_path:
        return list(dataset.chains), []
    if dataset.assigned_split:
        held_out = {c for c, part in dataset.assigned_split.items() if part == "validation"}
    else:
        groups = {record.group for record in dataset.records.values()}
        chosen = _hold_out(groups, dataset.config.validation_fraction)
        held_out = {c for c, record in dataset.records.items() if record.group in chosen}
    train = [c for c in dataset.chains if c not in held_out]
    return train, [c for c in dataset.chains if c in held_out]


def open_validation(config: DataConfig, dataset: Dataset) -> tuple[Dataset, list[str]]:
    """The validation chains and the data set they are in: ``validation_path``, or held out."""
    if not config.validation_path:
        return dataset, split(dataset)[1]
    other = Dataset(config.validation_path, config)
    return other, list(other.chains)


def _hold_out(groups: set[str], fraction: float) -> set[str]:
    """Groups whose hash falls below ``fraction``; at least one where there are several."""

    def place(group: str) -> float:
        return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=6).digest()) / 2**48

    chosen = {group for group in groups if place(group) < fraction}
    if not chosen and fraction > 0 and len(groups) > 1:
        chosen = {min(groups, key=place)}
    return chosen


def _nothing_left(report: Report) -> str:
    reason = f"every chain was filtered out\n{report.summary()}"
    if any(rule.startswith("unknown") for rule in report.counts()):
        reason += "\ndata.accept_unknown=true keeps chains of unknown resolution or date"
    return reason


def _chain(structure: Structure, name: str) -> Chain:
    if name:
        return structure.chain(name)
    if len(structure.chains) != 1:
        present = ", ".join(structure.chains)
        raise DataError(structure.path, None, f"expected one protein chain (there are: {present})")
    return next(iter(structure.chains.values()))


def _confident(chain: Chain, min_plddt: float, path: str) -> Chain:
    """A predicted chain without the atoms of residues whose pLDDT is no higher than this."""
    mask = chain.mask * (chain.b_factors > min_plddt)[:, None]
    if not mask.any():
        highest = f"the highest is {chain.b_factors.max(initial=0):g}"
        reason = f"no residue with a pLDDT (B-factor) above {min_plddt:g}: {highest}"
        raise DataError(path, None, reason)
    return replace(chain, positions=chain.positions * mask[:, :, None], mask=mask)


def _aatype(sequence: str) -> Int32[np.ndarray, " r"]:
    return _CODES[np.frombuffer(sequence.encode("latin-1", "replace"), np.uint8)]


def _structure_bytes(structure: Structure) -> int:
    return sum(
        chain.positions.nbytes + chain.mask.nbytes + chain.b_factors.nbytes
        for chain in structure.chains.values()
    )


def _raw_bytes(raw: RawExample) -> int:
    arrays = (raw.positions, raw.mask, raw.msa, raw.deletions, *raw.templates.values())
    return sum(array.nbytes for array in arrays)


class _Cache(Generic[T]):
    """The most recently used parsed objects, up to a total size in bytes."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self._entries: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._total = 0

    def get(self, key: str, make: Callable[[], T], size: Callable[[T], int]) -> T:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        value = make()
        self._entries[key] = (value, size(value))
        self._total += self._entries[key][1]
        while self._total > self.maximum and len(self._entries) > 1:
            self._total -= self._entries.popitem(last=False)[1][1]
        return value
