"""Outer product mean (Suppl. Alg. 10, lines 3-4), but for plain matrix products.

The products over sequences are matrix products of the library, [s, i c] by [s, j e]. They leave the
outer products of a pair of residues scattered: the kernels read and write them there, as a matrix
of pairs by channels, and do the projection, the mean and their gradients. Nothing of it is kept
between the forward and the backward pass.

Legend: n pairs (b, i, j) of residues, k channels (c, e) of an outer product, z channels of pairs,
g groups of pairs, t tiles.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, cdiv
from foldcore.kernels.rows import Tiles, block, choose, load_tile, load_vector, product, store_tile

COUNT_EPS = tl.constexpr(1e-3)  # added to the number of sequences
PROGRAMS = 256  # of the gradient by the weights: a little less than two a multiprocessor

# (architecture, channels of pairs up to) -> sizes
PROJECT = {(90, 128): Tiles(128, 64, 8, 3)}
GRADIENT = {(90, 128): Tiles(128, 64, 8, 2)}
WEIGHTS = {(90, 128): Tiles(64, 128, 8, 3)}


@dataclass(frozen=True)
class Shape:
    """Of the outer products [b i, c, j, e], and the channels they are projected to."""

    bi: int
    j: int
    c: int
    e: int
    z: int

    @property
    def n(self) -> int:
        return self.bi * self.j

    @property
    def k(self) -> int:
        return self.c * self.e

    @property
    def constants(self) -> dict[str, int]:
        return {"N": self.n, "J": self.j, "C": self.c, "E": self.e, "Z": self.z}


@triton.jit
def place(pair, channel, J: tl.constexpr, C: tl.constexpr, E: tl.constexpr):
    """Where a channel of the outer product of a pair lies in [b i, c, j, e]."""
    of_pair = (pair // J).to(tl.int64) * (C * J * E) + (pair % J) * E
    return of_pair + ((channel // E) * (J * E) + channel % E)


@triton.jit
def outer_product_project_kernel(
    outer_ptr,  # [b i, c, j, e]
    weights_ptr,  # [k, z]
    bias_ptr,  # [z]
    count_ptr,  # [n] float32: sequences that have both residues
    pair_ptr,  # [n, z]: what the mean is added to
    out_ptr,  # [n, z]
    N: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    Z: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    await_previous()
    start = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_Z)[None, :]
    left = N - start
    total = tl.zeros([BLOCK_N, BLOCK_Z], tl.float32)
    for k in range(0, C * E, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)[None, :]
        inside = (row < left) & (channel < C * E)
        outer = tl.load(outer_ptr + place(start + row, channel, J, C, E), mask=inside, other=0.0)
        weights_row = tl.arange(0, BLOCK_K)[:, None]
        weights = load_tile(weights_ptr + k * Z, C * E - k, Z, weights_row, column, Z, 1)
        total += product(outer, weights.to(outer.dtype))
    total += load_vector(bias_ptr, column, Z)
    total /= load_vector(count_ptr + start, row, left) + COUNT_EPS
    at = start.to(tl.int64) * Z
    if RESIDUAL:
        total += load_tile(pair_ptr + at, left, Z, row, column, Z, 1).to(tl.float32)
    store_tile(out_ptr + at, total, left, Z, row, column, Z, 1)


@triton.jit
def outer_product_gradient_kernel(
    dout_ptr,  # [n, z]
    weights_ptr,  # [k, z]
    count_ptr,  # [n] float32
    dsum_ptr,  # [n, z]: by what is divided by the count
    douter_ptr,  # [b i, c, j, e]
    sums_ptr,  # [t, z]: of dsum
    N: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    Z: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    await_previous()
    start = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_Z)[None, :]
    index = tl.arange(0, BLOCK_Z)
    left = N - start
    first = start.to(tl.int64) * Z
    dout = load_tile(dout_ptr + first, left, Z, row, column, Z, 1)
    dsum = dout.to(tl.float32) / (load_vector(count_ptr + start, row, left) + COUNT_EPS)
    tl.store(sums_ptr + tl.program_id(0) * Z + index, tl.sum(dsum, 0), mask=index < Z)
    dsum = dsum.to(dout.dtype)
    store_tile(dsum_ptr + first, dsum, left, Z, row, column, Z, 1)
    for k in range(0, C * E, BLOCK_K):
        weights_row = tl.arange(0, BLOCK_K)[:, None]
        weights = load_tile(weights_ptr + k * Z, C * E - k, Z, weights_row, column, Z, 1)
        douter = product(dsum, tl.trans(weights.to(dsum.dtype)))
        channel = k + tl.arange(0, BLOCK_K)[None, :]
        inside = (row < left) & (channel < C * E)
        at = douter_ptr + place(start + row, channel, J, C, E)
        tl.store(at, douter.to(dsum.dtype), mask=inside)


@triton.jit
def outer_product_weights_kernel(
    outer_ptr,  # [b i, c, j, e]
    dsum_ptr,  # [n, z]
    dweights_ptr,  # [g, k, z] float32
    N: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    Z: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    TILES: tl.constexpr,
):
    await_previous()
    k = tl.program_id(0) * BLOCK_K
    group = tl.program_id(1)
    channel = k + tl.arange(0, BLOCK_K)[None, :]
    row = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_Z)[None, :]
    total = tl.zeros([BLOCK_K, BLOCK_Z], tl.float32)
    for tile in range(TILES):
        start = (group * TILES + tile) * BLOCK_N
        left = N - start  # pairs, none at all beyond the last
        inside = (row < left) & (channel < C * E)
        outer = tl.load(outer_ptr + place(start + row, channel, J, C, E), mask=inside, other=0.0)
        dsum = load_tile(dsum_ptr + start.to(tl.int64) * Z, left, Z, row, column, Z, 1)
        total += product(tl.trans(outer), dsum)
    at = dweights_ptr + group * (C * E * Z) + k * Z
    weights_row = tl.arange(0, BLOCK_K)[:, None]
    store_tile(at, total, C * E - k, Z, weights_row, column, Z, 1)


def project(
    shape: Shape,
    dtype: str,
    architecture: int,
    residual: bool = False,
    tiles: Tiles | None = None,
) -> Launch:
    """(outer products, weights, bias, count, pair) -> their projected mean [n, z].

    With ``residual`` it is added to the pair, which is not read without.
    """
    tiles = tiles or choose(PROJECT, shape.z, dtype, architecture)
    return Launch(
        kernel=outer_product_project_kernel,
        grid=(cdiv(shape.n, tiles.rows),),
        outputs=(Output((shape.n, shape.z), dtype),),
        constants=shape.constants | blocks(shape, tiles) | {"RESIDUAL": residual},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def gradient(shape: Shape, dtype: str, architecture: int, tiles: Tiles | None = None) -> Launch:
    """(dout, weights, count) -> gradients by the sum [n, z] and by the outer products, column sums
    of the former [t, z]."""
    tiles = tiles or choose(GRADIENT, shape.z, dtype, architecture)
    count = cdiv(shape.n, tiles.rows)
    outer = Output((shape.bi, shape.c, shape.j, shape.e), dtype)
    return Launch(
        kernel=outer_product_gradient_kernel,
        grid=(count,),
        outputs=(Output((shape.n, shape.z), dtype), outer, Output((count, shape.z), "float32")),
        constants=shape.constants | blocks(shape, tiles),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def weights(shape: Shape, dtype: str, architecture: int, tiles: Tiles | None = None) -> Launch:
    """(outer products, gradient by the sum) -> gradients by the weights, of groups [g, k z]."""
    tiles = tiles or choose(WEIGHTS, shape.z, dtype, architecture)
    k_blocks, count = cdiv(shape.k, tiles.fit(shape.k)), cdiv(shape.n, tiles.rows)
    per_group = cdiv(count, min(count, max(1, PROGRAMS // k_blocks)))
    groups = cdiv(count, per_group)
    return Launch(
        kernel=outer_product_weights_kernel,
        grid=(k_blocks, groups),
        outputs=(Output((groups, shape.k * shape.z), "float32"),),
        constants=shape.constants | blocks(shape, tiles) | {"TILES": per_group},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def blocks(shape: Shape, tiles: Tiles) -> dict[str, int]:
    """The sizes of a program's tiles."""
    return {"BLOCK_N": tiles.rows, "BLOCK_K": tiles.fit(shape.k), "BLOCK_Z": block(shape.z)}
