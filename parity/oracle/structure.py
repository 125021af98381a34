"""DeepMind's side of the structure module, of the geometry below it, and of the heads."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfold.structure_module import POSITION_SCALE
from parity.oracle import published
from parity.oracle.part import Function, Inputs, Outputs, Part
from parity.oracle.published import all_atom, confidence, folding, modules, quat_affine, r3

CONFIG = published.tiny_config()
GLOBAL = CONFIG.global_config
STRUCTURE = CONFIG.heads.structure_module
BREAKS = np.linspace(0.0, 31.0, 63)  # between the bins of the aligned error, angstrom

TEMPLATE = ("template_aatype", "template_all_atom_positions", "template_all_atom_masks")

FOLD = "structure_module/fold_iteration"


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


def _three_points(params: published.Params, x: Inputs) -> Outputs:
    del params
    points = [r3.vecs_from_tensor(x["all_atom_positions"][:, atom]) for atom in (0, 1, 2)]
    frames = r3.rigids_from_3_points(*points)
    return {"triads": _matrices(frames.rot), "triads origins": r3.vecs_to_tensor(frames.trans)}


# Heads --------------------------------------------------------------------------------------------


def _head(name: str, cls: Callable[..., Any], takes: str, kind: str) -> Function:
    def logits(params: published.Params, x: Inputs) -> Outputs:
        value = published.apply_part(
            lambda: cls(CONFIG.heads[name], GLOBAL, name="part"),
            params,
            {takes: x[kind]},
            {**x, "msa_feat": x["msa"]},
            is_training=True,
        )
        return {kind: value["logits"]}

    return logits


def _confidence(params: published.Params, x: Inputs) -> Outputs:
    del params
    weights, logits = x["seq_mask"], x["error_logits"]
    aligned = confidence.compute_predicted_aligned_error(logits, BREAKS)
    return {
        "single": confidence.compute_plddt(x["lddt_logits"]),
        "pair": aligned["predicted_aligned_error"],
        "whole": confidence.predicted_tm_score(logits, BREAKS, weights),
    }


PARTS: dict[str, Part] = {
    "invariant_point_attention": Part(_attention, f"{FOLD}/invariant_point_attention"),
    "fold_iteration": Part(_fold_iteration, FOLD),
    "rigid_sidechain": Part(_sidechain, f"{FOLD}/rigid_sidechain"),
    "structure_module": Part(_structure, "structure_module"),
    "torsions from atoms": Part(_torsions),
    "frame from three points": Part(_three_points),
    "confidences": Part(_confidence, in_numpy=True),
}
for _name, _cls, _takes, _kind in (
    ("distogram", modules.DistogramHead, "pair", "pair"),
    ("masked_msa", modules.MaskedMsaHead, "msa", "msa"),
    ("experimentally_resolved", modules.ExperimentallyResolvedHead, "single", "single"),
    ("predicted_lddt", modules.PredictedLDDTHead, "structure_module", "single"),
    ("predicted_aligned_error", modules.PredictedAlignedErrorHead, "pair", "pair"),
):
    PARTS[f"{_name}_head"] = Part(_head(_name, _cls, _takes, _kind), f"{_name}_head")
