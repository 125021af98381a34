"""The products of triangle multiplication and of its gradients, for Hopper (Gluon).

Of many square matrices at once, either factor as it lies or transposed. The matrix library is as
quick to compute them, but begins and ends apart from the launches around it: it waits for all of
the one before, and the one after for all of it. These launches overlap (``dependent``).

A program takes tiles of results in turn; copies are some steps ahead of the products that read
them, across tiles. Other sizes are left to the library.

Legend: m matrices, of n rows and columns; a step is BLOCK_K of the axis that is summed over.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.hopper import ARCHITECTURE, channels_of, copy_tile, tile_at
from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.turns import MULTIPROCESSORS

# of an H200: tiles of results, steps, how many steps are on chip at once
BLOCKS = {"BLOCK_I": 128, "BLOCK_J": 256, "BLOCK_K": 64, "AHEAD": 4, "COLUMNS": 64}
NUM_WARPS = 8


@gluon.jit
def place_of(tile, N: gl.constexpr, BLOCK_I: gl.constexpr, BLOCK_J: gl.constexpr):
    """Where a tile's matrix begins, its first row and column."""
    ACROSS: gl.constexpr = N // BLOCK_J
    TILES: gl.constexpr = ACROSS * (N // BLOCK_I)
    return tile // TILES * (N * N), tile % TILES // ACROSS * BLOCK_I, tile % ACROSS * BLOCK_J


@gluon.jit
def copy_step(
    a_ptr,
    b_ptr,
    places,  # for the tiles of both factors, step by step
    number,  # of a program's steps
    M: gl.constexpr,
    N: gl.constexpr,
    TURNED_A: gl.constexpr,
    TURNED_B: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """Begin to copy what a step takes, if there is such a step."""
    STEPS: gl.constexpr = N // BLOCK_K
    tile = gl.program_id(0) + number // STEPS * gl.num_programs(0)
    k = number % STEPS * BLOCK_K
    matrix, i, j = place_of(tile, N, BLOCK_I, BLOCK_J)
    wanted = tile < M * (N // BLOCK_I) * (N // BLOCK_J)
    a_ptr += matrix + (k * N + i if TURNED_A else i * N + k)
    b_ptr += matrix + (j * N + k if TURNED_B else k * N + j)
    turn = number % places[0].shape[0]
    copy_tile(a_ptr, places[0].index(turn), wanted, N)
    copy_tile(b_ptr, places[1].index(turn), wanted, N)
    async_copy.commit_group()


@gluon.jit
def begin_product(a, b, total, TURNED_A: gl.constexpr, TURNED_B: gl.constexpr):
    """Add a step's product to the total, on its way."""
    if TURNED_A:
        a = a.permute((1, 0))
    if TURNED_B:
        b = b.permute((1, 0))
    return warpgroup_mma(a, b, total, is_async=True)


@gluon.jit
def store_tile(ptr, parts, places, layout: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr):
    """Write a tile's results, some columns after others, 16 bytes at a time."""
    for i in gl.static_range(PARTS):
        place = places[i % 2]
        place.store(gl.convert_layout(parts[i], layout))
        to = tile_at(ptr + i * place.shape[1], place.shape[0], place.shape[1], N)
        gl.thread_barrier()
        gl.store(to, place.load(to.type.layout))


@gluon.jit
def triangle_product_kernel(
    a_ptr,  # [m, n, n]
    b_ptr,  # [m, n, n]
    out_ptr,  # [m, n, n]
    M: gl.constexpr,
    N: gl.constexpr,
    TURNED_A: gl.constexpr,
    TURNED_B: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
    BLOCK_K: gl.constexpr,
    AHEAD: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    await_previous()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_J, 16])
    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * COLUMNS if COLUMNS < 64 else 128, 16, 2)
    A: gl.constexpr = [AHEAD, BLOCK_K, BLOCK_I] if TURNED_A else [AHEAD, BLOCK_I, BLOCK_K]
    B: gl.constexpr = [AHEAD, BLOCK_J, BLOCK_K] if TURNED_B else [AHEAD, BLOCK_K, BLOCK_J]
    a_places = gl.allocate_shared_memory(gl.bfloat16, A, shared)
    b_places = gl.allocate_shared_memory(gl.bfloat16, B, shared)
    even = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_I, COLUMNS], narrow)
    odd = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_I, COLUMNS], narrow)
    given = a_ptr, b_ptr, (a_places, b_places)
    for s in gl.static_range(AHEAD - 1):
        copy_step(*given, s, M, N, TURNED_A, TURNED_B, BLOCK_I, BLOCK_J, BLOCK_K)
    number = 0
    TILES: gl.constexpr = M * (N // BLOCK_I) * (N // BLOCK_J)
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        total = warpgroup_mma_init(gl.zeros([BLOCK_I, BLOCK_J], gl.float32, mma))
        for _ in gl.static_range(N // BLOCK_K):
            async_copy.wait_group(AHEAD - 2)
            total = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[total]))
            gl.thread_barrier()  # this step's copies are there, the last one's product is done
            fence_async_shared()
            turn = number % AHEAD
            a, b = a_places.index(turn), b_places.index(turn)
            total = begin_product(a, b, total, TURNED_A, TURNED_B)
            after = number + AHEAD - 1
            copy_step(*given, after, M, N, TURNED_A, TURNED_B, BLOCK_I, BLOCK_J, BLOCK_K)
            number += 1
        total = warpgroup_mma_wait(0, deps=[total])
        matrix, i, j = place_of(tile, N, BLOCK_I, BLOCK_J)
        parts = channels_of(total.to(gl.bfloat16), COLUMNS)
        to_ptr = out_ptr + (matrix + i * N + j)
        store_tile(to_ptr, parts, (even, odd), part, N, BLOCK_J // COLUMNS)
    async_copy.wait_group(0)


def fits(m: int, n: int, dtype: str, architecture: int) -> bool:
    """Whether the kernel takes these sizes: whole tiles, on the one architecture."""
    whole = n % BLOCKS["BLOCK_I"] == n % BLOCKS["BLOCK_J"] == n % BLOCKS["BLOCK_K"] == 0
    return dtype == "bfloat16" and architecture == ARCHITECTURE and whole and m * n * n < 2**31


def product(
    m: int, n: int, turned: tuple[bool, bool], blocks: dict[str, int] | None = None
) -> Launch:
    """(a, b) [m n n] -> their products [m n n], of either as it lies or transposed (``turned``);
    for sizes that fit, in bfloat16."""
    blocks = blocks or BLOCKS
    tiles = m * (n // blocks["BLOCK_I"]) * (n // blocks["BLOCK_J"])
    return Launch(
        kernel=triangle_product_kernel,
        grid=(min(tiles, MULTIPROCESSORS),),
        outputs=(Output((m, n, n), "bfloat16"),),
        constants={"M": m, "N": n, "TURNED_A": turned[0], "TURNED_B": turned[1]} | blocks,
        num_warps=NUM_WARPS,
    )
