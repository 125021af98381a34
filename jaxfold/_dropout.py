"""Dropout masks by the Triton kernel: one launch, where plain operations are hundreds."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, UInt32

from foldcore.kernels import dropout as kernel
from jaxfold._triton import call

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


def _signed(words: UInt32[Array, "..."]) -> Array:
    """The same bits as int32."""
    return jax.lax.bitcast_convert_type(words, jnp.int32)
