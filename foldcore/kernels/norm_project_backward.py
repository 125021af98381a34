"""Gradients of ``norm_project``.

The rows are normalised again. With x the rows of mean 0 and variance 1 and d the gradient by the
narrow outputs, x^T d and the sums of d are all that the parameters' gradients need of them: by the
weights, scale x^T d + offset sum(d); by scale and offset, the weights times the one and the other,
summed over the outputs. So a program keeps [c, h] numbers and not two for each element of a tile.

Legend: as there; g programs.
"""

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.norm_project import (
    Pairs,
    Sizes,
    choose,
    find_tile,
    groups,
    load_pairs,
    load_row,
    load_sides,
    row_constants,
    store_pairs,
)
from foldcore.kernels.rows import (
    load_tile,
    load_vector,
    load_weights,
    product,
    standardize,
    standardize_backward,
    store_tile,
)

ONES = tl.constexpr(16)  # columns of a matrix of ones: the tensor cores take no less

# channels up to -> sizes in bfloat16
PAIR_BIAS = {64: Sizes(32, 4, 4, 2), 128: Sizes(32, 8, 2, 3)}
SIDES = {64: Sizes(32, 4, 2, 2), 256: Sizes(32, 8, 1, 2)}


@triton.jit
def as_result(x):
    """``x`` in float32, among the threads as results of products are: a product with zeros added.

    All that is computed of it, and of a product, then is. Else the compiler keeps and computes half
    of it twice, and reads it in shared memory in a way that no layout suits.
    """
    left = tl.zeros([x.shape[0], ONES], tl.float32).to(x.dtype)
    right = tl.zeros([ONES, x.shape[1]], tl.float32).to(x.dtype)
    return tl.dot(left, right, x.to(tl.float32), input_precision="ieee")


@triton.jit
def pair_bias_backward_kernel(
    x_ptr,  # [b, i, j, c]
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    weights_ptr,  # [c, h]
    dbias_ptr,  # [b, h, j, i]
    dnormal_ptr,  # [b, j, i, c]; not read without NORMAL
    dresidual_ptr,  # [b, i, j, c]: what goes past the norm to dx; not read without RESIDUAL
    dx_ptr,  # [b, i, j, c]
    sums_ptr,  # [g, c h + 2 c]: gradients by weights, scale, offset
    B: tl.constexpr,
    I: tl.constexpr,  # noqa: E741, the legend's name
    J: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    NORMAL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    AHEAD: tl.constexpr,
):
    await_previous()
    ROWS: tl.constexpr = BLOCK_I * BLOCK_J
    position = tl.arange(0, ROWS)[:, None]
    i, j = position % BLOCK_I, position // BLOCK_I
    column, head = tl.arange(0, BLOCK_C)[None, :], tl.arange(0, BLOCK_H)[None, :]
    weights = load_weights(weights_ptr, 0, C, H, BLOCK_C, head).to(x_ptr.dtype.element_ty)
    scale = load_row(scale_ptr, C, BLOCK_C)
    correlation = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    total = tl.zeros([ROWS, BLOCK_H], tl.float32)
    # the last two columns are of no head: sums over rows, as products with a column of ones
    of_scale = (head == BLOCK_H - 2).to(tl.float32) + tl.zeros([ROWS, 1], tl.float32)
    of_offset = (head == BLOCK_H - 1).to(tl.float32) + tl.zeros([ROWS, 1], tl.float32)
    of_scale, of_offset = of_scale.to(weights.dtype), of_offset.to(weights.dtype)
    tiles = B * tl.cdiv(I, BLOCK_I) * tl.cdiv(J, BLOCK_J)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=AHEAD):
        example, first_i, first_j = find_tile(tile, I, J, BLOCK_I, BLOCK_J)
        inside = (i < I - first_i) & (j < J - first_j)
        start = first_j * I + first_i
        at = dbias_ptr + example * (H * I * J) + start + (head * (I * J) + (j * I + i))
        # what is loaded is no operand as it is: see tests/compiled_kernels.py
        dbias = tl.load(at, mask=inside & (head < H))
        dbias = tl.where(inside & (head < H), dbias, 0.0)
        total += dbias.to(tl.float32)
        turned = (example * (I * J) + start) * C
        start = (example * (I * J) + first_i * J + first_j) * C
        x = load_pairs(x_ptr + start, i * J + j, inside, column, C, WHOLE)
        normal, rstd = standardize(as_result(x), column < C, C, 1)
        correlation += product(tl.trans(normal.to(x.dtype)), dbias)
        dy = product(dbias, tl.trans(weights))
        if NORMAL:
            dnormal = load_pairs(dnormal_ptr + turned, j * I + i, inside, column, C, WHOLE)
            dnormal = tl.where(inside & (column < C), dnormal.to(tl.float32), 0.0)
            slope = dnormal * normal
            rounded = slope.to(x.dtype)
            correlation += product(tl.trans(rounded), of_scale)
            if x.dtype != tl.float32:  # what rounding left
                left = (slope - rounded.to(tl.float32)).to(x.dtype)
                correlation += product(tl.trans(left), of_scale)
            correlation += product(tl.trans(dnormal.to(x.dtype)), of_offset)
            dy += dnormal
        dx = standardize_backward(dy * scale, normal, rstd, C, 1)
        if RESIDUAL:
            dresidual = load_pairs(dresidual_ptr + start, i * J + j, inside, column, C, WHOLE)
            dx += dresidual.to(tl.float32)
        store_pairs(dx_ptr + start, dx, i * J + j, inside, column, C, WHOLE)
    sums = sums_ptr + tl.program_id(0) * (C * H + 2 * C)
    total = tl.sum(total, 0)[None, :]
    inner = tl.arange(0, BLOCK_C)[:, None]
    dweights = weights_gradient(scale_ptr, offset_ptr, correlation, total, inner, C)
    tl.store(sums + inner * H + head, dweights, mask=(inner < C) & (head < H))
    weights = load_weights(weights_ptr, 0, C, H, BLOCK_C, head).to(tl.float32)
    dscale = tl.sum(tl.where(head == BLOCK_H - 2, correlation, 0.0), 1)
    doffset = tl.sum(tl.where(head == BLOCK_H - 1, correlation, 0.0), 1)
    store_vectors(sums + C * H, weights, correlation, total, dscale, doffset, C)


@triton.jit
def weights_gradient(scale_ptr, offset_ptr, correlation, total, inner, C: tl.constexpr):
    scale, offset = load_vector(scale_ptr, inner, C), load_vector(offset_ptr, inner, C)
    return scale * correlation + offset * total


@triton.jit
def store_vectors(sums_ptr, weights, correlation, total, dscale, doffset, C: tl.constexpr):
    """Gradients by scale and offset: those by the normalised rows, and through the projection."""
    index = tl.arange(0, weights.shape[0])
    tl.store(sums_ptr + index, dscale + tl.sum(weights * correlation, 1), mask=index < C)
    tl.store(sums_ptr + C + index, doffset + tl.sum(weights * total, 1), mask=index < C)


@triton.jit
def outer_product_sides_backward_kernel(
    x_ptr,  # [n, c]
    mask_ptr,  # [n] float32
    scale_ptr,  # [c]
    offset_ptr,  # [c]
    left_weights_ptr,  # [c, e]
    right_weights_ptr,  # [c, e]
    dleft_ptr,  # [n, e]
    dright_ptr,  # [n, e]
    dresidual_ptr,  # [n, c]: what goes past the norm to dx; not read without RESIDUAL
    dx_ptr,  # [n, c]
    sums_ptr,  # [g, 2 c e + 2 c + 2 e]: gradients by weights, scale, offset, biases
    N: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,  # of both sides
    AHEAD: tl.constexpr,
):
    await_previous()
    row, inner = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_C)[:, None]
    column, side = tl.arange(0, BLOCK_C)[None, :], tl.arange(0, BLOCK_E)[None, :]
    weights = load_sides(left_weights_ptr, right_weights_ptr, C, inner, side, E, E)
    weights = weights.to(x_ptr.dtype.element_ty)
    scale = load_row(scale_ptr, C, BLOCK_C)
    correlation = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=AHEAD):
        start = tl.cast(tile, tl.int64) * BLOCK_N
        rows = N - start
        dboth = load_sides(dleft_ptr + start * E, dright_ptr + start * E, rows, row, side, E, E)
        dboth = dboth.to(tl.float32) * load_vector(mask_ptr + start, row, rows)
        total += dboth
        dboth = dboth.to(x_ptr.dtype.element_ty)
        x = load_tile(x_ptr + start * C, rows, C, row, column, C, 1, WHOLE)
        normal, rstd = standardize(as_result(x), column < C, C, 1)
        correlation += product(tl.trans(normal.to(x.dtype)), dboth)
        dnormal = product(dboth, tl.trans(weights))
        dx = standardize_backward(dnormal * scale, normal, rstd, C, 1)
        if RESIDUAL:
            at = dresidual_ptr + start * C
            dx += load_tile(at, rows, C, row, column, C, 1, WHOLE).to(tl.float32)
        store_tile(dx_ptr + start * C, dx, rows, C, row, column, C, 1, WHOLE)
    sums = sums_ptr + tl.program_id(0) * (2 * C * E + 2 * C + 2 * E)
    total = tl.sum(total, 0)[None, :]
    dweights = weights_gradient(scale_ptr, offset_ptr, correlation, total, inner, C)
    at = sums + tl.where(side < E, inner * E + side, (C * E - E) + inner * E + side)
    tl.store(at, dweights, mask=(inner < C) & (side < 2 * E))
    weights = load_sides(left_weights_ptr, right_weights_ptr, C, inner, side, E, E).to(tl.float32)
    store_vectors(sums + 2 * C * E, weights, correlation, total, 0.0, 0.0, C)
    tl.store(sums + (2 * C * E + 2 * C) + side, total, mask=side < 2 * E)


def pair_bias(
    pairs: Pairs,
    dtype: str,
    architecture: int,
    normal: bool,
    residual: bool,
    sizes: Sizes | None = None,
) -> Launch:
    """(x, scale, offset, weights, dbias, dnormal, dresidual) -> dx [b, i, j, c], sums of groups
    [g, c h + 2 c] for weights, scale and offset.

    The kernel reads ``dnormal`` and ``dresidual`` only where it is told that they are there.
    """
    sizes = sizes or choose(PAIR_BIAS, pairs.c, dtype, architecture)
    count = groups(pairs.tiles(sizes.rows), sizes, architecture)
    shape, width = (pairs.b, pairs.i, pairs.j, pairs.c), pairs.c * (pairs.h + 2)
    options = {"NORMAL": normal, "RESIDUAL": residual, "AHEAD": sizes.ahead}
    return Launch(
        kernel=pair_bias_backward_kernel,
        grid=(count,),
        outputs=(Output(shape, dtype), Output((count, width), "float32")),
        constants=pairs.constants(sizes.rows) | options,
        num_warps=sizes.num_warps,
    )


def outer_product_sides(
    n: int,
    c: int,
    e: int,
    dtype: str,
    architecture: int,
    residual: bool,
    sizes: Sizes | None = None,
) -> Launch:
    """(x, mask, scale, offset, both weights, dleft, dright, dresidual) -> dx [n, c], sums [g, 2 c e
    + 2 c + 2 e] for both weights, scale, offset and both biases.

    Without ``residual`` the kernel does not read ``dresidual``.
    """
    sizes = sizes or choose(SIDES, c, dtype, architecture)
    count = groups(cdiv(n, sizes.rows), sizes, architecture)
    width = 2 * c * e + 2 * c + 2 * e
    return Launch(
        kernel=outer_product_sides_backward_kernel,
        grid=(count,),
        outputs=(Output((n, c), dtype), Output((count, width), "float32")),
        constants=row_constants(n, c, e, sizes) | {"RESIDUAL": residual},
        num_warps=sizes.num_warps,
    )
