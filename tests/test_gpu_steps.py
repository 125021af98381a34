"""On a GPU: a training step from the same state and batch gives the same bits, the first time too.

What a program reads before anything has written it is zero in a process that has just begun, and
what was there before in one that has run: the first run differs then from later ones.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

from parity.case import Setting
from parity.full_size import Example
from parity.options import configuration
from parity.step_cases import observe, recycled
from parity.step_runs import program
from parity.tracks import Arrays

pytestmark = pytest.mark.gpu


@cache
def example() -> tuple[Any, Arrays, Arrays]:
    """The `small` network with a batch."""
    config = configuration("configs/small.toml", [])
    return config, *Example(config)()


def run(package: str, setting: Setting, passes: int) -> Arrays:
    """Outputs, losses and gradients of one step."""
    config, parameters, batch = example()
    return observe(program(package, config, setting), parameters, {**batch, **recycled(passes)})


def compare(package: str, setting: Setting, passes: int) -> None:
    """Three runs: the first, which compiles; the second, which may be captured; one more."""
    last, *others = [run(package, setting, passes) for _ in range(3)][::-1]
    assert len(last) > 300
    for name, found in last.items():
        for other in others:
            np.testing.assert_array_equal(np.float64(other[name]), np.float64(found), name)


@pytest.mark.parametrize("package", ["jaxfold", "torchfold"])
@pytest.mark.parametrize("passes", [0, 2])
def test_a_step_gives_the_same_bits_each_time(passes: int, package: str) -> None:
    compare(package, Setting("bfloat16", "gpu", "triton"), passes)
