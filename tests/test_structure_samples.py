"""Genuine mmCIF and PDB files: known facts of each, and every atom against a plain reading."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from foldcore.constants import atom_order, atom_types
from foldcore.data.mmcif import read_structure

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
