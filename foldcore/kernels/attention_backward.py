"""Gated self-attention with key mask and pair bias: the gradients.

The weights come back from the saved logsumexp; the scores' gradients never leave the chip. Four
facts keep traffic low. With o = attention, s the open gate and output y = o s, the gradient of what
the gate is the sigmoid of, dy o s (1 - s), is dy y (1 - s), and the row sums of do * o that
softmax's gradient needs are those of dy * y: o is never read. A program that holds all keys of a
group and head finishes the gradient of its queries tile by tile in the same pass. It sums the
gradient of the gate on its way, for the gate's bias. And the bias, shared by all groups, has a
tile of its gradient stay on chip while its program walks through the groups; what it needs of a
query, do and its row sum, the pass before has left.
"""

import triton
import triton.language as tl

from foldcore.kernels.attention import (
    LOG2_E,
    MASKED,
    PARTS,
    key_summand,
    load_bias,
    load_gate,
    load_gate_bias,
    load_tile,
    store_tile,
)
from foldcore.kernels.attention_tiles import Problem, Tiles, choose
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv


@triton.jit
def empty_group(mask_ptr, STEP: tl.constexpr, LENGTH: tl.constexpr, BLOCK_ALL: tl.constexpr):
    """Whether a group has no key at all. Its logsumexp, MASKED, has swallowed their number."""
    keys = tl.arange(0, BLOCK_ALL)
    masks = tl.load(mask_ptr + keys * STEP, mask=keys < LENGTH, other=0.0)
    return tl.max(masks, 0) <= 0


@triton.jit
def output_terms(
    output_ptr,
    grad_ptr,
    gate_ptr,
    gate_bias,
    gate_grad_ptr,
    query,
    STRIDE: tl.constexpr,
    GATE_GRAD_STRIDE: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of what was gathered, its row sums with it, and of the gate, which it stores."""
    y = load_tile(output_ptr, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
    dy = load_tile(grad_ptr, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
    product = y.to(tl.float32) * dy.to(tl.float32)
    gate = load_gate(gate_ptr, gate_bias, query, PARTS * STRIDE, LENGTH, WIDTH, BLOCK_D)
    gate_grad = product - product * gate
    store_tile(gate_grad_ptr, query, gate_grad, GATE_GRAD_STRIDE, LENGTH, WIDTH)
    return (dy.to(tl.float32) * gate).to(dy.dtype), tl.sum(product, 1), gate_grad


@triton.jit
def store_sums(sums_ptr, tile, WIDTH: tl.constexpr):
    """The sums of a tile's columns."""
    channels = tl.arange(0, tile.shape[1])
    tl.store(sums_ptr + channels, tl.sum(tile, 0), mask=channels < WIDTH)


@triton.jit
def whole_grad_kernel(
    projected_ptr,  # [b s r 4 h d]
    gate_bias_ptr,  # [h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    output_ptr,  # [b s r h d]
    logsumexp_ptr,  # [b g h q]
    grad_ptr,  # [b s r h d], of the output
    projected_grad_ptr,  # [b s r 4 h d]
    delta_ptr,  # [b g h q], row sums of grad * output
    gate_sums_ptr,  # [b g h d], sums of the gate's gradient over the positions of a group
    gathered_grad_ptr,  # [b s r h d], of what was gathered; only a bias needs it
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
    """All keys of one group and head on chip, over tiles of queries; scores are [keys, queries]."""
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    STRIDE: tl.constexpr = STEP * PARTS * CHANNELS
    head, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = (batch * (GROUPS * LENGTH) + group * GROUP_STEP).to(tl.int64)
    base = position * (PARTS * CHANNELS) + head * WIDTH
    out = position * CHANNELS + head * WIDTH
    bias_ptr += (batch * HEADS + head).to(tl.int64) * (LENGTH * LENGTH)
    row = (batch * GROUPS + group).to(tl.int64)
    K_PART: tl.constexpr = 2 * CHANNELS
    key = tl.arange(0, BLOCK_K)
    k = load_tile(projected_ptr + base + K_PART, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
    v = load_tile(projected_ptr + base + K_PART + CHANNELS, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
    summand = key_summand(mask_ptr + position, key, STEP, LENGTH, MASKED)[:, None]
    empty = empty_group(mask_ptr + position, STEP, LENGTH, BLOCK_K)
    slope = tl.where(empty, 0.0, SCALE)  # the logits of masked keys are fixed
    gate_bias = load_gate_bias(gate_bias_ptr + head * WIDTH, WIDTH, BLOCK_D)
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    gate_grads = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, LENGTH, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        q = load_tile(projected_ptr + base, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
        do, delta, gate_grad = output_terms(
            output_ptr + out,
            grad_ptr + out,
            projected_ptr + base + CHANNELS,
            gate_bias,
            projected_grad_ptr + base + CHANNELS,
            query,
            STEP * CHANNELS,
            STRIDE,
            LENGTH,
            WIDTH,
            BLOCK_D,
        )
        gate_grads += gate_grad
        statistic = (row * HEADS + head) * LENGTH + query
        tl.store(delta_ptr + statistic, delta, mask=query < LENGTH)
        logsumexp = tl.load(logsumexp_ptr + statistic, mask=query < LENGTH, other=float("inf"))
        shift = summand
        if HAS_BIAS:
            shift += load_bias(bias_ptr, query[None, :], key[:, None], LENGTH)
            store_tile(gathered_grad_ptr + out, query, do, STEP * CHANNELS, LENGTH, WIDTH)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * SCALE + shift
        weights = tl.exp2(logits * LOG2_E - logsumexp[None, :])
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (weights * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        store_tile(projected_grad_ptr + base, query, dq * slope, STRIDE, LENGTH, WIDTH)
    dv *= tl.where(empty, 1 / LENGTH, 1.0)
    store_tile(projected_grad_ptr + base + K_PART, key, dk * slope, STRIDE, LENGTH, WIDTH)
    store_tile(projected_grad_ptr + base + K_PART + CHANNELS, key, dv, STRIDE, LENGTH, WIDTH)
    store_sums(gate_sums_ptr + row * CHANNELS + head * WIDTH, gate_grads, WIDTH)


@triton.jit
def bias_grad_kernel(
    projected_ptr,  # [b s r 4 h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    logsumexp_ptr,  # [b g h q]
    delta_ptr,  # [b g h q]
    gathered_grad_ptr,  # [b s r h d]
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
    GROUPS_A_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the bias, over a chunk of the groups."""
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    STRIDE: tl.constexpr = STEP * PARTS * CHANNELS
    tiles = tl.cdiv(LENGTH, BLOCK_K)
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    query = tile // tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tile % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * GROUPS_A_PROGRAM
    batch = tl.program_id(2)
    bias_ptr += (batch * HEADS + head).to(tl.int64) * (LENGTH * LENGTH)
    bias = load_bias(bias_ptr, query[:, None], key[None, :], LENGTH)
    bias = bias.to(tl.float32) / SCALE  # what the products of queries and keys are added to
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    last = tl.minimum(first + GROUPS_A_PROGRAM, GROUPS)
    for group in tl.range(first, last, num_stages=STAGES):
        position = (batch * (GROUPS * LENGTH) + group * GROUP_STEP).to(tl.int64)
        base_ptr = projected_ptr + position * (PARTS * CHANNELS) + head * WIDTH
        k_ptr = base_ptr + 2 * CHANNELS
        statistic = ((batch * GROUPS + group).to(tl.int64) * HEADS + head) * LENGTH + query
        q = load_tile(base_ptr, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
        k = load_tile(k_ptr, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
        v = load_tile(k_ptr + CHANNELS, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
        do_ptr = gathered_grad_ptr + position * CHANNELS + head * WIDTH
        do = load_tile(do_ptr, query, STEP * CHANNELS, LENGTH, WIDTH, BLOCK_D)
        logsumexp = tl.load(logsumexp_ptr + statistic, mask=query < LENGTH, other=float("inf"))
        delta = tl.load(delta_ptr + statistic, mask=query < LENGTH, other=0.0)
        # no weight for masked keys even of a query without any other: their logits are fixed
        summand = key_summand(mask_ptr + position, key, STEP, LENGTH, float("-inf"))
        logits = tl.dot(q, tl.trans(k), bias + summand[None, :], input_precision="ieee")
        weights = tl.exp2(logits * (SCALE * LOG2_E) - logsumexp[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        total += weights * (dp - delta[:, None])
    bias_grad_ptr += tl.program_id(1).to(tl.int64) * (tl.num_programs(2) * HEADS) * LENGTH * LENGTH
    bias_grad_ptr += (batch * HEADS + head).to(tl.int64) * (LENGTH * LENGTH)
    inside = (query < LENGTH)[:, None] & (key < LENGTH)[None, :]
    tl.store(bias_grad_ptr + query[:, None] * LENGTH + key[None, :], total, mask=inside)


# Launch geometry ----------------------------------------------------------------------------------


def whole_grad(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """(projected, gate bias, mask, bias, output, logsumexp, grad) -> gradients.

    (of projected, delta, parts of the gate bias's to sum, of what was gathered if there is a bias)
    """
    tiles = tiles or choose("whole_grad", problem)
    blocks = tiles.fit(problem.length)
    unwritten = Output((1,), problem.dtype)
    return Launch(
        kernel=whole_grad_kernel,
        grid=(problem.heads, problem.groups, problem.batch),
        outputs=(
            Output(problem.shape, problem.dtype),
            problem.statistics,
            problem.gate_sums(tiles=1),
            problem.gathered if problem.has_bias else unwritten,
        ),
        constants=problem.constants() | blocks,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def bias_grad(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """(projected, mask, bias, logsumexp, delta, gathered_grad) -> parts of the bias's to sum."""
    tiles = tiles or choose("bias_grad", problem)
    blocks = tiles.fit(problem.length)
    chunks = cdiv(problem.groups, tiles.groups)
    shape = (chunks, problem.batch, problem.heads, problem.length, problem.length)
    tile_count = cdiv(problem.length, blocks["BLOCK_Q"]) * cdiv(problem.length, blocks["BLOCK_K"])
    walk = {"GROUPS_A_PROGRAM": tiles.groups, "STAGES": tiles.num_stages}
    return Launch(
        kernel=bias_grad_kernel,
        grid=(problem.heads * tile_count, chunks, problem.batch),
        outputs=(Output(shape, "float32"),),
        constants=problem.constants() | blocks | walk,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
