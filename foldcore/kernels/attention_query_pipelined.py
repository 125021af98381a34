"""Gradients of attention's queries and pair bias for Hopper, in order by hand (Gluon).

As in ``attention_bias`` a program owns a tile of queries with all their keys and walks over groups;
of the scores' gradients, computed once, come those of the queries, and sums that stay in registers.
Here keys are taken by tiles of 32. While one tile's weights are computed the products of the next
are under way, over the end of a group as well; the product with keys runs beside what follows it.
Two programs share a processor. Each part of a group's keys and values has one place on chip, which
the next group's take as soon as it has been read.

As in ``attention_pipelined`` the bias lies in shared memory as float32, what the products begin
with, and masks are added by a product. Sizes that this kernel does not take are left to
``attention_bias``, whose results these are up to rounding.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from foldcore.kernels.attention_pipelined import await_copies, by_threads, chosen
from foldcore.kernels.attention_tiles import Problem
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.hopper import ARCHITECTURE, copy_tile, tile_in
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import LOG2_E

ROWS, WIDTH, LENGTH = 64, 32, 256  # queries of a program, channels of a head, keys: of an H200
TOGETHER = 256  # programs that H100 and H200 run at once, two a multiprocessor
MOST_GROUPS = 16  # of a program: a tile of masks is 16 wide
COLUMNS = gl.constexpr(32)  # keys of a tile
PART = gl.constexpr(64)  # keys that are copied together
# What a masked key's products begin with: less than any logsumexp, that of no keys included
HIDDEN = gl.constexpr(-(2.0**120))


# What a program brings to the chip ----------------------------------------------------------------


@gluon.jit
def places(COUNT: gl.constexpr, SIZE: gl.constexpr, WIDTH: gl.constexpr):
    """So many tiles in shared memory, each by itself: no barrier is put between uses of two."""
    shared: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
    found = ()
    for _ in gl.static_range(COUNT):
        found = found + (gl.allocate_shared_memory(gl.bfloat16, [1, SIZE, WIDTH], shared),)  # type: ignore[assignment]
    return found


@gluon.jit
def tile_of(parts, tile: gl.constexpr, zero):
    """A tile of keys. ``zero`` is i >> 16 for a program's group i, of at most 16: the compiler does
    not know that it is 0, so it makes addresses where they are used. Known ahead of the loop they
    are kept, in registers that are not there."""
    EACH: gl.constexpr = PART // COLUMNS
    return parts[tile // EACH].index(zero).slice(tile % EACH * COLUMNS, COLUMNS)


@gluon.jit
def copy_part(ptr, wanted, on_chip, part: gl.constexpr, STEP: gl.constexpr, CHANNELS: gl.constexpr):
    """Begin to copy a part of a group's keys and values; ptr is to the head's first query."""
    at = ptr + (2 * CHANNELS + part * (PART * STEP))
    copy_tile(at, on_chip[0][part].index(0), wanted, STEP)
    copy_tile(at + CHANNELS, on_chip[1][part].index(0), wanted, STEP)


@gluon.jit
def hold_masks(mask_ptr, count, ahead, STEP: gl.constexpr, LENGTH: gl.constexpr):
    """What the masks of a program's groups add, one group a column, in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [gl.num_warps(), 1], [1, 0])
    key = gl.arange(0, LENGTH, layout=gl.SliceLayout(1, layout))[:, None]
    group = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))[None, :]
    inside = (group < count) & (key >= 0)
    kept = gl.load(mask_ptr + (key * STEP + group * ahead), mask=inside, other=1.0) > 0
    shared: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    masks = gl.allocate_shared_memory(gl.bfloat16, [1, LENGTH, 16], shared)
    masks.index(0).store(gl.where(kept, 0.0, HIDDEN).to(gl.bfloat16))
    return masks


@gluon.jit
def hold_bias(bias_ptr, ROWS: gl.constexpr, LENGTH: gl.constexpr, SCALE: gl.constexpr):
    """The bias in units of products, in shared memory."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    shape: gl.constexpr = [LENGTH // COLUMNS, ROWS, COLUMNS]
    biases = gl.allocate_shared_memory(gl.float32, shape, by_threads(ROWS, COLUMNS))
    for tile in gl.static_range(LENGTH // COLUMNS):
        bias = gl.load(tile_in(bias_ptr + tile * COLUMNS, ROWS, COLUMNS, LENGTH, mma))
        biases.index(tile).store(bias.to(gl.float32) * (1 / SCALE))
    return biases


@gluon.jit
def load_statistics(lse_ptr, delta_ptr, wanted, ROWS: gl.constexpr, layout: gl.constexpr):
    """Logarithms of the sums of weights and row sums of a group's queries, if there is one."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    inside = (row >= 0) & wanted
    logsumexp = gl.load(lse_ptr + row, mask=inside, other=0.0)
    return logsumexp, gl.load(delta_ptr + row, mask=inside, other=0.0)


@gluon.jit
def copy_queries(q_ptr, do_ptr, wanted, on_chip, STEP: gl.constexpr):
    """Begin to copy a group's queries and the gradients of what they gathered."""
    copy_tile(q_ptr, on_chip[2].index(0), wanted, STEP)
    copy_tile(do_ptr, on_chip[3].index(0), wanted, STEP // 4)


@gluon.jit
def fill(k_ptr, q_ptr, do_ptr, wanted, on_chip, STEP: gl.constexpr, CHANNELS: gl.constexpr):
    """Begin to copy a program's first group, but for the last part of its keys."""
    copy_queries(q_ptr, do_ptr, wanted, on_chip, STEP)
    for part in gl.static_range(len(on_chip[0]) - 1):
        copy_part(k_ptr, wanted, on_chip, part, STEP, CHANNELS)
        async_copy.commit_group()


@gluon.jit
def refill(part: gl.constexpr, ptrs, more, on_chip, STEP: gl.constexpr, CHANNELS: gl.constexpr):
    """Begin to copy into the place of the part before ``part``: the next group's, if there is one.
    Before the first part it is this group's last one, and the next group's queries."""
    here, next_ptr, q_ptr, do_ptr = ptrs
    if part == 0:
        copy_part(here, True, on_chip, len(on_chip[0]) - 1, STEP, CHANNELS)
        copy_queries(q_ptr, do_ptr, more, on_chip, STEP)
    else:
        copy_part(next_ptr, more, on_chip, part - 1, STEP, CHANNELS)
    async_copy.commit_group()


@gluon.jit
def take(place):
    """Queries or these gradients, as an operand of products."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    return place.index(0).load(layout)


@gluon.jit
def take_queries(place, i):
    """A group's queries and, of the program's group i, what chooses the masks."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    ROWS: gl.constexpr = place.shape[1]
    return take(place), chosen(i, layout, ROWS)


# A tile of keys -----------------------------------------------------------------------------------


@gluon.jit
def begin_scores(q, choice, on_chip, tile: gl.constexpr, zero):
    """Begin what makes a tile's logits, in units of products."""
    k, _, _, _, masks, biases = on_chip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    key = tile_of(k, tile, zero).permute((1, 0))
    mask = masks.index(zero).slice(tile * COLUMNS, COLUMNS).permute((1, 0))
    scores = biases.index(tile + zero).load(mma)
    scores = warpgroup_mma(choice, mask, scores, is_async=True)
    return warpgroup_mma(q, key, scores, is_async=True)


@gluon.jit
def begin_weights_grad(do, v, tile: gl.constexpr, zero):
    """Begin what makes the gradients of a tile's weights."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    ROWS: gl.constexpr = do.shape[0]
    nothing = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    value = tile_of(v, tile, zero).permute((1, 0))
    return warpgroup_mma(do, value, nothing, use_acc=False, is_async=True)


@gluon.jit
def gather(ds, keys, dq, first: gl.constexpr):
    """Begin to add what a tile of keys gives to the queries' gradients."""
    width: gl.constexpr = keys.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, width, 16])
    ds = gl.convert_layout(ds.to(gl.bfloat16), gl.DotOperandLayout(0, mma, 2))
    return warpgroup_mma(ds, keys, dq, use_acc=not first, is_async=True)


@gluon.jit
def zeros(COUNT: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """So many tiles."""
    found = ()
    for _ in gl.static_range(COUNT):
        found = found + (gl.zeros([ROWS, COLUMNS], gl.float32, layout),)  # type: ignore[assignment]
    return found


@gluon.jit
def store_tile(ptr, x, STEP: gl.constexpr):
    """Write it to rows that are STEP apart."""
    layout: gl.constexpr = x.type.layout
    gl.store(tile_in(ptr, x.shape[0], x.shape[1], STEP, layout), x)


@gluon.jit
def place_of(
    BATCH: gl.constexpr,
    GROUPS: gl.constexpr,
    HEADS: gl.constexpr,
    LENGTH: gl.constexpr,
    ROWS: gl.constexpr,
):
    """A program's first query, head, first group, then every so manieth, so many, and example."""
    TILES: gl.constexpr = LENGTH // ROWS
    program = gl.program_id(0)  # those that run together read neighbouring groups
    chunks = gl.num_programs(0) // (TILES * HEADS * BATCH)
    first = program // (TILES * HEADS) % chunks
    count = (GROUPS - first + chunks - 1) // chunks
    batch = program // (TILES * HEADS) // chunks
    return program % TILES * ROWS, program // TILES % HEADS, first, chunks, count, batch


@gluon.jit
def query_bias_grad_pipelined_kernel(
    projected_ptr,  # [b s r 4 h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    logsumexp_ptr,  # [b g h q]
    delta_ptr,  # [b g h q]
    gathered_grad_ptr,  # [b s r h d]
    gate_grad_ptr,  # [b s r 4 h d], the same as the next
    projected_grad_ptr,  # [b s r 4 h d], here of the query
    bias_grad_ptr,  # [chunks b h q k] float32, to be summed
    SCALE: gl.constexpr,
    GROUPS: gl.constexpr,
    LENGTH: gl.constexpr,
    GROUP_STEP: gl.constexpr,  # positions from one group to the next
    STEP: gl.constexpr,  # positions from one member of a group to the next
    HEADS: gl.constexpr,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    BATCH: gl.constexpr,
):
    await_previous()
    CHANNELS: gl.constexpr = HEADS * WIDTH
    STRIDE: gl.constexpr = STEP * 4 * CHANNELS
    N: gl.constexpr = LENGTH // COLUMNS
    PARTS: gl.constexpr = LENGTH // PART
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    gathered: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    start, head, first, chunks, count, batch = place_of(BATCH, GROUPS, HEADS, LENGTH, ROWS)
    ahead = chunks * GROUP_STEP  # positions to a program's next group
    position = (batch * (GROUPS * LENGTH) + first * GROUP_STEP).to(gl.int64)
    k_ptr = projected_ptr + position * (4 * CHANNELS) + head * WIDTH
    do_ptr = gathered_grad_ptr + (position + start * STEP) * CHANNELS + head * WIDTH
    dq_ptr = projected_grad_ptr + (position + start * STEP) * (4 * CHANNELS) + head * WIDTH
    row = ((batch * GROUPS + first).to(gl.int64) * HEADS + head) * LENGTH + start
    lse_ptr, delta_ptr = logsumexp_ptr + row, delta_ptr + row
    bias_ptr += (batch * HEADS + head).to(gl.int64) * (LENGTH * LENGTH) + start * LENGTH
    queries, grads = places(2, ROWS, WIDTH)
    held = places(PARTS, PART, WIDTH), places(PARTS, PART, WIDTH), queries, grads
    fill(k_ptr, k_ptr + start * STRIDE, do_ptr, count > 0, held, STRIDE, CHANNELS)
    masks = hold_masks(mask_ptr + position, count, ahead, STEP, LENGTH)
    on_chip = held + (masks, hold_bias(bias_ptr, ROWS, LENGTH, SCALE))
    totals = zeros(N, ROWS, scored)
    logsumexp, delta = load_statistics(lse_ptr, delta_ptr, count > 0, ROWS, scored)
    fence_async_shared()
    await_copies(PARTS - 2)
    q, choice = take_queries(queries, 0)
    scores = warpgroup_mma_wait(0, deps=[begin_scores(q, choice, on_chip, 0, gl.to_tensor(0))])
    for i in range(count):
        more = i + 1 < count
        next_ptr = k_ptr + (i + 1) * ahead * (4 * CHANNELS)
        do_at = do_ptr + (i + 1) * ahead * CHANNELS
        ptrs = k_ptr + i * ahead * (4 * CHANNELS), next_ptr, next_ptr + start * STRIDE, do_at
        at = (i + 1) * chunks * (HEADS * LENGTH)
        next_lse, next_delta = load_statistics(lse_ptr + at, delta_ptr + at, more, ROWS, scored)
        dq = gl.zeros([ROWS, WIDTH], gl.float32, gathered)
        sums = ()
        do = take(grads)
        dp = begin_weights_grad(do, on_chip[1], 0, i >> 16)
        for t in gl.static_range(N):
            if t == N - 1:
                q, choice = take_queries(queries, i + 1)
            later = begin_scores(q, choice, on_chip, (t + 1) % N, i >> 16)
            weights = gl.exp2(scores * (LOG2_E * SCALE) - logsumexp[:, None])
            dp, dq = warpgroup_mma_wait(2, deps=[dp, dq])
            if t * COLUMNS % PART == 0:
                await_copies(PARTS - 3)  # all have read the part before; that after this is there
                refill(t * COLUMNS // PART, ptrs, more, on_chip, STRIDE, CHANNELS)
            ds = weights * (dp - delta[:, None])
            sums = sums + (totals[t] + ds,)  # type: ignore[assignment]
            dq = gather(ds, tile_of(on_chip[0], t, i >> 16), dq, t == 0)
            if t < N - 1:
                dp = begin_weights_grad(do, on_chip[1], t + 1, i >> 16)
                scores = warpgroup_mma_wait(2, deps=[later])
        scores, dq = warpgroup_mma_wait(0, deps=[later, dq])
        totals, logsumexp, delta = sums, next_lse, next_delta
        store_tile(dq_ptr + i * ahead * (4 * CHANNELS), (dq * SCALE).to(gl.bfloat16), STRIDE)
    async_copy.wait_group(0)
    bias_grad_ptr += ((first * BATCH + batch).to(gl.int64) * HEADS + head) * (LENGTH * LENGTH)
    for t in gl.static_range(N):
        store_tile(bias_grad_ptr + (start * LENGTH + t * COLUMNS), totals[t], LENGTH)


# Launch geometry ----------------------------------------------------------------------------------


def fits(problem: Problem) -> bool:
    """Whether the kernel takes these sizes: measured ones, on the one architecture."""
    kind = problem.dtype, problem.architecture, problem.width, problem.length
    known = kind == ("bfloat16", ARCHITECTURE, WIDTH, LENGTH)
    return problem.has_bias and known and problem.short


def query_bias_grad(problem: Problem, rows: int = ROWS, together: int = TOGETHER) -> Launch:
    """As ``attention_bias.query_bias_grad``, for sizes that fit; so many queries a program."""
    programs = problem.batch * problem.heads * (problem.length // rows)
    chunks = max(cdiv(problem.groups, MOST_GROUPS), min(problem.groups, together // programs))
    shape = (chunks, problem.batch, problem.heads, problem.length, problem.length)
    constants = problem.constants()
    del constants["BLOCK_D"], constants["HAS_BIAS"]
    return Launch(
        kernel=query_bias_grad_pipelined_kernel,
        grid=(programs * chunks,),
        outputs=(Output(problem.shape, problem.dtype), Output(shape, "float32")),
        constants=constants | {"ROWS": rows, "BATCH": problem.batch},
        num_warps=rows // 16,
        in_place={6: 0},
    )
