"""What the parity suite compares with: parameters of a network some way on."""

import itertools

import pytest
import torch

from parity.step_runs import SMALL, some_way_on
from parity.tracks import TORCH, Arrays
from parity.variety import varied


@pytest.fixture(scope="module")
def parameters() -> Arrays:
    return some_way_on(SMALL)


def test_every_weight_matters(parameters: Arrays) -> None:
    """Weights that a network starts with may be zero; a product with them says nothing."""
    weights = [name for name in parameters if name.endswith(("weights", "_w"))]
    assert len(weights) > 100
    assert not [name for name in weights if not parameters[name].any()]


def test_raw_torsions_are_far_from_zero(parameters: Arrays) -> None:
    """Near zero gradients grow without bound, and noise decides how large they are."""
    network = TORCH.step.Network(SMALL.model)
    named = network.unflatten(torch.tensor(network.layout.flatten(parameters)))
    for batch in itertools.islice(varied(SMALL), 3):
        with torch.no_grad():
            found = network(named, {name: torch.tensor(x) for name, x in batch.items()}, None)
        lengths = found["unnormalized_angles"].norm(dim=-1)
        assert lengths.min() > 0.3
        assert 0.8 < lengths.mean() < 1.2
