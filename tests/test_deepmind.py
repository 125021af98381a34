"""Names and shapes of the parameters against DeepMind's, and their files."""

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from foldcore.config import ModelConfig
from foldcore.deepmind import (
    PREFIX,
    ParameterFileError,
    canonical_name,
    detect_variant,
    read_npz,
    write_npz,
)
from foldcore.initializers import KINDS
from jaxfold.model import AlphaFold
from jaxfold.params import ParameterError, _places, initialize, load_parameters, parameters
from tests.toy_model import CONFIG, random_model

TREE: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "parameter_tree.json").read_text()
)


def published(templates: bool, pae: bool) -> dict[str, tuple[int, ...]]:
    tree = dict(TREE["all"]) | (TREE["pae"] if pae else {})
    absent = set() if templates else set(TREE["templates"])
    return {name: tuple(shape) for name, shape in tree.items() if name not in absent}


@pytest.fixture(scope="module")
def toy() -> AlphaFold:
    return random_model()


@pytest.mark.parametrize(
    ("templates", "pae", "arrays", "count"),
    [
        (True, False, 336, 93_229_082),
        (True, True, 338, 93_237_338),
        (False, False, 265, 92_899_674),
    ],
)
def test_names_and_shapes_are_deepminds(
    templates: bool, pae: bool, arrays: int, count: int
) -> None:
    config = ModelConfig(templates_enabled=templates, pae_enabled=pae)
    model = nnx.eval_shape(lambda: AlphaFold(config))
    shapes = {name: tuple(array.shape) for name, array in parameters(model).items()}
    assert shapes == published(templates, pae)
    assert len(shapes) == arrays
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    assert list(shapes) == sorted(shapes)
    assert detect_variant(shapes) == (templates, pae)


def test_file_round_trip_is_exact(tmp_path: Path, toy: AlphaFold) -> None:
    path = tmp_path / "params_model_1.npz"
    arrays = {name: np.asarray(array) for name, array in parameters(toy).items()}
    write_npz(path, arrays)
    with np.load(path) as file:
        assert set(file.files) == {PREFIX + name for name in arrays}
    other = nnx.eval_shape(lambda: AlphaFold(CONFIG))
    load_parameters(other, read_npz(path))
    for name, array in parameters(other).items():
        assert array.dtype == np.float32
        assert np.asarray(array).tobytes() == arrays[name].tobytes(), name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("evoformer/single_activations/bias", "evoformer/single_activations//bias"),
        ("input_embedder/left_single/bias", "evoformer/left_single//bias"),
        (
            "evoformer/blocks/outer_product_mean/output_w",
            "evoformer/evoformer_iteration/outer_product_mean//output_w",
        ),
        ("structure_module/pair_layer_norm/scale", "structure_module/pair_layer_norm//scale"),
    ],
)
def test_canonical_names(path: str, name: str) -> None:
    assert canonical_name(path.split("/")) == name


def test_wrong_arrays_are_named(toy: AlphaFold) -> None:
    arrays = dict(parameters(toy))
    name = "distogram_head/half_logits//bias"
    with pytest.raises(ParameterError, match=f"'{name}' is missing"):
        load_parameters(toy, {k: v for k, v in arrays.items() if k != name})
    with pytest.raises(ParameterError, match="'a//b' is not part of this model"):
        load_parameters(toy, arrays | {"a//b": arrays[name]})
    with pytest.raises(ParameterError, match=rf"'{name}' has shape \(3,\).*needs \(64,\)"):
        load_parameters(toy, arrays | {name: jnp.zeros(3)})
    for key, array in parameters(toy).items():  # a refused load changes nothing
        assert array is arrays[key]


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for arrays, message in (
        ({"a//b": np.zeros(2)}, "'a//b' is not named"),
        ({PREFIX + "a//b": np.zeros(2, np.int32)}, "a//b' has dtype int32"),
        ({PREFIX + "a//b": np.full(2, np.nan)}, "a//b' contains non-finite"),
        ({PREFIX + "a//b": np.array([{}], object)}, "a//b' has dtype object"),
    ):
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(ParameterFileError, match=message):
            read_npz(path)
    for content in (b"", b"PK\x03\x04 truncated", b"text"):
        path.write_bytes(content)
        with pytest.raises(ParameterFileError, match="x.npz"):
            read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PREFIX + "a//b.npy", b"\x93NUMPY\x01\x00 cut")
    with pytest.raises(ParameterFileError, match="x.npz"):
        read_npz(path)
    with pytest.raises(ParameterFileError, match="absent.npz"):
        read_npz(tmp_path / "absent.npz")


# Initial values -----------------------------------------------------------------------------------


def test_kinds_of_initial_values() -> None:
    model = nnx.eval_shape(lambda: AlphaFold(replace(CONFIG, pae_enabled=True)))
    kinds = {name: getattr(*place).kind for name, place in _places(model).items()}
    assert set(kinds.values()) == set(KINDS)
    block = "evoformer/evoformer_iteration"
    for name, kind in {
        f"{block}/msa_column_attention/attention//query_w": "glorot",
        f"{block}/msa_column_attention/attention//gating_w": "zeros",
        f"{block}/msa_column_attention/attention//gating_b": "ones",
        f"{block}/msa_column_attention/attention//output_w": "zeros",
        f"{block}/msa_row_attention_with_pair_bias//feat_2d_weights": "normal",
        f"{block}/msa_transition/transition1//weights": "relu",
        f"{block}/msa_transition/transition2//weights": "zeros",
        f"{block}/triangle_multiplication_outgoing/left_gate//weights": "zeros",
        f"{block}/triangle_multiplication_outgoing/left_gate//bias": "ones",
        f"{block}/triangle_multiplication_outgoing/gating_linear//bias": "ones",
        f"{block}/triangle_multiplication_outgoing/left_projection//weights": "linear",
        f"{block}/triangle_multiplication_outgoing/output_projection//weights": "zeros",
        f"{block}/outer_product_mean/left_projection//weights": "linear",
        f"{block}/outer_product_mean//output_w": "zeros",
        "evoformer/template_single_embedding//weights": "relu",
        "evoformer/template_projection//weights": "relu",
        "evoformer/template_embedding/single_template_embedding/embedding2d//weights": "relu",
        "evoformer/single_activations//weights": "linear",
        "evoformer/prev_pos_linear//weights": "linear",
        "structure_module/fold_iteration/affine_update//weights": "zeros",
        "structure_module/fold_iteration/transition_2//weights": "zeros",
        "structure_module/fold_iteration/rigid_sidechain/resblock1//weights": "relu",
        "structure_module/fold_iteration/rigid_sidechain/resblock2//weights": "zeros",
        "structure_module/fold_iteration/rigid_sidechain/unnormalized_angles//weights": "linear",
        "predicted_lddt_head/act_0//weights": "relu",
        "predicted_lddt_head/logits//weights": "zeros",
    }.items():
        assert kinds[name] == kind, name


def test_initialize_draws_by_name_and_seed() -> None:
    first, second, other = (nnx.eval_shape(lambda: AlphaFold(CONFIG)) for _ in range(3))
    initialize(first, 1)
    initialize(second, 1)
    initialize(other, 2)
    name = "evoformer/evoformer_iteration/pair_transition/transition1//weights"
    a, b, c = (np.asarray(parameters(model)[name]) for model in (first, second, other))
    np.testing.assert_array_equal(a, b)
    assert (a != c).all()
    assert a.shape[0] == CONFIG.evoformer_blocks and (a[0] != a[1]).all()
    for name, array in parameters(first).items():
        if name.endswith("//scale"):
            assert (array == 1).all(), name
        if name.endswith(("//offset", "//output_b")):
            assert (array == 0).all(), name
