"""Devices and how they work together: the only file with mesh, axis and process words.

The mesh has two axes: ``data`` (each device group has its own examples) and ``dap`` (one example
spread over the group; its size is 1 until axial sharding exists). The state is replicated over
both. A process works on one device; ``torchrun`` starts as many as there are.
"""

import atexit
import functools
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh, init_device_mesh

from foldcore.config import ConfigError
from foldcore.features import FEATURES
from torchfold._arrays import map_tree

Tree = TypeVar("Tree")
DATA, DAP = "data", "dap"
_ON_HOST = "num_iter_recycling"  # decides how many passes are started, so the host must know it
_mesh: DeviceMesh | None = None  # of the function that runs now
# copies may still read the batches of the steps in flight
_pinned: deque[Tensor] = deque(maxlen=4 * len(FEATURES))


def initialize() -> None:
    """Join the other processes, if the environment names any: ``torchrun`` sets these variables.

    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` start a run by
    hand.
    """
    if dist.is_initialized():
        return
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "RANK" not in os.environ:
        raise ConfigError("SLURM started several tasks: let each of them start torchrun")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def process() -> tuple[int, int]:
    """This process's number and how many there are; each reads its own share of every batch."""
    return dist.get_rank(), dist.get_world_size()


def is_first_process() -> bool:
    """True in the one process that writes and prints."""
    return dist.get_rank() == 0


def make_mesh(batch_size: int, dap: int = 1) -> DeviceMesh:
    """All devices of all processes; the batch must divide over the ``data`` axis."""
    replicas = dist.get_world_size() // dap
    if batch_size % replicas:
        raise ConfigError(
            f"train.batch_size={batch_size} cannot be divided over {replicas} devices: "
            f"set train.batch_size to a multiple of {replicas}"
        )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, (replicas, dap), mesh_dim_names=(DATA, DAP))


def replicas(mesh: DeviceMesh) -> int:
    """How many examples the devices work on at once."""
    return mesh.size(0)


def replicate(mesh: DeviceMesh, tree: Tree) -> Tree:
    """Host arrays to every device."""
    # a copy, also on the host: steps write into the state, whose buffers may begin as one array
    return map_tree(lambda array: torch.tensor(array, device=_device(mesh)), tree)


def place(mesh: DeviceMesh, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """This process's examples to its devices, as its part of the global batch."""
    return {
        name: torch.from_numpy(array) if name == _ON_HOST else _to_device(mesh, array)
        for name, array in batch.items()
    }


def _beside(mesh: DeviceMesh, batch: Mapping[str, np.ndarray]) -> Callable[[], dict[str, Tensor]]:
    """``place``, on a stream beside the one in use; the result waits for it and returns it."""
    if mesh.device_type == "cpu":
        placed = place(mesh, batch)
        return lambda: placed
    stream = _copies()
    with torch.cuda.stream(stream):
        placed = place(mesh, batch)
        there = torch.cuda.Event()
        there.record()

    def arrived() -> dict[str, Tensor]:
        current = torch.cuda.current_stream()
        current.wait_event(there)
        for name, tensor in placed.items():
            if name != _ON_HOST:
                tensor.record_stream(current)  # its memory is free when this stream is done with it
        return placed

    return arrived


@functools.cache
def _copies() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _to_device(mesh: DeviceMesh, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    if mesh.device_type == "cpu":
        return tensor
    return tensor.pin_memory().to(_device(mesh), non_blocking=True)


def _device(mesh: DeviceMesh) -> torch.device:
    """The device this process works on."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.cuda.current_device())


def over_mesh(function: Callable[..., Any], mesh: DeviceMesh) -> Callable[..., Any]:
    """``function(state, local_batch)`` on every device; what it returns must be equal on all."""

    def run(state: Any, batch: Mapping[str, Tensor]) -> Any:
        global _mesh
        _mesh = mesh
        try:
            return function(state, batch)
        finally:
            _mesh = None

    return run


def mean_over_data(tree: Tree) -> Tree:
    """Mean over the ``data`` axis, inside ``over_mesh``: a step's only communication."""
    group, count = _data_axis()
    if count == 1:
        return tree

    leaves: list[Tensor] = []
    map_tree(leaves.append, tree)
    total = torch.cat([leaf.ravel() for leaf in leaves])  # one message, not one for each metric
    dist.all_reduce(total, group=group)
    parts = iter((total / count).split([leaf.numel() for leaf in leaves]))
    return map_tree(lambda leaf: next(parts).view(leaf.shape).to(leaf.dtype), tree)


def gather_over_data(tree: Tree) -> Tree:
    """The batch axis of every device put together, inside ``over_mesh``."""
    group, count = _data_axis()
    if count == 1:
        return tree

    def gather(local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(count)]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    return map_tree(gather, tree)


def _data_axis() -> tuple[dist.ProcessGroup, int]:
    if _mesh is None:
        raise RuntimeError("collectives work inside a function given to over_mesh only")
    return _mesh.get_group(DATA), replicas(_mesh)


def agree_to_stop(requested: bool, step: int, every: int) -> bool:
    """Whether this is the last step because a process was asked to stop; equal in all processes.

    Several processes talk about it at every ``every``-th step only, as they must wait to do so.
    """
    if dist.get_world_size() == 1:
        return requested
    if step % every:
        return False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.tensor(int(requested), device=device)
    dist.all_reduce(count)
    return bool(count)


def exchange(value: Any) -> list[Any]:
    """A JSON value of each process, in all of them; every process must call this."""
    if dist.get_world_size() == 1:
        return [value]
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, json.dumps(value))
    return [json.loads(text) for text in texts]


def host_array(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Memory on the host for a batch on its way to the devices: pinned, if there is a GPU."""
    pinned = torch.cuda.is_available()
    tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype), pin_memory=pinned)
    if pinned:
        _pinned.append(tensor)
    return tensor.numpy()


def describe_devices() -> str:
    """One line: what this run computes on."""
    count = dist.get_world_size()
    cuda = torch.cuda.is_available()
    kind = f"gpu {torch.cuda.get_device_name()}" if cuda else "cpu"
    return f"{count} x {kind} in {count} process(es)"
