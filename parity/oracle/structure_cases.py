"""Cases of the structure module, of the geometry below it, and of the heads."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfold import heads, rigid
from jaxfold.model import AlphaFold
from jaxfold.rigid import Rigid, rigid_from_quaternion
from jaxfold.structure_module import POSITION_SCALE, backbone_update
from parity.oracle import published
from parity.oracle.case import Case, Inputs, Outputs
from parity.oracle.published import all_atom, confidence, folding, modules, quat_affine, r3

CONFIG = published.tiny_config()
GLOBAL = CONFIG.global_config
STRUCTURE = CONFIG.heads.structure_module
BREAKS = np.linspace(0.0, 31.0, 63)  # between the bins of the aligned error, angstrom

TEMPLATE = ("template_aatype", "template_all_atom_positions", "template_all_atom_masks")

_FOLD = "structure_module/fold_iteration"


def _affine(x: Inputs) -> Any:
    return quat_affine.QuatAffine.from_tensor(x["frames"])


def _matrices(rotations: Any) -> Any:
    matrices = jnp.stack(rotations, axis=-1)
    return matrices.reshape(*matrices.shape[:-1], 3, 3)


# Structure module ---------------------------------------------------------------------------------


def _attention(params: published.Params, x: Inputs) -> Outputs:
    update = published.apply_part(
        lambda: folding.InvariantPointAttention(STRUCTURE, GLOBAL, name="part"),
        params,
        inputs_1d=x["single"],
        inputs_2d=x["pair"],
        mask=x["seq_mask"][:, None],
        affine=_affine(x),
    )
    return {"single": update}


def _our_attention(model: AlphaFold, x: Inputs) -> Outputs:
    module = model.structure_module.fold_iteration.invariant_point_attention
    frames = rigid_from_quaternion(x["frames"])
    bias = module.attention_2d(x["pair"])
    return {"single": module(x["single"], x["pair"], bias, x["seq_mask"], frames)}


def _fold_iteration(params: published.Params, x: Inputs) -> Outputs:
    activations, outputs = published.apply_part(
        lambda: folding.FoldIteration(STRUCTURE, GLOBAL, name="part"),
        params,
        {"act": x["single"], "affine": x["frames"]},
        sequence_mask=x["seq_mask"][:, None],
        update_affine=True,
        is_training=True,
        initial_act=x["initial"],
        static_feat_2d=x["pair"],
        aatype=x["aatype"],
    )
    return {"single": activations["act"], "single frames": outputs["affine"]}


def _our_fold_iteration(model: AlphaFold, x: Inputs) -> Outputs:
    module = model.structure_module.fold_iteration
    bias = module.invariant_point_attention.attention_2d(x["pair"])
    frames = rigid_from_quaternion(x["frames"])
    single, update = module(x["single"], x["pair"], bias, x["seq_mask"], frames)
    moved = backbone_update(x["frames"][..., :4], x["frames"][..., 4:], update)
    return {"single": single, "single frames": jnp.concatenate(moved, axis=-1)}


def _sidechain(params: published.Params, x: Inputs) -> Outputs:
    placed = published.apply_part(
        lambda: folding.MultiRigidSidechain(STRUCTURE.sidechain, GLOBAL, name="part"),
        params,
        _affine(x).scale_translation(POSITION_SCALE),
        [x["single"], x["initial"]],
        x["aatype"],
    )
    return {
        "single angles": placed["angles_sin_cos"],
        "single raw angles": placed["unnormalized_angles_sin_cos"],
        "single rotations": _matrices(placed["frames"].rot),
        "single origins": r3.vecs_to_tensor(placed["frames"].trans),
        "single atoms": r3.vecs_to_tensor(placed["atom_pos"]),
    }


def _our_sidechain(model: AlphaFold, x: Inputs) -> Outputs:
    module = model.structure_module.fold_iteration.rigid_sidechain
    angles, raw = module(x["single"], x["initial"])
    frames = rigid_from_quaternion(x["frames"])
    backbone = Rigid(frames.rotation, frames.translation * POSITION_SCALE)
    groups = rigid.torsion_angles_to_frames(x["aatype"], backbone, angles)
    return {
        "single angles": angles,
        "single raw angles": raw,
        "single rotations": groups.rotation,
        "single origins": groups.translation,
        "single atoms": rigid.frames_to_atom14(x["aatype"], groups),
    }


def _structure(params: published.Params, x: Inputs) -> Outputs:
    representations = {"single": x["single"], "pair": x["pair"]}
    returned = published.apply_part(
        lambda: folding.StructureModule(STRUCTURE, GLOBAL, name="part"),
        params,
        representations,
        dict(x),
        is_training=True,
    )
    return {
        "single": representations["structure_module"],
        "single frames": jnp.moveaxis(returned["traj"], 0, 1),
        "single atoms": returned["final_atom_positions"],
    }


def _our_structure(model: AlphaFold, x: Inputs) -> Outputs:
    outputs = model.structure_module(x["single"], x["pair"], x)
    return {
        "single": outputs["structure_module_single"],
        "single frames": jnp.moveaxis(outputs["traj"], 0, 2),
        "single atoms": outputs["final_atom37_positions"],
    }


# Geometry -----------------------------------------------------------------------------------------


def _torsions(params: published.Params, x: Inputs) -> Outputs:
    del params
    torsions = all_atom.atom37_to_torsion_angles(
        *(x[name] for name in TEMPLATE), placeholder_for_undefined=False
    )
    return {
        "templates": torsions["torsion_angles_sin_cos"],
        "templates alternative": torsions["alt_torsion_angles_sin_cos"],
        "templates mask": torsions["torsion_angles_mask"],
    }


def _our_torsions(model: AlphaFold, x: Inputs) -> Outputs:
    del model
    torsions = rigid.torsion_angles_from_atom37(*(x[name] for name in TEMPLATE))
    return {
        "templates": torsions.sin_cos,
        "templates alternative": torsions.alt_sin_cos,
        "templates mask": torsions.mask,
    }


def _three_points(params: published.Params, x: Inputs) -> Outputs:
    del params
    points = [r3.vecs_from_tensor(x["all_atom_positions"][:, atom]) for atom in (0, 1, 2)]
    frames = r3.rigids_from_3_points(*points)
    return {"single": _matrices(frames.rot), "single origins": r3.vecs_to_tensor(frames.trans)}


def _our_three_points(model: AlphaFold, x: Inputs) -> Outputs:
    del model
    points = [x["all_atom_positions"][..., atom, :] for atom in (0, 1, 2)]
    frames = rigid.rigid_from_3_points(*points)
    return {"single": frames.rotation, "single origins": frames.translation}


# Heads --------------------------------------------------------------------------------------------


def _head(name: str, cls: Callable[..., Any], takes: str, ours_name: str, kind: str) -> Case:
    def oracle(params: published.Params, x: Inputs) -> Outputs:
        value = published.apply_part(
            lambda: cls(CONFIG.heads[name], GLOBAL, name="part"),
            params,
            {takes: x["single" if takes == "structure_module" else takes]},
            {**x, "msa_feat": x["msa"]},
            is_training=True,
        )
        return {kind: value["logits"]}

    def mine(model: AlphaFold, x: Inputs) -> Outputs:
        return {kind: getattr(model, ours_name)(x[kind])}

    return Case(oracle, mine, ours_name)


def _confidence(params: published.Params, x: Inputs) -> Outputs:
    del params
    weights, logits = x["seq_mask"], x["error_logits"]
    aligned = confidence.compute_predicted_aligned_error(logits, BREAKS)
    return {
        "single": confidence.compute_plddt(x["lddt_logits"]),
        "pair": aligned["predicted_aligned_error"],
        "whole": confidence.predicted_tm_score(logits, BREAKS, weights),
    }


def _our_confidence(model: AlphaFold, x: Inputs) -> Outputs:
    del model
    return {
        "single": heads.compute_plddt(x["lddt_logits"]),
        "pair": heads.compute_predicted_aligned_error(x["error_logits"]),
        "whole": heads.predicted_tm_score(x["error_logits"], x["seq_mask"]),
    }


CASES: dict[str, Case] = {
    "invariant_point_attention": Case(
        _attention, _our_attention, f"{_FOLD}/invariant_point_attention"
    ),
    "fold_iteration": Case(_fold_iteration, _our_fold_iteration, _FOLD),
    "rigid_sidechain": Case(_sidechain, _our_sidechain, f"{_FOLD}/rigid_sidechain"),
    "structure_module": Case(_structure, _our_structure, "structure_module"),
    "torsions from atoms": Case(_torsions, _our_torsions, mutate=TEMPLATE[1:]),
    "frame from three points": Case(
        _three_points, _our_three_points, mutate=("all_atom_positions",)
    ),
    "distogram_head": _head("distogram", modules.DistogramHead, "pair", "distogram_head", "pair"),
    "masked_msa_head": _head("masked_msa", modules.MaskedMsaHead, "msa", "masked_msa_head", "msa"),
    "experimentally_resolved_head": _head(
        "experimentally_resolved",
        modules.ExperimentallyResolvedHead,
        "single",
        "experimentally_resolved_head",
        "single",
    ),
    "predicted_lddt_head": _head(
        "predicted_lddt",
        modules.PredictedLDDTHead,
        "structure_module",
        "predicted_lddt_head",
        "single",
    ),
    "predicted_aligned_error_head": _head(
        "predicted_aligned_error",
        modules.PredictedAlignedErrorHead,
        "pair",
        "predicted_aligned_error_head",
        "pair",
    ),
    "confidences": Case(
        _confidence, _our_confidence, mutate=("error_logits", "lddt_logits"), in_numpy=True
    ),
}
