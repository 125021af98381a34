"""Level 1, part one: every module of the published network, by itself, at its real widths.

The names are also those of ``parity.oracle.modules``, which has DeepMind's side of each.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from foldcore.config import ModelConfig
from parity import example
from parity.case import Case, Change, disturb, flip, rounded, scale, swap_axes, unmask
from parity.module_run import Module, jax_run, torch_run
from parity.tracks import TRUNK, Arrays, Named, Track

EXAMPLES = 2
CONFIG = ModelConfig(
    evoformer_blocks=2,
    extra_msa_blocks=1,
    template_blocks=1,
    structure_iterations=2,
    pae_enabled=True,
    matmul_precision="ieee",
)
LAST = CONFIG.evoformer_blocks - 1
BLOCK, EXTRA_BLOCK = "evoformer/evoformer_iteration", "evoformer/extra_msa_stack"
TEMPLATES = "evoformer/template_embedding"
PAIR_STACK = f"{TEMPLATES}/single_template_embedding/template_pair_stack"
FOLD = "structure_module/fold_iteration"
ATTENTION = f"{FOLD}/invariant_point_attention"
TEMPLATE_ATOMS = ("template_aatype", "template_all_atom_positions", "template_all_atom_masks")
RECYCLED = ("prev_msa_first_row", "prev_pair", "prev_pos")
EMBEDDERS = (
    *("preprocess_1d", "left_single", "extra_msa_activations", "preprocess_msa", "right_single"),
    *("pair_activiations", "prev_pos_linear", "prev_msa_first_row_norm", "prev_pair_norm"),
)
NARROW = ("msa", "extra", "pair", "single", "initial", "small_pair", *RECYCLED[:2])
_WEIGHTS = ("weights", "output_w", "feat_2d_weights", "query_w", "key_w", "value_w", "gating_w")
_PAE = "predicted_aligned_error_head/logits//"
Call = Callable[[Track, Any, Named], Named]


def make_parameters() -> Arrays:
    """Parameters of the whole network for which no output is trivial.

    The first two bins of the aligned error are tied. On the diagonal that error is zero but for
    round-off, which decides between these bins: with equal logits the choice makes no difference.
    """
    return dict(_parameters())


@functools.cache
def _parameters() -> Arrays:
    shapes = Module(lambda track: {"": track.model_of(CONFIG)}, _no_call).shapes()
    random = np.random.default_rng(0)
    parameters = {name: draw_parameter(random, name, shapes[name]) for name in sorted(shapes)}
    for leaf in ("weights", "bias"):
        parameters[_PAE + leaf][..., 1] = parameters[_PAE + leaf][..., 0]
    return parameters


def draw_parameter(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter of the network that makes every output matter."""
    scope, leaf = name.split("//")
    normal = random.standard_normal(shape)
    if leaf == "scale":
        return rounded(1 + 0.1 * normal)
    if leaf not in _WEIGHTS:
        return rounded(0.1 * normal)
    stacked = any(stack in scope for stack in ("evoformer_iteration", "extra_msa_stack", "__layer"))
    layer = shape[1:] if stacked else shape
    inputs = np.prod(layer[:-1]) if leaf == "output_w" else layer[0]
    return rounded(normal / np.sqrt(inputs))


@functools.cache
def make_inputs() -> Arrays:
    """Two examples as features of one recycling pass, with random activations."""
    passes = [example.one_pass(example.make_batch(seed)) for seed in range(EXAMPLES)]
    x = {name: np.stack([each[name] for each in passes]) for name in passes[0]}
    x["template_mask"][1] = 0  # an example without templates
    random = np.random.default_rng(3)
    s, e, r = (example.SIZES[name] for name in "ser")
    shapes = {
        "msa": (s, r, CONFIG.c_m),
        "extra": (e, r, CONFIG.c_e),
        "pair": (r, r, CONFIG.c_z),
        "single": (r, CONFIG.c_s),
        "initial": (r, CONFIG.c_s),
        "small_pair": (r, r, CONFIG.c_t),
        "frames": (r, 7),
        "points": (r, 3),
        "error_logits": (r, r, 64),
        "lddt_logits": (r, 50),
        "prev_msa_first_row": (r, CONFIG.c_m),
        "prev_pair": (r, r, CONFIG.c_z),
        "prev_pos": (r, 37, 3),
    }
    for name, shape in shapes.items():
        x[name] = rounded(random.standard_normal((EXAMPLES, *shape)))
    x["frames"][..., :4] /= np.linalg.norm(x["frames"][..., :4], axis=-1, keepdims=True)
    x["points"], x["prev_pos"] = 10 * x["points"], 10 * x["prev_pos"]  # angstrom
    x["extra_mask"] = x["extra_msa_mask"]
    x["pair_mask"] = x["seq_mask"][:, :, None] * x["seq_mask"][:, None]
    return x


def real(kind: str, inputs: Arrays) -> np.ndarray:
    """Which elements are no padding; the first word of ``kind`` names the leading axes."""
    residues, axes = inputs["seq_mask"] > 0, kind.split()[0].removeprefix("small_")
    if axes in ("pair", "prev_pair"):
        return residues[:, :, None] & residues[:, None]
    if axes in ("msa", "extra"):
        rows = np.asarray((inputs[f"{axes}_mask"] > 0).any(axis=-1))
        return rows[:, :, None] & residues[:, None]
    if axes == "templates":
        count = inputs["template_aatype"].shape[1]
        return np.repeat(residues[:, None], count, axis=1)
    if axes == "triads":  # of residues with all three atoms: others have no direction
        return residues & (inputs["all_atom_mask"][..., :3] > 0).all(axis=-1)
    return np.ones(len(residues), bool) if axes == "whole" else residues


# Calls --------------------------------------------------------------------------------------------


def _no_call(track: Track, model: Any, x: Named) -> Named:
    raise AssertionError("only its parameters are of interest")


def _part(track: Track, model: Any, path: str, extra: bool) -> Callable[..., Any]:
    stack = model.extra_msa_stack if extra else model.evoformer
    return track.part(stack.blocks, 0 if extra else LAST, path)


def _block_part(path: str, kind: str, takes: tuple[str, ...]) -> Call:
    def call(track: Track, model: Any, x: Named) -> Named:
        module = _part(track, model, path, "extra" in takes)
        return {kind: module(*(x[name] for name in takes))}

    return call


def _block(kind: str) -> Call:
    def call(track: Track, model: Any, x: Named) -> Named:
        block = _part(track, model, "", kind == "extra")
        msa, pair = block(x[kind], x["pair"], x[f"{kind}_mask"], x["pair_mask"])
        return {kind: msa, "pair": pair}

    return call


def _embeddings(track: Track, model: Any, x: Named) -> Named:
    msa, pair = model.input_embedder(x["target_feat"], x["residue_index"], x["msa_feat"])
    row, update = model.recycling_embedder(x["aatype"], *(x[name] for name in RECYCLED))
    extra = (x[name] for name in ("extra_msa", "extra_has_deletion", "extra_deletion_value"))
    return {
        "msa": track.concatenate([msa[:, :1] + row[:, None], msa[:, 1:]], 1),
        "pair": pair + update,
        "extra": model.extra_msa_embedder(*extra),
    }


def _template_rows(track: Track, model: Any, x: Named) -> Named:
    return {"templates": model.template_angle_embedder(*(x[name] for name in TEMPLATE_ATOMS))[0]}


def _template_embedding(track: Track, model: Any, x: Named) -> Named:
    names = ("aatype", "pseudo_beta", "pseudo_beta_mask", "all_atom_masks", "mask")
    features = (x[f"template_{name}"] for name in names)
    return {"pair": model.template_embedding(x["pair"], x["pair_mask"], *features)}


def _pair_stack(track: Track, model: Any, x: Named) -> Named:
    stack = model.template_embedding.single_template_embedding.template_pair_stack
    return {"small_pair": stack(x["small_pair"], x["pair_mask"])}


def _bins(track: Track, model: Any, x: Named) -> Named:
    wide = x["points"].dtype
    return {"pair bins": track.embedders.distance_bins(x["points"], 3.25, 50.75, 39, wide)}


def _attention(track: Track, model: Any, x: Named) -> Named:
    module = model.structure_module.fold_iteration.invariant_point_attention
    frames = track.rigid.rigid_from_quaternion(x["frames"])
    return {"single": module(x["single"], module.prepare(x["pair"], x["seq_mask"]), frames)}


def _fold_iteration(track: Track, model: Any, x: Named) -> Named:
    module, frames = model.structure_module.fold_iteration, x["frames"]
    shared = module.invariant_point_attention.prepare(x["pair"], x["seq_mask"])
    rigid = track.rigid.rigid_from_quaternion(frames)
    single, update = module(x["single"], shared, rigid)
    moved = track.structure_module.backbone_update(frames[..., :4], frames[..., 4:], update)
    return {"single": single, "single frames": track.concatenate(moved, -1)}


def _sidechain(track: Track, model: Any, x: Named) -> Named:
    module = model.structure_module.fold_iteration.rigid_sidechain
    angles, raw = module(x["single"], x["initial"])
    frames = track.rigid.rigid_from_quaternion(x["frames"])
    scale = track.structure_module.POSITION_SCALE
    backbone = track.rigid.Rigid(frames.rotation, frames.translation * scale)
    groups = track.rigid.torsion_angles_to_frames(x["aatype"], backbone, angles)
    return {
        "single angles": angles,
        "single raw angles": raw,
        "single rotations": groups.rotation,
        "single origins": groups.translation,
        "single atoms": track.rigid.frames_to_atom14(x["aatype"], groups),
    }


def _structure(track: Track, model: Any, x: Named) -> Named:
    outputs = model.structure_module(x["single"], x["pair"], x)
    return {
        "single": outputs["structure_module_single"],
        "single frames": track.moveaxis(outputs["traj"], 0, 2),
        "single atoms": outputs["final_atom37_positions"],
    }


def _torsions(track: Track, model: Any, x: Named) -> Named:
    torsions = track.rigid.torsion_angles_from_atom37(*(x[name] for name in TEMPLATE_ATOMS))
    return {
        "templates": torsions.sin_cos,
        "templates alternative": torsions.alt_sin_cos,
        "templates mask": torsions.mask,
    }


def _three_points(track: Track, model: Any, x: Named) -> Named:
    points = [x["all_atom_positions"][..., atom, :] for atom in (0, 1, 2)]
    frames = track.rigid.rigid_from_3_points(*points)
    return {"triads": frames.rotation, "triads origins": frames.translation}


def _head(name: str, kind: str) -> Call:
    return lambda track, model, x: {kind: getattr(model, name)(x[kind])}


def _confidences(track: Track, model: Any, x: Named) -> Named:
    heads = track.heads
    return {
        "single": heads.compute_plddt(x["lddt_logits"]),
        "pair": heads.compute_predicted_aligned_error(x["error_logits"]),
        "whole": heads.predicted_tm_score(x["error_logits"], x["seq_mask"]),
    }


# The cases ----------------------------------------------------------------------------------------

LOW, HIGH = ("float64", "float32", "bfloat16"), ("float64", "float32")


def _case(
    name: str,
    call: Call,
    scopes: str | tuple[str, ...] = (),
    derive: tuple[str, ...] = (),
    mutate: Change | None = None,
    perturbed: tuple[str, ...] = (),
) -> Case:
    """``scopes`` are DeepMind's names of the parts whose parameters matter."""
    scopes = (scopes,) if isinstance(scopes, str) else scopes

    def build(track: Any) -> dict[str, Any]:
        return {"": track.model_of(CONFIG)} if scopes else {}

    module = Module(build, lambda t, m, x: call(t, m.get(""), x), derive, NARROW, real=real)

    def make() -> tuple[Arrays, dict[str, Arrays]]:
        everything = make_parameters()
        names = [n for n in everything if any(in_scope(n, s) for s in scopes)]
        return {n: everything[n] for n in names}, {"": make_inputs()}

    def oracle() -> Any:
        from parity.oracle import modules

        return modules.run(name, module)

    return Case(
        name=name,
        level=1,
        make=make,
        jax=functools.partial(jax_run, module),
        torch=functools.partial(torch_run, module),
        mutate=mutate or flip(),
        oracle=oracle,
        # what follows the trunk computes in at least float32
        dtypes=LOW if scopes and scopes[0].startswith(TRUNK) else HIGH,
        perturbed_inputs=(*derive, *perturbed),
        narrow_inputs=NARROW,
    )


def in_scope(name: str, scope: str) -> bool:
    """Whether a parameter belongs to a scope or one below."""
    path = name.partition("//")[0]
    return path == scope or path.startswith(scope + "/")


def _trunk_parts() -> list[Case]:
    msa, extra, pair = ((kind, f"{kind}_mask") for kind in ("msa", "extra", "pair"))
    row = "msa_row_attention_with_pair_bias"
    turned, transition = swap_axes("pair"), "msa_transition"
    parts: list[tuple[str, str, tuple[str, ...], Change]] = [
        (row, "msa", ("msa", "pair", "msa_mask"), unmask("msa_mask")),
        (f"extra {row}", "extra", ("extra", "pair", "extra_mask"), turned),
        ("msa_column_attention", "msa", msa, unmask("msa_mask")),
        ("msa_column_global_attention", "extra", extra, unmask("extra_mask")),
        (transition, "msa", msa[:1], flip(f"{BLOCK}/{transition}/transition1//weights")),
        ("outer_product_mean", "pair", msa, flip()),
        ("triangle_multiplication_outgoing", "pair", pair, turned),
        ("triangle_multiplication_incoming", "pair", pair, turned),
        ("triangle_attention_starting_node", "pair", pair, turned),
        ("triangle_attention_ending_node", "pair", pair, unmask("pair_mask")),
        ("pair_transition", "pair", pair[:1], scale(1.25)),
    ]
    cases = []
    for name, kind, takes, mutate in parts:
        path = name.removeprefix("extra ")
        scope = f"{EXTRA_BLOCK if 'extra' in takes else BLOCK}/{path}"
        derive = tuple(take for take in takes if "mask" not in take)
        cases.append(_case(name, _block_part(path, kind, takes), scope, derive, mutate))
    return cases


def cases() -> list[Case]:
    """Of all modules and geometric functions."""
    transition = "msa_transition/transition1//weights"
    embedders = tuple(f"evoformer/{name}" for name in EMBEDDERS)
    angles = tuple(f"evoformer/template_{name}" for name in ("projection", "single_embedding"))
    heads = (
        ("distogram_head", "pair"),
        ("masked_msa_head", "msa"),
        ("experimentally_resolved_head", "single"),
        ("predicted_lddt_head", "single"),
        ("predicted_aligned_error_head", "pair"),
    )
    structure = ("single", "pair", "frames")
    blocks = {scope: flip(f"{scope}/{transition}") for scope in (BLOCK, EXTRA_BLOCK)}
    sidechain = ("single", "initial", "frames")
    atoms = disturb(*TEMPLATE_ATOMS[1:])
    corners = ("all_atom_positions",)
    logits = ("error_logits", "lddt_logits")
    return [
        *_trunk_parts(),
        _case("evoformer block", _block("msa"), BLOCK, ("msa", "pair"), blocks[BLOCK]),
        _case("extra MSA block", _block("extra"), EXTRA_BLOCK, ("extra", "pair"),
              blocks[EXTRA_BLOCK]),
        _case("embedders", _embeddings, embedders, RECYCLED[:2],
              flip(*(f"{scope}//weights" for scope in embedders[:3])), ("msa_feat", "target_feat")),
        _case("template_angle_embedder", _template_rows, angles, (), flip(f"{angles[0]}//weights")),
        _case("template_embedding", _template_embedding, TEMPLATES, ("pair",)),
        _case("template_pair_stack", _pair_stack, PAIR_STACK, ("small_pair",)),
        _case("distance bins", _bins, mutate=disturb("points"), perturbed=("points",)),
        _case("invariant_point_attention", _attention, ATTENTION, structure),
        _case("fold_iteration", _fold_iteration, FOLD, structure),
        _case("rigid_sidechain", _sidechain, f"{FOLD}/rigid_sidechain", sidechain),
        _case("structure_module", _structure, "structure_module", ("single", "pair")),
        _case("torsions from atoms", _torsions, mutate=atoms, perturbed=TEMPLATE_ATOMS[1:2]),
        _case("frame from three points", _three_points, (), corners, disturb(*corners)),
        *(_case(name, _head(name, kind), name, (kind,)) for name, kind in heads),
        # the scale of the TM-score, which no input moves, cancels nine tenths of itself: float32 is
        # off by more than moving the logits shows
        replace(_case("confidences", _confidences, (), logits, disturb(*logits)), dtypes=LOW[:1]),
    ]  # fmt: skip
