"""Read protein chains from wwPDB mmCIF and PDB files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from foldcore.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """One protein chain, a row for every residue of the sequence, resolved or not."""

    chain_id: str  # author chain id, the one in file names and caches
    label_id: str  # label_asym_id; "" in PDB files
    sequence: str  # SEQRES in one-letter code, X where there is no parent residue
    residue_index: Int32[np.ndarray, " r"]  # 0-based position in the sequence
    positions: Float32[np.ndarray, "r 37 3"]  # angstrom; 0 where the atom is not resolved
    mask: Float32[np.ndarray, "r 37"]  # 1 where the atom is resolved


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """The protein chains of one entry."""

    pdb_id: str  # lower case
    chains: dict[str, Chain]  # by author chain id
    resolution: float  # angstrom; 0 = unknown
    release_date: str  # YYYY-MM-DD; "" = unknown
    method: str  # upper case, as in _exptl.method; "" = unknown
    warnings: tuple[str, ...]  # what was read in another way than the file says
    path: str

    def chain(self, chain_id: str) -> Chain:
        """The chain with this author id; :class:`DataError` names the ids there are."""
        if chain_id not in self.chains:
            present = ", ".join(self.chains)
            raise DataError(
                self.path, None, f"no protein chain {chain_id!r} (there are: {present})"
            )
        return self.chains[chain_id]


def read_structure(path: str | Path, data: bytes | None = None) -> Structure:
    """Read ``.cif`` or ``.pdb`` / ``.ent`` (also gzipped); ``data`` stands in for its bytes."""
    raise NotImplementedError
