"""Triangle multiplication after the product, for Hopper, in order by hand (Gluon).

What ``triangle.output`` does. Tiles of pair and product go into registers, as the operands that
they are; there the product's channels are summed and the residual is added. Dropout's factors stay
in registers, two in one. See ``triangle_pipelined``, which this is the counterpart of.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.hopper import ARCHITECTURE, channels_of, copy_tile, tile_at
from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.rows import LOG2_E
from foldcore.kernels.triangle_pipelined import (
    Steps,
    constants,
    reciprocal,
    row_moments,
)
from foldcore.kernels.turns import share

# channels -> sizes, of an H200
SIZES = {
    64: Steps(64, 64, 4, ahead=2, programs=2),
    128: Steps(64, 64, 4, ahead=1, programs=2),
}


@gluon.jit
def pack(x):
    """Numbers [rows, n] that bfloat16 has, two in 32 bits: [rows, n / 2]."""
    low, high = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpack(x):
    """[rows, n] float32. Each time anew, for the compiler has no registers to keep them."""
    low, high = gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        "=r,=r,r",
        [x],
        dtype=(gl.float32, gl.float32),
        is_pure=False,
        pack=1,
    )
    return gl.reshape(gl.join(low, high), [x.shape[0], x.shape[1] * 2])


@gluon.jit
def largest_factors(factor_ptr, row, column, C: gl.constexpr, START: gl.constexpr):
    """Of each row, from a column on."""
    COLUMNS: gl.constexpr = column.shape[0]
    some = gl.load(factor_ptr + START + (row[:, None] * C + column[None, :]))
    largest = gl.max(gl.maximum(some, -some), 1)
    if START + COLUMNS == C:
        return largest
    else:
        return gl.maximum(largest, largest_factors(factor_ptr, row, column, C, START + COLUMNS))


@gluon.jit
def packed_factors(factor_ptr, row, column, inverse, C: gl.constexpr, START: gl.constexpr):
    """Dropout's factors [rows, c], from a column on, as shares of each row's largest: packed, a
    tuple of [rows, columns / 2]. Shares are 0 and 1, or are rounded."""
    COLUMNS: gl.constexpr = column.shape[0]
    some = gl.load(factor_ptr + START + (row[:, None] * C + column[None, :]))
    share = pack((some * inverse).to(gl.bfloat16).to(gl.float32))
    if START + COLUMNS == C:
        return (share,)
    else:
        return (share,) + packed_factors(factor_ptr, row, column, inverse, C, START + COLUMNS)


@gluon.jit
def factors_of(factor_ptr, row, column, C: gl.constexpr):
    """As gates take them: packed shares; the inverse of each row's largest, of which they are."""
    largest = largest_factors(factor_ptr, row, column, C, 0)
    inverse = gl.where(largest == 0.0, 3e38, reciprocal(largest))[:, None]
    return packed_factors(factor_ptr, row, column, inverse, C, 0), inverse


@gluon.jit
def copy_outputs(gate_ptr, update_ptr, gates, updates, STEP: gl.constexpr):
    """Begin to copy the weights of each chunk: of the gates, from the pair, and of the updates."""
    CHUNKS: gl.constexpr = gates.shape[0]
    COLUMNS: gl.constexpr = gates.shape[2]
    for i in gl.static_range(CHUNKS):
        copy_tile(gate_ptr + i * COLUMNS, gates.index(i), True, STEP)
        copy_tile(update_ptr + i * COLUMNS, updates.index(i), True, CHUNKS * COLUMNS)
    async_copy.commit_group()


@gluon.jit
def hold_biases(
    gate_ptr,
    update_ptr,
    C: gl.constexpr,
    COLUMNS: gl.constexpr,
    mma: gl.constexpr,
):
    """Those of all chunks, in shared memory: gates', as parts of powers of 2; then updates'."""
    CHUNKS: gl.constexpr = C // COLUMNS
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    biases = gl.allocate_shared_memory(gl.float32, [2 * CHUNKS, COLUMNS], plain)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    for i in gl.static_range(CHUNKS):
        biases.index(i).store(gl.load(gate_ptr + i * COLUMNS + column) * -LOG2_E)
        biases.index(CHUNKS + i).store(gl.load(update_ptr + i * COLUMNS + column))
    return biases


@gluon.jit
def copy_tiles(pair_ptr, product_ptr, xs, zs, turn, i, END: gl.constexpr, J: gl.constexpr):
    """Begin to copy the tiles of pair and product of an i, if it is before the end."""
    copy_tile(pair_ptr + i * (J * xs.shape[2]), xs.index(turn), i < END, xs.shape[2])
    copy_tile(product_ptr + i * J, zs.index(turn), i < END, END * J)
    async_copy.commit_group()


@gluon.jit
def begin_output(x, z, gates, updates, none, CHUNK: gl.constexpr):
    """Products for a chunk's gates and updates, on their way."""
    gate = warpgroup_mma(x, gates.index(CHUNK), none, use_acc=False, is_async=True)
    update = warpgroup_mma(z, updates.index(CHUNK), none, use_acc=False, is_async=True)
    return gate, update


@gluon.jit
def finish_output(
    products,
    x,  # the chunk's residual, or None
    factor,  # the chunk's, packed, or None
    scales,
    gate_bias,
    update_bias,
    to_ptr,
    place,
    none,
    C: gl.constexpr,
):
    """Write a chunk's results, [positions, channels]."""
    columns: gl.constexpr = gl.SliceLayout(0, none.type.layout)
    power_scale, center_rstd, inverse = scales
    gate = warpgroup_mma_wait(1, deps=[products[0]])
    gate = gl.exp2(gate * power_scale + gate_bias.load(columns)[None, :])
    gate = reciprocal(inverse + inverse * gate)
    if factor is not None:
        gate *= gl.convert_layout(unpack(factor), none.type.layout, assert_trivial=True)
    update = warpgroup_mma_wait(0, deps=[products[1]])
    update = (update * center_rstd + update_bias.load(columns)[None, :]) * gate
    if x is not None:
        update += gl.convert_layout(x, none.type.layout).to(gl.float32)
    place.store(update.to(gl.bfloat16))
    to = tile_at(to_ptr, place.shape[0], place.shape[1], C)
    gl.thread_barrier()
    gl.store(to, place.load(to.type.layout))


@gluon.jit
def finish_tile(
    products,
    operands,  # x, z
    scales,
    to_ptr,
    kept,  # weights of gates and updates, factors, biases, places for chunks in turn, zeros
    RESIDUAL: gl.constexpr,
):
    """All chunks of a tile, the first of which has been begun."""
    weights, factors, biases, places, none = kept
    CHUNKS: gl.constexpr = weights[0].shape[0]
    COLUMNS: gl.constexpr = weights[0].shape[2]
    residuals = (None,) * CHUNKS
    if RESIDUAL:
        residuals = channels_of(operands[0], COLUMNS)
    for chunk in gl.static_range(CHUNKS):
        finish_output(
            products,
            residuals[chunk],
            factors[chunk],
            scales,
            biases.index(chunk),
            biases.index(CHUNKS + chunk),
            to_ptr + chunk * COLUMNS,
            places[chunk % 2],
            none,
            CHUNKS * COLUMNS,
        )
        if chunk + 1 < CHUNKS:
            products = begin_output(*operands, *weights, none, chunk + 1)


@gluon.jit
def triangle_output_pipelined_kernel(
    product_ptr,  # [b, h, p]
    pair_ptr,  # [b, p, c]
    factor_ptr,  # [b, j, c] float32: dropout, the same for all i of p = (i, j)
    rstd_ptr,  # [b, p]
    folded_ptr,  # [c, w]
    folded_bias_ptr,  # [w] float32
    output_folded_ptr,  # [h, c]
    output_folded_bias_ptr,  # [c] float32
    out_ptr,  # [b, p, c]
    center_mean_ptr,  # [b, p]: of the product's channels
    center_rstd_ptr,  # [b, p]
    I: gl.constexpr,  # noqa: E741, the legend's name
    J: gl.constexpr,
    C: gl.constexpr,
    H: gl.constexpr,
    HAS_FACTOR: gl.constexpr,
    RESIDUAL: gl.constexpr,
    BLOCKS: gl.constexpr,  # of j, of all examples
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """Programs: block of an example's j, then group of i."""
    await_previous()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * COLUMNS if COLUMNS < 64 else 128, 16, 2)
    CHUNKS: gl.constexpr = C // COLUMNS
    block = gl.program_id(0) % BLOCKS
    example = block // (J // ROWS)
    j = block % (J // ROWS) * ROWS
    first, step = gl.program_id(0) // BLOCKS, gl.num_programs(0) // BLOCKS
    pair_ptr += (example * I * J + j) * C
    product_ptr += example * (H * I * J) + j
    gates = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, C, COLUMNS], narrow)
    updates = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, H, COLUMNS], narrow)
    xs = gl.allocate_shared_memory(gl.bfloat16, [AHEAD, ROWS, C], shared)
    zs = gl.allocate_shared_memory(gl.bfloat16, [AHEAD, H, ROWS], shared)
    even = gl.allocate_shared_memory(gl.bfloat16, [ROWS, COLUMNS], narrow)
    odd = gl.allocate_shared_memory(gl.bfloat16, [ROWS, COLUMNS], narrow)
    copy_outputs(folded_ptr + 4 * H, output_folded_ptr, gates, updates, 4 * H + C)
    for k in gl.static_range(AHEAD):
        copy_tiles(pair_ptr, product_ptr, xs, zs, k, first + k * step, I, J)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    none = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    factors, inverse = (None,) * CHUNKS, 1.0
    if HAS_FACTOR:
        factors, inverse = factors_of(factor_ptr + (example * J + j) * C, row, column, C)
    biases = hold_biases(folded_bias_ptr + 4 * H, output_folded_bias_ptr, C, COLUMNS, mma)
    kept = (gates, updates), factors, biases, (even, odd), none
    row += example * I * J + j
    next_rstd = gl.load(rstd_ptr + first * J + row)
    turn = 0
    async_copy.wait_group(AHEAD)
    fence_async_shared()
    for i in range(first, I, step):
        rstd = next_rstd
        next_rstd = gl.load(rstd_ptr + gl.minimum(i + step, I - 1) * J + row)
        async_copy.wait_group(AHEAD - 1)
        gl.thread_barrier()
        x = xs.index(turn).load(operand)
        z = zs.index(turn).permute((1, 0)).load(operand)
        gl.thread_barrier()  # all have read the tiles
        copy_tiles(pair_ptr, product_ptr, xs, zs, turn, i + AHEAD * step, I, J)
        turn = (turn + 1) % AHEAD
        products = begin_output(x, z, gates, updates, none, 0)
        mean, center_rstd = row_moments(z, H, mma)
        gl.store(center_mean_ptr + i * J + row, mean)
        gl.store(center_rstd_ptr + i * J + row, center_rstd)
        scales = (rstd * -LOG2_E)[:, None], center_rstd[:, None], inverse
        to_ptr = out_ptr + ((example * I + i) * J + j) * C
        finish_tile(products, (x, z), scales, to_ptr, kept, RESIDUAL)
    async_copy.wait_group(0)


def fits(b: int, shape: tuple[int, int], c: int, h: int, dtype: str, architecture: int) -> bool:
    """Whether the kernel takes these sizes, ``shape`` (i, j): whole tiles, on the architecture."""
    if dtype != "bfloat16" or architecture != ARCHITECTURE or c != h or c not in SIZES:
        return False
    i, j = shape
    return j % SIZES[c].rows == 0 and b * i * j * c < 2**31


def output(
    b: int,
    shape: tuple[int, int],
    c: int,
    h: int,
    has_factor: bool,
    residual: bool,
    steps: Steps | None = None,
) -> Launch:
    """See the kernel -> result [b p c], mean and rstd of the product [b p]; ``shape``: (i, j)."""
    steps, (i, j) = steps or SIZES[c], shape
    number = Output((b, i * j), "float32")
    blocks = b * j // steps.rows
    sizes = {"I": i, "J": j, "C": c, "H": h, "BLOCKS": blocks}
    return Launch(
        kernel=triangle_output_pipelined_kernel,
        grid=(blocks * share(i, blocks, steps.programs),),
        outputs=(Output((b, i * j, c), "bfloat16"), number, number),
        constants=sizes | {"HAS_FACTOR": has_factor, "RESIDUAL": residual} | constants(steps),
        num_warps=steps.num_warps,
    )
