"""How PyTorch launches a Triton kernel."""

import functools
import os

import torch
from torch import Tensor

from foldcore.kernels.launch import INTERPRETER, NEEDS_GPU, Launch, Output
from torchfold.ops import UnsupportedOp


def call(launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run a kernel on the device of its inputs; the outputs are new tensors, or inputs in place."""
    places = {output: inputs[i] for i, output in launch.in_place.items()}
    outputs = tuple(
        places[i] if i in places else _allocate(output, inputs[0].device)
        for i, output in enumerate(launch.outputs)
    )
    launch.kernel[launch.grid](
        *(x.contiguous() for x in inputs),
        *launch.scalars,
        *outputs,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return outputs


def _allocate(output: Output, device: torch.device) -> Tensor:
    return torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=device)


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
