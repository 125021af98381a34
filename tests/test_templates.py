"""Templates: every filter, the mapping of residues, realignment, the features, real hits."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldcore.constants import atom_order, restype_order
from foldcore.data.chains import Chain
from foldcore.data.hhr import TemplateHit, read_hhr
from foldcore.data.mmcif import Structure, read_structure
from foldcore.data.templates import Reject, Template, resolve_hits, stack_templates
from foldcore.errors import DataError
from foldcore.features import FEATURES

_QUERY = "ACDEFGHIKLMNPQRSTVWYACDEFGHIKL"  # 30 residues
_OTHER = "WYACDMFGHIKLMNAQRSTVWYPP"  # 24; its 3rd..22nd are the query's 1st..20th but for two
_CA, _CB = atom_order["CA"], atom_order["CB"]


def _chain(sequence: str = _OTHER, atoms: tuple[str, ...] = ("N", "CA", "C", "CB")) -> Chain:
    """Atom number a of residue i lies at (3.8 i, a, 0)."""
    positions = np.zeros((len(sequence), 37, 3), np.float32)
    mask = np.zeros((len(sequence), 37), np.float32)
    for atom in (atom_order[name] for name in atoms):
        positions[:, atom, 0] = 3.8 * np.arange(len(sequence))
        positions[:, atom, 1] = atom
        mask[:, atom] = 1
    index, b_factors = np.arange(len(sequence), dtype=np.int32), np.zeros(len(sequence), np.float32)
    return Chain("A", "A", sequence, index, positions, mask, b_factors)


def _structure(chain: Chain, pdb_id: str = "1abc", date: str = "2001-01-01") -> Structure:
    return Structure(pdb_id, {"A": chain}, 2.0, date, "", (), f"{pdb_id}.cif")


def _hit(
    query: str = _QUERY[:20],
    hit: str = _OTHER[2:22],
    query_start: int = 0,
    hit_start: int = 2,
    name: str = "1abc_A",
    sum_probs: float = 10.0,
) -> TemplateHit:
    pdb_id, _, chain_id = name.partition("_")
    indices = [_indices(query, query_start), _indices(hit, hit_start)]
    aligned = int(((indices[0] >= 0) & (indices[1] >= 0)).sum())
    return TemplateHit(
        1, f"{name} words", pdb_id, chain_id, aligned, sum_probs, 99.0, 0.1, query, hit, *indices
    )


def _indices(aligned: str, start: int) -> np.ndarray:
    is_residue = np.array(list(aligned)) != "-"
    return np.where(is_residue, start - 1 + np.cumsum(is_residue), -1).astype(np.int32)


def _resolve(
    hits: list[TemplateHit],
    structure: Structure | None = None,
    query: str = _QUERY,
    cutoff: str = "2010-01-01",
    accept_unknown: bool = False,
    max_templates: int = 20,
) -> tuple[list[Template], list[Reject]]:
    structure = structure or _structure(_chain())

    def get_chain(pdb_id: str, chain_id: str) -> tuple[Structure, Chain]:
        return structure, structure.chain(chain_id)

    return resolve_hits(
        hits, query, "9XYZ", cutoff, get_chain, accept_unknown, max_templates=max_templates
    )


def _one(hit: TemplateHit, structure: Structure | None = None, query: str = _QUERY) -> Template:
    (template,), rejects = _resolve([hit], structure, query)
    assert not rejects
    return template


def _sources(template: Template) -> list[int]:
    """For each residue of the query the residue of the structure it has, -1 for none."""
    x = template.positions[:, _CA, 0]
    return [int(round(v / 3.8)) if m else -1 for v, m in zip(x, template.mask[:, _CA], strict=True)]


def test_mapping() -> None:
    template = _one(_hit())
    assert template.name == "1abc_A"
    assert _sources(template) == [*range(2, 22), *[-1] * 10]
    assert template.aatype.tolist() == [*(restype_order[c] for c in _OTHER[2:22]), *[21] * 10]
    assert not template.mask[20:].any() and not template.positions[20:].any()
    assert (template.aatype.dtype, template.mask.dtype) == (np.int32, np.float32)


def test_mapping_across_gaps() -> None:
    query = "ACDE--FGHIKLMNPQ"
    hit = "ACDMFG-" + "HIKLMNAQR"
    template = _one(_hit(query, hit))
    assert _sources(template)[:14] == [2, 3, 4, 5, -1, 8, 9, 10, 11, 12, 13, 14, 15, 16]


def test_unresolved_residues_keep_their_type() -> None:
    chain = _chain()
    chain.mask[4] = 0
    chain.positions[4] = 0
    template = _one(_hit(), _structure(chain))
    assert template.aatype[2] == restype_order["D"]
    assert _sources(template)[:4] == [2, 3, -1, 5]


@pytest.mark.parametrize("shift", [-2, 3])
def test_numbers_of_another_origin_are_corrected(shift: int) -> None:
    """The database or the query may be numbered from another residue than the sequences here."""
    moved = _hit(hit_start=2 + shift)
    assert _sources(_one(moved)) == _sources(_one(_hit()))
    query = _hit(query_start=3)
    assert _sources(_one(query)) == _sources(_one(_hit()))


def test_repeats_follow_the_numbers() -> None:
    repeat = "ACDMFGHIKLMN"
    structure = _structure(_chain(repeat * 2))
    first = _one(_hit(_QUERY[:12], repeat, hit_start=0), structure)
    second = _one(_hit(_QUERY[:12], repeat, hit_start=12), structure)
    assert _sources(first)[:12] == list(range(12))
    assert _sources(second)[:12] == list(range(12, 24))


def test_x_fits_every_residue() -> None:
    hit = _hit(hit=_OTHER[2:10] + "XX" + _OTHER[12:22])
    template = _one(hit)
    assert template.aatype[8] == restype_order["K"]  # the structure's own residue


def test_realignment_to_another_version_of_the_sequence() -> None:
    version = "GSHM" + _OTHER[2:8] + "A" + _OTHER[9:14] + _OTHER[15:]  # tag, mutation, deletion
    template = _one(_hit(), _structure(_chain(version)))
    expected = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -1, 16, 17, 18, 19, 20, 21, 22]
    assert _sources(template)[:20] == expected
    assert template.aatype[6] == restype_order["A"]
    assert template.aatype[12] == 21


def test_realignment_of_unrelated_sequences_is_refused() -> None:
    _, rejects = _resolve([_hit()], _structure(_chain("GPGPGWWWPGPGPGWWPGPGPP")))
    assert rejects[0].rule == "sequence"
    assert rejects[0].reason.startswith("the structure's sequence is another")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_realignment_finds_what_is_left_of_a_sequence(data: st.DataObject) -> None:
    """The structure lacks a stretch and has tags: every residue that is left is found."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    full = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 60))
    start = data.draw(st.integers(15, 40))
    lost = data.draw(st.integers(1, 5))
    head = data.draw(st.integers(0, 6))
    version = "G" * head + full[:start] + full[start + lost :]
    query = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), 60))
    template = _one(_hit(query, full, hit_start=0), _structure(_chain(version)), query)
    taken = [i for i in _sources(template) if i >= 0]
    assert taken == list(range(head, len(version)))
    assert template.aatype[template.aatype < 21].tolist() == [
        restype_order[c] for c in version[head:]
    ]


# Filters ------------------------------------------------------------------------------------------


def _rule(hit: TemplateHit, structure: Structure | None = None, **options: bool | str) -> str:
    templates, rejects = _resolve([hit], structure, **options)  # type: ignore[arg-type]
    assert len(templates) + len(rejects) == 1
    return rejects[0].rule if rejects else ""


def test_own_entry() -> None:
    assert _rule(_hit(name="9xyz_B")) == "own_entry"
    assert _rule(_hit(), _structure(_chain(), pdb_id="9xyz")) == "own_entry"


def test_dates() -> None:
    def rule(date: str, accept_unknown: bool = False) -> str:
        structure = _structure(_chain(), date=date)
        return _rule(_hit(), structure, cutoff="2010-01-01", accept_unknown=accept_unknown)

    assert rule("2009-12-31") == ""
    assert rule("2010-01-01") == "date"  # of the same day as the query
    assert rule("2010-01-02", accept_unknown=True) == "date"
    assert rule("") == "date"
    assert rule("", accept_unknown=True) == ""
    with pytest.raises(ValueError, match="expected YYYY-MM-DD"):
        _resolve([_hit()], cutoff="")


def test_coverage() -> None:
    query = _QUERY * 5  # 150 residues: 15 aligned are exactly a tenth
    piece = _hit(_QUERY[:15], _OTHER[2:17])
    assert _resolve([piece], query=query)[1][0].rule == "coverage"
    assert _resolve([piece], query=query[:149])[1] == []


def test_subsequence_of_the_query() -> None:
    query, structure = _QUERY[:20], _structure(_chain(_QUERY))
    same = _hit(query, query, hit_start=0)
    part = _hit(query[:19], query[:19], hit_start=0)  # 0.95 of the query: not more
    mutant = _hit(query, "W" + query[1:], hit_start=0)
    assert _resolve([same], structure, query)[1][0].rule == "subsequence"
    assert _resolve([part], structure, query)[1] == []
    assert _resolve([mutant], structure, query)[1] == []  # realigned: one residue differs


def test_length() -> None:
    assert _rule(_hit(_QUERY[:9], _OTHER[2:11])) == "length"
    assert _rule(_hit(_QUERY[:10], _OTHER[2:12])) == ""


def test_neighbours_far_apart() -> None:
    chain = _chain()
    chain.positions[12:, :, 2] = 149.0  # and 3.8 along x
    assert _rule(_hit(), _structure(chain)) == ""
    chain.positions[12:, :, 2] = 151.0
    assert _rule(_hit(), _structure(chain)) == "distance"
    chain.mask[12] = 0  # no longer neighbours
    assert _rule(_hit(), _structure(chain)) == ""


def test_few_atoms() -> None:
    chain = _chain(atoms=("CA",))
    chain.mask[:7] = 0
    chain.mask[11:] = 0
    assert _rule(_hit(), _structure(chain)) == "atoms"  # 4
    chain.mask[11, _CA] = 1
    assert _rule(_hit(), _structure(chain)) == ""


def test_query_of_another_sequence() -> None:
    assert _rule(_hit(query="W" * 20)) == "sequence"


def test_what_cannot_be_read() -> None:
    assert _rule(dataclasses.replace(_hit(), pdb_id="", chain_id="")) == "unreadable"
    _, rejects = _resolve([_hit(name="1abc_Q")])
    expected = "1abc.cif: no protein chain 'Q' (there are: A)"
    assert rejects == [Reject("1abc_Q", expected, "unreadable")]


def test_order_and_laziness() -> None:
    asked: list[str] = []
    structure = _structure(_chain())

    def get_chain(pdb_id: str, chain_id: str) -> tuple[Structure, Chain]:
        asked.append(pdb_id)
        if pdb_id == "1bad":
            raise DataError("1bad.cif", 7, "damaged")
        return structure, structure.chain(chain_id)

    names = {"1low": 1.0, "1top": 9.0, "1bad": 8.0, "1mid": 5.0}
    hits = [_hit(name=f"{name}_A", sum_probs=score) for name, score in names.items()]
    templates, rejects = resolve_hits(
        hits, _QUERY, "9xyz", "2010-01-01", get_chain, False, max_templates=2
    )
    assert [template.name for template in templates] == ["1top_A", "1mid_A"]
    assert [template.sum_probs for template in templates] == [9.0, 5.0]
    assert rejects == [Reject("1bad_A", "1bad.cif:7: damaged", "unreadable")]
    assert asked == ["1top", "1bad", "1mid"]


# Features -----------------------------------------------------------------------------------------


def test_features() -> None:
    hits = [_hit(sum_probs=3.0), _hit(_QUERY[:12], _OTHER[2:14], sum_probs=7.0)]
    templates, _ = _resolve(hits)
    features = stack_templates(templates, 4, len(_QUERY))
    sizes = {"t": 4, "r": 30}
    schema = {k: f for k, f in FEATURES.items() if k.startswith("template_")}
    assert features.keys() == schema.keys()
    for name, feature in schema.items():
        assert features[name].dtype == feature.dtype
        expected = tuple(d if isinstance(d, int) else sizes[d] for d in feature.dims)
        assert features[name].shape == expected, name
        assert not features[name][2:].any()  # padding
    assert features["template_mask"].tolist() == [1, 1, 0, 0]
    assert features["template_sum_probs"][:, 0].tolist() == [7, 3, 0, 0]
    glycine = _QUERY.index("G")
    beta = features["template_pseudo_beta"][1]
    assert beta[glycine].tolist() == templates[1].positions[glycine, _CA].tolist()
    assert beta[0].tolist() == templates[1].positions[0, _CB].tolist()
    assert features["template_pseudo_beta_mask"][1].tolist() == [1] * 20 + [0] * 10


def test_features_take_the_best_and_may_be_none() -> None:
    templates, _ = _resolve([_hit(sum_probs=3.0), _hit(sum_probs=7.0)])
    assert stack_templates(templates, 1, 30)["template_sum_probs"].tolist() == [[7.0]]
    assert stack_templates([], 2, 30)["template_mask"].tolist() == [0, 0]
    assert stack_templates([], 0, 30)["template_aatype"].shape == (0, 30)


# Genuine files ------------------------------------------------------------------------------------


def test_real_hits(shared_data: Path) -> None:
    folder = shared_data / "mini"
    cache = json.loads((folder / "chain_data_cache.json").read_text())
    structures: dict[str, Structure] = {}

    def get_chain(pdb_id: str, chain_id: str) -> tuple[Structure, Chain]:
        if pdb_id not in structures:
            structures[pdb_id] = read_structure(folder / "mmcif" / f"{pdb_id}.cif")
        return structures[pdb_id], structures[pdb_id].chain(chain_id)

    found = 0
    for chain_id in sorted(cache)[::60]:
        query, date = cache[chain_id]["seq"], cache[chain_id]["release_date"] or "2018-04-30"
        hits = read_hhr(folder / "alignments" / chain_id / "pdb70_hits.hhr")
        templates, rejects = resolve_hits(hits, query, chain_id[:4], date, get_chain, True)
        assert len(templates) + len(rejects) == len(hits)
        assert {r.rule for r in rejects} <= {"own_entry", "coverage", "date", "length"}
        assert "own_entry" in {r.rule for r in rejects}
        for template in templates:
            assert not template.name.startswith(chain_id[:4])
            _check_real(template, hits, query, structures)
        found += len(templates)
    assert found > 20


def _check_real(
    template: Template, hits: list[TemplateHit], query: str, structures: dict[str, Structure]
) -> None:
    """Every aligned column holds the atoms of the residue that the file pairs with it."""
    name = template.name.partition("_")
    where = (name[0], name[2], template.sum_probs)  # some chains are hit more than once
    (hit,) = (h for h in hits if (h.pdb_id, h.chain_id, h.sum_probs) == where)
    chain = structures[hit.pdb_id].chain(hit.chain_id)
    paired = dict(zip(hit.indices_query.tolist(), hit.indices_hit.tolist(), strict=True))
    for residue in range(len(query)):
        source = paired.get(residue, -1)
        if source < 0:
            assert template.aatype[residue] == 21 and not template.mask[residue].any()
        else:
            assert template.aatype[residue] == restype_order.get(chain.sequence[source], 20)
            assert (template.positions[residue] == chain.positions[source]).all()
