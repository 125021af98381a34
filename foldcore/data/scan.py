"""What the filters need, read from the structure files themselves where no table has it."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import gemmi

from foldcore.data.caches import ChainInfo
from foldcore.data.files import read_text
from foldcore.data.mmcif import Structure
from foldcore.errors import DataError

T = TypeVar("T")


def chain_infos(structure: Structure) -> dict[str, ChainInfo]:
    """What a parsed entry says of each of its chains."""
    return {name: chain_info(structure, c.sequence) for name, c in structure.chains.items()}


def chain_info(structure: Structure, sequence: str) -> ChainInfo:
    """What an entry says of one of its chains."""
    resolution = structure.resolution or (0.0 if "NMR" in structure.method else None)
    return ChainInfo(sequence, resolution, structure.release_date or None)


def scan(
    entries: Iterable[str], read: Callable[[str], Structure]
) -> Iterator[tuple[str, dict[str, ChainInfo] | DataError]]:
    """(entry, its chains or why it cannot be read), with a progress line for the patient."""
    for entry in progress(sorted(entries), "reading structures (no cache lists their chains)"):
        try:
            yield entry, chain_infos(read(entry))
        except DataError as error:
            yield entry, error


def entity_ids(path: str, entry: str, data: bytes | None = None) -> dict[str, str]:
    """Author chain id -> ``1ABC_1`` of an mmCIF file, as RCSB's cluster files name entities."""
    if not path.removesuffix(".gz").endswith(".cif"):
        return {}
    try:
        block = gemmi.cif.read_string(read_text(path, data)).sole_block()
    except (RuntimeError, ValueError) as error:
        raise DataError(path, None, f"not readable as mmCIF: {error}") from None
    rows = block.find("_entity_poly.", ["entity_id", "pdbx_strand_id"])
    return {
        chain.strip(): f"{entry.upper()}_{row.str(0)}"
        for row in rows
        for chain in row.str(1).split(",")
    }


def progress(items: list[T], what: str) -> Iterator[T]:
    """Yield the items and say on stderr how far it is: one live line, or a line each 10 s."""
    live = sys.stderr.isatty()
    said, said_anything = time.monotonic(), False
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        due = now - said > (0.5 if live else 10.0)
        if due or (said_anything and number == len(items)):
            said, said_anything = now, True
            end = "\r" if live and number < len(items) else "\n"
            print(f"{what}: {number}/{len(items)}", end=end, file=sys.stderr, flush=True)
