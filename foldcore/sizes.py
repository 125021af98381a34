"""Which network a set of parameters belongs to: its sizes, read off the shapes of its arrays.

Only shapes are looked at, so a file is identified before any of it is believed. Each size is read
off several arrays and is what most of them say, so that one wrong array is found to disagree. Every
projection counts as a matrix of (inputs, outputs), whatever axes its format gives it.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from foldcore.config import ModelConfig
from foldcore.deepmind import EVOFORMER_STACK, EXTRA_MSA_STACK, TEMPLATE_STACK, detect_variant

# name of an array -> its (inputs, outputs), or (size,) of a vector; once for each layer where the
# layers of a stack are separate arrays
Matrices = Callable[[str], list[tuple[int, ...]]]
# name of a projection to all heads -> the number of heads, where its axes tell
Heads = Callable[[str], list[int]]

STACKS = (EVOFORMER_STACK, EXTRA_MSA_STACK, TEMPLATE_STACK)


def _linear(*scopes: str) -> tuple[str, ...]:
    return tuple(f"{scope}//{leaf}" for scope in scopes for leaf in ("weights", "bias"))


_IPA = "structure_module/fold_iteration/invariant_point_attention"
_SIDECHAIN = "structure_module/fold_iteration/rigid_sidechain"
_TEMPLATES = "evoformer/template_embedding"
_TRIANGLE = "triangle_multiplication_outgoing"
# field -> the parameters whose outputs it counts; of a stack, one layer's
_OUTPUTS = {
    "c_m": _linear("evoformer/preprocess_msa", "evoformer/preprocess_1d"),
    "c_z": _linear("evoformer/left_single", "evoformer/right_single"),
    "c_s": _linear("evoformer/single_activations", "structure_module/initial_projection"),
    "c_e": _linear(
        "evoformer/extra_msa_activations", f"{EXTRA_MSA_STACK}/msa_transition/transition2"
    ),
    "c_t": _linear(
        f"{_TEMPLATES}/single_template_embedding/embedding2d",
        f"{TEMPLATE_STACK}/pair_transition/transition2",
    ),
    "outer_product_hidden": _linear(
        f"{EVOFORMER_STACK}/outer_product_mean/left_projection",
        f"{EVOFORMER_STACK}/outer_product_mean/right_projection",
    ),
    "triangle_hidden": _linear(
        f"{EVOFORMER_STACK}/{_TRIANGLE}/left_gate", f"{EVOFORMER_STACK}/{_TRIANGLE}/right_gate"
    ),
    "template_triangle_hidden": _linear(
        f"{TEMPLATE_STACK}/{_TRIANGLE}/left_gate", f"{TEMPLATE_STACK}/{_TRIANGLE}/right_gate"
    ),
    "ipa_heads": (*_linear(f"{_IPA}/attention_2d"), f"{_IPA}//trainable_point_weights"),
    "sidechain_channels": _linear(
        f"{_SIDECHAIN}/input_projection", f"{_SIDECHAIN}/input_projection_1"
    ),
    "plddt_channels": _linear("predicted_lddt_head/act_0", "predicted_lddt_head/act_1"),
}
# fields <kind>_heads and <kind>_head_dim -> the scopes around the attentions of that kind
_ATTENTIONS = {
    "msa": (
        f"{EVOFORMER_STACK}/msa_row_attention_with_pair_bias",
        f"{EVOFORMER_STACK}/msa_column_attention",
    ),
    "extra_msa": (f"{EXTRA_MSA_STACK}/msa_row_attention_with_pair_bias",),
    "pair": (
        f"{EVOFORMER_STACK}/triangle_attention_starting_node",
        f"{EVOFORMER_STACK}/triangle_attention_ending_node",
    ),
    "template_pair": (
        f"{TEMPLATE_STACK}/triangle_attention_starting_node",
        f"{TEMPLATE_STACK}/triangle_attention_ending_node",
    ),
    "template_pointwise": (_TEMPLATES,),
}
_UNBIASED = ("/msa_column_attention", "/template_embedding")  # by pairs
_PROJECTIONS = ("query_w", "key_w", "value_w", "gating_w", "gating_b")  # to all heads
_TRANSITIONS = {
    "transition_factor": (
        f"{EVOFORMER_STACK}/msa_transition",
        f"{EVOFORMER_STACK}/pair_transition",
        f"{EXTRA_MSA_STACK}/msa_transition",
        f"{EXTRA_MSA_STACK}/pair_transition",
    ),
    "template_transition_factor": (f"{TEMPLATE_STACK}/pair_transition",),
}


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

    def layer(name: str) -> tuple[int, ...]:
        return shapes.get(name, ())[1 if stack_of(name) else 0 :]

    def matrices(name: str) -> list[tuple[int, ...]]:
        return [matrix_shape(name, shape)] if (shape := layer(name)) else []

    def heads(name: str) -> list[int]:  # [c heads dim], a bias [heads dim]
        shape = layer(name)
        return [shape[-2]] if len(shape) == (2 if name.endswith("_b") else 3) else []

    def blocks(stack: str) -> list[int]:
        return [shape[0] for name, shape in shapes.items() if shape and stack_of(name) == stack]

    return infer_sizes(shapes.keys(), matrices, heads, blocks)


def infer_sizes(
    names: Collection[str],
    matrices: Matrices,
    heads: Heads,
    blocks: Callable[[str], Iterable[int]],
) -> ModelConfig:
    """Sizes by which most arrays make sense; where those are missing, the published size.

    ``blocks`` counts the layers of a stack, once for each of its parameters. The heads of the
    pointwise attention over templates cannot be told from matrices: without ``heads`` of its
    projections, the published number.
    """
    templates, pae = detect_variant(names)
    sizes = _Sizes(ModelConfig(templates_enabled=templates, pae_enabled=pae), matrices)
    for field, arrays in _OUTPUTS.items():
        sizes.vote(field, sizes.outputs(*arrays))
    for kind, scopes in _ATTENTIONS.items():
        _infer_attention(sizes, heads, kind, scopes)
    for field, scopes in _TRANSITIONS.items():
        wide = [s for scope in scopes for s in matrices(f"{scope}/transition1//weights")]
        narrow = [s[::-1] for scope in scopes for s in matrices(f"{scope}/transition2//weights")]
        sizes.vote(field, (_exact(s[-1], s[0]) for s in wide + narrow))
    _infer_points(sizes)
    relative = matrices("evoformer/pair_activiations//weights")
    sizes.vote("max_relative_position", (_exact(shape[0] - 1, 2) for shape in relative))
    counts = ("evoformer_blocks", "extra_msa_blocks", "template_blocks")
    for field, stack in zip(counts, STACKS, strict=True):
        sizes.vote(field, blocks(stack))
    return sizes.config


class _Sizes:
    """The sizes found so far, in a configuration that begins as the published one."""

    def __init__(self, config: ModelConfig, matrices: Matrices) -> None:
        self.config = config
        self.matrices = matrices

    def outputs(self, *names: str) -> Iterator[int]:
        """The last axis of each of these arrays that is there."""
        return (shape[-1] for name in names for shape in self.matrices(name))

    def vote(self, field: str, candidates: Iterable[int | None]) -> None:
        """Take the most frequent candidate; of several, the published size or the first."""
        counts = Counter(size for size in candidates if size is not None and size > 0)
        published = getattr(self.config, field)
        if counts:
            most = max(counts, key=lambda size: (counts[size], size == published))
            sizes: dict[str, Any] = {field: most}
            self.config = replace(self.config, **sizes)


def _infer_attention(sizes: _Sizes, heads: Heads, kind: str, scopes: Iterable[str]) -> None:
    projections = [f"{scope}/attention//{leaf}" for scope in scopes for leaf in _PROJECTIONS]
    count = f"{kind}_heads"
    biases = (f"{scope}//feat_2d_weights" for scope in scopes if not scope.endswith(_UNBIASED))
    told = [number for name in projections for number in heads(name)]
    sizes.vote(count, [*sizes.outputs(*biases), *told])
    number = getattr(sizes.config, count)
    sizes.vote(f"{kind}_head_dim", (_exact(w, number) for w in sizes.outputs(*projections)))


def _infer_points(sizes: _Sizes) -> None:
    """Widths of the invariant point attention; points have three coordinates."""
    heads, outputs = sizes.config.ipa_heads, sizes.matrices(f"{_IPA}/output_projection//weights")
    queries = (_exact(w, heads) for w in sizes.outputs(*_linear(f"{_IPA}/q_scalar")))
    keys = (_exact(w, 2 * heads) for w in sizes.outputs(*_linear(f"{_IPA}/kv_scalar")))
    sizes.vote("ipa_scalar_dim", [*queries, *keys])
    # the output has of each head its scalars, its points with their lengths, and the pairs
    wide = [s[0] - heads * (sizes.config.ipa_scalar_dim + sizes.config.c_z) for s in outputs]
    values = [_exact(width, 4 * heads) for width in wide]
    sizes.vote("ipa_value_points", values)
    # one projection makes the key points and the value points
    both = [_exact(w, 3 * heads) or 0 for w in sizes.outputs(*_linear(f"{_IPA}/kv_point_local"))]
    rest = [points - sizes.config.ipa_value_points for points in both]
    queries = (_exact(w, 3 * heads) for w in sizes.outputs(*_linear(f"{_IPA}/q_point_local")))
    sizes.vote("ipa_query_points", [*queries, *rest])
    sizes.vote("ipa_value_points", [p - sizes.config.ipa_query_points for p in both] + values)


def _exact(size: int, parts: int) -> int | None:
    """One of the equal parts of a size, if these are whole."""
    return size // parts if parts > 0 and size % parts == 0 else None
