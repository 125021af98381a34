"""How the PyTorch track runs a step: masks drawn together."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

from foldcore import dropout as definition
from tests import toy_model
from tests.torch_twin import TORCH_THREADS
from torchfold._masks import MaskPlan, Request
from torchfold.primitives import DropoutKey
from torchfold.step import Network

STEP = 7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(TORCH_THREADS)
    yield


def as_torch(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in batch.items()}


def network_and_parameters(**changes: Any) -> tuple[Network, dict[str, torch.Tensor]]:
    """The toy network with parameters that make every part matter."""
    network = Network(replace(toy_model.CONFIG, **changes))
    shapes = {name: np.empty(shape) for name, shape, _ in network.layout}
    flat = torch.from_numpy(network.layout.flatten(toy_model.random_parameters(shapes)))
    return network, network.unflatten(flat)


# Masks --------------------------------------------------------------------------------------------


def test_masks_drawn_together_are_those_of_the_definition() -> None:
    plan, ids = MaskPlan(), np.array([3, -2], np.int32)
    asked = [
        Request("a/x", 0, (1, 5, 4), 0.15, 1),
        Request("a/y", 0, (9,), 0.25, 1),
        Request("t/x", 2, (6, 1), 0.15, 3),
    ]
    owners = [("a", 0), ("a", 0), ("t", 2)]
    for owner, request in zip(owners, asked, strict=True):
        plan.note(owner, request)
    drawn = plan.draw(5, torch.tensor(STEP), torch.from_numpy(ids), 1)
    for owner, request in zip(owners, asked, strict=True):
        want = definition.keep_mask(
            (2, *request.shape),
            request.rate,
            path=request.path,
            seed=5,
            step=STEP,
            example_id=ids,
            block=request.block,
            recycling=1,
        )
        found = drawn.of(owner).get(request).numpy()
        np.testing.assert_array_equal(found, want.repeat(request.repeat, axis=0))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_draws_the_masks_of_its_model(seed: int) -> None:
    network, params = network_and_parameters()
    batch = as_torch(toy_model.random_batch(seed, recycling=2))
    key = DropoutKey(seed, torch.tensor(STEP), batch["example_id"])
    by_path = {path: params[name] for path, name in network._names.items()}
    with torch.no_grad():
        one_by_one = functional_call(network._model, by_path, (batch, key))
        without = functional_call(network._model, by_path, (batch, None))
        for _ in range(2):  # with and without a rehearsal before it
            together = network(params, batch, key)
            for name, value in one_by_one.items():
                assert torch.equal(together[name], value), name
    assert not torch.equal(without["msa"], one_by_one["msa"])
