"""Gradients of attention with a pair bias and few keys: queries and the bias in one kernel.

``attention_backward`` explains the method. The bias is shared by all groups. A program owns a tile
of queries with all their keys, and walks through groups: the scores' gradients that it has then
give those of the queries, and are added to the bias's, which stay in registers. Its tile of the
bias stays in shared memory, and the tensor cores add it, as in ``attention``. What is elementwise
has a kernel of its own before, and keys and values have one after (``attention_long``). So weights
are computed twice in all, as with ``whole_grad`` and ``bias_grad``, but by programs that hold less
and change less between threads.
"""

import triton
import triton.language as tl

from foldcore.kernels import attention_query_pipelined
from foldcore.kernels.attention import (
    PARTS,
    key_summand,
    load_bias,
    load_gate_bias,
    load_tile,
    store_tile,
)
from foldcore.kernels.attention_backward import output_terms, store_sums
from foldcore.kernels.attention_long import identity_of
from foldcore.kernels.attention_tiles import Problem, Tiles, choose
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv

TOGETHER = 256  # programs that H100 and H200 run at once, two a multiprocessor


@triton.jit
def output_grad_kernel(
    projected_ptr,  # [b s r 4 h d]
    gate_bias_ptr,  # [h d]
    output_ptr,  # [b s r h d]
    grad_ptr,  # [b s r h d], of the output
    projected_grad_ptr,  # [b s r 4 h d], here of the gate
    delta_ptr,  # [b g h q], row sums of grad * output
    gate_sums_ptr,  # [b g tiles h d], sums of the gate's gradient over the positions of a tile
    gathered_grad_ptr,  # [b s r h d], of what was gathered
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP_STEP: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is elementwise, of one tile of queries."""
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    STRIDE: tl.constexpr = STEP * PARTS * CHANNELS
    tiles = tl.cdiv(LENGTH, BLOCK_Q)
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    query = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    group, batch = tl.program_id(1), tl.program_id(2)
    position = (batch * (GROUPS * LENGTH) + group * GROUP_STEP).to(tl.int64)
    gate = position * (PARTS * CHANNELS) + CHANNELS + head * WIDTH
    out = position * CHANNELS + head * WIDTH
    do, delta, gate_grad = output_terms(
        output_ptr + out,
        grad_ptr + out,
        projected_ptr + gate,
        load_gate_bias(gate_bias_ptr + head * WIDTH, WIDTH, BLOCK_D),
        projected_grad_ptr + gate,
        query,
        STEP * CHANNELS,
        STRIDE,
        LENGTH,
        WIDTH,
        BLOCK_D,
    )
    store_tile(gathered_grad_ptr + out, query, do, STEP * CHANNELS, LENGTH, WIDTH)
    row = (batch * GROUPS + group).to(tl.int64)
    tl.store(delta_ptr + (row * HEADS + head) * LENGTH + query, delta, mask=query < LENGTH)
    store_sums(gate_sums_ptr + (row * tiles + tile) * CHANNELS + head * WIDTH, gate_grad, WIDTH)


@triton.jit
def query_bias_grad_kernel(
    projected_ptr,  # [b s r 4 h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    logsumexp_ptr,  # [b g h q]
    delta_ptr,  # [b g h q]
    gathered_grad_ptr,  # [b s r h d]
    gate_grad_ptr,  # [b s r 4 h d], the same as the next
    projected_grad_ptr,  # [b s r 4 h d], here of the query
    bias_grad_ptr,  # [chunks b h q k] float32, to be summed
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP_STEP: tl.constexpr,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of queries with all keys, over the groups that are this program's."""
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    GROUP_STRIDE: tl.constexpr = GROUP_STEP * PARTS * CHANNELS
    STRIDE: tl.constexpr = STEP * PARTS * CHANNELS
    TILES: tl.constexpr = (LENGTH + BLOCK_K - 1) // BLOCK_K
    head, first, batch = tl.program_id(0) % HEADS, tl.program_id(1), tl.program_id(2)
    query = tl.program_id(0) // HEADS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_K)
    bias_ptr += (batch * HEADS + head).to(tl.int64) * (LENGTH * LENGTH)
    unit, identity = identity_of(bias_ptr, SCALE, BLOCK_Q)
    biases, totals = (), ()
    for i in tl.static_range(TILES):
        at = i * BLOCK_K + key
        held = load_bias(bias_ptr, query[:, None], at[None, :], LENGTH)
        biases = biases + (held,)  # type: ignore[assignment]
        totals = totals + (tl.zeros([BLOCK_Q, BLOCK_K], tl.float32),)  # type: ignore[assignment]
    positions = batch.to(tl.int64) * (GROUPS * LENGTH)
    batch_ptr = projected_ptr + positions * (PARTS * CHANNELS) + head * WIDTH
    first_ptr = batch_ptr + first.to(tl.int64) * GROUP_STRIDE
    q_ahead = load_tile(first_ptr, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
    step = tl.num_programs(1)  # groups in turn
    for group in tl.range(first, GROUPS, step, num_stages=STAGES):
        q = q_ahead  # the next waits in registers: shared memory is full
        next_ptr = batch_ptr + tl.minimum(group + step, GROUPS - 1).to(tl.int64) * GROUP_STRIDE
        q_ahead = load_tile(next_ptr, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
        position = positions + group * GROUP_STEP
        base = position * (PARTS * CHANNELS) + head * WIDTH
        do_ptr = gathered_grad_ptr + position * CHANNELS + head * WIDTH
        do = load_tile(do_ptr, query, STEP * CHANNELS, LENGTH, WIDTH, BLOCK_D)
        statistic = ((batch * GROUPS + group).to(tl.int64) * HEADS + head) * LENGTH + query
        logsumexp = tl.load(logsumexp_ptr + statistic, mask=query < LENGTH, other=float("inf"))
        delta = tl.load(delta_ptr + statistic, mask=query < LENGTH, other=0.0)
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        sums = ()
        for i in tl.static_range(TILES):
            at = i * BLOCK_K + key
            k_ptr = projected_ptr + base + 2 * CHANNELS
            k = load_tile(k_ptr, at, STRIDE, LENGTH, WIDTH, BLOCK_D)
            v = load_tile(k_ptr + CHANNELS, at, STRIDE, LENGTH, WIDTH, BLOCK_D)
            # no weight for masked keys even of a query without any other
            summand = key_summand(mask_ptr + position, at, STEP, LENGTH, float("-inf"))
            logits = tl.dot(identity, biases[i], input_precision="ieee")
            logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
            weights = tl.exp2(logits * unit + (summand[None, :] - logsumexp[:, None]))
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = weights * (dp - delta[:, None])
            sums = sums + (totals[i] + ds,)  # type: ignore[assignment]
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        totals = sums
        store_tile(projected_grad_ptr + base, query, dq * SCALE, STRIDE, LENGTH, WIDTH)
    table = (first.to(tl.int64) * tl.num_programs(2) + batch) * HEADS + head
    bias_grad_ptr += table * (LENGTH * LENGTH)
    for i in tl.static_range(TILES):
        at = i * BLOCK_K + key
        pointers = bias_grad_ptr + query[:, None] * LENGTH + at[None, :]
        tl.store(pointers, totals[i], mask=(query[:, None] < LENGTH) & (at[None, :] < LENGTH))


# Launch geometry ----------------------------------------------------------------------------------


def output_grad(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """(projected, gate bias, output, grad) -> gradients.

    (of projected only the gate, delta, parts of the gate bias's to sum, of what was gathered)
    """
    tiles = tiles or choose("output_grad", problem)
    blocks = tiles.fit(problem.length)
    query_tiles = cdiv(problem.length, blocks["BLOCK_Q"])
    return Launch(
        kernel=output_grad_kernel,
        grid=(problem.heads * query_tiles, problem.groups, problem.batch),
        outputs=(
            Output(problem.shape, problem.dtype),
            problem.statistics,
            problem.gate_sums(query_tiles),
            problem.gathered,
        ),
        constants=problem.constants() | blocks,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def query_bias_grad(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """(projected, mask, bias, logsumexp, delta, gathered_grad, gate_grad) -> gradients.

    (of projected, where the query's is written into what ``output_grad`` left; parts of the bias's)
    Of ``tiles``, or as measured.
    """
    if tiles is None and attention_query_pipelined.fits(problem):
        return attention_query_pipelined.query_bias_grad(problem)
    tiles = tiles or choose("query_bias_grad", problem)
    blocks = tiles.fit(problem.length)
    query_tiles = cdiv(problem.length, blocks["BLOCK_Q"])
    programs = problem.batch * problem.heads * query_tiles
    chunks = min(problem.groups, max(1, TOGETHER // programs))
    shape = (chunks, problem.batch, problem.heads, problem.length, problem.length)
    return Launch(
        kernel=query_bias_grad_kernel,
        grid=(problem.heads * query_tiles, chunks, problem.batch),
        outputs=(Output(problem.shape, problem.dtype), Output(shape, "float32")),
        constants=problem.constants() | blocks | {"STAGES": tiles.num_stages},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        in_place={6: 0},
    )
