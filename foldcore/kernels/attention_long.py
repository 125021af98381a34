"""Gradients of attention in two kernels, those of queries and those of keys and values.

``attention_backward`` explains the method; here the weights are computed once for the gradients of
queries and gate, and once more for those of keys and values. Programs are small, and no gradient of
a score has to change places between threads.

Where sizes say so (IDENTITY) the tensor cores add the bias to the products of queries and keys, as
in ``attention``: its tile goes from memory to them without passing through registers. Keys and
values are that way beside ``attention_bias`` too. Some sizes of these have a kernel of their own on
Hopper, see ``attention_key_value_pipelined``.
"""

import triton
import triton.language as tl

from foldcore.kernels import attention_key_value_pipelined
from foldcore.kernels.attention import (
    LOG2_E,
    MASKED,
    PARTS,
    diagonal,
    key_summand,
    load_bias,
    load_gate_bias,
    load_tile,
    store_tile,
)
from foldcore.kernels.attention_backward import empty_group, output_terms, store_sums
from foldcore.kernels.attention_tiles import Problem, Tiles, choose
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv, next_power_of_2


@triton.jit
def identity_of(bias_ptr, SCALE: tl.constexpr, SIZE: tl.constexpr):
    """By what logits are then multiplied, and 1 / SCALE times the identity in the bias's dtype."""
    inverse = tl.full([], 1 / SCALE, tl.float32).to(bias_ptr.dtype.element_ty)
    identity = diagonal(inverse.to(tl.float32), SIZE).to(bias_ptr.dtype.element_ty)
    return LOG2_E / inverse.to(tl.float32), identity


@triton.jit
def query_grad_kernel(
    projected_ptr,  # [b s r 4 h d]
    gate_bias_ptr,  # [h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    output_ptr,  # [b s r h d]
    logsumexp_ptr,  # [b g h q]
    grad_ptr,  # [b s r h d], of the output
    projected_grad_ptr,  # [b s r 4 h d], here of query and gate
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
    """One tile of queries, over all keys."""
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    STRIDE: tl.constexpr = STEP * PARTS * CHANNELS
    tiles = tl.cdiv(LENGTH, BLOCK_Q)
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    query = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    group = tl.program_id(1)
    batch = tl.program_id(2)
    position = (batch * (GROUPS * LENGTH) + group * GROUP_STEP).to(tl.int64)
    base_ptr = projected_ptr + position * (PARTS * CHANNELS) + head * WIDTH
    bias_ptr += (batch * HEADS + head).to(tl.int64) * (LENGTH * LENGTH)
    query_grad_ptr = projected_grad_ptr + position * (PARTS * CHANNELS) + head * WIDTH
    statistic = ((batch * GROUPS + group).to(tl.int64) * HEADS + head) * LENGTH + query
    inside = query < LENGTH

    q = load_tile(base_ptr, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
    do, delta, gate_grad = output_terms(
        output_ptr + position * CHANNELS + head * WIDTH,
        grad_ptr + position * CHANNELS + head * WIDTH,
        base_ptr + CHANNELS,
        load_gate_bias(gate_bias_ptr + head * WIDTH, WIDTH, BLOCK_D),
        query_grad_ptr + CHANNELS,
        query,
        STEP * CHANNELS,
        STRIDE,
        LENGTH,
        WIDTH,
        BLOCK_D,
    )
    do_ptr = gathered_grad_ptr + position * CHANNELS + head * WIDTH
    store_tile(do_ptr, query, do, STEP * CHANNELS, LENGTH, WIDTH)
    tile += (batch * GROUPS + group).to(tl.int64) * tiles
    store_sums(gate_sums_ptr + tile * CHANNELS + head * WIDTH, gate_grad, WIDTH)
    tl.store(delta_ptr + statistic, delta, mask=inside)
    logsumexp = tl.load(logsumexp_ptr + statistic, mask=inside, other=float("inf"))
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, LENGTH, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        k_ptr = base_ptr + 2 * CHANNELS
        k = load_tile(k_ptr, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
        v = load_tile(k_ptr + CHANNELS, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
        # no weight for masked keys even of a query without any other: their logits are fixed
        summand = key_summand(mask_ptr + position, key, STEP, LENGTH, float("-inf"))[None, :]
        if HAS_BIAS:
            summand += load_bias(bias_ptr, query[:, None], key[None, :], LENGTH)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE + summand
        weights = tl.exp2(logits * LOG2_E - logsumexp[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (weights * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    store_tile(query_grad_ptr, query, dq * SCALE, STRIDE, LENGTH, WIDTH)


@triton.jit
def key_value_grad_kernel(
    projected_ptr,  # [b s r 4 h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    logsumexp_ptr,  # [b g h q]
    delta_ptr,  # [b g h q], row sums of grad * output
    gathered_grad_ptr,  # [b s r h d]
    query_grad_ptr,  # [b s r 4 h d], the same as the next
    projected_grad_ptr,  # [b s r 4 h d], here of key and value
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
    BLOCK_ALL: tl.constexpr,
    IDENTITY: tl.constexpr,
):
    """One tile of keys, over all queries; scores are [keys, queries]."""
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    STRIDE: tl.constexpr = STEP * PARTS * CHANNELS
    head = tl.program_id(0) % HEADS
    key = tl.program_id(0) // HEADS * BLOCK_K + tl.arange(0, BLOCK_K)
    group = tl.program_id(1)
    batch = tl.program_id(2)
    position = (batch * (GROUPS * LENGTH) + group * GROUP_STEP).to(tl.int64)
    base_ptr = projected_ptr + position * (PARTS * CHANNELS) + head * WIDTH
    bias_ptr += (batch * HEADS + head).to(tl.int64) * (LENGTH * LENGTH)
    first_statistic = ((batch * GROUPS + group).to(tl.int64) * HEADS + head) * LENGTH

    k_ptr = base_ptr + 2 * CHANNELS
    k = load_tile(k_ptr, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
    v = load_tile(k_ptr + CHANNELS, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
    summand = key_summand(mask_ptr + position, key, STEP, LENGTH, MASKED * LOG2_E)[:, None]
    empty = empty_group(mask_ptr + position, STEP, LENGTH, BLOCK_ALL)
    slope = tl.where(empty, 0.0, SCALE)  # the logits of masked keys are fixed
    do_ptr = gathered_grad_ptr + position * CHANNELS + head * WIDTH
    unit = SCALE * LOG2_E
    if IDENTITY:
        unit, identity = identity_of(bias_ptr, SCALE, BLOCK_Q)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, LENGTH, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        q = load_tile(base_ptr, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
        do = load_tile(do_ptr, query, STEP * CHANNELS, LENGTH, WIDTH, BLOCK_D)
        statistic = first_statistic + query
        logsumexp = tl.load(logsumexp_ptr + statistic, mask=query < LENGTH, other=float("inf"))
        delta = tl.load(delta_ptr + statistic, mask=query < LENGTH, other=0.0)
        shift = summand
        logits = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
        if IDENTITY:
            bias = load_bias(bias_ptr, query[:, None], key[None, :], LENGTH)
            logits = tl.dot(tl.trans(bias), identity, input_precision="ieee")
        elif HAS_BIAS:
            bias = load_bias(bias_ptr, query[None, :], key[:, None], LENGTH)
            shift += bias.to(tl.float32) * LOG2_E
        logits = tl.dot(k, tl.trans(q), logits, input_precision="ieee")
        weights = tl.exp2(logits * unit + shift - logsumexp[None, :])
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (weights * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    dv *= tl.where(empty, 1 / LENGTH, 1.0)
    out_ptr = projected_grad_ptr + position * (PARTS * CHANNELS) + 2 * CHANNELS + head * WIDTH
    store_tile(out_ptr, key, dk * slope, STRIDE, LENGTH, WIDTH)
    store_tile(out_ptr + CHANNELS, key, dv, STRIDE, LENGTH, WIDTH)


# Launch geometry ----------------------------------------------------------------------------------


def query_grad(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """As ``attention_backward.whole_grad``, but of projected only query and gate."""
    tiles = tiles or choose("query_grad", problem)
    blocks = tiles.fit(problem.length)
    query_tiles = cdiv(problem.length, blocks["BLOCK_Q"])
    return Launch(
        kernel=query_grad_kernel,
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


def key_value_grad(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """(projected, mask, bias, logsumexp, delta, gathered_grad, query_grad) -> gradients.

    Those of key and value are written into what ``query_grad`` left of projected.
    """
    if tiles is None and attention_key_value_pipelined.fits(problem):
        return attention_key_value_pipelined.key_value_grad(problem)
    tiles = tiles or choose("key_value_grad", problem)
    blocks = tiles.fit(problem.length)
    every = {"BLOCK_ALL": max(16, next_power_of_2(problem.length))}
    key_tiles = cdiv(problem.length, blocks["BLOCK_K"])
    return Launch(
        kernel=key_value_grad_kernel,
        grid=(problem.heads * key_tiles, problem.groups, problem.batch),
        outputs=(Output(problem.shape, problem.dtype),),
        constants=problem.constants()
        | blocks
        | every
        | {"IDENTITY": tiles.held and problem.holds_bias},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        in_place={6: 0},
    )
