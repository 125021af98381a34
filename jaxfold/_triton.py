"""How JAX launches a Triton kernel: the one file that knows jax-triton.

jax-triton's ``triton_call`` stands in a traced program; what becomes of it is ours: a custom call
that names a kernel, and ``_launch.c``, which launches it.
"""

import functools
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.interpreters import mlir

from foldcore.kernels.launch import NEEDS_GPU, Launch
from jaxfold._launcher import TARGET
from jaxfold._triton_cache import Request, is_coming, provide
from jaxfold.ops import UnsupportedOp

_importing = threading.Lock()


def call(launch: Launch, *inputs: Array) -> tuple[Array, ...]:
    """Run a kernel; the outputs are new arrays, also those that take the place of inputs."""
    capability = architecture()  # says what is missing where no kernel can run
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
        compute_capability=capability,
        input_output_aliases=dict(launch.in_place),
        **launch.constants,
    )


def keep_in(folder: Path) -> None:
    """Keep compiled kernels in this folder, unless the environment names another for Triton."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder))


@functools.cache
def _jax_triton() -> ModuleType:
    """The library, which cannot be imported without a GPU build of jaxlib.

    Its import empties TRITON_CACHE_DIR, with which Triton refuses to work for anyone else.
    """
    name = "TRITON_CACHE_DIR"
    folder = os.environ.get(name)
    import jax_triton
    from jax_triton import triton_lib

    del os.environ[name]
    if folder is not None:
        os.environ[name] = folder
    mlir.register_lowering(triton_lib.triton_kernel_call_p, _lower, platform="cuda")
    return jax_triton


def _lower(context: mlir.LoweringRuleContext, *arrays: Any, **params: Any) -> Any:
    """The custom call that launches the kernel, which is compiled now or on its way."""
    request = Request.of(context.avals_in, params)
    if not is_coming(request):
        provide(request)
    aliases = dict(params["input_output_aliases"])
    rule = jax.ffi.ffi_lowering(TARGET, operand_output_aliases=aliases)
    grid = np.array([*params["grid"], 1, 1][:3], np.int32)
    scalars = {"scalars": request.words()} if request.scalars else {}
    return rule(context, *arrays, kernel=request.key, grid=grid, **scalars)


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
