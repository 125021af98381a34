"""Which network a set of parameters belongs to: its sizes, read off the shapes of some arrays.

Only shapes are looked at, so a file is identified before any of it is believed. Every projection
counts as a matrix of (inputs, outputs), whatever axes its format gives it.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from foldcore.config import ModelConfig
from foldcore.deepmind import EVOFORMER_STACK, EXTRA_MSA_STACK, TEMPLATE_STACK, detect_variant

Matrix = Callable[[str], tuple[int, ...] | None]  # name of a projection -> (inputs, outputs)

STACKS = (EVOFORMER_STACK, EXTRA_MSA_STACK, TEMPLATE_STACK)
_IPA = "structure_module/fold_iteration/invariant_point_attention"
# field -> the parameter whose outputs it counts; of a stack, one layer's
_OUTPUTS = {
    "c_m": "evoformer/preprocess_msa//weights",
    "c_z": "evoformer/left_single//weights",
    "c_s": "evoformer/single_activations//weights",
    "c_e": "evoformer/extra_msa_activations//weights",
    "c_t": "evoformer/template_embedding/single_template_embedding/embedding2d//weights",
    "msa_heads": f"{EVOFORMER_STACK}/msa_row_attention_with_pair_bias//feat_2d_weights",
    "extra_msa_heads": f"{EXTRA_MSA_STACK}/msa_row_attention_with_pair_bias//feat_2d_weights",
    "pair_heads": f"{EVOFORMER_STACK}/triangle_attention_starting_node//feat_2d_weights",
    "template_pair_heads": f"{TEMPLATE_STACK}/triangle_attention_starting_node//feat_2d_weights",
    "outer_product_hidden": f"{EVOFORMER_STACK}/outer_product_mean/left_projection//weights",
    "triangle_hidden": f"{EVOFORMER_STACK}/triangle_multiplication_outgoing/left_gate//weights",
    "template_triangle_hidden": (
        f"{TEMPLATE_STACK}/triangle_multiplication_outgoing/left_gate//weights"
    ),
    "ipa_heads": f"{_IPA}/attention_2d//weights",
    "sidechain_channels": (
        "structure_module/fold_iteration/rigid_sidechain/input_projection//weights"
    ),
    "plddt_channels": "predicted_lddt_head/act_0//weights",
}
# width of a head -> (number of heads, the projection to all heads)
_HEAD_WIDTHS = {
    "msa_head_dim": (
        "msa_heads",
        f"{EVOFORMER_STACK}/msa_row_attention_with_pair_bias/attention//query_w",
    ),
    "extra_msa_head_dim": (
        "extra_msa_heads",
        f"{EXTRA_MSA_STACK}/msa_row_attention_with_pair_bias/attention//query_w",
    ),
    "pair_head_dim": (
        "pair_heads",
        f"{EVOFORMER_STACK}/triangle_attention_starting_node/attention//query_w",
    ),
    "template_pair_head_dim": (
        "template_pair_heads",
        f"{TEMPLATE_STACK}/triangle_attention_starting_node/attention//query_w",
    ),
    "ipa_scalar_dim": ("ipa_heads", f"{_IPA}/q_scalar//weights"),
    "ipa_query_points": ("ipa_heads", f"{_IPA}/q_point_local//weights"),
    "ipa_value_points": ("ipa_heads", f"{_IPA}/kv_point_local//weights"),
}
_FACTORS = {
    "transition_factor": f"{EVOFORMER_STACK}/pair_transition/transition1//weights",
    "template_transition_factor": f"{TEMPLATE_STACK}/pair_transition/transition1//weights",
}
POINTWISE_QUERY = "evoformer/template_embedding/attention//query_w"


def stack_of(name: str) -> str | None:
    """The stack of layers that a parameter belongs to; its first axis counts them."""
    return next((stack for stack in STACKS if name.startswith(f"{stack}/")), None)


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(inputs, outputs) of a projection, (size,) of anything else; without an axis of layers."""
    leaf = name.partition("//")[2]
    if leaf == "output_w":
        return math.prod(shape[:-1]), shape[-1]
    if leaf.endswith(("weights", "_w")) and leaf != "trainable_point_weights":
        return shape[0], math.prod(shape[1:])
    return (math.prod(shape),)


def identify(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The network that parameters with DeepMind's names belong to, by their shapes."""

    def matrix(name: str) -> tuple[int, ...] | None:
        shape = shapes.get(name, ())[1 if stack_of(name) else 0 :]
        return matrix_shape(name, shape) if len(shape) > 1 else None

    def blocks(stack: str) -> int | None:
        lengths = Counter(shape[0] for name, shape in shapes.items() if stack_of(name) == stack)
        return lengths.most_common(1)[0][0] if lengths else None

    query = shapes.get(POINTWISE_QUERY, ())
    return infer_sizes(shapes.keys(), matrix, blocks, query[1] if len(query) == 3 else None)


def infer_sizes(
    names: Collection[str],
    matrix: Matrix,
    blocks: Callable[[str], int | None],
    pointwise_heads: int | None,
) -> ModelConfig:
    """Sizes by which the arrays make sense; where one is missing, the published size.

    ``blocks`` counts the layers of a stack. The heads of the pointwise attention over templates
    cannot be told from a matrix: ``pointwise_heads``, or the published number.
    """
    templates, pae = detect_variant(names)
    config = ModelConfig(templates_enabled=templates, pae_enabled=pae)
    found = {field: size[1] for field, name in _OUTPUTS.items() if (size := matrix(name))}
    for field, (heads, name) in _HEAD_WIDTHS.items():
        if (size := matrix(name)) and heads in found:
            found[field] = size[1] // max(found[heads], 1)
    for field in ("ipa_query_points", "ipa_value_points"):
        if field in found:
            found[field] //= 3  # coordinates
    # one projection makes the key points and the value points
    if "ipa_value_points" in found:
        found["ipa_value_points"] -= found.get("ipa_query_points", config.ipa_query_points)
    for field, name in _FACTORS.items():
        if size := matrix(name):
            found[field] = size[1] // max(size[0], 1)
    if size := matrix("evoformer/pair_activiations//weights"):
        found["max_relative_position"] = (size[0] - 1) // 2
    if size := matrix(POINTWISE_QUERY):
        count = pointwise_heads or config.template_pointwise_heads
        found["template_pointwise_heads"] = count
        found["template_pointwise_head_dim"] = size[1] // count
    counts = ("evoformer_blocks", "extra_msa_blocks", "template_blocks")
    for field, stack in zip(counts, STACKS, strict=True):
        if layers := blocks(stack):
            found[field] = layers
    sizes: dict[str, Any] = {field: max(size, 1) for field, size in found.items()}
    return replace(config, **sizes)
