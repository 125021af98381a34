"""Bytes of an outside file, gunzipped where they are gzip, never more than ``MAX_BYTES``."""

import zlib
from pathlib import Path

from foldcore.errors import DataError

# Far above the largest entry or alignment in use; a gzip bomb must not fill the memory.
MAX_BYTES = 1 << 30
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_FRAMING = 31  # zlib's name for: gzip header, 32 KiB window
_STEP = 1 << 24  # bytes inflated at a time


def read_bytes(path: str | Path, data: bytes | None = None) -> bytes:
    """Contents of ``path``, or ``data`` in its stead, decompressed if they begin like gzip."""
    if data is None:
        data = _load(path)
    _check_size(len(data), path)
    return _gunzip(data, path) if data.startswith(_GZIP_MAGIC) else data


def read_text(path: str | Path, data: bytes | None = None) -> str:
    """Like :func:`read_bytes`, decoded: U+FFFD for bytes that are no UTF-8, line ends ``\\n``."""
    raw = read_bytes(path, data)
    if not raw.strip():
        raise DataError(path, None, "the file is empty")
    if (nul := raw.find(b"\0")) >= 0:
        line = raw.count(b"\n", 0, nul) + 1
        raise DataError(path, line, "a NUL byte: binary data, or a damaged file")
    return raw.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _load(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(path, None, f"cannot read: {error.strerror or error}") from None


def _gunzip(data: bytes, path: str | Path) -> bytes:
    parts: list[bytes] = []
    size = 0
    while data:  # a gzip file may hold several members end to end
        if not data.startswith(_GZIP_MAGIC):
            raise DataError(path, None, "damaged gzip: other bytes after a member's end")
        member = zlib.decompressobj(_GZIP_FRAMING)
        while not member.eof:
            part = _inflate(member, data, path)
            size += len(part)
            _check_size(size, path)
            parts.append(part)
            data = member.unconsumed_tail
        data = member.unused_data.lstrip(b"\0")  # tape blocks pad with zeros
    return b"".join(parts)


def _inflate(member: "zlib._Decompress", data: bytes, path: str | Path) -> bytes:
    try:
        part = member.decompress(data, _STEP)
    except zlib.error as error:
        raise DataError(path, None, f"damaged gzip: {error}") from None
    if not part and not member.eof and not member.unconsumed_tail:
        raise DataError(path, None, "truncated gzip: its end is missing")
    return part


def _check_size(size: int, path: str | Path) -> None:
    if size > MAX_BYTES:
        raise DataError(path, None, f"larger than the limit of {MAX_BYTES} bytes when unpacked")
