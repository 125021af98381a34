"""Damaged copies of a valid file, for fuzzing readers: cut, overwritten, repeated, reordered."""

from hypothesis import strategies as st

_FIELDS = (b"?", b".", b"nan", b"inf", b"-1", b"1e400", b"99999999999", b"abc", b"'", b"", b"\xff")


def _overwrite(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _replace_field(data: bytes, line: int, field: int, new: bytes) -> bytes:
    lines = data.split(b"\n")
    fields = lines[line % len(lines)].split() or [b""]
    fields[field % len(fields)] = new
    lines[line % len(lines)] = b" ".join(fields)
    return b"\n".join(lines)


def _move_line(data: bytes, line: int, to: int, count: int) -> bytes:
    lines = data.split(b"\n")
    start = line % len(lines)
    moved, rest = lines[start : start + count], lines[:start] + lines[start + count :]
    return b"\n".join(rest[:to] + moved + rest[to:])


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """``valid`` after one to three edits; truncations are the most frequent."""
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "cut", "bytes", "field", "move", "drop", "repeat"])):
            case "cut":
                data = data[:at]
            case "bytes":
                data = _overwrite(data, at, draw(st.binary(min_size=1, max_size=4)))
            case "field":
                new = draw(st.sampled_from(_FIELDS))
                data = _replace_field(data, at, draw(st.integers(0, 25)), new)
            case "move":
                data = _move_line(data, at, draw(st.integers(0, 50)), draw(st.integers(1, 3)))
            case "drop":
                data = data[:at] + data[at + draw(st.integers(1, 200)) :]
            case "repeat":
                piece = data[at : at + draw(st.integers(1, 200))]
                data = data[:at] + piece + data[at:]
    return data
