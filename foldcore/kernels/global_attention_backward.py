"""Gated attention with one query a group and head: the gradients.

As in the forward pass a program walks through its group twice. On the first way it finishes the
gradient of the gates and sums that of what was gathered, on the second it finishes those of keys
and values, in one array, and sums that of the query. The weights come back from the logsumexp.
"""

import triton
import triton.language as tl

from foldcore.kernels.attention import LOG2_E, MASKED, key_summand
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.global_attention import BACKWARD as MEASURED
from foldcore.kernels.global_attention import (
    Problem,
    Tiles,
    by_head,
    choose,
    load_heads,
)
from foldcore.kernels.launch import Launch, Output
from foldcore.kernels.rows import load_tile, load_vector, product, sigmoid, store_tile

# The logsumexp of a group without any key is MASKED, which has swallowed their number
EMPTY = tl.constexpr(-(2.0**99))


@triton.jit
def global_attention_backward_kernel(
    query_ptr,  # [b g h d]
    projected_ptr,  # [b s r n]
    gate_bias_ptr,  # [h d]
    mask_ptr,  # [b s r]
    gathered_ptr,  # [b g h d] float32
    logsumexp_ptr,  # [b g h]
    grad_ptr,  # [b s r h d], of the output
    query_grad_ptr,  # [b g h d]
    projected_grad_ptr,  # [b s r n]
    sums_ptr,  # [b g, h d], sums of the gate's gradient over the positions of a group
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP_STEP: tl.constexpr,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    AHEAD: tl.constexpr,
):
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    N: tl.constexpr = 2 * WIDTH + CHANNELS
    WHOLE: tl.constexpr = LENGTH % BLOCK_S == 0 and BLOCK_E == 2 * WIDTH
    WHOLE_GATES: tl.constexpr = LENGTH % BLOCK_T == 0 and BLOCK_J == CHANNELS
    group = (tl.program_id(1) * GROUPS + tl.program_id(0)).to(tl.int64)
    position = tl.program_id(1).to(tl.int64) * (GROUPS * LENGTH) + tl.program_id(0) * GROUP_STEP
    projected_ptr += position * N
    projected_grad_ptr += position * N
    grad_ptr += position * CHANNELS
    channel = tl.arange(0, BLOCK_J)
    gate_bias = load_vector(gate_bias_ptr, channel, CHANNELS)[None, :]
    flat = load_vector(gathered_ptr + group * CHANNELS, channel, CHANNELS)[None, :]
    flat_grad = tl.zeros([BLOCK_T, BLOCK_J], tl.float32)
    gate_grads = tl.zeros([BLOCK_T, BLOCK_J], tl.float32)
    for start in tl.range(0, LENGTH, BLOCK_T, num_stages=AHEAD):
        row, column = start + tl.arange(0, BLOCK_T)[:, None], channel[None, :]
        dy = load_tile(grad_ptr, LENGTH, CHANNELS, row, column, STEP * CHANNELS, 1, WHOLE_GATES)
        gate_ptr = projected_ptr + 2 * WIDTH
        gate = load_tile(gate_ptr, LENGTH, CHANNELS, row, column, STEP * N, 1, WHOLE_GATES)
        opened = sigmoid(gate.to(tl.float32) + gate_bias)
        inner = dy.to(tl.float32) * opened
        gate_grad = inner * flat * (1 - opened)
        out_ptr = projected_grad_ptr + 2 * WIDTH
        store_tile(out_ptr, gate_grad, LENGTH, CHANNELS, row, column, STEP * N, 1, WHOLE_GATES)
        flat_grad += inner
        gate_grads += gate_grad
    tl.store(sums_ptr + group * CHANNELS + channel, tl.sum(gate_grads, 0), mask=channel < CHANNELS)
    dtype = projected_ptr.dtype.element_ty
    gathered_grad = by_head(tl.sum(flat_grad, 0), WIDTH, BLOCK_H, BLOCK_E).to(dtype)
    gathered = load_heads(gathered_ptr + group * CHANNELS, WIDTH, HEADS, WIDTH, BLOCK_H, BLOCK_E)
    delta = tl.sum(gathered * gathered_grad.to(tl.float32), 1)[None, :]
    head, both = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E)[None, :]
    query = load_heads(query_ptr + group * CHANNELS, 0, HEADS, WIDTH, BLOCK_H, BLOCK_E)
    at = logsumexp_ptr + group * HEADS + head
    logsumexp = tl.load(at, mask=head < HEADS, other=float("inf"))[None, :]
    empty = logsumexp < EMPTY  # keys get the same weights, whatever the query is
    share = tl.where(empty, 1 / LENGTH, 1.0)
    slope = tl.where(empty, 0.0, SCALE)
    query_grad = tl.zeros([BLOCK_H, BLOCK_E], tl.float32)
    for start in tl.range(0, LENGTH, BLOCK_S, num_stages=AHEAD):
        key = start + tl.arange(0, BLOCK_S)
        row = key[:, None]
        kv = load_tile(projected_ptr, LENGTH, 2 * WIDTH, row, both, STEP * N, 1, WHOLE)
        summand = key_summand(mask_ptr + position, key, STEP, LENGTH, MASKED)
        logits = product(kv, tl.trans(query)) * SCALE + summand[:, None]
        weights = tl.exp2(logits * LOG2_E - logsumexp) * share
        weights_grad = product(kv, tl.trans(gathered_grad)) - delta
        logits_grad = (weights * weights_grad * slope).to(dtype)
        kv_grad = product(weights.to(dtype), gathered_grad) + product(logits_grad, query)
        store_tile(projected_grad_ptr, kv_grad, LENGTH, 2 * WIDTH, row, both, STEP * N, 1, WHOLE)
        query_grad += product(tl.trans(logits_grad), kv)
    keys = (head < HEADS)[:, None] & (both < WIDTH)
    at = query_grad_ptr + group * CHANNELS + head[:, None] * WIDTH + both
    tl.store(at, query_grad.to(query_grad_ptr.dtype.element_ty), mask=keys)


def backward(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """(query, projected, gate bias, mask, gathered, logsumexp, grad) -> gradients.

    Of the query, of what is projected, and parts of the gate bias's to sum.
    """
    tiles = tiles or choose(MEASURED, problem)
    b, groups, heads = problem.by_head
    channels = heads * problem.width
    return Launch(
        kernel=global_attention_backward_kernel,
        grid=problem.grid,
        outputs=(
            Output((*problem.by_head, problem.width), problem.dtype),
            Output((*problem.table, 2 * problem.width + channels), problem.dtype),
            Output((b * groups, channels), "float32"),
        ),
        constants=problem.constants(tiles),
        num_warps=tiles.num_warps,
        num_stages=tiles.ahead,
    )
