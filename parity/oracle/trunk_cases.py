"""Cases of the trunk: embedders, the Evoformer's modules and blocks, templates."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from jaxfold.embedders import distance_bins
from jaxfold.model import AlphaFold
from parity.oracle import ours, published
from parity.oracle.case import Case, Inputs, Outputs
from parity.oracle.published import modules

GLOBAL = published.tiny_config().global_config
TRUNK = published.tiny_config().embeddings_and_evoformer
EVOFORMER = TRUNK.evoformer

_BLOCK, _EXTRA_BLOCK = "evoformer/evoformer_iteration", "evoformer/extra_msa_stack"
_TEMPLATES = "evoformer/template_embedding"
_PAIR_STACK = f"{_TEMPLATES}/single_template_embedding/template_pair_stack"
_LAST = published.EVOFORMER_BLOCKS - 1
Make = Callable[..., Any]


def _our_block(model: AlphaFold, extra: bool) -> Any:
    if extra:
        return ours.layer(model.extra_msa_stack.blocks, 0)
    return ours.layer(model.evoformer.blocks, _LAST)


def _part(
    name: str, make: Make, kind: str, takes: tuple[str, ...], ours_takes: tuple[str, ...] = ()
) -> Case:
    """A module of a block. ``extra`` in what it takes says that it belongs to the extra stack."""
    extra = "extra" in takes

    def oracle(params: published.Params, x: Inputs) -> Outputs:
        arrays = [x[each] for each in takes]
        keys = {"pair_act": x["pair"]} if "row_attention" in name else {}
        return {
            kind: published.apply_part(lambda: make(GLOBAL, name="part"), params, *arrays, **keys)
        }

    def mine(model: AlphaFold, x: Inputs) -> Outputs:
        arrays = [x[each] for each in ours_takes or takes]
        return {kind: getattr(_our_block(model, extra), name)(*arrays)}

    scope = _EXTRA_BLOCK if extra else _BLOCK
    return Case(oracle, mine, f"{scope}/{name}", 0 if extra else _LAST)


def _make(cls: Make, name: str, **keys: Any) -> Make:
    return lambda *args, **more: cls(EVOFORMER[name], *args, **keys, **more)


def _parts() -> dict[str, Case]:
    row, column = "msa_row_attention_with_pair_bias", "msa_column_attention"
    msa, extra, pair = ("msa", "msa_mask"), ("extra", "extra_mask"), ("pair", "pair_mask")
    make_row = _make(modules.MSARowAttentionWithPairBias, row)
    make_outer = _make(
        modules.OuterProductMean, "outer_product_mean", num_output_channel=TRUNK.pair_channel
    )
    cases = {
        row: _part(row, make_row, "msa", msa, ("msa", "pair", "msa_mask")),
        f"extra {row}": _part(row, make_row, "extra", extra, ("extra", "pair", "extra_mask")),
        column: _part(column, _make(modules.MSAColumnAttention, column), "msa", msa),
        "outer_product_mean": _part("outer_product_mean", make_outer, "pair", msa),
    }
    # the released configuration describes both column attentions in one place
    name = "msa_column_global_attention"
    cases[name] = _part(name, _make(modules.MSAColumnGlobalAttention, column), "extra", extra)
    for name, kind, takes in (("msa_transition", "msa", msa), ("pair_transition", "pair", pair)):
        cases[name] = _part(name, _make(modules.Transition, name), kind, takes, takes[:1])
    for way in ("outgoing", "incoming"):
        name = f"triangle_multiplication_{way}"
        cases[name] = _part(name, _make(modules.TriangleMultiplication, name), "pair", pair)
    for node in ("starting", "ending"):
        name = f"triangle_attention_{node}_node"
        cases[name] = _part(name, _make(modules.TriangleAttention, name), "pair", pair)
    return cases


def _block(extra: bool) -> Case:
    kind = "extra" if extra else "msa"

    def oracle(params: published.Params, x: Inputs) -> Outputs:
        return published.apply_part(
            lambda: modules.EvoformerIteration(EVOFORMER, GLOBAL, is_extra_msa=extra, name="part"),
            params,
            activations={"msa": x[kind], "pair": x["pair"]},
            masks={"msa": x[f"{kind}_mask"], "pair": x["pair_mask"]},
        )

    def named(params: published.Params, x: Inputs) -> Outputs:
        activations = oracle(params, x)
        return {kind: activations["msa"], "pair": activations["pair"]}

    def mine(model: AlphaFold, x: Inputs) -> Outputs:
        block = _our_block(model, extra)
        msa, pair = block(x[kind], x["pair"], x[f"{kind}_mask"], x["pair_mask"])
        return {kind: msa, "pair": pair}

    scope = _EXTRA_BLOCK if extra else _BLOCK
    return Case(
        named, mine, scope, 0 if extra else _LAST, (f"{scope}/msa_transition/transition1//weights",)
    )


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


def _our_embeddings(model: AlphaFold, x: Inputs) -> Outputs:
    recycled = (x[name] for name in ("prev_msa_first_row", "prev_pair", "prev_pos"))
    msa, pair = model.input_embedder(x["target_feat"], x["residue_index"], x["msa_feat"])
    first_row, update = model.recycling_embedder(x["aatype"], *recycled)
    extra = (x[name] for name in ("extra_msa", "extra_has_deletion", "extra_deletion_value"))
    return {
        "msa": msa.at[:, 0].add(first_row),
        "pair": pair + update,
        "extra": model.extra_msa_embedder(*extra),
    }


def _template_rows(params: published.Params, x: Inputs) -> Outputs:
    rows = _into_the_stacks(params, x, templates=True)["msa"]
    return {"templates": rows[x["msa_feat"].shape[0] :]}


def _our_template_rows(model: AlphaFold, x: Inputs) -> Outputs:
    names = ("template_aatype", "template_all_atom_positions", "template_all_atom_masks")
    return {"templates": model.template_angle_embedder(*(x[name] for name in names))[0]}


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


def _our_template_embedding(model: AlphaFold, x: Inputs) -> Outputs:
    return {"pair": model._templates(x, x["pair"], x["pair_mask"], None)}


def _pair_stack(params: published.Params, x: Inputs) -> Outputs:
    stack = TRUNK.template.template_pair_stack
    pair = published.apply_part(
        lambda: modules.TemplatePairStack(stack, GLOBAL, name="part"),
        params,
        x["small_pair"],
        x["pair_mask"],
        is_training=True,
    )
    return {"pair": pair}


def _our_pair_stack(model: AlphaFold, x: Inputs) -> Outputs:
    stack = model.template_embedding.single_template_embedding.template_pair_stack
    return {"pair": stack(x["small_pair"], x["pair_mask"])}


def _bins(params: published.Params, x: Inputs) -> Outputs:
    del params
    return {"pair": modules.dgram_from_positions(x["points"], **TRUNK.template.dgram_features)}


def _our_bins(model: AlphaFold, x: Inputs) -> Outputs:
    del model
    return {"pair": distance_bins(x["points"], 3.25, 50.75, 39, jnp.float32)}


CASES: dict[str, Case] = {
    **_parts(),
    "evoformer block": _block(extra=False),
    "extra MSA block": _block(extra=True),
    "embedders": Case(
        lambda params, x: _into_the_stacks(params, x, templates=False),
        _our_embeddings,
        "evoformer",
        mutate=tuple(
            f"evoformer/{name}//weights"
            for name in ("preprocess_1d", "left_single", "extra_msa_activations")
        ),
    ),
    "template_angle_embedder": Case(
        _template_rows,
        _our_template_rows,
        "evoformer",
        mutate=("evoformer/template_projection//weights",),
    ),
    "template_embedding": Case(_template_embedding, _our_template_embedding, _TEMPLATES),
    "template_pair_stack": Case(_pair_stack, _our_pair_stack, _PAIR_STACK),
    "distance bins": Case(_bins, _our_bins, mutate=("points",)),
}
