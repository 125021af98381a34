"""Structures: an inline entry with every irregularity, the genuine samples, and damaged files."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings

from foldcore.constants import atom_order, atom_types
from foldcore.data import files
from foldcore.data.mmcif import Chain, Structure, read_structure
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


def _read(text: str | bytes, name: str = "9xyz.cif") -> Structure:
    return read_structure(name, data=text.encode() if isinstance(text, str) else text)


def _atoms(chain: Chain) -> dict[tuple[int, str], float]:
    """(1-based residue, atom) -> x of everything resolved."""
    return {
        (int(r) + 1, atom_types[a]): float(chain.positions[r, a, 0])
        for r, a in np.argwhere(chain.mask)
    }


def test_entry_data() -> None:
    structure = _read(_cif())
    assert structure.pdb_id == "9xyz"
    assert structure.resolution == 2.25  # of _reflns: _refine says it is unknown
    assert structure.release_date == "2002-03-04"  # the earliest, not the first
    assert structure.method == "X-RAY DIFFRACTION"
    assert list(structure.chains) == ["X"]  # no RNA, no water


def test_sequence_and_atoms() -> None:
    structure = _read(_cif())
    chain = structure.chain("X")
    assert chain.label_id == "A"
    assert chain.sequence == "MMRSSQG"  # parents; the first of SER/THR; PCA by the entry's word
    assert chain.residue_index.dtype == np.int32
    assert chain.residue_index.tolist() == list(range(7))
    assert (chain.positions.shape, chain.mask.shape) == ((7, 37, 3), (7, 37))
    assert chain.positions.dtype == chain.mask.dtype == np.float32
    assert _atoms(chain) == {
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


def test_most_occupied_residue_where_the_listed_one_is_not_resolved() -> None:
    text = _cif().replace(" SER A 1 4 ", " CYS A 1 4 ")
    chain = _read(text).chain("X")
    assert chain.sequence[3] == "S"
    assert _atoms(chain)[4, "CA"] == 11.0
    assert (4, "OG1") not in _atoms(chain)  # an atom serine does not have


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
    assert _read(_cif().replace(item, value)).resolution == expected


def test_unknown_date_stays_unknown() -> None:
    text = _cif().replace("2003-04-05", "?").replace("2002-03-04", ".")
    assert _read(text).release_date == ""


def test_older_date_table() -> None:
    text = _cif().replace("_pdbx_audit_revision_history.ordinal", "_database_PDB_rev.num")
    text = text.replace("_pdbx_audit_revision_history.revision_date", "_database_PDB_rev.date")
    assert _read(text).release_date == "2002-03-04"


def test_without_sequence_tables() -> None:
    head = "data_model\n" + _SCHEME[_SCHEME.index("loop_\n_atom_site") :]
    rows = [row for row in _atom_rows().split("\n") if " X 1" in row]
    structure = _read(head + "\n".join(rows) + "\n", "model_1.cif")
    chain = structure.chain("X")
    assert structure.pdb_id == "model_1"
    assert chain.sequence == "MRSSEG"  # no entry's word on PCA: the table's
    assert chain.residue_index.tolist() == [0, 1, 2, 3, 4, 6]  # author numbers 10 10A 11 12 13 15
    assert "SEQRES" in structure.warnings[0]


def test_absent_chain_names_those_there_are() -> None:
    with pytest.raises(DataError, match=r"9xyz.cif: no protein chain 'A' \(there are: X\)"):
        _read(_cif()).chain("A")


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
        _read(damage(_cif()))
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
        _read(packed[:-20], "9xyz.cif.gz")
    with pytest.raises(DataError, match="damaged gzip"):
        _read(packed + b"rubbish", "9xyz.cif.gz")
    with pytest.raises(DataError, match="damaged gzip"):
        _read(packed[:50] + b"\0\0\0\0" + packed[54:], "9xyz.cif.gz")


def test_gzip_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(b"\n" * 50_000_000)  # 49 kB
    monkeypatch.setattr(files, "MAX_BYTES", 1_000_000)
    with pytest.raises(DataError, match="larger than the limit of 1000000 bytes"):
        _read(bomb, "9xyz.cif.gz")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(damaged(_cif().encode()))
def test_fuzz_mmcif(data: bytes) -> None:
    _valid_or_error(data, "9xyz.cif")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(damaged(gzip.compress(_cif().encode())))
def test_fuzz_gzip(data: bytes) -> None:
    _valid_or_error(data, "9xyz.cif.gz")


def _valid_or_error(data: bytes, name: str) -> None:
    try:
        structure = _read(data, name)
    except DataError:
        return
    assert structure.chains
    for chain in structure.chains.values():
        length = len(chain.sequence)
        assert chain.positions.shape == (length, 37, 3)
        assert chain.mask.shape == (length, 37)
        assert np.isfinite(chain.positions).all()
        assert (np.diff(chain.residue_index) > 0).all()


# PDB files --------------------------------------------------------------------------------------

_PDB = """\
HEADER    TEST PROTEIN                            03-NOV-97   9XYZ
EXPDTA    X-RAY DIFFRACTION
REVDAT   2   16-FEB-09 9XYZ    1       SOURCE
REVDAT   1   30-DEC-98 9XYZ    0
REMARK   2
REMARK   2 RESOLUTION.    1.85 ANGSTROMS.
SEQRES   1 A    6  GLY MSE ALA QQX SER GLY
MODRES 9XYZ QQX A    4  TYR
ATOM      1  CA AGLY A   1       1.000   0.250   0.500  0.40 10.00           C
ATOM      2  CA BGLY A   1       2.000   0.250   0.500  0.60 10.00           C
HETATM    3  CA  MSE A   2       5.000   0.250   0.500  1.00 10.00           C
HETATM    4 SE   MSE A   2       6.000   0.250   0.500  1.00 10.00          SE
ATOM      5  CA  ALA A   2A      8.000   0.250   0.500  1.00 10.00           C
ATOM      6  H   ALA A   2A      8.500   0.250   0.500  1.00 10.00           H
HETATM    7  CA  QQX A   4      11.000   0.250   0.500  1.00 10.00           C
ATOM      8  CA  GLY A   6      17.000   0.250   0.500  1.00 10.00           C
TER       9      GLY A   6
HETATM   10  O   HOH A 101      20.000   0.250   0.500  1.00 10.00           O
END
"""


def test_pdb() -> None:
    structure = _read(_PDB, "pdb9xyz.ent")
    chain = structure.chain("A")
    assert (structure.pdb_id, structure.resolution) == ("9xyz", 1.85)
    assert (structure.release_date, structure.method) == ("1998-12-30", "X-RAY DIFFRACTION")
    assert chain.sequence == "GMAYSG"
    assert chain.label_id == ""
    assert _atoms(chain) == {
        (1, "CA"): 2.0,
        (2, "CA"): 5.0,
        (2, "SD"): 6.0,
        (3, "CA"): 8.0,
        (4, "CA"): 11.0,
        (6, "CA"): 17.0,
    }


def test_pdb_models_and_missing_records() -> None:
    atoms = "".join(line + "\n" for line in _PDB.split("\n") if line.startswith(("ATOM", "HETATM")))
    second = atoms.replace("   1.000", "  91.000")
    structure = _read(
        f"MODEL        1\n{atoms}ENDMDL\nMODEL        2\n{second}ENDMDL\n", "pdb1abc.ent"
    )
    chain = structure.chain("A")
    assert (structure.pdb_id, structure.resolution, structure.release_date) == ("1abc", 0.0, "")
    assert chain.sequence == "GMAXG"
    assert chain.residue_index.tolist() == [0, 1, 2, 4, 6]  # author numbers 1 2 2A 4 6
    assert _atoms(chain)[1, "CA"] == 2.0


def test_pdb_date_of_header_is_reported() -> None:
    text = "\n".join(line for line in _PDB.split("\n") if not line.startswith("REVDAT"))
    structure = _read(text, "9xyz.pdb")
    assert structure.release_date == "1997-11-03"
    assert any("HEADER" in warning for warning in structure.warnings)


@pytest.mark.parametrize(
    ("damage", "line", "reason"),
    [
        (lambda t: "", None, "empty"),
        (lambda t: "garbage\n", None, "no atom records"),
        (lambda t: t[: t.index("ATOM")], None, "no atom records"),
        (lambda t: t[: t.index("  5.000") + 3], 11, "atom record without valid coordinates"),
        (lambda t: t.replace("   5.000", "   5,000"), 11, "atom record without valid coordinates"),
        (lambda t: t.replace("   5.000", "     inf"), 11, "out of range"),
        (lambda t: t[: t.index("TER")], 17, "without END: truncated"),
    ],
)
def test_pdb_damage_is_explained(damage: Damage, line: int | None, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        _read(damage(_PDB), "9xyz.pdb")
    assert (caught.value.path, caught.value.line) == ("9xyz.pdb", line)
    assert reason in caught.value.reason


@settings(max_examples=300, deadline=None, derandomize=True)
@given(damaged(_PDB.encode()))
def test_fuzz_pdb(data: bytes) -> None:
    _valid_or_error(data, "9xyz.pdb")


# Genuine files ----------------------------------------------------------------------------------

# name -> (chains with length and resolved CA atoms, resolution, release date, method)
_SAMPLES = {
    "1b5f": ("A:239:239 B:87:87 C:239:238 D:87:87", 1.72, "1999-01-13", "X-RAY DIFFRACTION"),
    "1dul": ("A:105:69", 1.8, "2000-02-28", "X-RAY DIFFRACTION"),
    "1psm": ("A:38:38", 0.0, "1995-02-07", "SOLUTION NMR"),
    "2q2k": ("A:70:45 B:70:44", 3.0, "2008-02-05", "X-RAY DIFFRACTION"),
    "3jqh": ("A:167:23", 2.201, "2009-11-10", "X-RAY DIFFRACTION"),
    "3u8v": ("A:93:83 B:93:83", 1.9, "2011-11-09", "X-RAY DIFFRACTION"),
    "3zee": ("A:84:84", 6.1, "2013-10-16", "ELECTRON MICROSCOPY"),
    "4zey": ("A:84:84", 1.5, "2015-05-06", "X-RAY DIFFRACTION"),
    "8u4l": ("A:609:598 B:606:582 C:52:50", 3.31, "2024-03-13", "ELECTRON MICROSCOPY"),
    "1ayf": ("A:105:103 B:105:104", 1.85, "1998-12-30", "X-RAY DIFFRACTION"),
    "1lve": ("A:122:114", 1.95, "1998-01-21", "X-RAY DIFFRACTION"),
}


def _sample(shared_data: Path, name: str) -> Path:
    (path,) = (shared_data / "formats").glob(f"*/{name}.*")
    return path


@pytest.mark.parametrize("name", _SAMPLES)
def test_samples(shared_data: Path, name: str) -> None:
    chains, resolution, date, method = _SAMPLES[name]
    structure = read_structure(_sample(shared_data, name))
    found = (structure.pdb_id, structure.resolution, structure.release_date, structure.method)
    assert found == (name, resolution, date, method)
    summary = [
        f"{c.chain_id}:{len(c.sequence)}:{int(c.mask[:, atom_order['CA']].sum())}"
        for c in structure.chains.values()
    ]
    assert " ".join(summary) == chains
    assert structure.warnings == ()


@pytest.mark.parametrize("name", ["1b5f", "1dul", "1psm", "2q2k", "3jqh", "3u8v", "4zey", "8u4l"])
def test_samples_against_a_plain_reading_of_their_rows(shared_data: Path, name: str) -> None:
    path = _sample(shared_data, name)
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    expected = _plain_rows(text)
    for chain in read_structure(path).chains.values():
        atoms = {
            (int(r) + 1, atom_types[a]): tuple(chain.positions[r, a].tolist())
            for r, a in np.argwhere(chain.mask)
        }
        plain = expected[chain.chain_id]
        assert atoms.keys() == plain.keys()
        for key, xyz in atoms.items():
            if key[1] not in ("NH1", "NH2"):  # may be exchanged
                assert np.float32(plain[key][1]).tolist() == list(xyz), key


def _plain_rows(text: str) -> dict[str, dict[tuple[int, str], tuple[float, list[float]]]]:
    """Author chain -> (residue, atom) -> (occupancy, position), from the text of ``_atom_site``."""
    lines = text.split("\n")
    items = [i for i, line in enumerate(lines) if line.startswith("_atom_site.")]
    columns = [lines[i].strip().removeprefix("_atom_site.") for i in items]
    listed: dict[tuple[str, str], str] = {}
    chains: dict[str, dict[tuple[int, str], tuple[float, list[float]]]] = {}
    for line in lines[items[-1] + 1 :]:
        if line.startswith("#"):
            return chains
        row = dict(zip(columns, (v.strip('"') for v in line.split()), strict=True))
        atom = row["label_atom_id"]
        atom = "SD" if (row["label_comp_id"], atom) == ("MSE", "SE") else atom
        if row["label_seq_id"] == "." or row["pdbx_PDB_model_num"] != "1" or atom not in atom_order:
            continue
        place = (row["label_asym_id"], row["label_seq_id"])
        if listed.setdefault(place, row["label_comp_id"]) != row["label_comp_id"]:
            continue  # the samples give the residue of SEQRES first
        atoms = chains.setdefault(row["auth_asym_id"], {})
        key = (int(row["label_seq_id"]), atom)
        occupancy = float(row["occupancy"])
        if key not in atoms or occupancy > atoms[key][0]:
            atoms[key] = (occupancy, [float(row[f"Cartn_{axis}"]) for axis in "xyz"])
    raise AssertionError("the table has no end")


def test_sample_sequences(shared_data: Path) -> None:
    def sequence(name: str, chain: str) -> str:
        return read_structure(_sample(shared_data, name)).chain(chain).sequence

    assert sequence("1b5f", "A") == sequence("1b5f", "C")  # identical chains
    assert sequence("1dul", "A").startswith("GFDLNDFLEQLRQMKNMGGMASLMGKLPGMGQIPDN")  # MSE
    assert sequence("3jqh", "A")[:18] == "GELPEKSKLQEIYQELTR"  # PRO/SER, ARG/GLN/GLU
    assert sequence("1lve", "A").startswith("DIVMTQSPDSLAVSLGERATINCKSSQSVLYSSNSKNYLAWYQ")


def test_arginines_of_samples_follow_the_convention(shared_data: Path) -> None:
    for name in ("1b5f", "3u8v", "8u4l"):
        for chain in read_structure(_sample(shared_data, name)).chains.values():
            nh1, nh2, cd = (chain.positions[:, atom_order[a]] for a in ("NH1", "NH2", "CD"))
            full = chain.mask[:, [atom_order[a] for a in ("NH1", "NH2", "CD")]].all(axis=1)
            near, far = (np.linalg.norm(x - cd, axis=1)[full] for x in (nh1, nh2))
            assert near.size and (near <= far).all()
