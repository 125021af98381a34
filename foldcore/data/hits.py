"""Template hits of a packed store: what no setting changes is done once, the rest when reading.

Reading a hit, finding it in its structure's sequence and AlphaFold's filters on lengths and atoms
are done in preparation. Own entry, cutoff date, unknown dates and the number of templates are up to
the chain and the configuration, so they are decided for each example, in the same order as
``templates.resolve_hits`` decides them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from foldcore import constants
from foldcore.data.hhr import TemplateHit
from foldcore.data.mmcif import Chain, Structure
from foldcore.data.shards import Address
from foldcore.data.structures import Atoms
from foldcore.data.templates import (
    Template,
    Unusable,
    align_hit,
    check_distances,
    check_hit,
    place_template,
    stack_templates,
)
from foldcore.errors import DataError

# rules that are looked at before the date, and those after it; "" is a usable hit
BEFORE_DATE = ("unreadable", "coverage", "subsequence", "length")
AFTER_DATE = ("distance", "sequence", "atoms", "")
GetChain = Callable[[str, str], tuple[Structure, Chain, Address]]
_RULES = frozenset(BEFORE_DATE + AFTER_DATE)
_KINDS = [str, str, str, str, float, int, int, int, int]
_NOWHERE = Address(-1, -1, -1)
_ARRAYS = tuple(stack_templates([], 0, 0))  # names of what candidates have
_CODES = np.full(256, constants.unknown_restype, np.int32)
for _letter, _code in constants.restype_order.items():
    _CODES[ord(_letter)] = _code


class PackedHit(NamedTuple):
    """A hit as stored; the aligned residues are empty where ``rule`` names why it is unusable."""

    name: str
    pdb_id: str  # of the hit; "" where its name is not <pdb id>_<chain>
    entry: str  # what its structure file calls itself
    release_date: str  # of its structure, YYYY-MM-DD; "" = unknown
    sum_probs: float
    rule: str
    address: Address  # of its chain
    in_query: Int32[np.ndarray, " n"]
    in_chain: Int32[np.ndarray, " n"]

    def rejection(self, entry: str, cutoff_date: str, accept_unknown: bool) -> str:
        """The rule by which it is no template for a chain of ``entry``, or ""."""
        if not self.pdb_id:
            return "unreadable"
        if self.pdb_id == entry:
            return "own_entry"
        if self.rule in BEFORE_DATE:
            return self.rule
        if self.entry == entry:
            return "own_entry"
        unknown = not self.release_date and not accept_unknown
        return "date" if unknown or self.release_date >= cutoff_date else self.rule


def pack_hits(
    hits: Sequence[TemplateHit], query_sequence: str, get_chain: GetChain
) -> list[PackedHit]:
    """All hits of a query, best first, each with its place in its structure or its rule."""
    return [
        _pack(hit, query_sequence, get_chain) for hit in sorted(hits, key=lambda h: -h.sum_probs)
    ]


def _pack(hit: TemplateHit, query_sequence: str, get_chain: GetChain) -> PackedHit:
    entry = date = rule = ""
    address = _NOWHERE
    aligned = (np.zeros(0, np.int32), np.zeros(0, np.int32))
    try:
        check_hit(hit, query_sequence, "")
        structure, chain, address = get_chain(hit.pdb_id, hit.chain_id)
        entry, date = structure.pdb_id, structure.release_date
        check_distances(chain)
        aligned = align_hit(hit, query_sequence, chain)
    except Unusable as error:
        rule = error.rule
    except DataError:
        rule = "unreadable"
    name = f"{hit.pdb_id}_{hit.chain_id}" if hit.pdb_id else hit.name.partition(" ")[0]
    return PackedHit(name, hit.pdb_id, entry, date, hit.sum_probs, rule, address, *aligned)


def dump_hits(hits: Sequence[PackedHit]) -> tuple[str, Int32[np.ndarray, " n"]]:
    """JSON of a list of hits, and their aligned residues end to end."""
    rows = [
        [
            h.name,
            h.pdb_id,
            h.entry,
            h.release_date,
            h.sum_probs,
            h.rule,
            *h.address,
            len(h.in_query),
        ]
        for h in hits
    ]
    parts = [part for hit in hits for part in (hit.in_query, hit.in_chain)]
    return json.dumps(rows), np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


def load_hits(text: str, residues: Int32[np.ndarray, " n"]) -> Iterator[PackedHit]:
    """The hits, one after another; ``ValueError`` where something does not fit."""
    start = 0
    if residues.ndim != 1 or residues.min(initial=0) < 0:
        raise ValueError("the aligned residues are not of this format")
    for name, pdb_id, entry, date, sum_probs, rule, *address, count in json.loads(text):
        kinds = [type(value) for value in (name, pdb_id, entry, date, sum_probs, *address, count)]
        if kinds != _KINDS or count < 0:
            raise ValueError("a template hit is not of this format")
        if rule not in _RULES:
            raise ValueError(f"a template hit has the unknown rule {rule!r}")
        middle, end = start + count, start + 2 * count
        if end > len(residues):
            raise ValueError("fewer residues than the template hits have")
        in_query, in_chain = residues[start:middle], residues[middle:end]
        start = end
        yield PackedHit(
            name, pdb_id, entry, date, sum_probs, rule, Address(*address), in_query, in_chain
        )


def choose_hits(
    hits: Iterable[PackedHit], entry: str, cutoff_date: str, accept_unknown: bool, maximum: int
) -> tuple[list[PackedHit], Counter[str]]:
    """The first ``maximum`` hits that may serve a chain of ``entry``; the others' rules."""
    chosen: list[PackedHit] = []
    rules: Counter[str] = Counter()
    for hit in hits:
        if len(chosen) >= maximum:
            break
        if rule := hit.rejection(entry, cutoff_date, accept_unknown):
            rules[rule] += 1
        else:
            chosen.append(hit)
    return chosen, rules


class PackedTemplates(Mapping[str, np.ndarray]):
    """Candidates as ``templates.stack_templates`` gives them, made when they are asked for.

    An example takes few of the candidates, and a window of the chain: ``pick`` reads no more.
    """

    def __init__(
        self, hits: Sequence[PackedHit], length: int, read: Callable[[Address], Atoms]
    ) -> None:
        self._hits, self._length, self._read = hits, length, read
        self._stacked: dict[str, np.ndarray] | None = None

    @property
    def count(self) -> int:
        """Number of candidates."""
        return len(self._hits)

    def pick(self, chosen: Int[np.ndarray, "t"], window: slice) -> dict[str, np.ndarray]:
        """The four arrays of the chosen candidates inside a window of the chain."""
        start, stop, _ = window.indices(self._length)
        count, length = len(chosen), stop - start
        aatype = np.full((count, length), constants.gap_code, np.int32)
        positions = np.zeros((count, length, 37, 3), np.float32)
        masks = np.zeros((count, length, 37), np.float32)
        sum_probs = np.zeros((count, 1), np.float32)
        for slot, number in enumerate(chosen):
            hit = self._hits[number]
            chain = self._chain(hit)
            inside = (hit.in_query >= start) & (hit.in_query < stop)
            at, source = hit.in_query[inside] - start, hit.in_chain[inside]
            codes = _CODES[np.frombuffer(chain.sequence.encode("latin-1", "replace"), np.uint8)]
            aatype[slot][at] = codes.take(source)
            positions[slot][at] = chain.positions.take(source, 0)
            masks[slot][at] = chain.mask.take(source, 0)
            sum_probs[slot] = hit.sum_probs
        return {
            "template_aatype": aatype,
            "template_all_atom_positions": positions,
            "template_all_atom_masks": masks,
            "template_sum_probs": sum_probs,
        }

    def __getitem__(self, name: str) -> np.ndarray:
        if self._stacked is None:
            templates = [self._template(hit) for hit in self._hits]
            self._stacked = stack_templates(templates, len(templates), self._length)
        return self._stacked[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_ARRAYS)

    def __len__(self) -> int:
        return len(_ARRAYS)

    def _template(self, hit: PackedHit) -> Template:
        residues = (hit.in_query, hit.in_chain)
        return place_template(hit.name, hit.sum_probs, self._length, self._chain(hit), *residues)

    def _chain(self, hit: PackedHit) -> Atoms:
        chain = self._read(hit.address)
        inside = hit.in_query.max(initial=-1) < self._length
        if not inside or hit.in_chain.max(initial=-1) >= len(chain.sequence):
            reason = "this template is aligned outside of its chain or its query"
            raise DataError(hit.name, None, reason)
        return chain


def pick_templates(
    templates: Mapping[str, np.ndarray], chosen: Int[np.ndarray, "t"], window: slice
) -> dict[str, np.ndarray]:
    """The chosen candidates inside a window of the chain, from either kind of example."""
    if isinstance(templates, PackedTemplates):
        return templates.pick(chosen, window)
    names = ("template_aatype", "template_all_atom_positions", "template_all_atom_masks")
    picked = {name: templates[name][chosen][:, window] for name in names}
    return picked | {"template_sum_probs": templates["template_sum_probs"][chosen]}


def count_templates(templates: Mapping[str, np.ndarray]) -> int:
    """Number of candidates."""
    if isinstance(templates, PackedTemplates):
        return templates.count
    return len(templates["template_aatype"])
