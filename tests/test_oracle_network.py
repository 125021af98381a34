"""The whole network with recycling against DeepMind's: outputs, losses, every gradient."""

import pytest

from parity.oracle import process

PASSES = ("0 recycling passes", "2 recycling passes")
# Zero in exact arithmetic, so no mutation changes them: compared absolutely.
ZERO_GRADIENTS = (
    "msa_row_attention_with_pair_bias/feat_2d_norm//offset",
    "invariant_point_attention/attention_2d//bias",
)
# The first pass has nothing to recycle.
ZERO_IN_FIRST_PASS = (
    "prev_pos_linear//weights",
    "prev_msa_first_row_norm//scale",
    "prev_pair_norm//scale",
)
PARAMETERS = 338  # arrays of the network with templates and aligned errors


def float64(passes: str, what: str) -> dict[str, process.Comparison]:
    return process.rows("network", "float64", f"{passes}: {what} ")


def float32(passes: str, what: str) -> dict[str, process.Comparison]:
    return process.rows("network", "float32", f"{passes}: {what} ")


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("what", ["output", "loss"])
def test_forward_in_float64(passes: str, what: str) -> None:
    process.check(float64(passes, what))


@pytest.mark.parametrize("passes", PASSES)
def test_gradients_in_float64(passes: str) -> None:
    found = float64(passes, "gradient")
    assert len(found) == PARAMETERS
    process.check(found, ZERO_GRADIENTS + ZERO_IN_FIRST_PASS * (passes == PASSES[0]))


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("what", ["output", "loss"])
def test_forward_in_float32(passes: str, what: str) -> None:
    process.check(float32(passes, what))


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES)
def test_gradients_in_float32(passes: str) -> None:
    found = float32(passes, "gradient")
    assert len(found) == PARAMETERS
    process.check(found, ZERO_GRADIENTS + ZERO_IN_FIRST_PASS * (passes == PASSES[0]))
