"""The packed structures of a store: every protein chain of every entry, by random access."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from foldcore.data.caches import ChainInfo
from foldcore.data.codec import decode
from foldcore.data.mmcif import Chain, Structure
from foldcore.data.scan import chain_info
from foldcore.data.shards import Address, ArrowFile, shard_path
from foldcore.errors import DataError

CHAIN_TEXT = tuple(field.name for field in fields(Chain) if field.type is str)
STRUCTURES = pa.schema(
    [(f.name, pa.string() if f.name in CHAIN_TEXT else pa.binary()) for f in fields(Chain)]
    + [("checksum", pa.uint32())]  # of the texts; arrays have their own
)
ENTRIES = pa.schema(
    [
        ("entry", pa.string()),
        ("pdb_id", pa.string()),
        ("resolution", pa.float64()),
        ("release_date", pa.string()),
        ("method", pa.string()),
        ("warnings", pa.list_(pa.string())),
        ("path", pa.string()),
        ("shard", pa.int32()),
        ("batch", pa.int32()),
        ("row", pa.int32()),  # of its first chain
        ("count", pa.int32()),  # chains, one after another
        ("entities", pa.list_(pa.string())),  # of the chains; "" where nothing asked for them
    ]
)


class Atoms(NamedTuple):
    """The part of a chain that a template needs."""

    sequence: str
    positions: Float32[np.ndarray, "r 37 3"]
    mask: Float32[np.ndarray, "r 37"]


class Structures:
    """``entries.arrow`` and ``structures-*.arrow`` of a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "entries.arrow"
        table = ArrowFile(self.path, ENTRIES).table().combine_chunks()
        self._columns = {name: table.column(name).combine_chunks() for name in ENTRIES.names}
        names = self._columns["entry"].to_pylist()
        self.rows = {name: number for number, name in enumerate(names)}
        self._shards: dict[int, ArrowFile] = {}

    def entry(self, entry: str) -> dict[str, Any]:
        """What is known of an entry, by its id in lower case."""
        if entry not in self.rows:
            raise DataError(self.root, None, f"no structure of entry {entry!r}")
        row = self.rows[entry]
        return {name: column[row].as_py() for name, column in self._columns.items()}

    def structure(self, entry: str) -> Structure:
        """An entry with all its chains."""
        chains = [self.chain(address) for address in self._addresses(self.entry(entry))]
        return self._structure(self.entry(entry), {chain.chain_id: chain for chain in chains})

    def chain(self, address: Address) -> Chain:
        """The chain at an address."""
        file = self._shard(address.shard)
        try:
            return self._decode(file, address)
        except (ValueError, TypeError, AttributeError) as error:
            raise _unusable(file, address, error) from None

    def atoms(self, address: Address) -> Atoms:
        """What a template needs of the chain at an address."""
        file = self._shard(address.shard)
        names = ("positions", "mask", "checksum", *CHAIN_TEXT)
        cells = {name: file.cell(address.batch, address.row, name) for name in names}
        try:
            _check_texts(cells)
            mask = decode(cells["mask"])
            atoms = Atoms(cells["sequence"], decode(cells["positions"], mask), mask)
            _check_atoms(*atoms)
        except (ValueError, TypeError, AttributeError) as error:
            raise _unusable(file, address, error) from None
        return atoms

    def find(self, entry: str, chain_id: str) -> tuple[Structure, Address]:
        """An entry without its chains, and where one of them is ("": the only one)."""
        known = self.entry(entry)
        addresses = self._addresses(known)
        if not chain_id and len(addresses) == 1:
            return self._structure(known, {}), addresses[0]
        names = self._names(addresses)
        if chain_id not in names:
            reason = f"no protein chain {chain_id!r} (there are: {', '.join(names)})"
            if not chain_id:
                reason = f"expected one protein chain (there are: {', '.join(names)})"
            raise DataError(known["path"], None, reason)
        return self._structure(known, {}), addresses[names.index(chain_id)]

    def names(self, entry: str) -> list[str]:
        """Author ids of an entry's chains."""
        return self._names(self._addresses(self.entry(entry)))

    def _names(self, addresses: list[Address]) -> list[str]:
        return [str(self._shard(a.shard).cell(a.batch, a.row, "chain_id")) for a in addresses]

    def sequence(self, entry: str, chain_id: str) -> str:
        """Sequence of a chain ("": of the only one)."""
        at = self.find(entry, chain_id)[1]
        return str(self._shard(at.shard).cell(at.batch, at.row, "sequence"))

    def template(self, entry: str, chain_id: str) -> tuple[Structure, Chain, Address]:
        """What template hits need: the entry, its chain, and where the chain is."""
        structure, address = self.find(entry, chain_id)
        return structure, self.chain(address), address

    def scan(
        self, entries: Iterable[str]
    ) -> Iterator[tuple[str, dict[str, ChainInfo] | DataError]]:
        """(entry, what it says of its chains or why it is not here), without reading atoms."""
        for entry in sorted(entries):
            try:
                known = self.entry(entry)
                structure = self._structure(known, {})
                yield entry, dict(self._infos(structure, self._addresses(known)))
            except DataError as error:
                yield entry, error

    def _infos(
        self, structure: Structure, addresses: list[Address]
    ) -> Iterator[tuple[str, ChainInfo]]:
        for at in addresses:
            file = self._shard(at.shard)
            sequence = file.cell(at.batch, at.row, "sequence")
            yield file.cell(at.batch, at.row, "chain_id"), chain_info(structure, sequence)

    def _decode(self, file: ArrowFile, at: Address) -> Chain:
        cells = {name: file.cell(at.batch, at.row, name) for name in STRUCTURES.names}
        _check_texts(cells)
        del cells["checksum"]
        values = {name: cells.pop(name) for name in CHAIN_TEXT}
        mask = decode(cells.pop("mask"))
        for name, blob in cells.items():
            values[name] = None if blob is None else decode(blob, mask)
        chain = Chain(mask=mask, **values)
        length = len(chain.sequence)
        _check_atoms(chain.sequence, chain.positions, mask)
        if chain.residue_index.shape != (length,):
            raise ValueError(f"{length} residues, {chain.residue_index.shape} numbers")
        return chain

    def _addresses(self, known: dict[str, Any]) -> list[Address]:
        shard, batch, row = (known[name] for name in ("shard", "batch", "row"))
        return [Address(shard, batch, row + number) for number in range(known["count"])]

    def _structure(self, known: dict[str, Any], chains: dict[str, Chain]) -> Structure:
        return Structure(
            pdb_id=known["pdb_id"],
            chains=chains,
            resolution=known["resolution"],
            release_date=known["release_date"],
            method=known["method"],
            warnings=tuple(known["warnings"]),
            path=known["path"],
        )

    def _shard(self, number: int) -> ArrowFile:
        if number not in self._shards:
            self._shards[number] = ArrowFile(
                shard_path(self.root, "structures", number), STRUCTURES
            )
        return self._shards[number]


def text_checksum(row: Mapping[str, Any]) -> int:
    """Checksum of the texts of a chain."""
    return zlib.crc32("\0".join(row[name] for name in CHAIN_TEXT).encode())


def _check_texts(row: Mapping[str, Any]) -> None:
    if row["checksum"] != text_checksum(row):
        raise ValueError("the checksum of its sequence does not match: damaged")


def _check_atoms(sequence: str, positions: np.ndarray, mask: np.ndarray) -> None:
    length = len(sequence)
    if mask.shape != (length, 37) or positions.shape != (length, 37, 3):
        raise ValueError(f"{length} residues, atoms of shape {positions.shape}")


def _unusable(file: ArrowFile, at: Address, error: Exception) -> DataError:
    where = f"row {at.row} of batch {at.batch}"
    return DataError(file.path, None, f"{where} cannot be used: {error}")
