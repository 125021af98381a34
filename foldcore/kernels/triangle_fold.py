"""Triangle multiplication's norms as a part of its weights, and their gradients.

A projection of a normalised row is ``LN(x) W + b`` with ``LN(x) = (x - mean) rstd scale + offset``.
With ``S W`` for the rows of W times the scale, and ``W'`` for ``S W`` less the mean of each of its
columns,

    LN(x) W + b = rstd (x - mean) (S W) + (offset W + b) = rstd (x W') + b'

for a row less its mean, times any matrix, is the row times that matrix less the means of its
columns. W' and b' depend on parameters alone: they are computed at once for all layers of a stack,
whose parameters lie in arrays with a leading axis of layers. Of a pair's rows the kernels then need
but rstd. Rounding W' to bfloat16 is one more rounding of the weights, in place of one of the
normalised rows.

Backward the gradient by b' is ``s = sum of dy``. That by W' is ``M = normal^T dy``, with the
standardised rows ``normal = (x - mean) rstd``: (rstd x)^T dy less the mean of each of its columns,
which is a gradient as good, as columns of W' always have the mean 0. From them follow

    dW = S M + offset s^T    db = s    dscale = sum over columns of M W    doffset = W s

Legend: l layers, n = b p rows of the pair, c channels of pairs, h channels of the product, w = 4 h
+ c: of left, left gate, right, right gate, gating, side by side.
"""

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import block, load_tile, load_vector, store_tile
from foldcore.kernels.triangle_tiles import moments, store_vector

BLOCK = 16  # columns, or rows, of weights that a program has
ROWS = 32  # of the pair
# which of the 16 parameters ``backward`` takes
WITHOUT_BIASES = (0, 1, 2, 4, 6, 8, 10, 11, 12, 14)


@triton.jit
def triangle_fold_kernel(
    norm_scale_ptr,  # [l, c]
    norm_offset_ptr,
    left_ptr,  # [l, c, h] and its bias [l, h], as are the three that follow
    left_bias_ptr,
    left_gate_ptr,
    left_gate_bias_ptr,
    right_ptr,
    right_bias_ptr,
    right_gate_ptr,
    right_gate_bias_ptr,
    center_scale_ptr,  # [l, h]
    center_offset_ptr,
    output_ptr,  # [l, h, c]
    output_bias_ptr,  # [l, c]
    gating_ptr,  # [l, c, c]
    gating_bias_ptr,  # [l, c]
    folded_ptr,  # [l, c, w]
    folded_bias_ptr,  # [l, w] float32
    output_folded_ptr,  # [l, h, c]
    output_folded_bias_ptr,  # [l, c] float32
    C: tl.constexpr,
    H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Programs: PARTS for the columns of each of the six weights; layer."""
    await_previous()
    W: tl.constexpr = 4 * H + C
    norm = norm_scale_ptr, norm_offset_ptr
    which = tl.program_id(0) // PARTS
    to = folded_ptr + which * H, folded_bias_ptr + which * H
    if which == 0:
        fold(left_ptr, left_bias_ptr, norm, to, PARTS, C, H, W, BLOCK_C, BLOCK_K)
    elif which == 1:
        fold(left_gate_ptr, left_gate_bias_ptr, norm, to, PARTS, C, H, W, BLOCK_C, BLOCK_K)
    elif which == 2:
        fold(right_ptr, right_bias_ptr, norm, to, PARTS, C, H, W, BLOCK_C, BLOCK_K)
    elif which == 3:
        fold(right_gate_ptr, right_gate_bias_ptr, norm, to, PARTS, C, H, W, BLOCK_C, BLOCK_K)
    elif which == 4:
        fold(gating_ptr, gating_bias_ptr, norm, to, PARTS, C, C, W, BLOCK_C, BLOCK_K)
    else:
        norm = center_scale_ptr, center_offset_ptr
        to = output_folded_ptr, output_folded_bias_ptr
        fold(output_ptr, output_bias_ptr, norm, to, PARTS, H, C, C, BLOCK_H, BLOCK_K)


@triton.jit
def fold(
    weights_ptr,  # [l, K, N]
    bias_ptr,  # [l, N]
    norm_ptrs,  # scale and offset, [l, K]
    to_ptrs,  # folded weights, as columns of [l, K, STEP], and bias, of [l, STEP]
    PARTS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """W' and b' of some columns."""
    layer = tl.cast(tl.program_id(1), tl.int64)
    start = tl.program_id(0) % PARTS * BLOCK_N
    index, place = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row, column = place[:, None], index[None, :]
    at = weights_ptr + layer * (K * N) + start
    weights = load_tile(at, K, N - start, row, column, N, 1).to(tl.float32)
    scaled = weights * load_vector(norm_ptrs[0] + layer * K, place, K)[:, None]
    folded = scaled - (tl.sum(scaled, 0) / K)[None, :]
    at = to_ptrs[0] + layer * (K * STEP) + start
    store_tile(at, folded, K, N - start, row, column, STEP, 1)
    bias = load_vector(bias_ptr + layer * N + start, index, N - start)
    bias += tl.sum(weights * load_vector(norm_ptrs[1] + layer * K, place, K)[:, None], 0)
    tl.store(to_ptrs[1] + layer * STEP + start + index, bias, mask=index < N - start)


@triton.jit
def triangle_rstd_kernel(
    pair_ptr,  # [n, c]
    rstd_ptr,  # [n]: 1 / standard deviation of the channels
    N: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    await_previous()
    start = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)[None, :]
    x = load_tile(pair_ptr + start * C, N - start, C, row[:, None], channel, C, 1, WHOLE)
    _, rstd = moments(x, channel < C, C, 1)
    store_vector(rstd_ptr + start, rstd, row, N - start, WHOLE)


@triton.jit
def triangle_fold_backward_kernel(
    dfolded_ptr,  # [l, c, w]: M of the projections
    dfolded_bias_ptr,  # [l, w] float32: s
    doutput_folded_ptr,  # [l, h, c]: those of the output
    doutput_folded_bias_ptr,  # [l, c] float32
    norm_scale_ptr,  # [l, c]
    norm_offset_ptr,
    left_ptr,  # [l, c, h], as are the three that follow
    left_gate_ptr,
    right_ptr,
    right_gate_ptr,
    center_scale_ptr,  # [l, h]
    center_offset_ptr,
    output_ptr,  # [l, h, c]
    gating_ptr,  # [l, c, c]
    dnorm_scale_ptr,  # by all parameters, in their order
    dnorm_offset_ptr,
    dleft_ptr,
    dleft_bias_ptr,
    dleft_gate_ptr,
    dleft_gate_bias_ptr,
    dright_ptr,
    dright_bias_ptr,
    dright_gate_ptr,
    dright_gate_bias_ptr,
    dcenter_scale_ptr,
    dcenter_offset_ptr,
    doutput_ptr,
    doutput_bias_ptr,
    dgating_ptr,
    dgating_bias_ptr,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Programs: some rows of the weights; of the output, or of all others; layer."""
    await_previous()
    W: tl.constexpr = 4 * H + C
    if tl.program_id(1) == 0:
        norm = norm_scale_ptr, norm_offset_ptr
        at, s = dfolded_ptr, dfolded_bias_ptr
        to = dleft_ptr, dleft_bias_ptr
        a, b = fold_backward(at, s, left_ptr, norm, to, C, H, W, BLOCK_K, BLOCK_H)
        to = dleft_gate_ptr, dleft_gate_bias_ptr
        c, d = fold_backward(at + H, s + H, left_gate_ptr, norm, to, C, H, W, BLOCK_K, BLOCK_H)
        at, s = at + 2 * H, s + 2 * H
        to = dright_ptr, dright_bias_ptr
        e, f = fold_backward(at, s, right_ptr, norm, to, C, H, W, BLOCK_K, BLOCK_H)
        to = dright_gate_ptr, dright_gate_bias_ptr
        g, h = fold_backward(at + H, s + H, right_gate_ptr, norm, to, C, H, W, BLOCK_K, BLOCK_H)
        at, s = at + 2 * H, s + 2 * H
        to = dgating_ptr, dgating_bias_ptr
        i, j = fold_backward(at, s, gating_ptr, norm, to, C, C, W, BLOCK_K, BLOCK_C)
        store_rows(dnorm_scale_ptr, a + c + e + g + i, C)
        store_rows(dnorm_offset_ptr, b + d + f + h + j, C)
    else:
        norm, to = (center_scale_ptr, center_offset_ptr), (doutput_ptr, doutput_bias_ptr)
        at, s = doutput_folded_ptr, doutput_folded_bias_ptr
        a, b = fold_backward(at, s, output_ptr, norm, to, H, C, C, BLOCK_K, BLOCK_C)
        store_rows(dcenter_scale_ptr, a, H)
        store_rows(dcenter_offset_ptr, b, H)


@triton.jit
def fold_backward(
    moments_ptr,  # M, as columns of [l, K, STEP]
    sums_ptr,  # s, as columns of [l, STEP]
    weights_ptr,  # [l, K, N]
    norm_ptrs,  # scale and offset, [l, K]
    to_ptrs,  # dW [l, K, N] and db [l, N]
    K: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dW of some rows; what these weights add to the gradients of scale and offset."""
    layer = tl.cast(tl.program_id(2), tl.int64)
    index, place = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    row, column = index[:, None], place[None, :]
    m = load_tile(moments_ptr + layer * (K * STEP), K, N, row, column, STEP, 1).to(tl.float32)
    weights = load_tile(weights_ptr + layer * (K * N), K, N, row, column, N, 1).to(tl.float32)
    s = load_vector(sums_ptr + layer * STEP, place, N)
    scale = load_vector(norm_ptrs[0] + layer * K, index, K)[:, None]
    offset = load_vector(norm_ptrs[1] + layer * K, index, K)[:, None]
    gradient = scale * m + offset * s[None, :]
    store_tile(to_ptrs[0] + layer * (K * N), gradient, K, N, row, column, N, 1)
    if tl.program_id(0) == 0:
        at = to_ptrs[1] + layer * N + place
        tl.store(at, s.to(at.dtype.element_ty), mask=place < N)
    return tl.sum(m * weights, 1), tl.sum(weights * s[None, :], 1)


@triton.jit
def store_rows(to_ptr, vector, K: tl.constexpr):
    """A number for each of the program's rows, rounded."""
    index = tl.program_id(0) * vector.shape[0] + tl.arange(0, vector.shape[0])
    at = to_ptr + tl.cast(tl.program_id(2), tl.int64) * K + index
    tl.store(at, vector.to(at.dtype.element_ty), mask=index < K)


def forward(layers: int, c: int, h: int, dtype: str) -> Launch:
    """All parameters in their order -> folded weights [l c w], bias [l w]; those of the output."""
    w, parts = 4 * h + c, cdiv(max(c, h), BLOCK)
    weights = Output((layers, c, w), dtype), Output((layers, w), "float32")
    output = Output((layers, h, c), dtype), Output((layers, c), "float32")
    blocks = {"BLOCK_C": block(c), "BLOCK_H": block(h), "BLOCK_K": BLOCK}
    return Launch(
        kernel=triangle_fold_kernel,
        grid=(6 * parts, layers),
        outputs=(*weights, *output),
        constants={"C": c, "H": h, "PARTS": parts} | blocks,
        num_stages=1,
    )


def backward(layers: int, c: int, h: int, dtype: str) -> Launch:
    """(M, s, those of the output, parameters without biases) -> gradients by all parameters."""
    norm, center = [(layers, c)] * 2, [(layers, h)] * 2
    shapes = [*norm, *[(layers, c, h), (layers, h)] * 4, *center]
    shapes += [(layers, h, c), (layers, c), (layers, c, c), (layers, c)]
    return Launch(
        kernel=triangle_fold_backward_kernel,
        grid=(cdiv(max(c, h), BLOCK), 2, layers),
        outputs=tuple(Output(shape, dtype) for shape in shapes),
        constants={"C": c, "H": h, "BLOCK_C": block(c), "BLOCK_H": block(h), "BLOCK_K": BLOCK},
        num_stages=1,
    )


def rstd(b: int, p: int, c: int, dtype: str) -> Launch:
    """pair -> 1 / standard deviation of its rows [b p]."""
    n = b * p
    sizes = {"N": n, "C": c, "WHOLE": n % ROWS == 0 and c == block(c)}
    return Launch(
        kernel=triangle_rstd_kernel,
        grid=(cdiv(n, ROWS),),
        outputs=(Output((b, p), "float32"),),
        constants=sizes | {"BLOCK_N": ROWS, "BLOCK_C": block(c)},
        num_stages=1,
    )
