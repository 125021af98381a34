"""Batches on their way to a GPU: pinned, beside the step's work, one ahead, and unharmed."""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from foldcore.config import Config, DataConfig, TrainConfig
from foldcore.data.loader import Loader, open_loader
from foldcore.features import Batch
from torchfold import distributed
from torchfold.step import prefetch

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is here as well

pytestmark = pytest.mark.gpu

STEPS = 20  # far more batches than are in memory at once
CYCLES = 1_000_000_000  # of the device: half a second
# the sizes of initial training: 44 MB an example
DATA = DataConfig(accept_unknown=True, workers=2, prefetch=4, ordered=True)
CONFIG = Config(data=DATA, train=TrainConfig(batch_size=1, seed=5))


@pytest.fixture
def loader() -> Iterator[Loader]:
    with open_loader(CONFIG, allocate=distributed.host_array) as source:
        yield source


@pytest.fixture(scope="module")
def expected() -> list[Batch]:
    """The same batches, prepared in this process and left on the host."""
    return list(
        itertools.islice(open_loader(replace(CONFIG, data=replace(DATA, workers=0))), STEPS)
    )


def assert_equal(found: dict[str, Any], batch: Batch) -> None:
    assert found.keys() == batch.keys()
    for name, value in batch.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def wait_until_ready(source: Loader) -> None:
    deadline = time.monotonic() + 60
    while not source.is_ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_batches_are_made_in_pinned_memory(loader: Loader) -> None:
    assert not torch.from_numpy(np.zeros(1000)).is_pinned()
    for name, array in next(loader).items():
        tensor = torch.from_numpy(array)
        assert tensor.is_pinned(), name
        assert tensor.pin_memory().data_ptr() == array.ctypes.data, name  # not copied once more


def test_copies_run_beside_the_steps_work(loader: Loader, expected: list[Batch]) -> None:
    distributed.initialize()
    mesh, batch = distributed.make_mesh(1), next(loader)
    distributed._beside(mesh, batch)()  # takes the memory
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    busy = torch.cuda.Event()
    busy.record()
    began = time.perf_counter()
    arrived = distributed._beside(mesh, batch)
    started = time.perf_counter() - began
    distributed._copies().synchronize()
    copied = time.perf_counter() - began
    assert not busy.query(), "the copies have waited for the step's stream"
    placed = arrived()
    size = sum(array.nbytes for array in batch.values())
    print(
        f"\n{size / 1e6:.1f} MB: {1e3 * started:.2f} ms to start the copies, there after "
        f"{1e3 * copied:.2f} ms ({size / copied / 1e9:.1f} GB/s), the step's stream still at work"
    )
    assert_equal({name: tensor.cpu().numpy() for name, tensor in placed.items()}, expected[0])


def test_one_batch_is_moved_ahead_during_a_step(loader: Loader) -> None:
    distributed.initialize()
    batches = prefetch(loader, distributed.make_mesh(1))
    next(batches)
    torch.cuda.synchronize()
    wait_until_ready(loader)
    torch.cuda._sleep(CYCLES)  # the first step
    busy = torch.cuda.Event()
    busy.record()
    next(batches)  # the second step's batch
    distributed._copies().synchronize()
    assert not busy.query(), "the copies have waited for the step's stream"
    wait_until_ready(loader)
    next(batches)
    assert loader.state()["step"] == 4  # of three that were asked for


def test_no_batch_is_written_over_while_it_is_copied_or_used(
    loader: Loader, expected: list[Batch]
) -> None:
    distributed.initialize()
    batches, kept = prefetch(loader, distributed.make_mesh(1)), []
    for batch, _, _ in itertools.islice(batches, STEPS):
        torch.cuda._sleep(CYCLES // 50)  # a step, which reads its batch at the end
        kept.append({name: tensor.clone() for name, tensor in batch.items()})
        del batch
    for found, whole in zip(kept, expected, strict=True):
        assert_equal({name: tensor.cpu().numpy() for name, tensor in found.items()}, whole)


def test_jax_gets_the_same(expected: list[Batch]) -> None:
    jax = pytest.importorskip("jax")
    from jaxfold import distributed as jax_distributed
    from jaxfold import step as jax_step

    assert jax.default_backend() == "gpu"
    with open_loader(CONFIG, allocate=jax_distributed.host_array) as source:
        batches = jax_step.prefetch(source, jax_distributed.make_mesh(1))
        kept = [batch for batch, _, _ in itertools.islice(batches, STEPS)]
        for array in kept[0].values():
            assert {device.platform for device in array.devices()} == {"gpu"}
        for found, whole in zip(kept, expected, strict=True):
            assert_equal(jax.device_get(found), whole)
