"""Where a file of arrays was cut: what can still be read of a .npz and of a .safetensors."""

import json
import os
import struct
from pathlib import Path

_LOCAL_HEADER = struct.Struct("<4s2xH10xI4xHH")  # signature, flags, bytes, lengths of name, extra
_SIGNATURE, _SIZE_FOLLOWS, _ZIP64 = b"PK\3\4", 8, 2**32 - 1


def cut_in_npz(path: str | Path) -> str:
    """Where a .npz without the directory at its end was cut, in words; "" where it cannot be told.

    numpy writes each array's size before it, so the arrays are counted off from the start.
    """
    place = ""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        while len(start := file.read(_LOCAL_HEADER.size)) == _LOCAL_HEADER.size:
            signature, flags, stored, name_length, extra_length = _LOCAL_HEADER.unpack(start)
            name = file.read(name_length).decode(errors="replace").removesuffix(".npy")
            extra = file.read(extra_length)
            if signature != _SIGNATURE or flags & _SIZE_FOLLOWS or len(extra) < extra_length:
                return place
            if stored == _ZIP64 and len(extra) >= 20:
                stored = int.from_bytes(extra[12:20], "little")
            if file.tell() + stored > size:
                return f"within array {name!r}"
            place = f"after array {name!r}"
            file.seek(stored, os.SEEK_CUR)
    return place


def cut_in_safetensors(path: str | Path) -> str | None:
    """The first array whose values lie beyond the end of the file; None of a whole or odd file."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                return None
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = sorted((int(entry["data_offsets"][1]), name) for name, entry in header.items())
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None  # its reader says what is wrong
    return next((name for end, name in ends if end > size - 8 - length), None)
