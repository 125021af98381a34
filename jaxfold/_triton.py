"""How JAX launches a Triton kernel: the one file that knows jax-triton."""

import functools
import os
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
from jax import Array

from foldcore.kernels.launch import NEEDS_GPU, Launch
from jaxfold._triton_cache import Kept
from jaxfold.ops import UnsupportedOp

_cache: Path | None = None  # where compiled kernels are kept
_importing = threading.Lock()


def call(launch: Launch, *inputs: Array) -> tuple[Array, ...]:
    """Run a kernel; the outputs are new arrays, also those that take the place of inputs."""
    shapes = tuple(jax.ShapeDtypeStruct(o.shape, np.dtype(o.dtype)) for o in launch.outputs)
    # a Python float would arrive in the kernel as float64
    scalars = [np.float32(x) if isinstance(x, float) else x for x in launch.scalars]
    with _importing:  # threads may trace at once
        jax_triton = _jax_triton()
    return jax_triton.triton_call(
        *inputs,
        *scalars,
        kernel=launch.kernel,
        name=launch.kernel.fn.__name__,
        out_shape=shapes,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        input_output_aliases=dict(launch.in_place),
        **launch.constants,
    )


def keep_in(folder: Path) -> None:
    """Keep compiled kernels in this folder; to be called before the first kernel."""
    global _cache
    _cache = folder


@functools.cache
def _jax_triton() -> ModuleType:
    """The library, which cannot be imported without a GPU build of jaxlib.

    Its import empties TRITON_CACHE_DIR, with which Triton refuses to work for anyone else.
    """
    name = "TRITON_CACHE_DIR"
    folder = os.environ.get(name)
    import jax_triton
    import triton
    from jax_triton import triton_lib

    del os.environ[name]
    if folder is not None:
        os.environ[name] = folder
    if _cache is not None:
        kept = Kept(
            triton_lib.code_gen.ast_to_ttir,
            triton_lib.compile_ttir_inplace,
            _cache,
            f"{triton.__version__} {jax_triton.__version__}",
            triton_lib.CompilationResult,
        )
        triton_lib.code_gen = SimpleNamespace(ast_to_ttir=kept.make)
        triton_lib.compile_ttir_inplace = kept.compile
    return jax_triton


@functools.cache
def architecture() -> int:
    """Compute capability as foldcore's tables of launch sizes are keyed, 90 for an H100."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        raise UnsupportedOp(NEEDS_GPU)
    return int(float(device.compute_capability) * 10)


def dtype_name(x: Array) -> str:
    """The dtype as foldcore names it: "bfloat16", "float32"."""
    return x.dtype.name
