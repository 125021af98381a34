"""Gated self-attention with key mask and pair bias (Suppl. Alg. 7, 8, 13, 14): the forward pass.

All four projections of a position arrive side by side, as one matrix product leaves them, in the
order query, gate, key, value; the gate's bias is added here. Positions form a table [s r]; a group
attends within itself and is a row of it (axis 2) or a column (axis 1), without a transpose: a head
of a position fills whole memory sectors either way. Scores never leave the chip. Where a tile
holds all keys of a group, the next group's tiles are on their way while one is computed.

Narrow heads leave the tensor cores idle and the other units too much to do. There a program holds
its tile of the bias (HELD), and the tensor cores add bias and mask: as products with the identity
and with a row of ones, in float32 and without rounding. The identity is multiplied by 1 / scale in
the bias's dtype, for ``Problem.short_scale`` only: products of queries and keys share its rounding.

Some sizes have a kernel of their own on Hopper, see ``attention_pipelined``.

Logits are natural, their maxima and the logarithms of sums in units of log 2, for exp2.
"""

import triton
import triton.language as tl

from foldcore.kernels import attention_pipelined
from foldcore.kernels.attention_tiles import MASKED, Problem, Tiles, choose
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, cdiv
from foldcore.kernels.rows import LOG2_E, sigmoid

PARTS = tl.constexpr(4)  # query, gate, key, value


@triton.jit
def load_tile(
    base_ptr,
    rows,
    STRIDE: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[rows, BLOCK_D] of one head, zero beyond ``LIMIT`` rows and ``WIDTH`` channels."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base_ptr + rows[:, None] * STRIDE + channels[None, :]
    if LIMIT % rows.shape[0] == 0 and WIDTH == BLOCK_D:
        tile = tl.load(pointers)
    else:
        inside = (rows < LIMIT)[:, None] & (channels < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    base_ptr, rows, tile, STRIDE: tl.constexpr, LIMIT: tl.constexpr, WIDTH: tl.constexpr
):
    """The counterpart of ``load_tile``."""
    channels = tl.arange(0, tile.shape[1])
    pointers = base_ptr + rows[:, None] * STRIDE + channels[None, :]
    tile = tile.to(base_ptr.dtype.element_ty)
    if LIMIT % tile.shape[0] == 0 and WIDTH == tile.shape[1]:
        tl.store(pointers, tile)
    else:
        inside = (rows < LIMIT)[:, None] & (channels < WIDTH)[None, :]
        tl.store(pointers, tile, mask=inside)


@triton.jit
def load_bias(base_ptr, query, key, LENGTH: tl.constexpr):
    """One head's bias where ``query`` and ``key``, one a row and one a column, meet."""
    pointers = base_ptr + query * LENGTH + key
    if LENGTH % pointers.shape[0] == 0 and LENGTH % pointers.shape[1] == 0:
        bias = tl.load(pointers)
    else:
        bias = tl.load(pointers, mask=(query < LENGTH) & (key < LENGTH), other=0.0)
    return bias


@triton.jit
def diagonal(value, SIZE: tl.constexpr):
    """[SIZE, SIZE], ``value`` on the diagonal and 0 elsewhere."""
    index = tl.arange(0, SIZE)
    return tl.where(index[:, None] == index[None, :], value, 0.0)


@triton.jit
def add_to_rows(tile, row, dtype):
    """``tile`` + ``row`` by the tensor cores, which take no less than 16 rows: 15 are zero."""
    extra = tl.arange(0, 16)
    ones = tl.where(extra[None, :] == 0, tl.full([tile.shape[0], 1], 1.0, tl.float32), 0.0)
    rows = tl.where(extra[:, None] == 0, row[None, :], 0.0)
    return tl.dot(ones.to(dtype), rows.to(dtype), tile, input_precision="ieee")


@triton.jit
def key_summand(mask_ptr, keys, STRIDE: tl.constexpr, LENGTH: tl.constexpr, HIDDEN: tl.constexpr):
    """What is added to a key's logits: 0, ``HIDDEN`` if it is masked, -inf if it is padding."""
    if LENGTH % keys.shape[0] == 0:
        summand = tl.where(tl.load(mask_ptr + keys * STRIDE) > 0, 0.0, HIDDEN)
    else:
        real = keys < LENGTH
        kept = tl.load(mask_ptr + keys * STRIDE, mask=real, other=0.0) > 0
        summand = tl.where(kept, 0.0, tl.where(real, HIDDEN, float("-inf")))
    return summand


@triton.jit
def load_gate(
    gate_ptr,
    gate_bias,
    rows,
    STRIDE: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """How far the gate of one head is open, between 0 and 1."""
    gate = load_tile(gate_ptr, rows, STRIDE, LIMIT, WIDTH, BLOCK_D).to(tl.float32)
    return sigmoid(gate + gate_bias[None, :])


@triton.jit
def load_gate_bias(gate_bias_ptr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """That of one head, in float32."""
    channels = tl.arange(0, BLOCK_D)
    return tl.load(gate_bias_ptr + channels, mask=channels < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    projected_ptr,  # [b s r 4 h d]
    gate_bias_ptr,  # [h d]
    mask_ptr,  # [b s r]
    bias_ptr,  # [b h q k]
    output_ptr,  # [b s r h d]
    logsumexp_ptr,  # [b g h q], in units of log 2
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUP_STEP: tl.constexpr,  # positions from one group to the next
    STEP: tl.constexpr,  # positions from one member of a group to the next
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,
):
    await_previous()
    CHANNELS: tl.constexpr = HEADS * WIDTH
    STRIDE: tl.constexpr = STEP * PARTS * CHANNELS
    tiles = tl.cdiv(LENGTH, BLOCK_Q)
    head = tl.program_id(0) // tiles
    query = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    batch = tl.program_id(2)
    bias_ptr += (batch * HEADS + head).to(tl.int64) * (LENGTH * LENGTH)
    gate_bias = load_gate_bias(gate_bias_ptr + head * WIDTH, WIDTH, BLOCK_D)
    unit = LOG2_E  # of logits
    if HELD:
        bias = load_bias(bias_ptr, query[:, None], tl.arange(0, BLOCK_K)[None, :], LENGTH)
        inverse = tl.full([], 1 / SCALE, tl.float32).to(bias.dtype).to(tl.float32)
        identity = diagonal(inverse, BLOCK_Q).to(bias.dtype)
        unit = LOG2_E / inverse
    # in turn: programs that run together read neighbouring groups
    for group in tl.range(tl.program_id(1), GROUPS, tl.num_programs(1), num_stages=STAGES):
        position = (batch * (GROUPS * LENGTH) + group * GROUP_STEP).to(tl.int64)
        base_ptr = projected_ptr + position * (PARTS * CHANNELS) + head * WIDTH
        q = load_tile(base_ptr, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
        highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        gathered = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for start in range(0, LENGTH, BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            k_ptr = base_ptr + 2 * CHANNELS
            k = load_tile(k_ptr, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
            v = load_tile(k_ptr + CHANNELS, key, STRIDE, LENGTH, WIDTH, BLOCK_D)
            summand = key_summand(mask_ptr + position, key, STEP, LENGTH, MASKED)
            if HELD:
                logits = tl.dot(identity, bias, input_precision="ieee")
                logits = add_to_rows(logits, summand, bias.dtype)
                logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
            else:
                summand = summand[None, :]
                if HAS_BIAS:
                    bias = load_bias(bias_ptr, query[:, None], key[None, :], LENGTH)
                    # in the bias's dtype, which has each of the sums: half the work
                    summand = (bias + summand.to(bias.dtype)).to(tl.float32)
                logits = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE + summand
            higher = tl.max(logits, 1) * unit
            if LENGTH > BLOCK_K:  # what earlier tiles left
                higher = tl.maximum(highest, higher)
                shrink = tl.exp2(highest - higher)
                total *= shrink
                gathered *= shrink[:, None]
            weights = tl.exp2(logits * unit - higher[:, None])
            total += tl.sum(weights, 1)
            gathered = tl.dot(weights.to(v.dtype), v, gathered, input_precision="ieee")
            highest = higher
        gate = load_gate(base_ptr + CHANNELS, gate_bias, query, STRIDE, LENGTH, WIDTH, BLOCK_D)
        output = gathered * (1 / total)[:, None] * gate
        out_ptr = output_ptr + position * CHANNELS + head * WIDTH
        store_tile(out_ptr, query, output, STEP * CHANNELS, LENGTH, WIDTH)
        lse_ptr = logsumexp_ptr + ((batch * GROUPS + group).to(tl.int64) * HEADS + head) * LENGTH
        if HELD:  # a query without any key: in natural units as well
            highest = tl.where(highest > MASKED * 0.001, highest, MASKED * LOG2_E)
        tl.store(lse_ptr + query, highest + tl.log2(total), mask=query < LENGTH)


# Launch geometry ----------------------------------------------------------------------------------


def forward(problem: Problem, tiles: Tiles | None = None) -> Launch:
    """(projected, gate bias, mask, bias) -> (output, logsumexp); of ``tiles``, or as measured."""
    if tiles is None and attention_pipelined.fits(problem):
        return attention_pipelined.forward(problem)
    tiles = tiles or choose("forward", problem)
    blocks = tiles.fit(problem.length)
    programs = problem.heads * cdiv(problem.length, blocks["BLOCK_Q"])
    whole = problem.length <= blocks["BLOCK_K"]
    held = tiles.held and whole and problem.holds_bias
    walk = {"STAGES": tiles.num_stages, "HELD": held}
    return Launch(
        kernel=forward_kernel,
        grid=(programs, cdiv(problem.groups, tiles.groups), problem.batch),
        outputs=(problem.gathered, problem.statistics),
        constants=problem.constants() | blocks | walk,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
