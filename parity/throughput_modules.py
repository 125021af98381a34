"""The modules of a training step, each with inputs of the configuration's sizes.

Between them they make up a pass but for small change: casts of parameters, dropout masks, a few
additions. Every module is called as its parent calls it: with its residual and a factor of dropout,
and in a block of a stack with what the stack has derived from parameters, which is a row by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from foldcore import features
from foldcore.config import Config, ModelConfig
from parity import flops
from parity.module_run import Module
from parity.tracks import Arrays, Named, Track

Shapes = dict[str, tuple[int, ...]]
NARROW = (
    *("rows", "msa", "extra", "pair", "single", "template_pair"),
    *("prev_msa_first_row", "prev_pair"),
)
EMBEDDERS = ("input_embedder", "recycling_embedder", "extra_msa_embedder")
HEADS = (
    *("distogram_head", "masked_msa_head", "experimentally_resolved_head", "predicted_lddt_head"),
)
STRUCTURE = (
    *("structure_module_single", "traj", "traj_rotation", "angles", "unnormalized_angles"),
    *("sidechain_frames_rotation", "sidechain_frames_translation"),
    *("final_atom14_positions", "final_atom37_positions"),
)
UNREAD = ("gating_b", "output_w", "output_b")  # by what is derived from attention's parameters
LABELS = ("true_msa", "bert_mask")  # the loss looks for the slot of the last pass in these
TRIANGLES = {
    "triangle multiplication outgoing": "pair_factor",
    "triangle multiplication incoming": "pair_factor",
    "triangle attention starting node": "pair_factor",
    "triangle attention ending node": "column_factor",
}


@dataclass(frozen=True)
class Part:
    """One module: how often a pass of one example calls it, and the operations of one call."""

    name: str
    calls: int
    operations: float
    module: Module
    every_pass: bool = True  # otherwise only the one with a gradient
    in_stack: bool = False  # part of its blocks, with weights that are derived for all of them

    def calls_in(self, passes: int) -> int:
        """How often it is called by so many passes."""
        return self.calls * (passes if self.every_pass else 1)


def parts(config: Config) -> list[Part]:
    """All modules; the costly ones first."""
    m, data = config.model, config.data
    templates = [*_templates(m, data.num_templates, data.crop_size)] if _count(config) else []
    derived = [_derived(config, extra) for extra in (False, True)]
    return [*_block(config), *_extra_block(config), *derived, *templates, *_around(config)]


def _count(config: Config) -> int:
    """Templates of an example."""
    return config.data.num_templates if config.model.templates_enabled else 0


# What goes in -------------------------------------------------------------------------------------


def shapes(config: Config) -> Shapes:
    """Of everything that a module of one example may ask for: activations, masks, features."""
    m, data, t, r = config.model, config.data, _count(config), config.data.crop_size
    s, layers = data.num_msa_clusters, m.structure_iterations
    sizes = features.dimensions(data)
    given = {name: features.shape(name, sizes) for name in features.FEATURES}
    slots = {n: shape for n, shape in given.items() if _in_slots(n)}
    one_pass = {n: (1, *((1,) if n in LABELS else ()), *x[2:]) for n, x in slots.items()}
    return {
        **given,
        **one_pass,
        "rows": (1, s + t, r, m.c_m),
        "rows_mask": (1, s + t, r),
        "msa": (1, s, r, m.c_m),
        "extra": (1, data.num_extra_msa, r, m.c_e),
        "pair": (1, r, r, m.c_z),
        "pair_mask": (1, r, r),
        "template_pair": (t, r, r, m.c_t),
        "template_pair_mask": (t, r, r),
        "single": (1, r, m.c_s),
        "prev_msa_first_row": (1, r, m.c_m),
        "prev_pair": (1, r, r, m.c_z),
        "prev_pos": (1, r, 37, 3),
        "rows_factor": (1, 1, r, m.c_m),
        "extra_factor": (1, 1, r, m.c_e),
        "pair_factor": (1, 1, r, m.c_z),
        "column_factor": (1, r, 1, m.c_z),
        "structure_module_single": (1, r, m.c_s),
        "traj": (layers, 1, r, 7),
        "traj_rotation": (layers, 1, r, 3, 3),
        "angles": (layers, 1, r, 7, 2),
        "unnormalized_angles": (layers, 1, r, 7, 2),
        "sidechain_frames_rotation": (1, r, 8, 3, 3),
        "sidechain_frames_translation": (1, r, 8, 3),
        "final_atom14_positions": (1, r, 14, 3),
        "final_atom37_positions": (1, r, 37, 3),
    }


def _in_slots(name: str) -> bool:
    """Whether a feature has a sample for each pass."""
    return name in features.FEATURES and features.FEATURES[name].dims[:1] == ("recycle",)


def make_inputs(config: Config, batch: Mapping[str, np.ndarray]) -> Arrays:
    """The first pass of a batch's first example, and random activations."""
    random, found = np.random.default_rng(0), {}
    for name, shape in shapes(config).items():
        if name in batch:
            array = batch[name][:1]
            found[name] = array[:, :1].reshape(shape) if _in_slots(name) else array
        elif name.endswith("_mask"):
            found[name] = np.ones(shape, np.float32)
        elif name.endswith("_factor"):
            found[name] = (random.random(shape) < 0.75).astype(np.float32) / np.float32(0.75)
        else:
            found[name] = random.standard_normal(shape, np.float32)
    found["num_iter_recycling"] = np.zeros(1, np.int32)  # the slot of the labels
    length = batch["seq_mask"][0]
    found["pair_mask"] = (length[:, None] * length)[None]
    return found


def draw_parameters(part: Part) -> Arrays:
    """Random values for which no output is trivial; of no use to learn from."""
    random = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        normal = random.standard_normal(shape, np.float32)
        if name.endswith("//scale"):
            return 1 + normal / 10
        inputs = np.prod(shape[:-1]) if name.endswith("//output_w") else shape[0]
        return normal / np.sqrt(inputs) if len(shape) > 1 else normal / 10

    return {name: draw(name, shape) for name, shape in sorted(part.module.shapes().items())}


# The modules --------------------------------------------------------------------------------------

Build = Callable[[Track], Named]


def _module(
    build: Build,
    call: Callable[[Track, Any, Named], Named],
    derive: tuple[str, ...] = (),
    narrow: bool = True,
) -> Module:
    """``call`` gets the modules as attributes; ``narrow``: of the trunk."""
    return Module(
        build,
        lambda track, modules, x: call(track, SimpleNamespace(**modules), x),
        derive,
        NARROW,
        narrow=lambda name: narrow,
    )


def _of_block(config: Config, path: str, takes: tuple[str, ...], extra: bool = False) -> Module:
    """A module of the block that adds its update to the first of what it takes."""

    def build(track: Track) -> Named:
        return {"module": getattr(track.model._evoformer_block(config.model, extra), path)}

    def call(track: Track, m: Any, x: Named) -> Named:
        return {takes[0]: m.module(*(x[name] for name in takes), residual=True)}

    derive = tuple(name for name in takes if not name.endswith(("_mask", "_factor")))
    return _module(build, call, derive)


def _outer_product_mean(config: Config, msa: str, mask: str) -> Module:
    def build(track: Track) -> Named:
        block = track.model._evoformer_block(config.model, msa == "extra")
        return {"module": block.outer_product_mean}

    def call(track: Track, m: Any, x: Named) -> Named:
        return {"pair": x["pair"] + m.module(x[msa], x[mask])}

    return _module(build, call, (msa,))


def _block(config: Config) -> list[Part]:
    """What the blocks of the main stack do; the pair's part is also the extra stack's."""
    m, data, mask = config.model, config.data, "rows_mask"
    cost = flops.evoformer_block(m, data.num_msa_clusters + _count(config), data.crop_size)
    row = ("rows", "pair", mask, "rows_factor")
    found = [
        ("MSA row attention", _of_block(config, "msa_row_attention_with_pair_bias", row)),
        ("MSA column attention", _of_block(config, "msa_column_attention", ("rows", mask))),
        ("MSA transition", _of_block(config, "msa_transition", ("rows",))),
        ("outer product mean", _outer_product_mean(config, "rows", mask)),
    ]
    both = m.evoformer_blocks + m.extra_msa_blocks
    pairs = [
        Part(
            name, both, cost[" ".join(name.split()[:2])] / 2, _triangle(config, name), in_stack=True
        )
        for name in TRIANGLES
    ]
    last = _of_block(config, "pair_transition", ("pair",))
    return [
        *(
            Part(name, m.evoformer_blocks, cost[name], module, in_stack=True)
            for name, module in found
        ),
        *pairs,
        Part("pair transition", both, cost["pair transition"], last),
    ]


def _triangle(config: Config, name: str) -> Module:
    takes = ("pair", "pair_mask", TRIANGLES[name])
    return _of_block(config, name.replace(" ", "_"), takes)


def _extra_block(config: Config) -> list[Part]:
    """What the blocks of the extra MSA stack do to that MSA, and with it."""
    m, data, mask = config.model, config.data, "extra_msa_mask"
    cost = flops.extra_block(m, data.num_extra_msa, data.crop_size)
    row, column = ("extra", "pair", mask, "extra_factor"), ("extra", mask)
    found = {
        "MSA row attention": _of_block(config, "msa_row_attention_with_pair_bias", row, True),
        "MSA column attention": _of_block(config, "msa_column_global_attention", column, True),
        "MSA transition": _of_block(config, "msa_transition", ("extra",), True),
        "outer product mean": _outer_product_mean(config, "extra", mask),
    }
    return [
        Part(f"extra {name}", m.extra_msa_blocks, cost[name], module, in_stack=True)
        for name, module in found.items()
    ]


def _derived(config: Config, extra: bool) -> Part:
    """What a stack derives from the parameters of all its blocks."""
    m = config.model

    def build(track: Track) -> Named:
        block = track.model._evoformer_block(m, extra)
        column = "msa_column_global_attention" if extra else "msa_column_attention"
        rows, triangles = "msa_row_attention_with_pair_bias", "triangle_attention"
        found = {}
        for path in (rows, column, f"{triangles}_starting_node", f"{triangles}_ending_node"):
            found[path] = getattr(block, path).attention
            for name in UNREAD + (("query_w",) if path == column and extra else ()):
                delattr(found[path], name)
        for path in ("triangle_multiplication_outgoing", "triangle_multiplication_incoming"):
            found[path] = getattr(block, path)
        blocks = m.extra_msa_blocks if extra else m.evoformer_blocks
        return {name: track.stack.stack(module, blocks) for name, module in found.items()}

    def call(track: Track, m: Any, x: Named) -> Named:
        del track, x
        return {name: module.derive() for name, module in vars(m).items()}

    name = "extra weights derived" if extra else "weights derived"
    return Part(name, 1, 0.0, _module(build, call))


def _templates(c: ModelConfig, t: int, r: int) -> list[Part]:
    """The stack of the templates' pairs, and what is before and after it."""

    def embedding(track: Track) -> Any:
        return track.model.AlphaFold(c).template_embedding

    def build_stack(track: Track) -> Named:
        return {"stack": embedding(track).single_template_embedding.template_pair_stack}

    def stack(track: Track, m: Any, x: Named) -> Named:
        return {"template_pair": m.stack(x["template_pair"], x["template_pair_mask"])}

    def build_around(track: Track) -> Named:
        whole = embedding(track)
        names = ("embedding2d", "output_layer_norm")
        single = {name: getattr(whole.single_template_embedding, name) for name in names}
        return {**single, "attention": whole.attention}

    def around(track: Track, m: Any, x: Named) -> Named:
        names = ("aatype", "pseudo_beta", "pseudo_beta_mask", "all_atom_masks")
        given = [x[f"template_{name}"] for name in names]
        inputs = track.template.template_pair_features(*given, dtype=x["pair"].dtype)
        embedded = m.output_layer_norm(m.embedding2d(inputs))
        update = m.attention.to_templates(x["pair"], embedded, x["template_mask"])
        return {"pair": x["pair"] + update}

    attention = _module(build_around, around, ("pair",))
    return [
        Part(
            "template pair stack",
            1,
            flops.template_stack(c, t, r),
            _module(build_stack, stack, ("template_pair",)),
        ),
        Part("template attention", 1, flops.template_attention(c, t, r), attention),
    ]


def _around(config: Config) -> list[Part]:
    """What comes before the blocks, and after."""
    c, data, t, r = config.model, config.data, _count(config), config.data.crop_size
    heads = (*HEADS, *(["predicted_aligned_error_head"] if c.pae_enabled else []))

    def of_model(names: tuple[str, ...]) -> Build:
        def build(track: Track) -> Named:
            model = track.model.AlphaFold(c)
            return {name: getattr(model, name) for name in names}

        return build

    def structure(track: Track, m: Any, x: Named) -> Named:
        return dict(m.structure_module(x["single"], x["pair"], x))

    def losses(track: Track, m: Any, x: Named) -> Named:
        known = {name: x[name] for name in ("msa", "pair", "single", *STRUCTURE)}
        m.pae_enabled = c.pae_enabled
        outputs = known | track.model.AlphaFold._heads(m, known)
        return {"loss": track.losses.alphafold_loss(outputs, x, config.loss)[0]}

    derive = ("msa", "pair", "single", *STRUCTURE)
    embedders = (*EMBEDDERS, *(["template_angle_embedder"] if t else []))
    embed = partial(_embed, templates=t > 0)
    embedding = flops.embedders(c, data) + (flops.template_rows(c, t, r) if t else 0)
    folding = _module(of_model(("structure_module",)), structure, ("single", "pair"), narrow=False)
    judging = _module(of_model(heads), losses, derive, narrow=False)
    return [
        Part("structure module", 1, flops.structure_module(c, r), folding),
        Part("heads and losses", 1, flops.heads(c, data), judging, every_pass=False),
        Part("embedders", 1, embedding, _module(of_model(embedders), embed)),
    ]


def _embed(track: Track, m: Any, x: Named, templates: bool) -> Named:
    """The first representations of a pass."""
    msa, pair = m.input_embedder(x["target_feat"], x["residue_index"], x["msa_feat"])
    names = ("prev_msa_first_row", "prev_pair", "prev_pos")
    row, update = m.recycling_embedder(x["aatype"], *(x[name] for name in names))
    rows = [msa[:, :1] + row[:, None], msa[:, 1:]]
    if templates:
        names = ("template_aatype", "template_all_atom_positions", "template_all_atom_masks")
        rows.append(m.template_angle_embedder(*(x[name] for name in names))[0])
    names = ("extra_msa", "extra_has_deletion", "extra_deletion_value")
    extra = m.extra_msa_embedder(*(x[name] for name in names))
    return {"rows": track.concatenate(rows, 1), "pair": pair + update, "extra": extra}
