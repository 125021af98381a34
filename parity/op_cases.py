"""Level 1, part two: operations, primitives and stacks, with dropout, which have no published twin.

Random inputs of few channels; ``mask`` in a name stands for zeros and ones.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from parity import example
from parity.case import Case, Change, disturb, draw, flip, scale, swap_axes, unmask
from parity.module_run import Module, jax_run, torch_run
from parity.tracks import DTYPES, Arrays, Named, Track

SEED = 2**32 - 3  # more than 31 bits
WIDE = DTYPES[:2]  # of what computes in at least float32
Shapes = dict[str, tuple[int, ...]]
Call = Callable[[Track, Named, Named], Any]


def no_modules(track: Track) -> Named:
    """For a case without parameters."""
    return {}


def key_of(track: Track, x: Named) -> Any:
    """Dropout of one step."""
    seed = np.uint32(SEED) if track.is_jax else SEED
    return track.primitives.DropoutKey(seed, x["step"], x["example_id"])


def draw_inputs(shapes: Shapes) -> Arrays:
    """Random arrays, and what dropout depends on."""
    found = {n: draw(n, s) > -0.5 if "mask" in n else draw(n, s) for n, s in shapes.items()}
    inputs = {n: array.astype(np.float32) for n, array in found.items()}
    examples = max((shape[0] for shape in shapes.values()), default=1)
    ids = np.array([-5, 77], np.int32)[:examples]
    return inputs | {"step": np.array(12, np.int32), "example_id": ids}


def _case(
    name: str,
    build: Callable[[Track], Named],
    call: Call,
    shapes: Shapes,
    mutate: Change,
    features: Callable[[], Arrays] = dict,
    dtypes: tuple[str, ...] = DTYPES,
) -> Case:
    narrow = "bfloat16" in dtypes
    derive = tuple(name for name in shapes if "mask" not in name)
    module = Module(build, call, derive, derive if narrow else (), lambda name: narrow)

    def make() -> tuple[Arrays, dict[str, Arrays]]:
        parameters = {n: _weights(n, shape) for n, shape in module.shapes().items()}
        return parameters, {"": draw_inputs(shapes) | features()}

    return Case(
        name=name,
        level=1,
        make=make,
        jax=functools.partial(jax_run, module),
        torch=functools.partial(torch_run, module),
        mutate=mutate,
        dtypes=dtypes,
        narrow_parameters=lambda name: narrow,
        perturbed_inputs=derive,
        narrow_inputs=derive if narrow else (),
    )


def _weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights with which every part of a module matters."""
    return draw(name, shape, 0.25) + np.float32(name.endswith("//scale"))


# Operations ---------------------------------------------------------------------------------------

_ATTENTION: Shapes = {
    "projected": (2, 5, 5, 4, 2, 6),
    "gate": (2, 6),
    "bias": (2, 2, 5, 5),
    "mask": (2, 5, 5),
}
_PAIRS: Shapes = {"pair": (2, 5, 5, 3), "other": (2, 5, 5, 3)}


def _attention(track: Track, modules: Named, x: Named) -> Named:
    """Along both axes of a square table; without keys, a query attends to all alike."""
    mask, given, attend = x["mask"], (x["projected"], x["gate"]), track.ops.gated_attention
    return {
        "biased": attend(*given, mask, x["bias"], scale=0.4),
        "unbiased": attend(*given, mask),
        "along columns": attend(*given, mask, axis=1),
        "without keys": attend(*given, 0 * mask, x["bias"]),
    }


def _template_attention(track: Track, modules: Named, x: Named) -> Named:
    mask, given, attend = x["mask"], (x["q"], x["kv"]), track.ops.template_attention
    return {
        "some templates": attend(*given, mask, scale=0.4),
        "no template": attend(*given, 0 * mask),
    }


def _global_attention(track: Track, modules: Named, x: Named) -> Named:
    """Along both axes of a square table; also with groups that have no key."""
    ops, mask, found = track.ops, x["mask"], {}
    for axis in (1, 2):
        projected, mean = ops.project_with_mean(x["x"], mask, x["weights"], axis=axis)
        given = mean.reshape(*x["q"].shape) + x["q"], projected, x["bias"]
        found[f"mean over {axis}"] = mean
        found[f"along {axis}"] = ops.global_attention(*given, mask, axis=axis, scale=0.4)
        found[f"along {axis}, without keys"] = ops.global_attention(*given, 0 * mask, axis=axis)
    return found


def _op_cases() -> list[Case]:
    norm: Shapes = {"x": (2, 5, 5, 6), "scale": (6,), "offset": (6,)}
    shared: Shapes = {
        **{"x": (2, 5, 5, 6), "q": (2, 5, 2, 3), "weights": (6, 12), "bias": (2, 3)},
        **{"mask": (2, 5, 5)},
    }
    pairs: Shapes = {"q": (2, 3, 5, 2, 6), "kv": (2, 4, 3, 5, 2, 2, 6), "mask": (2, 4)}
    outer: Shapes = {
        **{"left": (2, 5, 5, 3), "right": (2, 5, 5, 4), "mask": (2, 5, 5)},
        **{"weights": (3, 4, 3), "bias": (3,)},
    }
    return [
        _case(
            "op layer_norm",
            no_modules,
            lambda t, m, x: t.ops.layer_norm(x["x"], x["scale"], x["offset"]),
            norm,
            disturb("scale"),
        ),
        _case("op gated_attention", no_modules, _attention, _ATTENTION, unmask("mask")),
        _case("op global_attention", no_modules, _global_attention, shared, unmask("mask")),
        _case("op template_attention", no_modules, _template_attention, pairs, unmask("mask")),
        _case(
            "op triangle_product",
            no_modules,
            lambda t, m, x: {
                way: t.ops.triangle_product(x["pair"], x["other"], way == "outgoing")
                for way in ("outgoing", "incoming")
            },
            _PAIRS,
            swap_axes("other"),
        ),
        _case(
            "op outer_product_mean",
            no_modules,
            lambda t, m, x: t.ops.outer_product_mean(*(x[name] for name in outer)),
            outer,
            unmask("mask"),
        ),
    ]


# Primitives and geometry --------------------------------------------------------------------------


def _primitives(track: Track) -> Named:
    p = track.primitives
    return {
        "linear": p.Linear(6, 3),
        "layer_norm": p.LayerNorm(6),
        "attention": p.Attention(6, 6, 6, 2, 3),
        "ungated": p.Attention(6, 5, 6, 2, 3, gating=False),
        "global_attention": p.GlobalAttention(6, 2, 3),
        "transition": p.Transition(6, 2),
    }


def _call_primitives(track: Track, modules: Named, x: Named) -> Named:
    q, attention = x["q"], modules["attention"]
    return {
        "linear": modules["linear"](x["q"]),
        "layer_norm": modules["layer_norm"](x["q"]),
        "attention": attention.within(attention.project(q), x["q_mask"], q, x["bias"]),
        "ungated": modules["ungated"].to_templates(q, x["kv"], x["mask"]),
        "global_attention": modules["global_attention"](x["q"], x["q_mask"], x["q"]),
        "transition": modules["transition"](x["q"]),
    }


def _dropout(track: Track, modules: Named, x: Named) -> Named:
    key, drop = key_of(track, x), track.primitives.dropout
    inner = key.enter("outer").enter("inner", 3).at_pass(2).repeat(2)
    return {
        "plain": drop(x["q"], 0.3, key, "update"),
        "shared": drop(x["q"], 0.15, key, "update", shared_axis=1),
        "repeated": drop(x["four"], 0.5, inner, "update", shared_axis=2),
    }


def _other_step(parameters: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
    return parameters, {**inputs, "step": inputs["step"] + 1}


def _rigid(track: Track, modules: Named, x: Named) -> Named:
    r = track.rigid
    unit = x["quaternion"] / (x["quaternion"] ** 2).sum(-1)[..., None] ** 0.5
    frames = r.Rigid(r.quaternion_to_rotation(unit), x["translation"])
    other = r.rigid_from_3_points(x["a"], x["b"], x["c"])
    groups = r.torsion_angles_to_frames(x["aatype"], frames, x["angles"])
    atom14 = r.frames_to_atom14(x["aatype"], groups)
    slots, exists = x["residx_atom37_to_atom14"], x["atom37_atom_exists"]
    return {
        "composed": frames.compose(other.invert()),
        "local": frames[..., None].invert_apply(x["a"][:, None]),
        "product": r.multiply_by_vector(x["quaternion"], x["a"]),
        "flat": r.rigid_from_flat12(x["flat"]),
        "atom37": r.atom14_to_atom37(atom14, slots, exists),
    }


def _features(*names: str) -> Callable[[], Arrays]:
    return lambda: {name: example.make_batch()[name] for name in names}


def _primitive_cases() -> list[Case]:
    shapes: Shapes = {
        **{"q": (2, 3, 4, 6), "kv": (2, 5, 3, 4, 5), "bias": (2, 2, 4, 4)},
        **{"mask": (2, 5), "q_mask": (2, 3, 4)},
    }
    geometry: Shapes = {
        **{"quaternion": (1, 16, 4), "translation": (1, 16, 3), "flat": (1, 16, 12)},
        **{"a": (1, 16, 3), "b": (1, 16, 3), "c": (1, 16, 3), "angles": (1, 16, 7, 2)},
    }
    slots = _features("aatype", "residx_atom37_to_atom14", "atom37_atom_exists")
    moved = disturb("quaternion", "a", "flat", "angles")
    return [
        _case("primitives", _primitives, _call_primitives, shapes, scale(1.25)),
        _case(
            "dropout",
            no_modules,
            _dropout,
            {"q": (2, 3, 4, 6), "four": (4, 3, 4, 6)},
            _other_step,
            features=lambda: {"example_id": np.array([-5, 77], np.int32)},
        ),
        _case("rigid", no_modules, _rigid, geometry, moved, slots, WIDE),
    ]


# Stacks, with dropout -----------------------------------------------------------------------------

BLOCK = {
    "msa_heads": 2,
    "msa_head_dim": 3,
    "pair_heads": 2,
    "pair_head_dim": 3,
    "outer_product_hidden": 3,
    "triangle_hidden": 5,
    "transition_factor": 2,
    "msa_dropout": 0.15,
    "pair_dropout": 0.25,
}
_STACK: Shapes = {
    "msa": (2, 3, 5, 6),
    "pair": (2, 5, 5, 4),
    "msa_mask": (2, 3, 5),
    "pair_mask": (2, 5, 5),
}


def evoformer(track: Track, recompute: str = "none") -> Named:
    """A stack of two small blocks."""
    block = track.evoformer.EvoformerBlock(6, 4, **BLOCK)
    return {"stack": track.evoformer.EvoformerStack(block, 2, 6, 5, recompute=recompute)}


def call_stack(track: Track, modules: Named, x: Named) -> Any:
    """With dropout."""
    masks = x["msa_mask"], x["pair_mask"]
    return modules["stack"](x["msa"], x["pair"], *masks, key_of(track, x))


def _extra_stack(track: Track) -> Named:
    block = track.evoformer.EvoformerBlock(6, 4, **BLOCK, global_column_attention=True)
    return {"stack": track.evoformer.ExtraMSAStack(block, 2)}


def _templates(track: Track) -> Named:
    t = track.template
    block = t.TemplatePairBlock(
        6, num_heads=2, c_hidden=3, triangle_hidden=5, transition_factor=2, dropout_rate=0.25
    )
    return {"templates": t.TemplateEmbedding(4, 6, 2, 3, t.TemplatePairStack(block, 2))}


def _call_templates(track: Track, modules: Named, x: Named) -> Any:
    names = ("aatype", "pseudo_beta", "pseudo_beta_mask", "all_atom_masks", "mask")
    features = (x[f"template_{name}"] for name in names)
    return modules["templates"](x["pair"], x["pair_mask"], *features, key_of(track, x))


def _structure(track: Track) -> Named:
    return {
        "structure": track.structure_module.StructureModule(
            6,
            4,
            num_iterations=3,
            num_heads=2,
            c_hidden=3,
            num_query_points=2,
            num_value_points=3,
            sidechain_channels=5,
            dropout_rate=0.1,
        )
    }


def _call_structure(track: Track, modules: Named, x: Named) -> Any:
    return modules["structure"](x["single"], x["pair"], x, key_of(track, x))


def _stack_cases() -> list[Case]:
    templates = ("aatype", "pseudo_beta", "pseudo_beta_mask", "all_atom_masks", "mask")
    atoms = ("aatype", "residx_atom37_to_atom14", "atom37_atom_exists")
    pair: Shapes = {"pair": (1, 16, 16, 4)}
    return [
        _case("evoformer stack with dropout", evoformer, call_stack, _STACK, flip()),
        _case("extra MSA stack with dropout", _extra_stack, call_stack, _STACK, _other_step),
        _case(
            "template embedding with dropout",
            _templates,
            _call_templates,
            pair | {"pair_mask": (1, 16, 16)},
            _other_step,
            _features(*(f"template_{name}" for name in templates)),
        ),
        _case(
            "structure module with dropout",
            _structure,
            _call_structure,
            pair | {"single": (1, 16, 6)},
            flip(),
            # the mask's large negative number would cost padding its last digits in float32
            lambda: _features(*atoms)() | {"seq_mask": np.ones((1, 16), np.float32)},
            WIDE,
        ),
    ]


def cases() -> list[Case]:
    """Of everything below the modules, and of stacks of them with dropout."""
    return [*_op_cases(), *_primitive_cases(), *_stack_cases()]
