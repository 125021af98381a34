"""How PyTorch launches a Triton kernel."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from foldcore.kernels.launch import INTERPRETER, NEEDS_GPU, Launch, Output, options
from foldcore.kernels.source import parse_in_turn
from torchfold.ops import UnsupportedOp

# where launches are noted instead of made
_noted: list[tuple[Launch, list[torch.dtype]]] | None = None


def call(launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run a kernel on the device of its inputs; the outputs are new tensors, or inputs in place."""
    places = {output: inputs[i] for i, output in launch.in_place.items()}
    outputs = tuple(
        places[i] if i in places else _allocate(output, inputs[0].device)
        for i, output in enumerate(launch.outputs)
    )
    if _noted is not None:
        _noted.append((launch, [x.dtype for x in inputs]))
        return outputs
    launch.kernel[launch.grid](
        *(x.contiguous() for x in inputs),
        *launch.scalars,
        *outputs,
        **launch.constants,
        **options(launch, architecture(inputs[0].device)),
    )
    return outputs


def _allocate(output: Output, device: torch.device) -> Tensor:
    # what no kernel writes must be numbers all the same: what follows may look things up by them
    make = torch.empty if _noted is None else torch.zeros
    return make(output.shape, dtype=getattr(torch, output.dtype), device=device)


def compile_kernel(launch: Launch, input_dtypes: Sequence[torch.dtype]) -> Any:
    """What Triton makes of a kernel, which its caches then hold."""
    outputs = [getattr(torch, output.dtype) for output in launch.outputs]
    return launch.kernel.warmup(
        *input_dtypes,
        *launch.scalars,
        *outputs,
        grid=launch.grid,
        **launch.constants,
        **options(launch, architecture(torch.device("cuda", torch.cuda.current_device()))),
    )


def compile_ahead(function: Callable[[], object]) -> None:
    """Compile the kernels that ``function`` launches, side by side, and load them.

    ``function`` runs without them: its results mean nothing.
    """
    global _noted
    noted: list[tuple[Launch, list[torch.dtype]]] = []
    _noted = noted
    try:
        function()
    finally:
        _noted = None
    parse_in_turn()
    distinct = {_kind(*launch): launch for launch in noted}
    device = torch.cuda.current_device()  # each thread has its own
    with ThreadPoolExecutor(
        min(32, os.cpu_count() or 1), initializer=torch.cuda.set_device, initargs=(device,)
    ) as pool:
        list(pool.map(_load, *zip(*distinct.values(), strict=True)))


def _kind(launch: Launch, input_dtypes: list[torch.dtype]) -> str:
    """The same for launches of the same machine code."""
    sizes = launch.constants, launch.num_warps, launch.num_stages
    return str((launch.kernel.__module__, launch.kernel.__name__, *sizes, input_dtypes))


def _load(launch: Launch, input_dtypes: list[torch.dtype]) -> None:
    compiled = compile_kernel(launch, input_dtypes)
    # made when it is asked for: the function that launches it
    assert compiled.run is not None


def architecture(device: torch.device) -> int:
    """Compute capability as foldcore's tables of launch sizes are keyed, 90 for an H100."""
    if device.type == "cuda":
        return _capability(device.index or 0)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    raise UnsupportedOp(NEEDS_GPU)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def dtype_name(x: Tensor) -> str:
    """The dtype as foldcore names it: "bfloat16", "float32"."""
    return str(x.dtype).removeprefix("torch.")
