"""OpenFold's parameter names: state dicts of its model, to and from DeepMind's names.

Its arrays are PyTorch's: matrices are [out, in], the heads of an attention are one axis, and the
layers of a stack are separate. Written are the names of its current code; read are all three
generations: blocks with ``core`` (its published weights), with ``pair_stack`` (current), and
neither (the first), and triangle multiplications with one projection for both operands.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from foldcore.config import ModelConfig
from foldcore.deepmind import (
    EVOFORMER_STACK,
    EXTRA_MSA_STACK,
    TEMPLATE_STACK,
    ParameterFileError,
    check_finite,
)
from foldcore.layout import Layout
from foldcore.sizes import infer_sizes, matrix_shape, stack_of

STACKS = {
    EVOFORMER_STACK: "evoformer.blocks",
    EXTRA_MSA_STACK: "extra_msa_stack.blocks",
    TEMPLATE_STACK: "template_embedder.template_pair_stack.blocks",
}


def _triangle_multiplication(scope: str, module: str, left: str, right: str) -> dict[str, str]:
    return {
        f"{scope}/layer_norm_input": f"{module}.layer_norm_in",
        f"{scope}/left_projection": f"{module}.linear_{left}_p",
        f"{scope}/right_projection": f"{module}.linear_{right}_p",
        f"{scope}/left_gate": f"{module}.linear_{left}_g",
        f"{scope}/right_gate": f"{module}.linear_{right}_g",
        f"{scope}/center_layer_norm": f"{module}.layer_norm_out",
        f"{scope}/output_projection": f"{module}.linear_z",
        f"{scope}/gating_linear": f"{module}.linear_g",
    }


def _triangle_attention(scope: str, module: str) -> dict[str, str]:
    return {
        scope: f"{module}.linear",  # feat_2d_weights
        f"{scope}/query_norm": f"{module}.layer_norm",
        f"{scope}/attention": f"{module}.mha",
    }


def _transition(scope: str, module: str) -> dict[str, str]:
    return {
        f"{scope}/input_layer_norm": f"{module}.layer_norm",
        f"{scope}/transition1": f"{module}.linear_1",
        f"{scope}/transition2": f"{module}.linear_2",
    }


# DeepMind's left and right are the supplement's a and b in Alg. 11, and b and a in Alg. 12
_PAIR_BLOCK = {
    **_triangle_multiplication("triangle_multiplication_outgoing", "tri_mul_out", "a", "b"),
    **_triangle_multiplication("triangle_multiplication_incoming", "tri_mul_in", "b", "a"),
    **_triangle_attention("triangle_attention_starting_node", "tri_att_start"),
    **_triangle_attention("triangle_attention_ending_node", "tri_att_end"),
    **_transition("pair_transition", "pair_transition"),
}
_MSA_BLOCK = {
    "msa_row_attention_with_pair_bias": "msa_att_row.linear_z",  # feat_2d_weights
    "msa_row_attention_with_pair_bias/query_norm": "msa_att_row.layer_norm_m",
    "msa_row_attention_with_pair_bias/feat_2d_norm": "msa_att_row.layer_norm_z",
    "msa_row_attention_with_pair_bias/attention": "msa_att_row.mha",
    "msa_column_attention/query_norm": "msa_att_col._msa_att.layer_norm_m",
    "msa_column_attention/attention": "msa_att_col._msa_att.mha",
    "msa_column_global_attention/query_norm": "msa_att_col.layer_norm_m",
    "msa_column_global_attention/attention": "msa_att_col.global_attention",
    "outer_product_mean": "outer_product_mean.linear_out",  # output_w, output_b
    "outer_product_mean/layer_norm_input": "outer_product_mean.layer_norm",
    "outer_product_mean/left_projection": "outer_product_mean.linear_1",
    "outer_product_mean/right_projection": "outer_product_mean.linear_2",
    **_transition("msa_transition", "msa_transition"),
    **{scope: f"pair_stack.{module}" for scope, module in _PAIR_BLOCK.items()},
}
_FOLD, _SIDECHAIN = "structure_module/fold_iteration", "structure_module.angle_resnet"
_EMBEDDING = "evoformer/template_embedding"
_MODULES = {
    "evoformer/preprocess_1d": "input_embedder.linear_tf_m",
    "evoformer/preprocess_msa": "input_embedder.linear_msa_m",
    "evoformer/left_single": "input_embedder.linear_tf_z_i",
    "evoformer/right_single": "input_embedder.linear_tf_z_j",
    "evoformer/pair_activiations": "input_embedder.linear_relpos",
    "evoformer/prev_pos_linear": "recycling_embedder.linear",
    "evoformer/prev_msa_first_row_norm": "recycling_embedder.layer_norm_m",
    "evoformer/prev_pair_norm": "recycling_embedder.layer_norm_z",
    "evoformer/extra_msa_activations": "extra_msa_embedder.linear",
    "evoformer/single_activations": "evoformer.linear",
    "evoformer/template_single_embedding": "template_embedder.template_single_embedder.linear_1",
    "evoformer/template_projection": "template_embedder.template_single_embedder.linear_2",
    f"{_EMBEDDING}/attention": "template_embedder.template_pointwise_att.mha",
    f"{_EMBEDDING}/single_template_embedding/embedding2d": (
        "template_embedder.template_pair_embedder.linear"
    ),
    f"{_EMBEDDING}/single_template_embedding/output_layer_norm": (
        "template_embedder.template_pair_stack.layer_norm"
    ),
    "structure_module/single_layer_norm": "structure_module.layer_norm_s",
    "structure_module/pair_layer_norm": "structure_module.layer_norm_z",
    "structure_module/initial_projection": "structure_module.linear_in",
    f"{_FOLD}/invariant_point_attention": "structure_module.ipa",  # trainable_point_weights
    f"{_FOLD}/invariant_point_attention/q_scalar": "structure_module.ipa.linear_q",
    f"{_FOLD}/invariant_point_attention/kv_scalar": "structure_module.ipa.linear_kv",
    f"{_FOLD}/invariant_point_attention/q_point_local": (
        "structure_module.ipa.linear_q_points.linear"
    ),
    f"{_FOLD}/invariant_point_attention/kv_point_local": (
        "structure_module.ipa.linear_kv_points.linear"
    ),
    f"{_FOLD}/invariant_point_attention/attention_2d": "structure_module.ipa.linear_b",
    f"{_FOLD}/invariant_point_attention/output_projection": "structure_module.ipa.linear_out",
    f"{_FOLD}/attention_layer_norm": "structure_module.layer_norm_ipa",
    f"{_FOLD}/transition": "structure_module.transition.layers.0.linear_1",
    f"{_FOLD}/transition_1": "structure_module.transition.layers.0.linear_2",
    f"{_FOLD}/transition_2": "structure_module.transition.layers.0.linear_3",
    f"{_FOLD}/transition_layer_norm": "structure_module.transition.layer_norm",
    f"{_FOLD}/affine_update": "structure_module.bb_update.linear",
    f"{_FOLD}/rigid_sidechain/input_projection": f"{_SIDECHAIN}.linear_in",
    f"{_FOLD}/rigid_sidechain/input_projection_1": f"{_SIDECHAIN}.linear_initial",
    f"{_FOLD}/rigid_sidechain/resblock1": f"{_SIDECHAIN}.layers.0.linear_1",
    f"{_FOLD}/rigid_sidechain/resblock2": f"{_SIDECHAIN}.layers.0.linear_2",
    f"{_FOLD}/rigid_sidechain/resblock1_1": f"{_SIDECHAIN}.layers.1.linear_1",
    f"{_FOLD}/rigid_sidechain/resblock2_1": f"{_SIDECHAIN}.layers.1.linear_2",
    f"{_FOLD}/rigid_sidechain/unnormalized_angles": f"{_SIDECHAIN}.linear_out",
    "predicted_lddt_head/input_layer_norm": "aux_heads.plddt.layer_norm",
    "predicted_lddt_head/act_0": "aux_heads.plddt.linear_1",
    "predicted_lddt_head/act_1": "aux_heads.plddt.linear_2",
    "predicted_lddt_head/logits": "aux_heads.plddt.linear_3",
    "distogram_head/half_logits": "aux_heads.distogram.linear",
    "experimentally_resolved_head/logits": "aux_heads.experimentally_resolved.linear",
    "masked_msa_head/logits": "aux_heads.masked_msa.linear",
    "predicted_aligned_error_head/logits": "aux_heads.tm.linear",
}
_LEAVES = {
    "weights": "weight",
    "bias": "bias",
    "scale": "weight",
    "offset": "bias",
    "feat_2d_weights": "weight",
    "output_w": "weight",
    "output_b": "bias",
    "trainable_point_weights": "head_weights",
}
_ATTENTION_LEAVES = {
    "query_w": "linear_q.weight",
    "key_w": "linear_k.weight",
    "value_w": "linear_v.weight",
    "gating_w": "linear_g.weight",
    "gating_b": "linear_g.bias",
    "output_w": "linear_o.weight",
    "output_b": "linear_o.bias",
}


class Place(NamedTuple):
    """Where one array of OpenFold's lies among ours."""

    name: str
    block: int | None  # layer of a stack
    shape: tuple[int, ...]  # OpenFold's


# Names --------------------------------------------------------------------------------------------


def openfold_key(name: str, block: int | None = None) -> str:
    """OpenFold's name of a parameter; of one in a stack, in layer ``block``."""
    scope, _, leaf = name.partition("//")
    stack = stack_of(name)
    leaves = _ATTENTION_LEAVES if scope.endswith("/attention") else _LEAVES
    if stack is None:
        return f"{_MODULES[scope]}.{leaves[leaf]}"
    modules = _PAIR_BLOCK if stack == TEMPLATE_STACK else _MSA_BLOCK
    module = modules[scope.removeprefix(f"{stack}/")]
    return f"{STACKS[stack]}.{block}.{module}.{leaves[leaf]}"


def places(layout: Layout) -> dict[str, Place]:
    """Every array of OpenFold's model of this layout, by OpenFold's name."""
    return dict(sorted(_places(layout)))


def current_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of any generation under the names of OpenFold's current code."""
    found: dict[str, np.ndarray] = {}
    for key, array in arrays.items():
        for name, part in _split(_current_name(key), array):
            if name in found:
                raise ValueError(f"array {key!r} is there twice, as {name!r}")
            found[name] = part
    return found


def _places(layout: Layout) -> Iterator[tuple[str, Place]]:
    for name, shape, _ in layout:
        if stack_of(name) is None:
            yield openfold_key(name), Place(name, None, matrix_shape(name, shape)[::-1])
        else:
            for block in range(shape[0]):
                matrix = matrix_shape(name, shape[1:])
                yield openfold_key(name, block), Place(name, block, matrix[::-1])


# (pattern, replacement), in this order
_RENAMED = (
    (r"^((_forward_module|module|_orig_mod|model)\.)+", ""),  # wrappers around the network
    (r"^extra_msa_stack\.stack\.", "extra_msa_stack."),
    (r"^(evoformer\..*\.msa_att_col)\.(layer_norm_m|mha)\.", r"\1._msa_att.\2."),
    (r"\.core\.", "."),
    (r"^((?:evoformer|extra_msa_stack)\.blocks\.\d+)\.(tri_|pair_transition)", r"\1.pair_stack.\2"),
    (r"\.ipa\.linear_(q|kv)_points\.(weight|bias)$", r".ipa.linear_\1_points.linear.\2"),
    (r"^template_angle_embedder\.", "template_single_embedder."),
    (r"^template_(?!embedder\.)", "template_embedder.template_"),
)


def _current_name(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def _split(key: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The two halves of a projection to both operands of a triangle multiplication."""
    fused = re.fullmatch(r"(.*\.tri_mul_(?:out|in)\.linear_)ab(_[pg]\.(?:weight|bias))", key)
    if fused is None or not array.ndim or array.shape[0] % 2:
        yield key, array
        return
    half = array.shape[0] // 2
    yield f"{fused[1]}a{fused[2]}", array[:half]
    yield f"{fused[1]}b{fused[2]}", array[half:]


# Arrays -------------------------------------------------------------------------------------------


def to_openfold(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of OpenFold's current model."""
    found = {}
    for name, array in params.items():
        if stack_of(name) is None:
            found[openfold_key(name)] = _to_torch(name, array)
        else:
            for block, layer in enumerate(array):
                found[openfold_key(name, block)] = _to_torch(name, layer)
    return dict(sorted(found.items()))


def from_openfold(
    arrays: Mapping[str, np.ndarray], layout: Layout, path: str | Path
) -> dict[str, np.ndarray]:
    """Parameters by our names; ``arrays`` has the current names, ``path`` is for errors.

    The first array that is missing, unknown or of another shape is a :class:`ParameterFileError`.
    """
    expected = places(layout)
    for key in sorted(expected.keys() | arrays.keys()):
        if key not in arrays:
            raise ParameterFileError(f"{path}: array {key!r} is missing")
        if key not in expected:
            raise ParameterFileError(f"{path}: array {key!r} is not part of OpenFold's network")
        shape, needed = tuple(arrays[key].shape), expected[key].shape
        if shape != needed:
            raise ParameterFileError(
                f"{path}: array {key!r} has shape {shape}, but this network needs {needed}"
            )
        check_finite(path, key, arrays[key])
    return {name: _from_torch(name, shape, arrays) for name, shape, _ in layout}


def identify(arrays: Mapping[str, np.ndarray]) -> ModelConfig:
    """The network that a state dict with the current names belongs to, by its shapes."""

    def blocks(stack: str) -> Iterable[int]:
        prefix = STACKS[stack] + "."
        layers = (key[len(prefix) :].partition(".") for key in arrays if key.startswith(prefix))
        return Counter(leaf for _, _, leaf in layers).values()

    def matrices(name: str) -> list[tuple[int, ...]]:
        stack = stack_of(name)
        layers = range(max(blocks(stack), default=0)) if stack else [None]
        found = [arrays.get(openfold_key(name, layer)) for layer in layers]
        return [array.shape[::-1] for array in found if array is not None and array.ndim]

    # as in DeepMind's names: what tells the variants apart
    names = []
    if any(key.startswith("template_embedder.") for key in arrays):
        names.append("evoformer/template_projection//weights")
    if any(key.startswith("aux_heads.tm.") for key in arrays):
        names.append("predicted_aligned_error_head/logits//weights")
    return infer_sizes(names, matrices, lambda name: [], blocks)  # heads are not an axis


def _to_torch(name: str, array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.reshape(matrix_shape(name, array.shape)).T)


def _from_torch(name: str, shape: tuple[int, ...], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    if stack_of(name) is None:
        return np.ascontiguousarray(arrays[openfold_key(name)].T).reshape(shape)
    layers = [arrays[openfold_key(name, block)].T.reshape(shape[1:]) for block in range(shape[0])]
    return np.stack(layers)
