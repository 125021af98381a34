"""Structures from text, for the tests of their readers."""

import numpy as np

from foldcore.constants import atom_types
from foldcore.data.mmcif import Chain, Structure, read_structure
from foldcore.errors import DataError


def read(text: str | bytes, name: str = "9xyz.cif") -> Structure:
    return read_structure(name, data=text.encode() if isinstance(text, str) else text)


def resolved(chain: Chain) -> dict[tuple[int, str], float]:
    """(1-based residue, atom) -> x of everything resolved."""
    return {
        (int(r) + 1, atom_types[a]): float(chain.positions[r, a, 0])
        for r, a in np.argwhere(chain.mask)
    }


def valid_or_error(data: bytes, name: str) -> None:
    try:
        structure = read(data, name)
    except DataError:
        return
    assert structure.chains
    for chain in structure.chains.values():
        length = len(chain.sequence)
        assert chain.positions.shape == (length, 37, 3)
        assert chain.mask.shape == (length, 37)
        assert chain.b_factors.shape == (length,) and (chain.b_factors >= 0).all()
        assert np.isfinite(chain.positions).all()
        assert (np.diff(chain.residue_index) > 0).all()
