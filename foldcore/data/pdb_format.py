"""PDB files (the older column format): checks that gemmi leaves out, and the header's records."""

import re

import gemmi

from foldcore.data.chains import MAX_COORDINATE, Entry
from foldcore.errors import DataError

_MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()
_OLDEST_YEAR = 70  # two-digit years: the archive began in 1971
_COORDINATE_COLUMNS = (slice(30, 38), slice(38, 46), slice(46, 54))
_OCCUPANCY_COLUMNS = slice(54, 60)


def parse_pdb(text: str, path: str, fallback_id: str) -> Entry:
    """Entry of a PDB file; SEQRES is aligned with the resolved residues."""
    text = text.encode("ascii", "replace").decode()  # columns: one byte a character
    lines = text.split("\n")
    warnings: list[str] = []
    _check_atoms(lines, path)
    _check_end(lines, path, warnings)
    try:
        structure = gemmi.read_pdb_string(text)
        structure.setup_entities()
        structure.assign_label_seq_id()
    except Exception as error:  # whatever a damaged file makes gemmi raise
        raise _translate(error, path) from None
    header = next((line for line in lines if line.startswith("HEADER")), "")
    return Entry(
        structure=structure,
        path=path,
        pdb_id=(header[62:66].strip() or fallback_id).lower(),
        resolution=_resolution(lines),
        release_date=_release_date(lines, header, warnings),
        method=structure.info["_exptl.method"].upper() if "_exptl.method" in structure.info else "",
        warnings=warnings,
        has_labels=False,
    )


def _check_atoms(lines: list[str], path: str) -> None:
    """Every atom record has numbers where they belong; gemmi would read letters as 0."""
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.startswith(("ATOM  ", "HETATM")):
            continue
        found = True
        try:
            coordinates = [float(line[columns]) for columns in _COORDINATE_COLUMNS]
            float(line[_OCCUPANCY_COLUMNS].strip() or 1)
        except ValueError:
            reason = f"atom record without valid coordinates or occupancy: {line[:66]!r}"
            raise DataError(path, number, reason) from None
        if not all(abs(x) < MAX_COORDINATE for x in coordinates):  # also false for NaN
            raise DataError(path, number, f"coordinates out of range: {line[30:54]!r}")
    if not found:
        raise DataError(path, None, "no atom records: not a PDB file, or truncated")


def _check_end(lines: list[str], path: str, warnings: list[str]) -> None:
    last = next(line for line in reversed(lines) if line.strip())
    if last.split()[0] in ("END", "ENDMDL"):
        return
    if any(line.startswith("HEADER") for line in lines):
        raise DataError(path, len(lines), "an archive file without END: truncated")
    warnings.append("no END record: the file may be truncated")


def _resolution(lines: list[str]) -> float:
    for line in lines:
        if match := re.match(r"REMARK   2 RESOLUTION\.\s+(\d+\.\d+)\s+ANGSTROM", line):
            return float(match[1])
    return 0.0


def _release_date(lines: list[str], header: str, warnings: list[str]) -> str:
    """Date of the first revision, which is the release."""
    for line in lines:
        if line.startswith("REVDAT") and line[7:10].strip() == "1" and (date := _date(line[13:22])):
            return date
    if date := _date(header[50:59]):
        warnings.append("no REVDAT 1: the deposition date of HEADER stands for the release date")
    return date


def _date(text: str) -> str:
    """``03-NOV-97`` -> ``1997-11-03``; anything else -> ``""``."""
    match = re.fullmatch(r"(\d\d)-([A-Z]{3})-(\d\d)", text.strip())
    if not match or match[2] not in _MONTHS:
        return ""
    century = 1900 if int(match[3]) >= _OLDEST_YEAR else 2000
    return f"{century + int(match[3])}-{_MONTHS.index(match[2]) + 1:02d}-{match[1]}"


def _translate(error: Exception, path: str) -> DataError:
    """gemmi's "Problem in line 12: reason"."""
    first, *_ = str(error).split("\n")
    if match := re.match(r"Problem in line (\d+): (.*)", first):
        return DataError(path, int(match[1]), match[2])
    return DataError(path, None, f"not a readable PDB file: {first}")
