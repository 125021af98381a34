"""Dropout masks by the Triton kernel: one launch, where plain operations are hundreds."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, UInt8, UInt32

from foldcore import dropout as definition
from foldcore.kernels import dropout as kernel
from jaxfold._triton import call
from jaxfold.primitives import DropoutKey, _word

BLOCK_COLUMN = 1  # of the kernel's table


def keep_mask(
    shape: tuple[int, ...],
    threshold: int,
    position: tuple[int, UInt32[Array, ""]],
    words: tuple[UInt32[Array, ""], ...],
    example_id: UInt32[Array, " b"],
) -> Bool[Array, "b ..."]:
    """The mask of ``shape`` (batch axis first) that ``foldcore/dropout.py`` defines.

    ``position`` is the hash of the path and the place in a stack, ``words`` seed, step and pass.
    """
    path, block = position
    size = int(np.prod(shape[1:]))
    rows, _, total = kernel.table([(path, 0, size, threshold)])
    table = jnp.asarray(np.array(rows, np.uint32)).at[:, BLOCK_COLUMN].set(block)
    launch = kernel.draw(len(rows), shape[0], total)
    (kept,) = call(launch, *(_signed(x) for x in (table, example_id, jnp.stack(words))))
    return kept[:, :size].astype(bool).reshape(shape)


def keep_masks(
    masks: Sequence[tuple[str, int, float]], blocks: int, key: DropoutKey
) -> Iterator[UInt8[Array, "l b n"]]:
    """Of (path, elements, rate) 1 where kept, for all blocks of a stack, from one launch."""
    each = [
        (definition.path_hash(path), block, size, definition.threshold(rate))
        for path, size, rate in masks
        for block in range(blocks)
    ]
    rows, places, total = kernel.table(each)
    ids, *words = (_word(x) for x in (key.example_id, key.seed, key.step, key.recycling))
    given = jnp.asarray(np.array(rows, np.uint32)), ids, jnp.stack(words)
    (kept,) = call(kernel.draw(len(rows), len(ids), total), *(_signed(x) for x in given))
    ends = [*places[blocks::blocks], total]
    for (_, size, _), first, end in zip(masks, places[::blocks], ends, strict=True):
        of_blocks = kept[:, first:end].reshape(len(ids), blocks, -1)[..., :size]
        yield jnp.moveaxis(of_blocks, 1, 0)


def _signed(words: UInt32[Array, "..."]) -> Array:
    """The same bits as int32."""
    return jax.lax.bitcast_convert_type(words, jnp.int32)
