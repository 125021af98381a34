"""Attention from each pair to the same pair of every template (Suppl. Alg. 17).

Keys and values of a pair and template arrive side by side, as one matrix product leaves them. There
are so few templates that no matrix product would pay: a program holds some pairs with all their
heads and takes one template after the other.

Logits and their maxima are in units of log 2, for exp2.

Legend: p pairs (i, j), t templates.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from foldcore.kernels.attention import LOG2_E, MASKED
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv, next_power_of_2


@dataclass(frozen=True)
class Problem:
    """How many examples, templates and pairs there are, heads and their width.

    ``dtype`` is a name, such as "bfloat16".
    """

    b: int
    t: int
    pairs: int
    heads: int
    width: int
    scale: float
    dtype: str
    architecture: int

    @property
    def by_pair(self) -> tuple[int, int, int, int]:
        """The shape of queries and results."""
        return self.b, self.pairs, self.heads, self.width

    def launch(self, kernel: Any, outputs: tuple[Output, ...], sizes: "Sizes") -> Launch:
        """Of either kernel."""
        if self.architecture == INTERPRETER:
            sizes = _TESTED
        heads, width = next_power_of_2(self.heads), next_power_of_2(self.width)
        rows = max(1, sizes.elements // (heads * width))
        blocks = {"BLOCK_P": rows, "BLOCK_H": heads, "BLOCK_D": width}
        numbers = {"SCALE": self.scale, "TEMPLATES": self.t, "PAIRS": self.pairs}
        channels = {"HEADS": self.heads, "WIDTH": self.width}
        return Launch(
            kernel=kernel,
            grid=(cdiv(self.pairs, rows), self.b),
            outputs=outputs,
            constants=numbers | channels | blocks | {"BLOCK_T": next_power_of_2(self.t)},
            num_warps=sizes.num_warps,
            num_stages=1,
        )


@dataclass(frozen=True)
class Sizes:
    """Of a launch: numbers in a tile of pairs."""

    elements: int
    num_warps: int


FORWARD, BACKWARD = Sizes(2048, 4), Sizes(2048, 4)
_TESTED = Sizes(256, 4)  # in the interpreter: several tiles of small arrays


@triton.jit
def load_pairs(
    base_ptr,
    left,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[pairs, heads, channels] in float32, 0 beyond the limits; ``STEP`` from pair to pair."""
    pair = tl.arange(0, BLOCK_P)[:, None, None]
    head = tl.arange(0, BLOCK_H)[None, :, None]
    channel = tl.arange(0, BLOCK_D)[None, None, :]
    at = base_ptr + pair * STEP + head * WIDTH + channel
    if PAIRS % BLOCK_P == 0 and HEADS == BLOCK_H and WIDTH == BLOCK_D:
        tile = tl.load(at)
    else:
        inside = (pair < left) & (head < HEADS) & (channel < WIDTH)
        tile = tl.load(at, mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def store_pairs(
    base_ptr,
    tile,
    left,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The counterpart of ``load_pairs``."""
    pair = tl.arange(0, tile.shape[0])[:, None, None]
    head = tl.arange(0, tile.shape[1])[None, :, None]
    channel = tl.arange(0, tile.shape[2])[None, None, :]
    at = base_ptr + pair * STEP + head * WIDTH + channel
    tile = tile.to(base_ptr.dtype.element_ty)
    if PAIRS % tile.shape[0] == 0 and HEADS == tile.shape[1] and WIDTH == tile.shape[2]:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=(pair < left) & (head < HEADS) & (channel < WIDTH))


@triton.jit
def fixed_logit(mask_ptr, TEMPLATES: tl.constexpr, BLOCK_T: tl.constexpr):
    """The logit of masked templates; all are alike where an example has no other."""
    template = tl.arange(0, BLOCK_T)
    masks = tl.load(mask_ptr + template, mask=template < TEMPLATES, other=0.0)
    return tl.where(tl.max(masks, 0) > 0, MASKED, 0.0)


@triton.jit
def template_attention_forward_kernel(
    query_ptr,  # [b p h d]
    projected_ptr,  # [b t p 2 h d]
    mask_ptr,  # [b t]
    output_ptr,  # [b p h d]
    logsumexp_ptr,  # [b p h], in units of log 2
    SCALE: tl.constexpr,
    TEMPLATES: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    await_previous()
    C: tl.constexpr = HEADS * WIDTH
    first = tl.program_id(0) * BLOCK_P
    left = PAIRS - first
    batch = tl.program_id(1).to(tl.int64)
    at = batch * PAIRS + first
    mask_ptr += batch * TEMPLATES
    fixed = fixed_logit(mask_ptr, TEMPLATES, BLOCK_T)
    query_ptr += at * C
    q = load_pairs(query_ptr, left, C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
    highest = tl.full([BLOCK_P, BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)
    gathered = tl.zeros([BLOCK_P, BLOCK_H, BLOCK_D], tl.float32)
    for template in range(TEMPLATES):
        of_template = (batch * TEMPLATES + template) * PAIRS + first
        k_ptr = projected_ptr + of_template * (2 * C)
        k = load_pairs(k_ptr, left, 2 * C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
        v = load_pairs(k_ptr + C, left, 2 * C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
        logits = tl.sum(q * k, 2) * (SCALE * LOG2_E)
        logits = tl.where(tl.load(mask_ptr + template) > 0, logits, fixed)
        higher = tl.maximum(highest, logits)
        shrink, weights = tl.exp2(highest - higher), tl.exp2(logits - higher)
        total = total * shrink + weights
        gathered = gathered * shrink[:, :, None] + weights[:, :, None] * v
        highest = higher
    output_ptr += at * C
    store_pairs(output_ptr, gathered / total[:, :, None], left, C, PAIRS, HEADS, WIDTH)
    pair, head = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_H)[None, :]
    logsumexp_ptr += at * HEADS + pair * HEADS + head
    tl.store(logsumexp_ptr, highest + tl.log2(total), mask=(pair < left) & (head < HEADS))


@triton.jit
def template_attention_backward_kernel(
    query_ptr,  # [b p h d]
    projected_ptr,  # [b t p 2 h d]
    mask_ptr,  # [b t]
    logsumexp_ptr,  # [b p h]
    grad_ptr,  # [b p h d], of the output
    query_grad_ptr,  # [b p h d]
    projected_grad_ptr,  # [b t p 2 h d]
    SCALE: tl.constexpr,
    TEMPLATES: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    await_previous()
    C: tl.constexpr = HEADS * WIDTH
    first = tl.program_id(0) * BLOCK_P
    left = PAIRS - first
    batch = tl.program_id(1).to(tl.int64)
    at = batch * PAIRS + first
    mask_ptr += batch * TEMPLATES
    fixed = fixed_logit(mask_ptr, TEMPLATES, BLOCK_T)
    q = load_pairs(query_ptr + at * C, left, C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
    do = load_pairs(grad_ptr + at * C, left, C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
    pair, head = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_H)[None, :]
    logsumexp_ptr += at * HEADS + pair * HEADS + head
    inside = (pair < left) & (head < HEADS)
    logsumexp = tl.load(logsumexp_ptr, mask=inside, other=float("inf"))
    delta = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)  # not of the result, which is rounded
    for template in range(TEMPLATES):
        k_ptr = projected_ptr + ((batch * TEMPLATES + template) * PAIRS + first) * (2 * C)
        k = load_pairs(k_ptr, left, 2 * C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
        v = load_pairs(k_ptr + C, left, 2 * C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
        kept = tl.load(mask_ptr + template) > 0
        logits = tl.where(kept, tl.sum(q * k, 2) * (SCALE * LOG2_E), fixed)
        delta += tl.exp2(logits - logsumexp) * tl.sum(do * v, 2)
    dq = tl.zeros([BLOCK_P, BLOCK_H, BLOCK_D], tl.float32)
    for template in range(TEMPLATES):
        place = ((batch * TEMPLATES + template) * PAIRS + first) * (2 * C)
        k_ptr, out_ptr = projected_ptr + place, projected_grad_ptr + place
        k = load_pairs(k_ptr, left, 2 * C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
        v = load_pairs(k_ptr + C, left, 2 * C, PAIRS, HEADS, WIDTH, BLOCK_P, BLOCK_H, BLOCK_D)
        kept = tl.load(mask_ptr + template) > 0
        logits = tl.where(kept, tl.sum(q * k, 2) * (SCALE * LOG2_E), fixed)
        weights = tl.exp2(logits - logsumexp)
        slope = tl.where(kept, SCALE, 0.0)  # the logits of masked templates are fixed
        ds = (weights * (tl.sum(do * v, 2) - delta) * slope)[:, :, None]
        store_pairs(out_ptr, ds * q, left, 2 * C, PAIRS, HEADS, WIDTH)
        dv = weights[:, :, None] * do
        store_pairs(out_ptr + C, dv, left, 2 * C, PAIRS, HEADS, WIDTH)
        dq += ds * k
    store_pairs(query_grad_ptr + at * C, dq, left, C, PAIRS, HEADS, WIDTH)


def forward(problem: Problem, sizes: Sizes = FORWARD) -> Launch:
    """(query, projected, mask) -> (output, logsumexp)."""
    statistics = Output(problem.by_pair[:3], "float32")
    outputs = Output(problem.by_pair, problem.dtype), statistics
    return problem.launch(template_attention_forward_kernel, outputs, sizes)


def backward(problem: Problem, sizes: Sizes = BACKWARD) -> Launch:
    """(query, projected, mask, logsumexp, grad) -> gradients of query and projected."""
    b, pairs, *by_head = problem.by_pair
    projected = b, problem.t, pairs, 2, *by_head
    outputs = tuple(Output(shape, problem.dtype) for shape in (problem.by_pair, projected))
    return problem.launch(template_attention_backward_kernel, outputs, sizes)
