"""DeepMind's side of the trunk: embedders, the Evoformer's modules and blocks, templates."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from parity.oracle import published
from parity.oracle.part import Inputs, Outputs, Part
from parity.oracle.published import modules

GLOBAL = published.tiny_config().global_config
TRUNK = published.tiny_config().embeddings_and_evoformer
EVOFORMER = TRUNK.evoformer

_BLOCK, _EXTRA_BLOCK = "evoformer/evoformer_iteration", "evoformer/extra_msa_stack"
_TEMPLATES = "evoformer/template_embedding"
_PAIR_STACK = f"{_TEMPLATES}/single_template_embedding/template_pair_stack"
_LAST = published.EVOFORMER_BLOCKS - 1
Make = Callable[..., Any]


def _part(name: str, make: Make, kind: str, takes: tuple[str, ...]) -> Part:
    """A module of a block. ``extra`` in what it takes says that it belongs to the extra stack."""
    extra = "extra" in takes

    def function(params: published.Params, x: Inputs) -> Outputs:
        arrays = [x[each] for each in takes]
        keys = {"pair_act": x["pair"]} if "row_attention" in name else {}
        part = published.apply_part(lambda: make(GLOBAL, name="part"), params, *arrays, **keys)
        return {kind: part}

    scope = _EXTRA_BLOCK if extra else _BLOCK
    return Part(function, f"{scope}/{name}", 0 if extra else _LAST)


def _make(cls: Make, name: str, **keys: Any) -> Make:
    return lambda *args, **more: cls(EVOFORMER[name], *args, **keys, **more)


def _parts() -> dict[str, Part]:
    row, column = "msa_row_attention_with_pair_bias", "msa_column_attention"
    msa, extra, pair = ("msa", "msa_mask"), ("extra", "extra_mask"), ("pair", "pair_mask")
    make_row = _make(modules.MSARowAttentionWithPairBias, row)
    make_outer = _make(
        modules.OuterProductMean, "outer_product_mean", num_output_channel=TRUNK.pair_channel
    )
    parts = {
        row: _part(row, make_row, "msa", msa),
        f"extra {row}": _part(row, make_row, "extra", extra),
        column: _part(column, _make(modules.MSAColumnAttention, column), "msa", msa),
        "outer_product_mean": _part("outer_product_mean", make_outer, "pair", msa),
    }
    # the released configuration describes both column attentions in one place
    name = "msa_column_global_attention"
    parts[name] = _part(name, _make(modules.MSAColumnGlobalAttention, column), "extra", extra)
    for name, kind, takes in (("msa_transition", "msa", msa), ("pair_transition", "pair", pair)):
        parts[name] = _part(name, _make(modules.Transition, name), kind, takes)
    for way in ("outgoing", "incoming"):
        name = f"triangle_multiplication_{way}"
        parts[name] = _part(name, _make(modules.TriangleMultiplication, name), "pair", pair)
    for node in ("starting", "ending"):
        name = f"triangle_attention_{node}_node"
        parts[name] = _part(name, _make(modules.TriangleAttention, name), "pair", pair)
    return parts


def _block(extra: bool) -> Part:
    kind = "extra" if extra else "msa"

    def function(params: published.Params, x: Inputs) -> Outputs:
        activations = published.apply_part(
            lambda: modules.EvoformerIteration(EVOFORMER, GLOBAL, is_extra_msa=extra, name="part"),
            params,
            activations={"msa": x[kind], "pair": x["pair"]},
            masks={"msa": x[f"{kind}_mask"], "pair": x["pair_mask"]},
        )
        return {kind: activations["msa"], "pair": activations["pair"]}

    return Part(function, _EXTRA_BLOCK if extra else _BLOCK, 0 if extra else _LAST)


# Embedders ----------------------------------------------------------------------------------------


def _into_the_stacks(params: published.Params, x: Inputs, templates: bool) -> dict[str, Any]:
    """What enters DeepMind's two stacks, which are replaced by functions that change nothing."""
    seen = {}

    def layer_stack(count: int) -> Any:
        del count
        return lambda function: functools.partial(unchanged, function.__name__)

    def unchanged(name: str, carry: Any) -> Any:
        if name.endswith("_fn"):  # not the template stack, which runs under vmap
            seen[name] = carry
        return carry

    config = published.tiny_config().embeddings_and_evoformer
    config.template.enabled = templates
    original, modules.layer_stack = modules.layer_stack, SimpleNamespace(layer_stack=layer_stack)
    try:
        published.apply_part(
            lambda: modules.EmbeddingsAndEvoformer(config, GLOBAL, name="part"),
            params,
            dict(x),
            is_training=True,
        )
    finally:
        modules.layer_stack = original
    extra, main = seen["extra_msa_stack_fn"][0], seen["evoformer_fn"][0]
    return {"extra": extra["msa"], "msa": main["msa"], "pair": extra["pair"]}


def _embeddings(params: published.Params, x: Inputs) -> Outputs:
    return _into_the_stacks(params, x, templates=False)


def _template_rows(params: published.Params, x: Inputs) -> Outputs:
    rows = _into_the_stacks(params, x, templates=True)["msa"]
    return {"templates": rows[x["msa_feat"].shape[0] :]}


def _template_embedding(params: published.Params, x: Inputs) -> Outputs:
    features = {name: value for name, value in x.items() if name.startswith("template_")}
    module = published.apply_part(
        lambda: modules.TemplateEmbedding(TRUNK.template, GLOBAL, name="part"),
        params,
        x["pair"],
        features,
        x["pair_mask"],
        is_training=True,
    )
    return {"pair": module}


def _pair_stack(params: published.Params, x: Inputs) -> Outputs:
    stack = TRUNK.template.template_pair_stack
    pair = published.apply_part(
        lambda: modules.TemplatePairStack(stack, GLOBAL, name="part"),
        params,
        x["small_pair"],
        x["pair_mask"],
        is_training=True,
    )
    return {"small_pair": pair}


def _bins(params: published.Params, x: Inputs) -> Outputs:
    del params
    return {"pair bins": modules.dgram_from_positions(x["points"], **TRUNK.template.dgram_features)}


PARTS: dict[str, Part] = {
    **_parts(),
    "evoformer block": _block(extra=False),
    "extra MSA block": _block(extra=True),
    "embedders": Part(_embeddings, "evoformer"),
    "template_angle_embedder": Part(_template_rows, "evoformer"),
    "template_embedding": Part(_template_embedding, _TEMPLATES),
    "template_pair_stack": Part(_pair_stack, _PAIR_STACK),
    "distance bins": Part(_bins),
}
