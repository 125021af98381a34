"""All dropout masks of a recycling pass in one launch: the generator of ``foldcore/dropout.py``.

Masks stand one after another in one array of bytes. A program writes ``BLOCK`` elements of one
mask; a table says of which, and where they begin.

Legend: b examples, t programs, n bytes.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from foldcore import dropout as definition
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv

# one row of the table: hash of the path, position in a stack of blocks, first element, place of it
# in the array, elements that remain of the mask, threshold
COLUMNS = 6
ALIGNMENT = 16  # bytes; masks begin at multiples of it
BLOCK = 2048
PARITY = tl.constexpr(definition.PARITY)
# rotations of even and of odd groups of four rounds
E0, E1, E2, E3 = (tl.constexpr(bits) for bits in definition.ROTATIONS[0])
O0, O1, O2, O3 = (tl.constexpr(bits) for bits in definition.ROTATIONS[1])


@triton.jit
def _rounds(x0, x1, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Four rounds, with these rotations."""
    x0 += x1
    x1 = x0 ^ ((x1 << A) | (x1 >> (32 - A)))
    x0 += x1
    x1 = x0 ^ ((x1 << B) | (x1 >> (32 - B)))
    x0 += x1
    x1 = x0 ^ ((x1 << C) | (x1 >> (32 - C)))
    x0 += x1
    x1 = x0 ^ ((x1 << D) | (x1 >> (32 - D)))
    return x0, x1


@triton.jit
def _threefry(k0, k1, x0, x1):
    """The first word of Threefry-2x32 with 20 rounds, of unsigned words."""
    k2 = k0 ^ k1 ^ PARITY
    x0, x1 = _rounds(x0 + k0, x1 + k1, E0, E1, E2, E3)
    x0, x1 = _rounds(x0 + k1, x1 + k2 + 1, O0, O1, O2, O3)
    x0, x1 = _rounds(x0 + k2, x1 + k0 + 2, E0, E1, E2, E3)
    x0, x1 = _rounds(x0 + k0, x1 + k1 + 3, O0, O1, O2, O3)
    x0, x1 = _rounds(x0 + k1, x1 + k2 + 4, E0, E1, E2, E3)
    return x0 + k2


@triton.jit
def _word(pointer):
    return tl.load(pointer).to(tl.uint32, bitcast=True)


@triton.jit
def dropout_masks_kernel(
    table_ptr,  # [t, 6] int32
    example_ptr,  # [b] int32
    words_ptr,  # [3] int32: seed, step, recycling pass
    kept_ptr,  # [b, n] uint8: 1 where an element is kept
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_previous()
    table_ptr += tl.program_id(0) * COLUMNS
    first, place, left = tl.load(table_ptr + 2), tl.load(table_ptr + 3), tl.load(table_ptr + 4)
    example = _word(example_ptr + tl.program_id(1))
    stream = _threefry(_word(table_ptr), example, _word(table_ptr + 1), _word(words_ptr + 2))
    index = tl.arange(0, BLOCK)
    element = (first + index).to(tl.uint32, bitcast=True)
    bits = _threefry(_word(words_ptr), _word(words_ptr + 1), stream, element)
    kept = (bits < _word(table_ptr + 5)).to(tl.uint8)
    kept_ptr += tl.program_id(1).to(tl.int64) * BYTES + place
    tl.store(kept_ptr + index, kept, mask=index < left)


def table(
    masks: Sequence[tuple[int, int, int, int]], block: int = BLOCK
) -> tuple[list[list[int]], list[int], int]:
    """The table for masks of (path hash, block, elements, threshold); their places; all bytes."""
    rows, places, end = [], [], 0
    for path, position, size, threshold in masks:
        places.append(end)
        for first in range(0, size, block):
            rows.append([path, position, first, end + first, size - first, threshold])
        end = cdiv(end + size, ALIGNMENT) * ALIGNMENT
    return rows, places, end


def draw(programs: int, examples: int, total: int, block: int = BLOCK) -> Launch:
    """Inputs: the table, the examples' numbers, (seed, step, pass). Output: every mask."""
    return Launch(
        kernel=dropout_masks_kernel,
        grid=(programs, examples),
        outputs=(Output((examples, total), "uint8"),),
        constants={"COLUMNS": COLUMNS, "BYTES": total, "BLOCK": block},
    )
