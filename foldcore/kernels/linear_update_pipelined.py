"""The last projection of a module for Hopper, in order by hand (Gluon).

What ``linear_update`` does, where it is limited by memory: a program keeps its weights on chip, and
its factors in registers, for it walks along the axis along which they are the same. Tiles of what
is projected and of the residual are on their way while it works on others, or while another program
on the processor does. Results take the place of the residual, from where they are written 16 bytes
at a time.

Sizes that it does not take are left to ``linear_update``. ``tests/gluon_interpreter.py`` runs it
without a GPU, and finds what it reads too early or overwrites too soon.

Legend: n = b i j rows, c channels; a tile is a rectangle of positions.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.hopper import ARCHITECTURE, copy_tile
from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.turns import share


@dataclass(frozen=True)
class Steps:
    """Sizes of a launch."""

    rows: int  # positions of a tile
    columns: int  # channels that a program computes
    num_warps: int
    ahead: int  # tiles on chip at once
    programs: int  # on each multiprocessor
    side: int = 1  # positions of a tile along i


# (channels, whether the rows that are projected are those of the transposed table) -> sizes
SIZES = {
    (64, False): Steps(64, 64, 4, ahead=3, programs=4),
    (64, True): Steps(64, 64, 4, ahead=3, programs=4, side=16),
    (128, False): Steps(64, 128, 8, ahead=2, programs=2),
    (128, True): Steps(64, 128, 8, ahead=2, programs=2, side=4),
    (256, False): Steps(64, 128, 8, ahead=3, programs=1),
}


@gluon.jit
def rows_at(
    ptr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STEP_I: gl.constexpr,
    STEP_J: gl.constexpr,
    SIDE: gl.constexpr,
):
    """Pointers to a tile whose positions are that far apart; a thread has 8 channels in a row."""
    WIDE: gl.constexpr = COLUMNS // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    at = row % SIDE * STEP_I + row // SIDE * STEP_J
    return ptr + (at[:, None] + column[None, :])


@gluon.jit
def copy_rows(ptr, place, wanted, STEP_I: gl.constexpr, STEP_J: gl.constexpr, SIDE: gl.constexpr):
    """Begin to copy a tile of positions, if it is wanted."""
    at = rows_at(ptr, place.shape[0], place.shape[1], STEP_I, STEP_J, SIDE)
    async_copy.async_copy_global_to_shared(place, at, mask=gl.to_tensor(wanted))


@gluon.jit
def factors_at(factor_ptr, first, none, C: gl.constexpr, SHARED: gl.constexpr, SIDE: gl.constexpr):
    """The factors of a tile, from their first row on, as the results of a product."""
    row = gl.arange(0, none.shape[0], layout=gl.SliceLayout(1, none.type.layout))
    column = gl.arange(0, none.shape[1], layout=gl.SliceLayout(0, none.type.layout))
    row = first + (row // SIDE if SHARED == 1 else row % SIDE)
    return gl.load(factor_ptr + (row[:, None] * C + column[None, :]))


@gluon.jit
def updated(update, bias, factor, x):
    """x + factor * (update + bias), x and factor or None."""
    update += bias.to(gl.float32)[None, :]
    if factor is not None:
        update *= factor
    if x is not None:
        update += x.to(gl.float32)
    return update.to(gl.bfloat16)


@gluon.jit
def begin_copies(
    x_ptr,  # or None
    y_ptr,
    weights_ptr,
    places,  # of tiles of y and x, of the weights
    first,
    step,
    LENGTH: gl.constexpr,
    Y_NEXT: gl.constexpr,
    Y_I: gl.constexpr,
    Y_J: gl.constexpr,
    X_NEXT: gl.constexpr,
    X_I: gl.constexpr,
    SIDE: gl.constexpr,
):
    """A program's first tiles, two groups each; with the first, which is further away, weights."""
    ys, xs, weights = places
    AHEAD: gl.constexpr = ys.shape[0]
    C: gl.constexpr = ys.shape[2]
    for k in gl.static_range(AHEAD):
        tile = first + k * step
        copy_rows(y_ptr + tile * Y_NEXT, ys.index(k), tile < LENGTH, Y_I, Y_J, SIDE)
        if x_ptr is not None:
            copy_rows(x_ptr + tile * X_NEXT, xs.index(k), tile < LENGTH, X_I, C, SIDE)
        if k == 0:
            copy_tile(weights_ptr, weights, True, C)
        async_copy.commit_group()
        async_copy.commit_group()


@gluon.jit
def linear_update_pipelined_kernel(
    y_ptr,  # [n, c]
    weights_ptr,  # [c, c]
    bias_ptr,  # [c]
    x_ptr,  # [n, c]
    factor_ptr,  # [b, j, c] or [b, i, c] float32: SHARED 1 or 2
    out_ptr,  # [n, c]
    N: gl.constexpr,  # of an example
    C: gl.constexpr,
    SHARED: gl.constexpr,
    RESIDUAL: gl.constexpr,
    KEPT: gl.constexpr,  # tiles of an example along the axis where programs stay
    LENGTH: gl.constexpr,  # and along that which they walk
    BLOCKS: gl.constexpr,  # KEPT of all examples
    Y_I: gl.constexpr,  # from a position of y to the next along i
    Y_J: gl.constexpr,  # along j
    Y_BLOCK: gl.constexpr,  # from a block to the next
    Y_NEXT: gl.constexpr,  # from a tile to the next
    X_I: gl.constexpr,  # the same of x
    X_BLOCK: gl.constexpr,
    X_NEXT: gl.constexpr,
    SIDE: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """Programs: some channels, then block, then group of tiles."""
    await_previous()
    EACH: gl.constexpr = COLUMNS * (ROWS // 16) // gl.num_warps()
    grid: gl.constexpr = [ROWS // 16, COLUMNS // EACH]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], grid, [16, EACH, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PARTS: gl.constexpr = C // COLUMNS
    part = gl.program_id(0) % PARTS * COLUMNS
    block = gl.program_id(0) // PARTS % BLOCKS
    first, step = gl.program_id(0) // (PARTS * BLOCKS), gl.num_programs(0) // (PARTS * BLOCKS)
    y_ptr += block // KEPT * (N * C) + block % KEPT * Y_BLOCK
    at = block // KEPT * (N * C) + block % KEPT * X_BLOCK + part
    x_ptr += at
    weights = gl.allocate_shared_memory(gl.bfloat16, [C, COLUMNS], shared)
    ys = gl.allocate_shared_memory(gl.bfloat16, [AHEAD, ROWS, C], shared)
    xs = gl.allocate_shared_memory(gl.bfloat16, [AHEAD, ROWS, COLUMNS], shared)
    given = y_ptr, weights_ptr + part, (ys, xs, weights), first, step
    begin_copies(x_ptr if RESIDUAL else None, *given, LENGTH, Y_NEXT, Y_I, Y_J, X_NEXT, X_I, SIDE)
    none = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    bias = gl.load(bias_ptr + part + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma)))
    factor = None
    if SHARED > 0:
        start = block * (ROWS // SIDE if SHARED == 1 else SIDE)
        factor = factors_at(factor_ptr + part, start, none, C, SHARED, SIDE)
    turn = 0
    for tile in range(first, LENGTH, step):
        after = tile + AHEAD * step
        async_copy.wait_group(2 * AHEAD - 2)
        fence_async_shared()
        gl.thread_barrier()
        update = warpgroup_mma(ys.index(turn), weights, none, use_acc=False, is_async=True)
        place = xs.index(turn)
        x = place.load(mma) if RESIDUAL else None
        update = warpgroup_mma_wait(0, deps=[update])
        place.store(updated(update, bias, factor, x))
        gl.thread_barrier()  # all products have ended, all results are there
        copy_rows(y_ptr + after * Y_NEXT, ys.index(turn), after < LENGTH, Y_I, Y_J, SIDE)
        async_copy.commit_group()
        to = rows_at(out_ptr + at + tile * X_NEXT, ROWS, COLUMNS, X_I, C, SIDE)
        gl.store(to, place.load(to.type.layout))
        gl.thread_barrier()  # all have read the results
        if RESIDUAL:
            copy_rows(x_ptr + after * X_NEXT, place, after < LENGTH, X_I, C, SIDE)
        async_copy.commit_group()
        turn = (turn + 1) % AHEAD
    async_copy.wait_group(0)


def fits(
    table: tuple[int, int, int], k: int, c: int, transposed: bool, dtype: str, architecture: int
) -> bool:
    """Whether the kernel takes these sizes, ``table`` (b, i, j): whole tiles, on the one
    architecture."""
    known = k == c and (c, transposed) in SIZES
    if dtype != "bfloat16" or architecture != ARCHITECTURE or not known:
        return False
    (b, i, j), steps = table, SIZES[c, transposed]
    whole = i % steps.side == j % (steps.rows // steps.side) == 0
    return whole and b * i * j * c < 2**31


def forward(
    table: tuple[int, int, int],
    c: int,
    shared: int,
    transposed: bool,
    residual: bool,
    steps: Steps | None = None,
) -> Launch:
    """(y, weights, bias, x, factor) -> as ``linear_update.forward``, of c channels from as many;
    for sizes that fit, in bfloat16."""
    steps, (b, i, j) = steps or SIZES[c, transposed], table
    tiles = i // steps.side, j // (steps.rows // steps.side)
    length, kept = reversed(tiles) if shared == 2 else tiles
    blocks, parts = b * kept, c // steps.columns
    sizes = {"N": i * j, "C": c, "SHARED": shared, "RESIDUAL": residual}
    ways = {"KEPT": kept, "LENGTH": length, "BLOCKS": blocks, "SIDE": steps.side}
    tile = {"ROWS": steps.rows, "COLUMNS": steps.columns, "AHEAD": steps.ahead}
    y = _distances("Y", (i, j), c, shared, transposed, steps)
    x = _distances("X", (i, j), c, shared, False, steps)
    del x["X_J"]  # as C
    return Launch(
        kernel=linear_update_pipelined_kernel,
        grid=(parts * blocks * share(length, parts * blocks, steps.programs),),
        outputs=(Output((b * i * j, c), "bfloat16"),),
        constants=sizes | ways | y | x | tile,
        num_warps=steps.num_warps,
    )


def _distances(
    name: str, table: tuple[int, int], c: int, shared: int, transposed: bool, steps: Steps
) -> dict[str, int]:
    """Elements between what follows on each other in a table of c channels."""
    i, j = (c, table[0] * c) if transposed else (table[1] * c, c)
    tile = steps.side * i, steps.rows // steps.side * j
    block, after = tile if shared == 2 else reversed(tile)
    return {f"{name}_I": i, f"{name}_J": j, f"{name}_BLOCK": block, f"{name}_NEXT": after}
