"""Every loss term and its gradients by the predictions, against DeepMind's code."""

import pytest

from parity.oracle import process

TERMS = (
    "backbone_fape",
    "sidechain_fape",
    "chi",
    "angle_norm",
    "violation",
    "distogram",
    "masked_msa",
    "plddt",
    "experimentally_resolved",
    "aligned_error",
    "alt_naming_is_better",
)


@pytest.mark.parametrize("term", TERMS)
def test_loss_in_float64(term: str) -> None:
    process.check(process.rows("losses", "float64", f"{term} "))


@pytest.mark.parametrize("term", TERMS)
def test_loss_in_float32(term: str) -> None:
    process.check(process.rows("losses", "float32", f"{term} "))


def test_no_term_is_left_out() -> None:
    compared = {name.partition(" ")[0] for name in process.table("losses", "float64")}
    assert compared == set(TERMS)


def test_every_term_but_the_naming_has_gradients() -> None:
    derived = {n.partition(" ")[0] for n in process.table("losses", "float64") if "gradient" in n}
    assert derived == set(TERMS) - {"alt_naming_is_better"}
