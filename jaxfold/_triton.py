"""How JAX launches a Triton kernel: the one file that knows jax-triton."""

import functools

import jax
import numpy as np
from jax import Array

from foldcore.kernels.launch import Launch


def call(launch: Launch, *inputs: Array) -> tuple[Array, ...]:
    """Run a kernel; the outputs are new arrays."""
    import jax_triton  # cannot be imported without a GPU build of jaxlib

    shapes = tuple(jax.ShapeDtypeStruct(o.shape, np.dtype(o.dtype)) for o in launch.outputs)
    # a Python float would arrive in the kernel as float64
    scalars = [np.float32(x) if isinstance(x, float) else x for x in launch.scalars]
    return jax_triton.triton_call(
        *inputs,
        *scalars,
        kernel=launch.kernel,
        name=launch.kernel.fn.__name__,
        out_shape=shapes,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch.constants,
    )


@functools.cache
def architecture() -> int:
    """Compute capability as foldcore's tables of launch sizes are keyed, 90 for an H100."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(f"JAX runs Triton kernels on a GPU, not on {device.platform}")
    return int(float(device.compute_capability) * 10)


def dtype_name(x: Array) -> str:
    """The dtype as foldcore names it: "bfloat16", "float32"."""
    return x.dtype.name
