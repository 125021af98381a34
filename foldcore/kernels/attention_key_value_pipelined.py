"""Attention's gradients of keys and values for Hopper, products and copies in order by hand.

A program keeps a head and a tile of keys and walks over groups, so that its tile of the bias is
read once: it stays in shared memory as it is, from where the tensor cores turn it and add it, as a
product with the identity (``attention_long``). Scores are [keys, queries]: weights and their
gradients go from the products that make them into those that use them without leaving their
threads. Keys and values are in registers; those of the next group come as the last scores of this
one have been begun. Queries and what comes back to them have one place on chip: the next group's
come while results are written. The scores of a next tile of queries are begun beside the sums of
this one. What one program waits for is hidden by two more on its processor, which fit if a thread
has no more than 168 registers.

A masked key's row is left out at the end. Of a group without any key all logits are made 0.

Sizes that this kernel does not take are left to ``attention_long``, whose results these are up to
rounding. Triton's interpreter cannot run Gluon; ``tests/gluon_interpreter.py`` does.
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

from foldcore.kernels.attention_pipelined import doubled, store_output
from foldcore.kernels.attention_tiles import MASKED, Problem
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.hopper import ARCHITECTURE, copy_tile, tile_in
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import LOG2_E


@dataclass(frozen=True)
class Steps:
    """Sizes of a launch: keys of a program, queries of a tile, at most so many groups a program."""

    keys: int
    queries: int
    groups: int
    num_warps: int


# keys -> sizes, of an H200
SIZES = {256: Steps(64, 32, 11, 4)}
WIDTH = 32


@gluon.constexpr_function
def in_a_row(length: int) -> gl.SharedLinearLayout:
    """Shared memory for numbers one after another."""
    return gl.SharedLinearLayout([[x] for x in doubled(1, length)])


# What a program brings to the chip ----------------------------------------------------------------


@gluon.jit
def hold_bias(bias_ptr, inverse, KEYS: gl.constexpr, QUERIES: gl.constexpr, LENGTH: gl.constexpr):
    """Begin to copy a program's keys of the bias, tile by tile of queries; a place for them, and
    ``inverse`` times the identity."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    TILES: gl.constexpr = LENGTH // QUERIES
    held = gl.allocate_shared_memory(gl.bfloat16, [TILES, QUERIES, KEYS], shared)
    for j in gl.static_range(TILES):
        copy_tile(bias_ptr + j * QUERIES * LENGTH, held.index(j), True, LENGTH)
    async_copy.commit_group()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, layout))[None, :]
    identity = gl.where(row == column, inverse, 0.0).to(gl.bfloat16)
    square: gl.constexpr = gl.NVMMASharedLayout(2 * QUERIES, 16, 2)
    return held, gl.allocate_shared_memory(gl.bfloat16, [QUERIES, QUERIES], square, identity)


@gluon.jit
def places(LENGTH: gl.constexpr, WIDTH: gl.constexpr):
    """Those of a group's queries, what comes back to them, and its statistics."""
    rows: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
    queries = gl.allocate_shared_memory(gl.bfloat16, [LENGTH, WIDTH], rows)
    outer = gl.allocate_shared_memory(gl.bfloat16, [LENGTH, WIDTH], rows)
    shifts = gl.allocate_shared_memory(gl.float32, [LENGTH], in_a_row(LENGTH))
    deltas = gl.allocate_shared_memory(gl.float32, [LENGTH], in_a_row(LENGTH))
    return queries, outer, shifts, deltas


@gluon.jit
def in_tiles(queries, outer, shifts, deltas, QUERIES: gl.constexpr):
    """The same, tile by tile."""
    TILES: gl.constexpr = queries.shape[0] // QUERIES
    WIDTH: gl.constexpr = queries.shape[1]
    rows: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
    queries = queries._reinterpret(gl.bfloat16, [TILES, QUERIES, WIDTH], rows)
    outer = outer._reinterpret(gl.bfloat16, [TILES, QUERIES, WIDTH], rows)
    shifts = shifts._reinterpret(gl.float32, [TILES, QUERIES], in_a_row(QUERIES))
    return (
        queries,
        outer,
        shifts,
        deltas._reinterpret(gl.float32, [TILES, QUERIES], in_a_row(QUERIES)),
    )


@gluon.jit
def zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A product that has not begun."""
    warps: gl.constexpr = [gl.num_warps(), 1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps, [16, COLUMNS, 16])
    return gl.zeros([ROWS, COLUMNS], gl.float32, layout)


@gluon.jit
def copy_queries(ptr, do_ptr, queries, outer, wanted, CHANNELS: gl.constexpr, STEP: gl.constexpr):
    """Begin to copy a group's queries and the gradients of what they gathered."""
    copy_tile(ptr, queries, wanted, STEP * 4 * CHANNELS)
    copy_tile(do_ptr, outer, wanted, STEP * CHANNELS)
    async_copy.commit_group()


@gluon.jit
def load_keys(ptr, KEYS: gl.constexpr, CHANNELS: gl.constexpr, STEP: gl.constexpr, like):
    """A program's keys and values, as operands of products."""
    WIDTH: gl.constexpr = like.shape[1]
    operand: gl.constexpr = gl.DotOperandLayout(0, like.type.layout, 2)
    k = gl.load(tile_in(ptr + 2 * CHANNELS, KEYS, WIDTH, STEP * 4 * CHANNELS, operand))
    return k, gl.load(tile_in(ptr + 3 * CHANNELS, KEYS, WIDTH, STEP * 4 * CHANNELS, operand))


@gluon.jit
def load_statistics(logsumexp_ptr, delta_ptr, LENGTH: gl.constexpr):
    """Of a group's queries -logsumexp, 0 if it has no key, and row sums; whether it has one."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    query = gl.arange(0, LENGTH, layout=layout)
    filled = gl.load(logsumexp_ptr) > MASKED * 0.001
    shift = gl.where(filled, 0.0 - gl.load(logsumexp_ptr + query), 0.0)
    return shift, gl.load(delta_ptr + query), filled


# Gradients within a group -------------------------------------------------------------------------


@gluon.jit
def begin_scores(k, tile, bias, identity, none):
    """Begin the logits of keys and a tile's queries, in units of products."""
    scores = warpgroup_mma(bias.permute((1, 0)), identity, none, use_acc=False, is_async=True)
    return warpgroup_mma(k, tile.permute((1, 0)), scores, is_async=True)


@gluon.jit
def begin_grads(v, tile, none):
    """Begin the gradients of their weights."""
    return warpgroup_mma(v, tile.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def begin_sum(x, tile, sum_, START: gl.constexpr, layout: gl.constexpr):
    """Begin to add what a tile's queries give to each key; START: to nothing."""
    x = gl.convert_layout(x.to(gl.bfloat16), gl.DotOperandLayout(0, layout, 2))
    return warpgroup_mma(x, tile, sum_, use_acc=not START, is_async=True)


@gluon.jit
def key_value_grads(
    k,
    v,
    biases,
    tiles,
    first,
    unit,
    none,
    nothing,
    next_ptr,
    CHANNELS: gl.constexpr,
    STEP: gl.constexpr,
):
    """Of the group whose tiles begin with ``first``; and keys and values of the next one."""
    held, identity = biases
    queries, outer, shifts, deltas = tiles
    TILES: gl.constexpr = held.shape[0]
    by_query: gl.constexpr = gl.SliceLayout(0, none.type.layout)
    summed: gl.constexpr = nothing.type.layout
    dk, dv, next_k, next_v = nothing, nothing, k, v
    next_scores = begin_scores(k, queries.index(first), held.index(0), identity, none)
    next_grads = begin_grads(v, outer.index(first), none)
    for j in gl.static_range(TILES):
        shift = shifts.index(j).load(by_query)[None, :]
        if j > 0:  # but for the gradients of weights all has ended then
            scores, dk, dv = warpgroup_mma_wait(1, deps=[next_scores, dk, dv])
        else:
            scores = warpgroup_mma_wait(1, deps=[next_scores])
        weights = gl.exp2(scores * unit + shift)
        i = first + j
        if j + 1 < TILES:
            next_scores = begin_scores(k, queries.index(i + 1), held.index(j + 1), identity, none)
        else:
            next_k, next_v = load_keys(next_ptr, k.shape[0], CHANNELS, STEP, nothing)
        dv = begin_sum(weights, outer.index(i), dv, j == 0, summed)
        # begun later: the two products of scores, the sum
        grads = warpgroup_mma_wait(3 if j + 1 < TILES else 1, deps=[next_grads])
        ds = weights * (grads - deltas.index(j).load(by_query)[None, :])
        dk = begin_sum(ds, queries.index(i), dk, j == 0, summed)
        if j + 1 < TILES:
            next_grads = begin_grads(v, outer.index(i + 1), none)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    return dk, dv, next_k, next_v


@gluon.jit
def load_kept(mask_ptr, STEP: gl.constexpr, like):
    """Which of a program's keys are not masked, for each row of a product."""
    row = gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, like.type.layout))
    return gl.load(mask_ptr + row * STEP) > 0


@gluon.jit
def attention_key_value_pipelined_kernel(
    projected_ptr,  # [b s r 4 h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    logsumexp_ptr,  # [b g h q], in units of log 2
    delta_ptr,  # [b g h q], row sums of grad * output
    gathered_grad_ptr,  # [b s r h d]
    query_grad_ptr,  # [b s r 4 h d], the same as the next
    projected_grad_ptr,  # [b s r 4 h d], here of key and value
    SCALE: gl.constexpr,
    GROUPS: gl.constexpr,
    LENGTH: gl.constexpr,
    GROUP_STEP: gl.constexpr,  # positions from one group to the next
    STEP: gl.constexpr,  # positions from one member of a group to the next
    HEADS: gl.constexpr,
    WIDTH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    KEYS: gl.constexpr,
    QUERIES: gl.constexpr,
    BATCH: gl.constexpr,
):
    await_previous()
    CHANNELS: gl.constexpr = HEADS * WIDTH
    ALL: gl.constexpr = 4 * CHANNELS
    PARTS: gl.constexpr = LENGTH // KEYS
    # in turn: programs that run together read neighbouring groups
    head = gl.program_id(0) % HEADS
    start = gl.program_id(0) // HEADS % PARTS * KEYS
    chunks = gl.num_programs(0) // (HEADS * PARTS * BATCH)  # a program takes every so manieth group
    first = gl.program_id(0) // (HEADS * PARTS) % chunks
    batch = gl.program_id(0) // (HEADS * PARTS) // chunks
    count = (GROUPS - first + chunks - 1) // chunks
    position = (batch * (GROUPS * LENGTH) + first * GROUP_STEP).to(gl.int64)
    ptr = projected_ptr + position * ALL + head * WIDTH
    do_ptr = gathered_grad_ptr + position * CHANNELS + head * WIDTH
    out_ptr = projected_grad_ptr + position * ALL + (head * WIDTH + start * STEP * ALL)
    bias_ptr += (batch * HEADS + head).to(gl.int64) * (LENGTH * LENGTH) + start
    statistic = ((batch * GROUPS + first).to(gl.int64) * HEADS + head) * LENGTH
    mask_ptr += position + start * STEP

    inverse = gl.full([], 1 / SCALE, gl.float32, None).to(gl.bfloat16).to(gl.float32)
    biases = hold_bias(bias_ptr, inverse, KEYS, QUERIES, LENGTH)
    queries, outer, shifts, deltas = places(LENGTH, WIDTH)
    tiles = in_tiles(queries, outer, shifts, deltas, QUERIES)
    none, nothing = zeros(KEYS, QUERIES), zeros(KEYS, WIDTH)
    copy_queries(ptr, do_ptr, queries, outer, True, CHANNELS, STEP)
    k, v = load_keys(ptr + start * STEP * ALL, KEYS, CHANNELS, STEP, nothing)
    logsumexp_ptr += statistic
    delta_ptr += statistic
    shift, delta, next_filled = load_statistics(logsumexp_ptr, delta_ptr, LENGTH)
    for i in range(count):
        filled = next_filled
        shifts.store(shift)
        deltas.store(delta)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        after = gl.minimum(i + 1, count - 1) * chunks  # the last group once more
        next_ptr = ptr + after * GROUP_STEP * ALL
        next_do_ptr = do_ptr + after * GROUP_STEP * CHANNELS
        next_key_ptr = ptr + (after * GROUP_STEP + start * STEP) * ALL
        shift, delta, next_filled = load_statistics(
            logsumexp_ptr + after * (HEADS * LENGTH), delta_ptr + after * (HEADS * LENGTH), LENGTH
        )
        at = i * chunks * GROUP_STEP
        kept = load_kept(mask_ptr + at, STEP, nothing)[:, None]
        unit = gl.where(filled, LOG2_E / inverse, 0.0)  # of logits as products leave them
        # 0, but the compiler does not know: else each tile's address has a register of its own
        none_yet = (i + count) >> 20
        dk, dv, k, v = key_value_grads(
            k, v, biases, tiles, none_yet, unit, none, nothing, next_key_ptr, CHANNELS, STEP
        )
        gl.thread_barrier()  # all have read queries and statistics
        copy_queries(next_ptr, next_do_ptr, queries, outer, i + 1 < count, CHANNELS, STEP)
        dk = gl.where(kept, dk * SCALE, 0.0)
        dv = gl.where(kept, dv, gl.where(filled, 0.0, dv * (1 / LENGTH)))
        store_output(out_ptr + (at * ALL + 2 * CHANNELS), dk, STEP * ALL)
        store_output(out_ptr + (at * ALL + 3 * CHANNELS), dv, STEP * ALL)
    async_copy.wait_group(0)


# Launch geometry ----------------------------------------------------------------------------------


def fits(problem: Problem) -> bool:
    """Whether the kernel takes these sizes: measured ones, on the one architecture."""
    kind = problem.dtype, problem.architecture, problem.width, problem.holds_bias
    known = kind == ("bfloat16", ARCHITECTURE, WIDTH, True) and problem.length in SIZES
    return known and problem.short


def key_value_grad(problem: Problem, steps: Steps | None = None) -> Launch:
    """As ``attention_long.key_value_grad``, for sizes that fit."""
    steps = steps or SIZES[problem.length]
    programs = problem.length // steps.keys * cdiv(problem.groups, steps.groups)
    constants = problem.constants()
    del constants["BLOCK_D"]
    sizes = {"KEYS": steps.keys, "QUERIES": steps.queries, "BATCH": problem.batch}
    return Launch(
        kernel=attention_key_value_pipelined_kernel,
        grid=(problem.heads * programs * problem.batch,),
        outputs=(Output(problem.shape, problem.dtype),),
        constants=constants | sizes,
        num_warps=steps.num_warps,
        in_place={6: 0},
    )
