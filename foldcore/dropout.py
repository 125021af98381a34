"""Dropout by counters: which elements a module keeps, defined so that both tracks keep the same.

Random words come from Threefry-2x32-20 (Salmon et al. 2011), a function of a key and a counter of
two 32-bit words each:

    stream = threefry(key=(crc32(path), example_id), counter=(block, recycling))[0]
    bits   = threefry(key=(seed, step),              counter=(stream, element))[0]
    keep   = bits < round((1 - rate) * 2**32)

``path`` is the module's path and the name of the update, ``block`` the position in a stack of
blocks, ``recycling`` the pass, ``element`` the row-major position in one example's mask. Masks
need no state, so a recomputed block meets the same mask. This file is the definition; the tracks
implement it in their own arithmetic and are tested against it.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of even and odd groups of four rounds
PARITY = 0x1BD11BDA  # third key word is the xor of the key and this
GROUPS = 5  # of four rounds

# (key, counter, result): known answers of the Random123 library
TEST_VECTORS = (
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)

Words = UInt32[np.ndarray, "..."]


def threefry(key: tuple[Words, Words], counter: tuple[Words, Words]) -> tuple[Words, Words]:
    """Threefry-2x32 with 20 rounds, elementwise over broadcast arrays."""
    k0, k1, x0, x1 = np.broadcast_arrays(*(np.asarray(w, np.uint32) for w in (*key, *counter)))
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(PARITY))
    with np.errstate(over="ignore"):  # sums are modulo 2**32
        x0, x1 = x0 + keys[0], x1 + keys[1]
        for group in range(GROUPS):
            for rotation in ROTATIONS[group % 2]:
                x0 = x0 + x1
                x1 = x0 ^ ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation)))
            x0 = x0 + keys[(group + 1) % 3]
            x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def path_hash(path: str) -> int:
    """32-bit name of a module's update."""
    return zlib.crc32(path.encode())


def threshold(rate: float) -> int:
    """Bits below this are kept; ``rate`` lies in 0 < rate < 1."""
    if not 0 < rate < 1:
        raise ValueError(f"dropout rate {rate}: expected a number between 0 and 1")
    return min(round((1 - rate) * 2**32), 2**32 - 1)


def keep_mask(
    shape: Sequence[int],
    rate: float,
    *,
    path: str,
    seed: int,
    step: int,
    example_id: Int32[np.ndarray, " b"],
    block: int = 0,
    recycling: int = 0,
) -> Bool[np.ndarray, "b ..."]:
    """Which elements of a mask of ``shape`` (batch axis first) are kept."""
    ids = np.asarray(example_id, np.int32).view(np.uint32)
    stream, _ = threefry((_word(path_hash(path)), ids), (_word(block), _word(recycling)))
    element = np.arange(int(np.prod(shape[1:])), dtype=np.uint32)
    bits, _ = threefry((_word(seed), _word(step)), (stream[:, None], element[None]))
    return (bits < np.uint32(threshold(rate))).reshape(shape)


def _word(value: int) -> Words:
    return np.array(value % 2**32, np.uint32)
