"""The parity suite in bfloat16: each track is off the float64 result by no more than noise."""

import pytest

from parity.noise import FLOORS
from tests import parity_runs

DTYPE = "bfloat16"


@pytest.mark.parametrize("name", parity_runs.names(DTYPE))
def test_errors_are_noise(name: str) -> None:
    parity_runs.check(DTYPE, name)
    assert all(entry["limit"] == FLOORS for entry in parity_runs.entries(DTYPE, name))
