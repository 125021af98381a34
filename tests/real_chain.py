"""Ubiquitin (1UBQ, 1.8 angstrom) from the embedded set, for tests that need a true structure."""

from importlib import resources

import numpy as np

from foldcore import constants
from foldcore.data.labels import make_labels
from foldcore.data.mmcif import read_structure


def ubiquitin(length: int = 76, dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Sequence, atoms and labels of the first residues, without a batch axis."""
    folder = resources.files("foldcore") / "data" / "embedded" / "mmcif"
    with resources.as_file(folder / "1ubq.cif.gz") as path:
        chain = read_structure(path).chain("A")
    letters = chain.sequence[:length]
    aatype = np.array([constants.restype_order[letter] for letter in letters], np.int32)
    positions, mask = chain.positions[:length], chain.mask[:length]
    return {
        "aatype": aatype,
        "residue_index": chain.residue_index[:length],
        "seq_length": np.array(length, np.int32),
        "seq_mask": np.ones(length, dtype),
        "all_atom_positions": positions.astype(dtype),
        "all_atom_mask": mask.astype(dtype),
        **make_labels(aatype, positions, mask, dtype),
    }
