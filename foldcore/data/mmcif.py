"""Read protein chains from wwPDB mmCIF files; PDB files go the same way (``pdb_format.py``).

Kept from a file: protein chains of the first model, by author chain id; a row for every residue of
SEQRES; of alternative locations the most occupied; selenomethionine as methionine, other modified
residues as their parents. Everything else (nucleic acids, ligands, water, hydrogens, D-peptides) is
left out.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import gemmi

from foldcore.data.chains import Chain, Entry, build_chains
from foldcore.data.files import read_text
from foldcore.data.pdb_format import parse_pdb
from foldcore.errors import DataError

_RESOLUTION_ITEMS = (
    "_refine.ls_d_res_high",
    "_em_3d_reconstruction.resolution",
    "_reflns.d_resolution_high",
)
# Release dates; entries from before the audit tables list their revisions in the second one.
_DATE_ITEMS = ("_pdbx_audit_revision_history.revision_date", "_database_PDB_rev.date")


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """The protein chains of one entry."""

    pdb_id: str  # lower case
    chains: dict[str, Chain]  # by author chain id
    resolution: float  # angstrom; 0 = unknown
    release_date: str  # YYYY-MM-DD; "" = unknown
    method: str  # upper case, as in _exptl.method; "" = unknown
    warnings: tuple[str, ...]  # where the reading had to depart from the file
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
    name = Path(path).name.lower().removesuffix(".gz")
    stem, dot, suffix = name.rpartition(".")
    if suffix not in ("cif", "mmcif", "pdb", "ent"):
        raise DataError(path, None, "unknown kind of file: .cif, .pdb or .ent expected, maybe .gz")
    parse = parse_pdb if suffix in ("pdb", "ent") else _parse_mmcif
    entry = parse(read_text(path, data), str(path), re.sub(r"^pdb(?=\w{4}$)", "", stem))
    chains = build_chains(entry)
    return Structure(
        pdb_id=entry.pdb_id,
        chains=chains,
        resolution=entry.resolution,
        release_date=entry.release_date,
        method=entry.method,
        warnings=tuple(entry.warnings),
        path=str(path),
    )


def _parse_mmcif(text: str, path: str, fallback_id: str) -> Entry:
    try:
        block = _atom_block(gemmi.cif.read_string(text), path)
        structure = gemmi.make_structure_from_block(block)
        if not any(entity.full_sequence for entity in structure.entities):
            structure.setup_entities()  # files of other programs may lack the entity tables
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes gemmi raise
        raise _translate(error, path) from None
    _check_end(text, block, path)
    return Entry(
        structure=structure,
        path=path,
        pdb_id=(_values(block, "_entry.id") or [fallback_id])[0].lower(),
        resolution=_resolution(block),
        release_date=_release_date(block),
        method=", ".join(_values(block, "_exptl.method")).upper(),
        warnings=[],
        has_labels=True,
        canonical=_canonical(block),
        observed=_observed(block),
    )


def _atom_block(document: gemmi.cif.Document, path: str) -> gemmi.cif.Block:
    for block in document:
        if block.find_loop("_atom_site.Cartn_x").get_loop() is not None:
            return block
    raise DataError(path, None, "no _atom_site table: not a coordinate file, or truncated")


def _check_end(text: str, block: gemmi.cif.Block, path: str) -> None:
    """The archive closes every category with ``#``; a file cut between two rows lacks the last."""
    archive = re.search(r"^#\s*$", text, re.MULTILINE) and block.find_loop("_entity_poly_seq.num")
    if archive and text.rstrip().rpartition("\n")[2].strip() != "#":
        raise DataError(path, text.rstrip().count("\n") + 1, "no # after the last row: truncated")


def _values(block: gemmi.cif.Block, item: str) -> list[str]:
    """Known values of an item, whether it stands alone or in a loop."""
    return [gemmi.cif.as_string(v) for v in block.find_values(item) if v not in ("?", ".")]


def _resolution(block: gemmi.cif.Block) -> float:
    for item in _RESOLUTION_ITEMS:
        for value in _values(block, item):
            if (number := gemmi.cif.as_number(value)) > 0:  # NaN where it is no number
                return number
    return 0.0


def _release_date(block: gemmi.cif.Block) -> str:
    """Earliest revision; the deposition date would let a template in before it was public."""
    for item in _DATE_ITEMS:
        if dates := [v for v in _values(block, item) if re.fullmatch(r"\d{4}-\d\d-\d\d", v)]:
            return min(dates)
    return ""


def _canonical(block: gemmi.cif.Block) -> dict[str, str]:
    table = block.find("_entity_poly.", ["entity_id", "pdbx_seq_one_letter_code_can"])
    return {row.str(0): "".join(row.str(1).split()) for row in table}


def _observed(block: gemmi.cif.Block) -> dict[str, set[int]]:
    observed: dict[str, set[int]] = {}
    for row in block.find("_pdbx_poly_seq_scheme.", ["asym_id", "seq_id", "auth_mon_id"]):
        if row[2] not in ("?", ".") and re.fullmatch(r"\d{1,9}", row[1]):
            observed.setdefault(row.str(0), set()).add(int(row[1]))
    return observed


def _translate(error: Exception, path: str) -> DataError:
    """gemmi's "string:12:0(345): reason" or "string:12 in data_X: reason"."""
    if match := re.match(r"\w*:(\d+)(?::\d+\(\d+\))?(.*)", str(error), re.DOTALL):
        return DataError(path, int(match[1]), match[2].strip(": \n"))
    return DataError(path, None, f"not a readable mmCIF file: {error}")
