"""Arrays as small, checked, compressed blobs: the cells of a packed store.

A blob is: CRC-32 of all that follows, coding, dtype, number of dimensions, bytes a value, the
dimensions, a count, the unpacked size, then one zstd frame. Blobs come from outside: sizes are
checked before memory is taken, and every failure is a ``ValueError`` that says what is wrong.

Codings (each gives back exactly the array that went in):

- PLAIN     the array's bytes
- BITS      an array of 0 and 1, eight to a byte
- STEPS     integers as differences along one axis: a running index is a run of ones
- DECIMALS  the values under a mask, as steps of 1/1000: coordinates as files write them
- MASKED    the values under a mask, where they are no such decimals
- SPARSE    the values that are not zero, and the distances between them down the columns
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

MAX_BYTES = 1 << 30  # of one unpacked array
LEVEL = 9  # zstd: beyond it, alignments shrink by 10 % at thirty times the work
PLAIN, BITS, STEPS, DECIMALS, MASKED, SPARSE = range(6)
_NAMES = ("|u1", "<u2", "<u4", "<i4", "<i8", "<f4", "<f8")
_DTYPES = tuple(map(np.dtype, _NAMES))
_DISTANCE, _ENTRY = np.dtype("<u4"), np.dtype("<u2")  # of sparse matrices
_HEAD = struct.Struct("<IBBBB")  # crc, coding, dtype, dimensions, bytes a value
_SHAPES = [struct.Struct(f"<{ndim}I") for ndim in range(9)]
_SIZES = struct.Struct("<II")  # count, unpacked size
_UNPACK = pa.Codec("zstd")
_SCALE = 1000.0  # decimals of a coordinate file: 1/1000 angstrom


def encode(array: Shaped[np.ndarray, "..."], mask: np.ndarray | None = None) -> bytes:
    """Pack an array; ``mask`` is that of its leading axes outside of which it is zero."""
    array = np.ascontiguousarray(array)
    if array.dtype == np.float32:
        bits = array.view(np.uint32)  # tells 0 from -0: exact is exact
        if mask is not None and not bits[mask == 0].any():
            return _encode_masked(array, array[mask != 0])
    if array.dtype == np.float32 and ((bits == 0) | (array == 1)).all():
        return _blob(BITS, array, 1, array.size, np.packbits(array.astype(bool)).tobytes())
    if array.ndim == 1 and array.dtype.kind in "iu" and array.size:
        steps = np.diff(array.astype(np.int64), prepend=0).astype(array.dtype)  # wraps, and back
        return _blob(STEPS, array, array.itemsize, array.size, _planes(steps))
    return _blob(PLAIN, array, array.itemsize, array.size, array.tobytes())


def encode_sparse(array: Shaped[np.ndarray, "n r"]) -> bytes:
    """Pack a matrix of unsigned integers of 16 bits that is zero nearly everywhere."""
    flat = np.ascontiguousarray(array.T).ravel()
    at = np.flatnonzero(flat)
    payload = _planes(np.diff(at, prepend=0).astype("<u4")) + _planes(flat[at].astype("<u2"))
    return _blob(SPARSE, array, 6, len(at), payload)


def encode_text(text: str) -> bytes:
    """Pack a text; :func:`decode_text` gives it back."""
    return encode(np.frombuffer(text.encode(), np.uint8)[None])


def decode_text(blob: Any) -> str:
    """Unpack a text."""
    return decode(blob).tobytes().decode()


def decode(blob: Any, mask: np.ndarray | None = None) -> np.ndarray:
    """Unpack a blob (any buffer); ``mask`` as given to :func:`encode`."""
    coding, dtype, shape, width, count, payload = _open(memoryview(blob))
    if coding == PLAIN:
        return np.frombuffer(payload, dtype).reshape(shape)  # read-only
    if coding == BITS:
        bits = np.unpackbits(np.frombuffer(payload, np.uint8), count=count)
        return bits.astype(dtype).reshape(shape)
    if coding == STEPS:
        return _unplane(payload, dtype).cumsum(dtype=dtype).reshape(shape)
    if coding == SPARSE:
        return _decode_sparse(payload, dtype, shape, count)
    return _decode_masked(coding, payload, dtype, shape, width, mask)


def _encode_masked(array: np.ndarray, values: np.ndarray) -> bytes:
    flat = values.reshape(len(values), -1) if values.size else values.reshape(0, 1)
    whole = np.rint(flat.astype(np.float64) * _SCALE)
    exact = np.isfinite(whole).all() and (np.abs(whole) < 2**31).all()
    if not exact or (whole / _SCALE + 0.0).astype(np.float32).tobytes() != flat.tobytes():
        return _blob(MASKED, array, 4, values.size, _planes(flat))
    steps = np.diff(whole.astype(np.int64), axis=0, prepend=0)
    narrow = not len(steps) or np.abs(steps[1:]).max(initial=0) < 2**15
    first = steps[:1].astype("<i4").tobytes()
    rest = steps[1:].astype("<i2" if narrow else "<i8")
    payload = first + _planes(np.ascontiguousarray(rest.T))
    return _blob(DECIMALS, array, rest.itemsize, values.size, payload)


def _decode_masked(
    coding: int,
    payload: memoryview,
    dtype: np.dtype,
    shape: Sequence[int],
    width: int,
    mask: np.ndarray | None,
) -> np.ndarray:
    if mask is None or tuple(shape[: mask.ndim]) != mask.shape:
        raise ValueError("its mask does not fit")
    at = (mask != 0).ravel().nonzero()[0]
    tail = math.prod(shape[mask.ndim :])
    if coding == MASKED:
        values = _unplane(payload, dtype)
    else:
        size = min(len(at), 1) * tail * 4
        steps = np.empty((tail, len(at)), np.int32)  # a wide step may wrap, and its sum back
        steps[:, :1] = np.frombuffer(payload[:size], "<i4").reshape(tail, -1)
        rest = _unplane(payload[size:], np.dtype(f"<i{width}"))
        if rest.size != tail * max(len(at) - 1, 0):
            raise ValueError("its mask counts other values")
        steps[:, 1:] = rest.reshape(tail, -1)
        values = (steps.cumsum(1, np.int32) / _SCALE).astype(np.float32).T
    if values.size != tail * len(at):
        raise ValueError("its mask counts other values")
    array = np.zeros((mask.size, tail), dtype)
    array[at] = values.reshape(-1, tail)
    return array.reshape(shape)


def _decode_sparse(
    payload: memoryview, dtype: np.dtype, shape: Sequence[int], count: int
) -> np.ndarray:
    rows, columns = shape
    at = _unplane(payload[: 4 * count], _DISTANCE).cumsum(dtype=np.int64)
    if count and not 0 <= at[-1] < rows * columns:  # steps are positive: the last is the largest
        raise ValueError("an entry lies outside the matrix")
    array = np.zeros((rows, columns), dtype)
    column, row = np.divmod(at, max(rows, 1))
    array[row, column] = _unplane(payload[4 * count :], _ENTRY)
    return array


def _blob(coding: int, array: np.ndarray, width: int, count: int, payload: bytes) -> bytes:
    dtype = array.dtype.newbyteorder("<").str
    if dtype not in _NAMES or max(array.nbytes, len(payload)) > MAX_BYTES:
        raise ValueError(f"an array of {array.dtype} and {array.nbytes} bytes cannot be packed")
    dims = struct.pack(f"<{array.ndim}I", *array.shape)
    body = dims + _SIZES.pack(count, len(payload))
    body += pa.Codec("zstd", LEVEL).compress(payload, asbytes=True)
    head = _HEAD.pack(0, coding, _NAMES.index(dtype), array.ndim, width)[4:]
    return zlib.crc32(head + body).to_bytes(4, "little") + head + body


def _open(blob: memoryview) -> tuple[int, np.dtype, tuple[int, ...], int, int, memoryview]:
    """Coding, dtype, shape, bytes a value, count and unpacked bytes, all of them checked."""
    if len(blob) < _HEAD.size:
        raise ValueError("truncated")
    crc, coding, kind, ndim, width = _HEAD.unpack_from(blob)
    start = _HEAD.size + 4 * ndim + _SIZES.size
    if zlib.crc32(blob[4:]) != crc:
        raise ValueError("its checksum does not match: damaged")
    if len(blob) < start or kind >= len(_DTYPES) or coding > SPARSE or ndim > 8:
        raise ValueError("not a blob of this format")
    shape: tuple[int, ...] = _SHAPES[ndim].unpack_from(blob, _HEAD.size)
    count, size = _SIZES.unpack_from(blob, start - _SIZES.size)
    dtype = _DTYPES[kind]
    _check_sizes(coding, dtype, math.prod(shape), ndim, width, count, size)
    try:
        payload = _UNPACK.decompress(blob[start:], size) if size else b""
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot be unpacked: {error}") from None
    if len(payload) != size:
        raise ValueError("it unpacks to another size")
    return coding, dtype, shape, width, count, memoryview(payload)


def _check_sizes(
    coding: int, dtype: np.dtype, total: int, ndim: int, width: int, count: int, size: int
) -> None:
    """The sizes that a blob announces must agree before any memory is taken."""
    expected = {
        PLAIN: total * dtype.itemsize,
        BITS: (total + 7) // 8,
        STEPS: total * dtype.itemsize,
        MASKED: count * dtype.itemsize,
        SPARSE: 6 * count,
    }.get(coding, size)
    fits = total * dtype.itemsize <= MAX_BYTES and size <= MAX_BYTES and count <= total
    if coding == SPARSE:
        fits = fits and ndim == 2 and dtype == np.uint16
    if coding == DECIMALS:
        fits = fits and width in (2, 8) and dtype == np.float32
    if not fits or size != expected or (coding == BITS and count != total):
        raise ValueError("its sizes do not agree")


def _planes(array: np.ndarray) -> bytes:
    """Bytes of equal significance together: the high ones are nearly constant."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return np.ascontiguousarray(flat.view(np.uint8).reshape(len(flat), flat.itemsize).T).tobytes()


def _unplane(payload: memoryview, dtype: np.dtype) -> np.ndarray:
    count, rest = divmod(len(payload), dtype.itemsize)
    if rest:
        raise ValueError("its sizes do not agree")
    low, *others = np.frombuffer(payload, np.uint8).reshape(dtype.itemsize, count)
    words = low.astype(f"<u{dtype.itemsize}")
    for place, plane in enumerate(others, 1):
        words |= plane.astype(words.dtype) << 8 * place
    return words.view(dtype)
