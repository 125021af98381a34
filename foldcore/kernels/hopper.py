"""What kernels for Hopper, ordered by hand in Gluon, share: tiles and their copies."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

ARCHITECTURE = 90  # the instructions are Hopper's only


@gluon.jit
def tile_in(
    ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr, layout: gl.constexpr
):
    """Pointers to [ROWS, COLUMNS], of rows that are STEP apart, in a layout."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))[None, :]
    return ptr + (row * STEP + column)


@gluon.jit
def tile_at(ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr):
    """The same where a thread has 8 in a row."""
    WIDE: gl.constexpr = COLUMNS // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [gl.num_warps(), 1], [1, 0])
    return tile_in(ptr, ROWS, COLUMNS, STEP, layout)


@gluon.jit
def copy_tile(ptr, place, wanted, STEP: gl.constexpr):
    """Begin to copy a tile, if it is wanted."""
    at = tile_at(ptr, place.shape[0], place.shape[1], STEP)
    async_copy.async_copy_global_to_shared(place, at, mask=gl.to_tensor(wanted))


@gluon.jit
def channels_of(x, COLUMNS: gl.constexpr):
    """[rows, c] as a tuple of [rows, COLUMNS], without moving anything."""
    if x.shape[1] == COLUMNS:
        return (x,)
    else:
        halves = gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1))
        low, high = gl.split(halves)
        return channels_of(low, COLUMNS) + channels_of(high, COLUMNS)
