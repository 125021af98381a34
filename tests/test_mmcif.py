"""mmCIF: an inline entry with every irregularity, and damaged files."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings
from reading import read, resolved, valid_or_error

from foldcore.data import files
from foldcore.data.mmcif import read_structure
from foldcore.errors import DataError

Damage = Callable[[str], str]

# SEQRES of chain X (label A): MET MSE ARG (SER or THR) SEP PCA GLY; residue 1 is not resolved.
_SEQRES = [(1, "MET"), (2, "MSE"), (3, "ARG"), (4, "SER"), (4, "THR")]
_SEQRES += [(5, "SEP"), (6, "PCA"), (7, "GLY")]
_HEAD = """data_9XYZ
_entry.id 9XYZ
#
_exptl.entry_id 9XYZ
_exptl.method 'X-ray diffraction'
#
_refine.ls_d_res_high ?
#
_reflns.d_resolution_high 2.25
#
loop_
_pdbx_audit_revision_history.ordinal
_pdbx_audit_revision_history.revision_date
1 2003-04-05
2 2002-03-04
3 ?
#
loop_
_entity.id
_entity.type
1 polymer
2 polymer
3 water
#
loop_
_entity_poly.entity_id
_entity_poly.type
_entity_poly.pdbx_seq_one_letter_code_can
1 polypeptide(L) MMRSSQG
2 polyribonucleotide A
#
loop_
_struct_asym.id
_struct_asym.entity_id
A 1
B 2
C 3
#
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
"""
_SCHEME = """2 1 A
#
loop_
_pdbx_poly_seq_scheme.asym_id
_pdbx_poly_seq_scheme.seq_id
_pdbx_poly_seq_scheme.auth_mon_id
A 1 ?
A 2 MSE
A 3 ARG
A 4 SER
A 5 SEP
A 6 PCA
A 7 GLY
B 1 A
#
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.pdbx_PDB_ins_code
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.pdbx_PDB_model_num
"""
# atom, alternative, residue, label chain, entity, label number, insertion code, x, occupancy,
# author number, author chain, model; y is x + 0.25 and z is 0.5
_ATOMS = """
CA . MSE A 1 2 ? 2.0 1.00 10 X 1
SE . MSE A 1 2 ? 3.0 1.00 10 X 1
H . MSE A 1 2 ? 3.5 1.00 10 X 1
CA . ARG A 1 3 A 4.0 1.00 10 X 1
CD . ARG A 1 3 A 5.0 1.00 10 X 1
NH1 . ARG A 1 3 A 8.0 1.00 10 X 1
NH2 . ARG A 1 3 A 6.0 1.00 10 X 1
CA A SER A 1 4 ? 10.0 0.30 11 X 1
OG A SER A 1 4 ? 10.5 0.30 11 X 1
CA B THR A 1 4 ? 11.0 0.70 11 X 1
OG1 B THR A 1 4 ? 11.5 0.70 11 X 1
CA A SEP A 1 5 ? 12.0 0.40 12 X 1
CA B SEP A 1 5 ? 13.0 0.60 12 X 1
P . SEP A 1 5 ? 13.5 1.00 12 X 1
CB A SEP A 1 5 ? 14.0 0.50 12 X 1
CB B SEP A 1 5 ? 15.0 0.50 12 X 1
CA . PCA A 1 6 ? 16.0 1.00 13 X 1
OE . PCA A 1 6 ? 16.5 1.00 13 X 1
CA . GLY A 1 7 ? 17.0 1.00 15 X 1
OXT . GLY A 1 7 ? 18.0 1.00 15 X 1
P . A B 2 1 ? 30.0 1.00 1 R 1
O . HOH C 3 . ? 40.0 1.00 201 X 1
CA . MSE A 1 2 ? 90.0 1.00 10 X 2
"""


def _atom_rows(text: str = _ATOMS) -> str:
    rows = []
    for number, line in enumerate(text.strip().split("\n"), start=1):
        atom, alt, residue, asym, entity, seq, ins, x, occ, auth, chain, model = line.split()
        group = "ATOM" if residue in ("ARG", "SER", "THR", "GLY", "A") else "HETATM"
        rows.append(
            f"{group} {number} {atom[0]} {atom} {alt} {residue} {asym} {entity} {seq} {ins} "
            f"{x} {float(x) + 0.25} 0.5 {occ} {auth} {chain} {model}"
        )
    return "\n".join(rows) + "\n"


def _cif() -> str:
    seqres = "".join(f"1 {number} {name}\n" for number, name in _SEQRES)
    return _HEAD + seqres + _SCHEME + _atom_rows() + "#\n"


def test_entry_data() -> None:
    structure = read(_cif())
    assert structure.pdb_id == "9xyz"
    assert structure.resolution == 2.25  # of _reflns: _refine says it is unknown
    assert structure.release_date == "2002-03-04"  # the earliest, not the first
    assert structure.method == "X-RAY DIFFRACTION"
    assert list(structure.chains) == ["X"]  # no RNA, no water


def test_sequence_and_atoms() -> None:
    structure = read(_cif())
    chain = structure.chain("X")
    assert chain.label_id == "A"
    assert chain.sequence == "MMRSSQG"  # parents; the first of SER/THR; PCA by the entry's word
    assert chain.residue_index.dtype == np.int32
    assert chain.residue_index.tolist() == list(range(7))
    assert (chain.positions.shape, chain.mask.shape) == ((7, 37, 3), (7, 37))
    assert chain.positions.dtype == chain.mask.dtype == np.float32
    assert resolved(chain) == {
        (2, "CA"): 2.0,  # of the first model
        (2, "SD"): 3.0,  # selenium
        (3, "CA"): 4.0,  # author number 10A
        (3, "CD"): 5.0,
        (3, "NH1"): 6.0,  # exchanged: NH2 was nearer to CD
        (3, "NH2"): 8.0,
        (4, "CA"): 10.0,  # SER is listed first, although THR has more occupancy
        (4, "OG"): 10.5,
        (5, "CA"): 13.0,  # alternative B
        (5, "CB"): 14.0,  # equal occupancies: the first
        (6, "CA"): 16.0,
        (7, "CA"): 17.0,
        (7, "OXT"): 18.0,
    }
    assert not chain.positions[chain.mask == 0].any()


def _with_b_factors(values: dict[str, str]) -> str:
    """The entry with a B-factor column: 10.00 but for the atoms with these x."""
    head, _, tail = _cif().partition("_atom_site.auth_seq_id")
    lines = (head + "_atom_site.B_iso_or_equiv\n_atom_site.auth_seq_id" + tail).split("\n")
    for number, line in enumerate(lines):
        if line.startswith(("ATOM ", "HETATM ")):
            words = line.split()
            words.insert(14, values.get(words[10], "10.00"))
            lines[number] = " ".join(words)
    return "\n".join(lines)


def test_b_factors() -> None:
    values = {"3.0": "91.25", "3.5": "99.00", "12.0": "70.00", "4.0": "nan", "18.0": "-1.0"}
    chain = read(_with_b_factors(values)).chain("X")
    assert chain.b_factors.dtype == np.float32
    # of the atoms that are kept: not of a hydrogen, nor of a less occupied alternative
    assert chain.b_factors.tolist() == [0.0, 91.25, 10.0, 10.0, 10.0, 10.0, 10.0]
    zipped = gzip.compress(_with_b_factors(values).encode())
    assert (read(zipped, "9xyz.cif.gz").chain("X").b_factors == chain.b_factors).all()


def test_most_occupied_residue_where_the_listed_one_is_not_resolved() -> None:
    text = _cif().replace(" SER A 1 4 ", " CYS A 1 4 ")
    chain = read(text).chain("X")
    assert chain.sequence[3] == "S"
    assert resolved(chain)[4, "CA"] == 11.0
    assert (4, "OG1") not in resolved(chain)  # an atom serine does not have


@pytest.mark.parametrize(
    ("item", "value", "expected"),
    [
        ("_refine.ls_d_res_high ?", "_refine.ls_d_res_high 1.5", 1.5),
        ("_refine.ls_d_res_high ?", "_em_3d_reconstruction.resolution 3.5", 3.5),
        ("_reflns.d_resolution_high 2.25", "_reflns.d_resolution_high .", 0.0),
        ("_reflns.d_resolution_high 2.25", "_reflns.d_resolution_high nonsense", 0.0),
    ],
)
def test_resolution(item: str, value: str, expected: float) -> None:
    assert read(_cif().replace(item, value)).resolution == expected


def test_unknown_date_stays_unknown() -> None:
    text = _cif().replace("2003-04-05", "?").replace("2002-03-04", ".")
    assert read(text).release_date == ""


def test_older_date_table() -> None:
    text = _cif().replace("_pdbx_audit_revision_history.ordinal", "_database_PDB_rev.num")
    text = text.replace("_pdbx_audit_revision_history.revision_date", "_database_PDB_rev.date")
    assert read(text).release_date == "2002-03-04"


def test_without_sequence_tables() -> None:
    head = "data_model\n" + _SCHEME[_SCHEME.index("loop_\n_atom_site") :]
    rows = [row for row in _atom_rows().split("\n") if " X 1" in row]
    structure = read(head + "\n".join(rows) + "\n", "model_1.cif")
    chain = structure.chain("X")
    assert structure.pdb_id == "model_1"
    assert chain.sequence == "MRSSEG"  # no entry's word on PCA: the table's
    assert chain.residue_index.tolist() == [0, 1, 2, 3, 4, 6]  # author numbers 10 10A 11 12 13 15
    assert "SEQRES" in structure.warnings[0]


def test_absent_chain_names_those_there_are() -> None:
    with pytest.raises(DataError, match=r"9xyz.cif: no protein chain 'A' \(there are: X\)"):
        read(_cif()).chain("A")


@pytest.mark.parametrize(
    ("damage", "line", "reason"),
    [
        (lambda t: "", None, "empty"),
        (lambda t: " \n", None, "empty"),
        (lambda t: "hello", 1, "data_"),
        (lambda t: t[: t.index("loop_\n_atom_site")], None, "_atom_site"),
        (lambda t: t[: t.index("SE . MSE") + 30], 66, "Wrong number of values"),
        (lambda t: t[: t.index("CA . PCA") - 10].rsplit("\n", 1)[0], None, "no # after"),
        (lambda t: t[: t.rindex("#")], None, "no # after the last row: truncated"),
        (lambda t: t.replace(" 2.0 ", " 2.x "), None, "atom CA of residue 2 of chain X"),
        (lambda t: t.replace(" 2.0 ", " 1e30 "), None, "no valid coordinates"),
        (lambda t: t.replace(" A 1 7 ", " A 1 70 "), None, "number 70 of a sequence of 7"),
        (lambda t: t.replace(" A 1 6 ? ", " A 1 7 ? "), None, "residue 6 of chain X is listed"),
        (lambda t: t.replace("polypeptide(L)", "polypeptide(D)"), None, "no protein chain"),
        (lambda t: t.replace("MSE", "M\0E"), 44, "NUL"),
        (lambda t: t.replace("_refine.ls_d", "_entry.id 9\n_refine.ls_d"), 7, "duplicate tag"),
    ],
)
def test_damage_is_explained(damage: Damage, line: int | None, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read(damage(_cif()))
    assert caught.value.path == "9xyz.cif"
    assert reason in caught.value.reason
    if line is not None:
        assert caught.value.line == line
        assert str(caught.value).startswith(f"9xyz.cif:{line}: ")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read: No such file"):
        read_structure(tmp_path / "none.cif")
    with pytest.raises(DataError, match="unknown kind of file"):
        read_structure("9xyz.txt", data=_cif().encode())


def test_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(DataError("a.cif", 3, "bad")))
    assert (error.path, error.line, error.reason) == ("a.cif", 3, "bad")


def test_gzip_is_sniffed(tmp_path: Path) -> None:
    path = tmp_path / "9xyz.cif"  # gzipped in spite of its name
    path.write_bytes(gzip.compress(_cif()[:1000].encode()) + gzip.compress(_cif()[1000:].encode()))
    assert read_structure(path).chain("X").sequence == "MMRSSQG"


def test_damaged_gzip() -> None:
    packed = gzip.compress(_cif().encode())
    with pytest.raises(DataError, match="truncated gzip"):
        read(packed[:-20], "9xyz.cif.gz")
    with pytest.raises(DataError, match="damaged gzip"):
        read(packed + b"rubbish", "9xyz.cif.gz")
    with pytest.raises(DataError, match="damaged gzip"):
        read(packed[:50] + b"\0\0\0\0" + packed[54:], "9xyz.cif.gz")


def test_gzip_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(b"\n" * 50_000_000)  # 49 kB
    monkeypatch.setattr(files, "MAX_BYTES", 1_000_000)
    with pytest.raises(DataError, match="larger than the limit of 1000000 bytes"):
        read(bomb, "9xyz.cif.gz")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(damaged(_cif().encode()))
def test_fuzz_mmcif(data: bytes) -> None:
    valid_or_error(data, "9xyz.cif")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(damaged(gzip.compress(_cif().encode())))
def test_fuzz_gzip(data: bytes) -> None:
    valid_or_error(data, "9xyz.cif.gz")
