"""Devices and how they work together: the only file with mesh, axis and process words.

The mesh has two axes: ``data`` (each device group has its own examples) and ``dap`` (one example
spread over the group; its size is 1 until axial sharding exists). Both hold the state whole.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from foldcore.config import ConfigError

Tree = TypeVar("Tree")
DATA, DAP = "data", "dap"


def initialize() -> None:
    """Join the other processes, if the environment names any: SLURM's variables or JAX_*.

    ``JAX_COORDINATOR_ADDRESS`` (host:port), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` start a
    run by hand; under SLURM with several tasks they are read from it.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        try:
            count, index = (int(os.environ[k]) for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
                f"whole numbers: {error}"
            ) from None
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, index)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()


def process() -> tuple[int, int]:
    """This process's number and how many there are; each reads its own share of every batch."""
    return jax.process_index(), jax.process_count()


def is_first_process() -> bool:
    """True in the one process that writes and prints."""
    return jax.process_index() == 0


def make_mesh(batch_size: int, dap: int = 1) -> Mesh:
    """All devices of all processes; the batch must divide over the ``data`` axis."""
    devices = np.asarray(jax.devices())
    replicas = devices.size // dap
    if batch_size % replicas:
        raise ConfigError(
            f"train.batch_size={batch_size} cannot be divided over {replicas} devices: "
            f"set train.batch_size to a multiple of {replicas}"
        )
    return Mesh(devices[: replicas * dap].reshape(replicas, dap), (DATA, DAP))


def replicas(mesh: Mesh) -> int:
    """How many examples the devices work on at once."""
    return mesh.shape[DATA]


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Host arrays to every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def place(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's examples to its devices, as its part of the global batch."""
    sharding = NamedSharding(mesh, P(DATA))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def over_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """``function(state, local_batch)`` on every device; what it returns must be equal on all."""
    # check_vma=False: kernels called inside carry no information about varying axes
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False
    )


def mean_over_data(tree: Tree) -> Tree:
    """Mean over the ``data`` axis, inside ``over_mesh``: a step's only communication."""
    return jax.lax.pmean(tree, DATA)


def gather_over_data(tree: Tree) -> Tree:
    """The batch axis of every device put together, inside ``over_mesh``."""
    return jax.lax.all_gather(tree, DATA, axis=0, tiled=True)


def agree_to_stop(requested: bool, step: int, every: int) -> bool:
    """Whether this is the last step because a process was asked to stop; equal in all processes.

    Several processes talk about it at every ``every``-th step only, as they must wait to do so.
    """
    if jax.process_count() == 1:
        return requested
    if step % every:
        return False
    return bool(np.any(multihost_utils.process_allgather(np.asarray(requested))))


def exchange(value: Any) -> list[Any]:
    """A JSON value of each process, in all of them; every process must call this."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size, np.int32))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(sizes.max()) - text.size)))
    return [json.loads(bytes(r[:n])) for r, n in zip(rows, sizes, strict=True)]


def host_array(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Memory on the host for a batch on its way to the devices."""
    return np.empty(shape, dtype)


def describe_devices() -> str:
    """One line: what this run computes on."""
    devices = jax.devices()
    kinds = ", ".join(sorted({_kind(d.platform, d.device_kind) for d in devices}))
    return f"{len(devices)} x {kinds} in {jax.process_count()} process(es)"


def _kind(platform: str, name: str) -> str:
    return platform if name == platform else f"{platform} {name}"
