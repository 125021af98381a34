"""The parity suite in float64: both tracks and DeepMind's code agree to 1e-9, in every array."""

import pytest

from parity import ladder
from parity.noise import FLOAT64
from parity.options import Options
from parity.oracle import shim
from tests import parity_runs

DTYPE = "float64"
PARAMETERS = 338  # arrays of the network with templates and aligned errors
# Adding the same number to all logits of a softmax changes nothing.
WITHOUT_GRADIENT = {
    "gradient evoformer/evoformer_iteration/msa_row_attention_with_pair_bias/feat_2d_norm//offset",
    "gradient evoformer/extra_msa_stack/msa_row_attention_with_pair_bias/feat_2d_norm//offset",
    "gradient structure_module/fold_iteration/invariant_point_attention/attention_2d//bias",
}
# The first pass has nothing to recycle.
ZERO_IN_FIRST_PASS = {
    f"gradient evoformer/{name}"
    for name in (
        "prev_pos_linear//weights",
        "prev_msa_first_row_norm//scale",
        "prev_pair_norm//scale",
    )
}


@pytest.mark.parametrize("name", parity_runs.names(DTYPE))
def test_the_tracks_agree(name: str) -> None:
    parity_runs.check(DTYPE, name)


PUBLISHED = [c.name for c in ladder.cases(Options(DTYPE, quick=True)) if c.oracle]


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_agree_with_published_code(name: str) -> None:
    if not shim.available():
        pytest.skip(shim.MISSING)
    for entry in parity_runs.entries(DTYPE, name):
        assert entry["oracle"]
        assert max(entry["error_jax"], entry["error_torch"]) <= FLOAT64 or entry["flips"] == 0


@pytest.mark.parametrize("passes", ladder.ENDS)
def test_every_gradient_of_the_network_is_compared(passes: int) -> None:
    (entry,) = (
        entry
        for entry in parity_runs.entries(DTYPE, "network")
        if entry["name"].endswith(f": {passes} recycling passes")
    )
    expected = WITHOUT_GRADIENT | (set() if passes else ZERO_IN_FIRST_PASS)
    assert set(entry["zero"]) == expected
    assert entry["arrays"] > PARAMETERS
    # a broken weight of the trunk changes everything else
    assert set(entry["blind"]) <= expected | {"steps symmetric atoms renamed"}


def test_the_suite_passes_and_says_so() -> None:
    report = parity_runs.report(DTYPE)
    assert all(case["passed"] for case in report["cases"]) and report["status"] == 0
    assert {case["level"] for case in report["cases"]} == {1, 2, 3, 4}
