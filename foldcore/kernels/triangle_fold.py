"""Triangle multiplication's norms as a part of its weights, and their gradients.

A projection of a normalised row is ``LN(x) W + b`` with ``LN(x) = (x - mean) rstd scale + offset``.
With ``S W`` for the rows of W times the scale, and ``W'`` for ``S W`` less the mean of each of its
columns,

    LN(x) W + b = rstd (x - mean) (S W) + (offset W + b) = rstd (x W') + b'

for a row less its mean, times any matrix, is the row times that matrix less the means of its
columns. W' and b' are computed once a call, and beside them rstd of the pair's rows; then the
kernels need no normalised rows. Rounding W' to bfloat16 is one more rounding of the weights, in
place of one of the normalised rows. Backward they sum ``M = normal^T dy``, with the standardised
rows ``normal = (x - mean) rstd``, and ``s = sum of dy``, from which follow

    dW = S M + offset s^T    dscale = sum over columns of M W    doffset = W s

Legend: n = b p rows of the pair, c channels of pairs, h channels of the product, w = 4 h + c: of
left, left gate, right, right gate, gating, side by side.
"""

from collections.abc import Sequence
from typing import TypeVar

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import block, load_tile, load_vector, store_tile
from foldcore.kernels.triangle_tiles import moments, store_vector

Array = TypeVar("Array")
BLOCK = 16  # columns, or rows, of weights that a program has
ROWS = 32  # of the pair
# which of the 16 parameters are matrices, which vectors, and which ``backward`` takes
WEIGHTS = (2, 4, 6, 8, 12, 14)
VECTORS = (0, 1, 3, 5, 7, 9, 10, 11, 13, 15)
WITHOUT_BIASES = (0, 1, 2, 4, 6, 8, 10, 11, 12, 14)


@triton.jit
def triangle_fold_kernel(
    pair_ptr,  # [n, c]
    norm_scale_ptr,  # [c]
    norm_offset_ptr,
    left_ptr,  # [c, h] and its bias [h], as are the three that follow
    left_bias_ptr,
    left_gate_ptr,
    left_gate_bias_ptr,
    right_ptr,
    right_bias_ptr,
    right_gate_ptr,
    right_gate_bias_ptr,
    center_scale_ptr,  # [h]
    center_offset_ptr,
    output_ptr,  # [h, c]
    output_bias_ptr,  # [c]
    gating_ptr,  # [c, c]
    gating_bias_ptr,  # [c]
    folded_ptr,  # [c, w]
    bias_ptr,  # [w] float32
    output_folded_ptr,  # [h, c]
    output_folded_bias_ptr,  # [c] float32
    rstd_ptr,  # [n]: 1 / standard deviation of the pair's channels
    N: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Programs: PARTS for the columns of each of the six weights, then one for some of the rows."""
    await_previous()
    W: tl.constexpr = 4 * H + C
    norm = norm_scale_ptr, norm_offset_ptr
    which = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    if which == 0:
        to = folded_ptr, bias_ptr
        fold(left_ptr, left_bias_ptr, norm, to, part, C, H, W, BLOCK_C, BLOCK_K)
    elif which == 1:
        to = folded_ptr + H, bias_ptr + H
        fold(left_gate_ptr, left_gate_bias_ptr, norm, to, part, C, H, W, BLOCK_C, BLOCK_K)
    elif which == 2:
        to = folded_ptr + 2 * H, bias_ptr + 2 * H
        fold(right_ptr, right_bias_ptr, norm, to, part, C, H, W, BLOCK_C, BLOCK_K)
    elif which == 3:
        to = folded_ptr + 3 * H, bias_ptr + 3 * H
        fold(right_gate_ptr, right_gate_bias_ptr, norm, to, part, C, H, W, BLOCK_C, BLOCK_K)
    elif which == 4:
        to = folded_ptr + 4 * H, bias_ptr + 4 * H
        fold(gating_ptr, gating_bias_ptr, norm, to, part, C, C, W, BLOCK_C, BLOCK_K)
    elif which == 5:
        norm = center_scale_ptr, center_offset_ptr
        to = output_folded_ptr, output_folded_bias_ptr
        fold(output_ptr, output_bias_ptr, norm, to, part, H, C, C, BLOCK_H, BLOCK_K)
    else:
        start = tl.cast(tl.program_id(0) - 6 * PARTS, tl.int64) * BLOCK_N
        store_rstd(pair_ptr + start * C, rstd_ptr + start, N - start, C, WHOLE, BLOCK_N, BLOCK_C)


@triton.jit
def fold(
    weights_ptr,  # [K, N]
    bias_ptr,  # [N]
    norm_ptrs,  # scale and offset, [K]
    to_ptrs,  # folded weights, as columns of [K, STEP], and bias [N]
    part,
    K: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """W' and b' of some columns."""
    start = part * BLOCK_N
    index, place = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row, column = place[:, None], index[None, :]
    weights = load_tile(weights_ptr + start, K, N - start, row, column, N, 1).to(tl.float32)
    scaled = weights * load_vector(norm_ptrs[0], place, K)[:, None]
    folded = scaled - (tl.sum(scaled, 0) / K)[None, :]
    store_tile(to_ptrs[0] + start, folded, K, N - start, row, column, STEP, 1)
    bias = load_vector(bias_ptr + start, index, N - start)
    bias += tl.sum(weights * load_vector(norm_ptrs[1], place, K)[:, None], 0)
    tl.store(to_ptrs[1] + start + index, bias, mask=index < N - start)


@triton.jit
def store_rstd(
    rows_ptr,  # [left, C]
    rstd_ptr,  # [left]
    left,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """1 / standard deviation of some rows."""
    row = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)[None, :]
    x = load_tile(rows_ptr, left, C, row[:, None], channel, C, 1, WHOLE)
    _, rstd = moments(x, channel < C, C, 1)
    store_vector(rstd_ptr, rstd, row, left, WHOLE)


@triton.jit
def triangle_fold_backward_kernel(
    moments_ptr,  # [c, w]: M of the projections
    output_moments_ptr,  # [h, c]: that of the output
    sums_ptr,  # [4 h] float32: s of the first four
    output_sums_ptr,  # [2 c] float32: of the output, of the gating
    norm_scale_ptr,  # [c]
    norm_offset_ptr,
    left_ptr,  # [c, h], as are the three that follow
    left_gate_ptr,
    right_ptr,
    right_gate_ptr,
    center_scale_ptr,  # [h]
    center_offset_ptr,
    output_ptr,  # [h, c]
    gating_ptr,  # [c, c]
    dleft_ptr,
    dleft_gate_ptr,
    dright_ptr,
    dright_gate_ptr,
    doutput_ptr,
    dgating_ptr,
    dvectors_ptr,  # [4 c + 6 h]: of norm, the biases of the first four, of center, other biases
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program for some rows of the weights: of the output, or of all others."""
    await_previous()
    W: tl.constexpr = 4 * H + C
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype = dvectors_ptr.dtype.element_ty
    dcenter_ptr = dvectors_ptr + 2 * C + 4 * H
    if tl.program_id(1) == 0:
        norm = norm_scale_ptr, norm_offset_ptr
        at, s = moments_ptr, sums_ptr
        a, b = fold_backward(at, s, left_ptr, norm, dleft_ptr, row, C, H, W, BLOCK_H)
        at, s = at + H, s + H
        c, d = fold_backward(at, s, left_gate_ptr, norm, dleft_gate_ptr, row, C, H, W, BLOCK_H)
        at, s = at + H, s + H
        e, f = fold_backward(at, s, right_ptr, norm, dright_ptr, row, C, H, W, BLOCK_H)
        at, s = at + H, s + H
        g, h = fold_backward(at, s, right_gate_ptr, norm, dright_gate_ptr, row, C, H, W, BLOCK_H)
        at, s = at + H, output_sums_ptr + C
        i, j = fold_backward(at, s, gating_ptr, norm, dgating_ptr, row, C, C, W, BLOCK_C)
        tl.store(dvectors_ptr + row, (a + c + e + g + i).to(dtype), mask=row < C)
        tl.store(dvectors_ptr + C + row, (b + d + f + h + j).to(dtype), mask=row < C)
        copy_sums(sums_ptr, dvectors_ptr + 2 * C, 4, H, BLOCK_K)
        copy_sums(output_sums_ptr, dcenter_ptr + 2 * H, 2, C, BLOCK_K)
    else:
        norm, s = (center_scale_ptr, center_offset_ptr), output_sums_ptr
        a, b = fold_backward(
            output_moments_ptr, s, output_ptr, norm, doutput_ptr, row, H, C, C, BLOCK_C
        )
        tl.store(dcenter_ptr + row, a.to(dtype), mask=row < H)
        tl.store(dcenter_ptr + H + row, b.to(dtype), mask=row < H)


@triton.jit
def fold_backward(
    moments_ptr,  # M, as columns of [K, STEP]
    sums_ptr,  # s [N]
    weights_ptr,  # [K, N]
    norm_ptrs,  # scale and offset, [K]
    dweights_ptr,  # [K, N]
    index,  # of rows
    K: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dW of some rows; what these weights add to the gradients of scale and offset."""
    place = tl.arange(0, BLOCK_N)
    row, column = index[:, None], place[None, :]
    m = load_tile(moments_ptr, K, N, row, column, STEP, 1).to(tl.float32)
    weights = load_tile(weights_ptr, K, N, row, column, N, 1).to(tl.float32)
    s = load_vector(sums_ptr, place, N)[None, :]
    scale = load_vector(norm_ptrs[0], index, K)[:, None]
    offset = load_vector(norm_ptrs[1], index, K)[:, None]
    store_tile(dweights_ptr, scale * m + offset * s, K, N, row, column, N, 1)
    return tl.sum(m * weights, 1), tl.sum(weights * s, 1)


@triton.jit
def copy_sums(sums_ptr, to_ptr, COUNT: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The program's share of COUNT vectors of this size, rounded."""
    index = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    for i in tl.static_range(COUNT):
        vector = load_vector(sums_ptr + i * SIZE, index, SIZE)
        to = to_ptr + i * SIZE + index
        tl.store(to, vector.to(to_ptr.dtype.element_ty), mask=index < SIZE)


def forward(b: int, p: int, c: int, h: int, dtype: str) -> Launch:
    """(pair, all parameters in their order) -> folded weights [c, w], bias [w]; those of the
    output; 1 / standard deviation of the pair's rows [b, p]."""
    n, w, parts = b * p, 4 * h + c, cdiv(max(c, h), BLOCK)
    weights = Output((c, w), dtype), Output((w,), "float32")
    output = Output((h, c), dtype), Output((c,), "float32")
    sizes = {"N": n, "C": c, "H": h, "PARTS": parts, "WHOLE": n % ROWS == 0 and c == block(c)}
    blocks = {"BLOCK_N": ROWS, "BLOCK_C": block(c), "BLOCK_H": block(h), "BLOCK_K": BLOCK}
    return Launch(
        kernel=triangle_fold_kernel,
        grid=(6 * parts + cdiv(n, ROWS),),
        outputs=(*weights, *output, Output((b, p), "float32")),
        constants=sizes | blocks,
        num_stages=1,
    )


def backward(c: int, h: int, dtype: str) -> Launch:
    """(M, M of the output, sums, parameters without biases) -> gradients of the six weights in the
    order of parameters; those of all vectors end to end, in that order."""
    shapes = ((c, h),) * 4 + ((h, c), (c, c), (4 * c + 6 * h,))
    return Launch(
        kernel=triangle_fold_backward_kernel,
        grid=(cdiv(max(c, h), BLOCK), 2),
        outputs=tuple(Output(shape, dtype) for shape in shapes),
        constants={"C": c, "H": h, "BLOCK_C": block(c), "BLOCK_H": block(h), "BLOCK_K": BLOCK},
        num_stages=1,
    )


def in_order(weights: Sequence[Array], vectors: Sequence[Array]) -> list[Array]:
    """All gradients in the order of parameters."""
    places = dict(zip((*WEIGHTS, *VECTORS), (*weights, *vectors), strict=True))
    return [places[i] for i in sorted(places)]
