"""Every module, by itself, against DeepMind's code: same weights, same inputs."""

from pathlib import Path

import numpy as np
import pytest

from foldcore.deepmind import read_npz, write_npz
from parity.oracle import process, shim

MODULES = (
    "msa_row_attention_with_pair_bias",
    "extra msa_row_attention_with_pair_bias",
    "msa_column_attention",
    "msa_column_global_attention",
    "msa_transition",
    "outer_product_mean",
    "triangle_multiplication_outgoing",
    "triangle_multiplication_incoming",
    "triangle_attention_starting_node",
    "triangle_attention_ending_node",
    "pair_transition",
    "evoformer block",
    "extra MSA block",
    "embedders",
    "template_angle_embedder",
    "template_embedding",
    "template_pair_stack",
    "distance bins",
    "invariant_point_attention",
    "fold_iteration",
    "rigid_sidechain",
    "structure_module",
    "torsions from atoms",
    "frame from three points",
    "distogram_head",
    "masked_msa_head",
    "experimentally_resolved_head",
    "predicted_lddt_head",
    "predicted_aligned_error_head",
    "confidences",
)


@pytest.mark.parametrize("name", MODULES)
def test_module_in_float64(name: str) -> None:
    process.check(process.rows("modules", "float64", f"{name}: "))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "confidences"])
def test_module_in_float32(name: str) -> None:
    process.check(process.rows("modules", "float32", f"{name}: "))


def test_no_module_is_left_out() -> None:
    compared = {name.partition(": ")[0] for name in process.table("modules", "float64")}
    assert compared == set(MODULES)


def test_labels_of_real_chains() -> None:
    process.check(process.rows("labels", "float64", ""))


def test_parameter_files_pass_between_both_codes_unchanged(tmp_path: Path) -> None:
    if not shim.available():
        pytest.skip(shim.MISSING)
    from parity.oracle import ours, published

    params = published.random_params(ours.shapes())
    write_npz(tmp_path / "ours.npz", params)
    theirs = published.read_npz(tmp_path / "ours.npz")
    assert theirs.keys() == published.nest(params).keys()
    for name, value in published.flatten(theirs).items():
        assert np.asarray(value).tobytes() == params[name].tobytes(), name

    published.write_npz(tmp_path / "theirs.npz", theirs)
    again = read_npz(tmp_path / "theirs.npz")
    assert again.keys() == params.keys()
    assert all(again[name].tobytes() == params[name].tobytes() for name in params)
    ours.network(again)  # takes every one of them
