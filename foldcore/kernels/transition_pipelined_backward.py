"""The transition's backward pass for Hopper in one kernel, all but the weights' gradients (Gluon).

As in ``transition_pipelined`` weights are on their way while products run. The gradient of some
hidden channels goes through relu into shared memory. There the product finds it that sums the
gradient by the normalised rows, and from there it is written, for the library's products for the
weights, while the first product of the next channels runs. What comes of that goes through relu
while the other one runs, where there is room for it. LayerNorm's backward pass, with rows and
gradients on chip, ends a program; it writes the normalised rows again, for the weights as well.

Legend: n rows, c channels, f hidden channels, g programs.
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
from foldcore.kernels.hopper import copy_tile, tile_at
from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.rows import EPS
from foldcore.kernels.transition_pipelined import SIZES, copy_first, copy_second
from foldcore.kernels.transition_signs import COLUMNS, masked, signs, words_at

# channels -> places for gradients; with two in place of one, two programs of 128 channels would not
# share a processor
PLACES = {64: 2, 128: 1, 256: 2}
PART = gl.constexpr(32)  # rows of which LayerNorm's backward pass is taken at a time


@gluon.jit
def begin_copies(dy_ptr, weights1_ptr, weights2_ptr, dy, first, second, F: gl.constexpr):
    """What the first product reads; then what the next two do."""
    copy_tile(dy_ptr, dy, True, dy.shape[1])
    copy_second(0, weights2_ptr, second, F)
    async_copy.commit_group()
    copy_first(0, weights1_ptr, first, F)
    copy_second(1, weights2_ptr, second, F)
    async_copy.commit_group()


@gluon.jit
def by_weights(x, places, step, sums, ADD: gl.constexpr):
    """Begin a product of shared memory with a step's weights, the other way round."""
    weights = places.index(step % places.shape[0]).permute((1, 0))
    return warpgroup_mma(x, weights, sums, use_acc=ADD, is_async=True)


@gluon.jit
def through_relu(h, words, y, places, step):
    """Relu's gradient to shared memory; then all copies and products have ended, of all warps."""
    place = places.index(step % places.shape[0])
    if places.shape[0] == 1:  # y's product reads it
        y = warpgroup_mma_wait(0, deps=[y])
    place.store(masked(h, words))
    y = warpgroup_mma_wait(0, deps=[y])
    async_copy.wait_group(0)
    gl.thread_barrier()
    fence_async_shared()
    return place, y


@gluon.jit
def write(place, step, dhidden_ptr, sums_ptr, F: gl.constexpr):
    """Copy a step's gradients out of shared memory, and the sums over their rows."""
    COLUMNS: gl.constexpr = place.shape[1]
    at = tile_at(dhidden_ptr + step * COLUMNS, place.shape[0], COLUMNS, F)
    gl.store(at, place.load(at.type.layout))
    # all rows of a column in one warp
    WIDE: gl.constexpr = COLUMNS // 2 // gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([2, 2], [32 // WIDE, WIDE], [1, gl.num_warps()], [1, 0])
    sums = gl.sum(place.load(layout).to(gl.float32), 0)
    column = step * COLUMNS + gl.arange(0, COLUMNS, layout=sums.type.layout)
    gl.store(sums_ptr + column, sums)


@gluon.jit
def load_vector(ptr, C: gl.constexpr):
    """As ``finish`` reads it: along rows of tiles."""
    at = tile_at(ptr, PART, C, C)
    return gl.load(ptr + gl.arange(0, C, layout=gl.SliceLayout(0, at.type.layout)))


@gluon.jit
def by_place(x):
    """Sums over those rows that are in one thread."""
    APART: gl.constexpr = gl.num_warps() * 256 // x.shape[1]
    return gl.sum(x.reshape([x.shape[0] // APART, APART, x.shape[1]]), 0)


@gluon.jit
def norm_backward(x, scale, offset, gradient):
    """Of some rows x: gradient by them, normalised rows, and what scale's gradient sums."""
    C: gl.constexpr = x.shape[1]
    by_normal = gradient * scale
    x = x - (gl.sum(x, 1) / C)[:, None]
    mean = (gl.sum(by_normal, 1) / C)[:, None]
    rstd = gl.rsqrt(gl.sum(x * x, 1) / C + EPS)[:, None]
    slope = (gl.sum(by_normal * x, 1) / C)[:, None] * rstd
    normal = x * rstd
    return (by_normal - mean - normal * slope) * rstd, normal * scale + offset, gradient * normal


@gluon.jit
def finish(rows, scale, offset, dx_ptr, normalized_ptr, sums_ptr, RESIDUAL: gl.constexpr):
    """LayerNorm's backward pass of x, its gradient and dy in shared memory, a part at a time."""
    x, gradient, dy = rows
    ROWS: gl.constexpr = x.shape[0]
    C: gl.constexpr = x.shape[1]
    at = tile_at(dx_ptr, PART, C, C)
    normalized_at = tile_at(normalized_ptr, PART, C, C)
    scale, offset = scale.to(gl.float32)[None, :], offset.to(gl.float32)[None, :]
    dbias = 0.0
    dscale = 0.0
    doffset = 0.0
    for row in gl.static_range(0, ROWS, PART):
        some = x.slice(row, PART).load(at.type.layout).to(gl.float32)
        passed = dy.slice(row, PART).load(at.type.layout).to(gl.float32)
        part = gradient.slice(row, PART).load(at.type.layout).to(gl.float32)
        dx, normalized, product = norm_backward(some, scale, offset, part)
        dx = dx + passed if RESIDUAL else dx
        gl.store(at + row * C, dx.to(gl.bfloat16))
        gl.store(normalized_at + row * C, normalized.to(gl.bfloat16))
        dbias += by_place(passed)
        dscale += by_place(product)
        doffset += by_place(part)
        gl.thread_barrier()  # registers of one part at a time
    sums = gl.sum(dbias, 0)
    column = gl.arange(0, C, layout=sums.type.layout)
    gl.store(sums_ptr + column, sums)
    gl.store(sums_ptr + C + column, gl.sum(dscale, 0))
    gl.store(sums_ptr + 2 * C + column, gl.sum(doffset, 0))


@gluon.jit
def transition_pipelined_backward_kernel(
    x_ptr,  # [n, c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    weights1_ptr,  # [c, f]
    weights2_ptr,  # [f, c]
    signs_ptr,  # [n / 16, f / 64, 8, 4]
    dy_ptr,  # [n, c]
    dx_ptr,  # [n, c]
    dhidden_ptr,  # [n, f]: by the argument of relu
    normalized_ptr,  # [n, c]
    hidden_sums_ptr,  # [g, f]: by bias1
    sums_ptr,  # [g, 3 c]: by bias2, scale and offset
    C: gl.constexpr,
    F: gl.constexpr,
    RESIDUAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_F: gl.constexpr,
    PLACES: gl.constexpr,
):
    await_previous()
    LAST: gl.constexpr = F // BLOCK_F - 1
    mma1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_F, 16])
    mma2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, C, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    program = gl.program_id(0)
    start = program.to(gl.int64) * BLOCK_N
    dhidden_ptr += start * F
    hidden_sums_ptr += program * F
    dy = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, C], shared)
    second = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_F, C], shared)
    first = gl.allocate_shared_memory(gl.bfloat16, [2, C, BLOCK_F], shared)
    places = gl.allocate_shared_memory(gl.bfloat16, [PLACES, BLOCK_N, BLOCK_F], shared)
    begin_copies(dy_ptr + start * C, weights1_ptr, weights2_ptr, dy, first, second, F)
    none = gl.zeros([BLOCK_N, BLOCK_F], gl.float32, mma1)
    words_ptr = words_at(signs_ptr + start * (F // 32), signs(none), F)
    words = gl.load(words_ptr)
    y = warpgroup_mma_init(gl.zeros([BLOCK_N, C], gl.float32, mma2))
    async_copy.wait_group(1)
    gl.thread_barrier()
    fence_async_shared()
    h = warpgroup_mma_wait(0, deps=[by_weights(dy, second, 0, none, False)])
    for step in range(LAST):
        place, y = through_relu(h, words, y, places, step)
        h = by_weights(dy, second, step + 1, none, False)
        y = by_weights(place, first, step, y, True)
        copy_first(step + 1, weights1_ptr, first, F)
        copy_second(step + 2, weights2_ptr, second, F)
        async_copy.commit_group()
        words = gl.load(words_ptr + (step + 1) * 32)
        write(place, step, dhidden_ptr, hidden_sums_ptr, F)
        h = warpgroup_mma_wait(1, deps=[h])
    place, y = through_relu(h, words, y, places, LAST)
    y = by_weights(place, first, LAST, y, True)
    x = second._reinterpret(gl.bfloat16, [BLOCK_N, C], shared)  # in the place of weights
    copy_tile(x_ptr + start * C, x, True, C)
    async_copy.commit_group()
    scale, offset = load_vector(scale_ptr, C), load_vector(offset_ptr, C)
    write(place, LAST, dhidden_ptr, hidden_sums_ptr, F)
    y = warpgroup_mma_wait(0, deps=[y])
    gl.thread_barrier()  # all have read the first weights
    gradient = first._reinterpret(gl.bfloat16, [BLOCK_N, C], shared)
    gradient.store(y.to(gl.bfloat16))
    async_copy.wait_group(0)
    gl.thread_barrier()
    rows = x, gradient, dy
    dx_ptr, normalized_ptr = dx_ptr + start * C, normalized_ptr + start * C
    finish(rows, scale, offset, dx_ptr, normalized_ptr, sums_ptr + program * (3 * C), RESIDUAL)


def backward(n: int, c: int, f: int, residual: bool) -> Launch:
    """(x, scale, offset, weights1, weights2, signs, dy) -> dx [n, c], gradient by the argument of
    relu [n, f], normalised x [n, c], sums [g, f] for bias1 and [g, 3 c] for bias2, scale, offset;
    for sizes that fit the forward kernel, in bfloat16."""
    steps = SIZES[c]
    assert steps.columns == COLUMNS and steps.rows == 2 * COLUMNS  # rows take the place of weights
    programs = n // steps.rows
    rows, hidden = Output((n, c), "bfloat16"), Output((n, f), "bfloat16")
    sums = Output((programs, f), "float32"), Output((programs, 3 * c), "float32")
    return Launch(
        kernel=transition_pipelined_backward_kernel,
        grid=(programs,),
        outputs=(rows, hidden, rows, *sums),
        constants={"C": c, "F": f, "RESIDUAL": residual}
        | {"BLOCK_N": steps.rows, "BLOCK_F": steps.columns, "PLACES": PLACES[c]},
        num_warps=steps.num_warps,
    )
