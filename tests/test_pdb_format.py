"""PDB files: an inline entry with every irregularity, and damaged files."""

from collections.abc import Callable

import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings
from reading import read, resolved, valid_or_error

from foldcore.errors import DataError

Damage = Callable[[str], str]

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
    structure = read(_PDB, "pdb9xyz.ent")
    chain = structure.chain("A")
    assert (structure.pdb_id, structure.resolution) == ("9xyz", 1.85)
    assert (structure.release_date, structure.method) == ("1998-12-30", "X-RAY DIFFRACTION")
    assert chain.sequence == "GMAYSG"
    assert chain.label_id == ""
    assert resolved(chain) == {
        (1, "CA"): 2.0,
        (2, "CA"): 5.0,
        (2, "SD"): 6.0,
        (3, "CA"): 8.0,
        (4, "CA"): 11.0,
        (6, "CA"): 17.0,
    }


def test_b_factors_of_pdb() -> None:
    text = _PDB.replace("6.000   0.250   0.500  1.00 10.00", "6.000   0.250   0.500  1.00 91.25")
    text = text.replace("8.500   0.250   0.500  1.00 10.00", "8.500   0.250   0.500  1.00 99.00")
    text = text.replace("1.000   0.250   0.500  0.40 10.00", "1.000   0.250   0.500  0.40 70.00")
    chain = read(text, "pdb9xyz.ent").chain("A")
    assert chain.b_factors.dtype == np.float32
    # of the atoms that are kept: not of the less occupied one, nor of the hydrogen
    assert chain.b_factors.tolist() == [10.0, 91.25, 10.0, 10.0, 0.0, 10.0]


def test_pdb_models_and_missing_records() -> None:
    atoms = "".join(line + "\n" for line in _PDB.split("\n") if line.startswith(("ATOM", "HETATM")))
    second = atoms.replace("   1.000", "  91.000")
    structure = read(
        f"MODEL        1\n{atoms}ENDMDL\nMODEL        2\n{second}ENDMDL\n", "pdb1abc.ent"
    )
    chain = structure.chain("A")
    assert (structure.pdb_id, structure.resolution, structure.release_date) == ("1abc", 0.0, "")
    assert chain.sequence == "GMAXG"
    assert chain.residue_index.tolist() == [0, 1, 2, 4, 6]  # author numbers 1 2 2A 4 6
    assert resolved(chain)[1, "CA"] == 2.0


def test_pdb_date_of_header_is_reported() -> None:
    text = "\n".join(line for line in _PDB.split("\n") if not line.startswith("REVDAT"))
    structure = read(text, "9xyz.pdb")
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
        read(damage(_PDB), "9xyz.pdb")
    assert (caught.value.path, caught.value.line) == ("9xyz.pdb", line)
    assert reason in caught.value.reason


@settings(max_examples=300, deadline=None, derandomize=True)
@given(damaged(_PDB.encode()))
def test_fuzz_pdb(data: bytes) -> None:
    valid_or_error(data, "9xyz.pdb")
