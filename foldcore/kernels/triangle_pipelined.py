"""Triangle multiplication before the product, for Hopper, in order by hand (Gluon).

What ``triangle`` does, and the standard deviations of the pair, with fewer instructions and waits.
A tile of the pair goes into registers once: there it is the operand of products with all channels
of the program, some at a time, and what its standard deviations come from. Its place on chip is
free at once for a later tile. Weights and biases stay on chip. Results are turned around by whole
matrices on their way to memory. Two programs share a processor; the products of one run while the
other computes sigmoids. What follows the product is in ``triangle_output_pipelined``.

Sizes that these kernels do not take are left to ``triangle``. ``tests/gluon_interpreter.py`` runs
them without a GPU, and finds what they read too early or overwrite too soon.

Legend: as in ``triangle``; w = 4 h + c columns of folded weights; a chunk is a few channels.
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
from foldcore.kernels.hopper import ARCHITECTURE, copy_tile, tile_at
from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.rows import EPS, LOG2_E
from foldcore.kernels.turns import share


@dataclass(frozen=True)
class Steps:
    """Sizes of a launch."""

    rows: int  # positions of a tile
    columns: int  # channels of a chunk
    num_warps: int
    ahead: int  # tiles on their way
    programs: int  # on each multiprocessor
    groups: int = 1  # programs that share all channels of a tile; of projections


# channels -> sizes, of an H200
SIZES = {
    64: Steps(64, 32, 4, ahead=3, programs=3),
    128: Steps(64, 64, 4, ahead=1, programs=2, groups=2),
}


@gluon.jit
def reciprocal(x):
    """1 / x to 1e-7; 0 where that is less than the least normal number."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def row_moments(x, C: gl.constexpr, mma: gl.constexpr):
    """Mean and 1 / standard deviation of rows of an operand, as rows of a product's results."""
    wide = x.to(gl.float32)
    mean = gl.convert_layout(gl.sum(wide, 1), gl.SliceLayout(1, mma), assert_trivial=True) / C
    squares = gl.convert_layout(gl.sum(wide * wide, 1), gl.SliceLayout(1, mma), assert_trivial=True)
    return mean, gl.rsqrt(gl.maximum(squares / C - mean * mean, 0.0) + EPS)


@gluon.constexpr_function
def chunk_start(i: int, matrices: int, columns: int, h: int) -> int:
    """Where a matrix begins among folded columns: values and gates of each chunk of left, side by
    side; then of right."""
    chunks = matrices // 4
    return i // (2 * chunks) * (2 * h) + i % 2 * h + i // 2 % chunks * columns


@gluon.jit
def copy_projections(folded_ptr, weights, H: gl.constexpr, STEP: gl.constexpr):
    """Begin to copy all matrices of a program."""
    MATRICES: gl.constexpr = weights.shape[0]
    for i in gl.static_range(MATRICES):
        start = chunk_start(i, MATRICES, weights.shape[2], H)
        copy_tile(folded_ptr + start, weights.index(i), True, STEP)
    async_copy.commit_group()


@gluon.jit
def hold_biases(
    folded_bias_ptr,
    MATRICES: gl.constexpr,
    COLUMNS: gl.constexpr,
    H: gl.constexpr,
    mma: gl.constexpr,
):
    """Those of the same columns, in shared memory; gates' are parts of powers of 2."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    biases = gl.allocate_shared_memory(gl.float32, [MATRICES, COLUMNS], plain)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    for i in gl.static_range(MATRICES):
        bias = gl.load(folded_bias_ptr + chunk_start(i, MATRICES, COLUMNS, H) + column)
        biases.index(i).store(bias * -LOG2_E if i % 2 == 1 else bias)
    return biases


@gluon.jit
def begin_project(x, weights, none, CHUNK: gl.constexpr):
    """Products for a chunk's gates and values, on their way."""
    gate = warpgroup_mma(x, weights.index(2 * CHUNK + 1), none, use_acc=False, is_async=True)
    value = warpgroup_mma(x, weights.index(2 * CHUNK), none, use_acc=False, is_async=True)
    return gate, value


@gluon.jit
def finish_project(
    products,
    scales,
    value_bias,
    gate_bias,
    to_ptr,
    place,
    none,
    P: gl.constexpr,
):
    """Write a chunk's gated values, [channels, positions]."""
    columns: gl.constexpr = gl.SliceLayout(0, none.type.layout)
    rstd, power_scale, inverse_mask = scales
    gate = warpgroup_mma_wait(1, deps=[products[0]])
    gate = gl.exp2(gate * power_scale + gate_bias.load(columns)[None, :])
    gate = reciprocal(gate * inverse_mask + inverse_mask)
    value = warpgroup_mma_wait(0, deps=[products[1]])
    value = (value * rstd + value_bias.load(columns)[None, :]) * gate
    place.permute((1, 0)).store(value.to(gl.bfloat16))
    to = tile_at(to_ptr, place.shape[0], place.shape[1], P)
    gl.thread_barrier()
    gl.store(to, place.load(to.type.layout))


@gluon.jit
def finish_tile(
    products,
    x,
    weights,
    scales,
    biases,
    to_ptrs,
    places,  # for chunks in turn
    none,
    P: gl.constexpr,
):
    """All chunks of a tile, left's and then right's, the first of which has been begun."""
    CHUNKS: gl.constexpr = weights.shape[0] // 2
    COLUMNS: gl.constexpr = weights.shape[2]
    for chunk in gl.static_range(CHUNKS):
        start = chunk % (CHUNKS // 2) * COLUMNS
        finish_project(
            products,
            scales,
            biases.index(2 * chunk),
            biases.index(2 * chunk + 1),
            (to_ptrs[0] if chunk < CHUNKS // 2 else to_ptrs[1]) + start * P,
            places[chunk % 2],
            none,
            P,
        )
        if chunk + 1 < CHUNKS:
            products = begin_project(x, weights, none, chunk + 1)


@gluon.jit
def triangle_project_pipelined_kernel(
    pair_ptr,  # [b, p, c]
    mask_ptr,  # [b, p] float32, nowhere negative
    folded_ptr,  # [c, w]
    folded_bias_ptr,  # [w] float32
    left_ptr,  # [b, h, p]
    right_ptr,  # [b, h, p]
    rstd_ptr,  # [b, p]: 1 / standard deviation of the pair's channels
    B: gl.constexpr,
    P: gl.constexpr,
    C: gl.constexpr,
    H: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """Programs: some of left's channels and the same of right's; then group of tiles."""
    await_previous()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * COLUMNS if COLUMNS < 64 else 128, 16, 2)
    PARTS: gl.constexpr = H // GROUPS // COLUMNS
    TILES: gl.constexpr = B * P // ROWS
    channel = gl.program_id(0) % GROUPS * (H // GROUPS)
    first = gl.program_id(0) // GROUPS
    step = gl.num_programs(0) // GROUPS
    weights = gl.allocate_shared_memory(gl.bfloat16, [4 * PARTS, C, COLUMNS], narrow)
    places = gl.allocate_shared_memory(gl.bfloat16, [AHEAD, ROWS, C], shared)
    even = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, ROWS], shared)
    odd = gl.allocate_shared_memory(gl.bfloat16, [COLUMNS, ROWS], shared)
    copy_projections(folded_ptr + channel, weights, H, 4 * H + C)
    for i in gl.static_range(AHEAD):
        tile = first + i * step
        copy_tile(pair_ptr + tile * (ROWS * C), places.index(i), tile < TILES, C)
        async_copy.commit_group()
    biases = hold_biases(folded_bias_ptr + channel, 4 * PARTS, COLUMNS, H, mma)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    none = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    next_mask = gl.load(mask_ptr + first * ROWS + row)
    turn = 0
    async_copy.wait_group(AHEAD)
    fence_async_shared()
    for tile in range(first, TILES, step):
        mask = next_mask
        next_mask = gl.load(mask_ptr + gl.minimum(tile + step, TILES - 1) * ROWS + row)
        async_copy.wait_group(AHEAD - 1)
        gl.thread_barrier()
        x = places.index(turn).load(gl.DotOperandLayout(0, mma, 2))
        gl.thread_barrier()  # all have read the tile
        ahead = tile + AHEAD * step
        copy_tile(pair_ptr + ahead * (ROWS * C), places.index(turn), ahead < TILES, C)
        async_copy.commit_group()
        turn = (turn + 1) % AHEAD
        products = begin_project(x, weights, none, 0)
        _, rstd = row_moments(x, C, mma)
        if channel == 0:
            gl.store(rstd_ptr + tile * ROWS + row, rstd)
        # sigmoid times mask = 1 / (inverse + inverse 2^power), which is 0 where the mask is
        inverse_mask = gl.where(mask == 0.0, 3e38, reciprocal(mask))
        scales = rstd[:, None], (rstd * -LOG2_E)[:, None], inverse_mask[:, None]
        example = tile // (P // ROWS)
        to = (example * H + channel) * P + tile % (P // ROWS) * ROWS
        to_ptrs = left_ptr + to, right_ptr + to
        finish_tile(products, x, weights, scales, biases, to_ptrs, (even, odd), none, P)
    async_copy.wait_group(0)


def fits(b: int, p: int, c: int, h: int, dtype: str, architecture: int) -> bool:
    """Whether the kernel takes these sizes: whole tiles, on the one architecture."""
    if dtype != "bfloat16" or architecture != ARCHITECTURE or c != h or c not in SIZES:
        return False
    steps = SIZES[c]
    return p % steps.rows == 0 and b * p * h < 2**31


def project(b: int, p: int, c: int, h: int, steps: Steps | None = None) -> Launch:
    """(pair, mask, folded weights, bias) -> left, right [b h p], 1 / standard deviation of the
    pair's rows [b p]; for sizes that fit, in bfloat16."""
    steps = steps or SIZES[c]
    side = Output((b, h, p), "bfloat16")
    tiles = b * p // steps.rows
    sizes = {"B": b, "P": p, "C": c, "H": h, "GROUPS": steps.groups}
    return Launch(
        kernel=triangle_project_pipelined_kernel,
        grid=(steps.groups * share(tiles, steps.groups, steps.programs),),
        outputs=(side, side, Output((b, p), "float32")),
        constants=sizes | constants(steps),
        num_warps=steps.num_warps,
    )


def constants(steps: Steps) -> dict[str, int]:
    """What both kernels know of their sizes."""
    return {"ROWS": steps.rows, "COLUMNS": steps.columns, "AHEAD": steps.ahead}
