"""DeepMind's side of ``parity.loss_cases``: every loss term, and its gradients."""

from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from parity import example
from parity.case import Run
from parity.loss_cases import PREDICTED, WITH_ITERATIONS, table
from parity.oracle import published
from parity.oracle.published import folding, modules, r3
from parity.tracks import Arrays

Tree = Mapping[str, Any]

HEADS = {
    "distogram": modules.DistogramHead,
    "masked_msa": modules.MaskedMsaHead,
    "experimentally_resolved": modules.ExperimentallyResolvedHead,
    "predicted_lddt": modules.PredictedLDDTHead,
    "predicted_aligned_error": modules.PredictedAlignedErrorHead,
}


def run() -> Run:
    """DeepMind's terms of the examples of a batch, one after another, in float64."""
    program = jax.jit(jax.jacrev(published_terms, has_aux=True))

    def examples_in_turn(parameters: Arrays, inputs: Arrays) -> Arrays:
        batch = {name: x for name, x in inputs.items() if not name.startswith(PREDICTED)}
        results = []
        for index in range(len(batch["aatype"])):
            outputs = {
                name.removeprefix(PREDICTED): np.take(
                    x, index, axis=int(name.removeprefix(PREDICTED) in WITH_ITERATIONS)
                )
                for name, x in inputs.items()
                if name.startswith(PREDICTED)
            }
            features = example.one_pass(batch, index)
            results.append(program(*(published.cast(x, "float64") for x in (outputs, features))))
        gradients, values = jax.tree.map(lambda *each: np.stack(each), *results)
        for by_input in gradients.values():
            for name in WITH_ITERATIONS:
                by_input[name] = np.moveaxis(by_input[name], 0, 1)
        renamed = values.pop("alt_naming_is_better")
        return table(values, renamed, gradients)

    return examples_in_turn


def published_terms(outputs: Tree, batch: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """DeepMind's value of each of our loss terms, for one example, to derive and to keep.

    Kept as well: its choice of names for symmetric atoms.
    """
    config = published.tiny_config()
    heads, structure = config.heads, config.heads.structure_module
    value = as_returned(outputs, batch)

    def head(name: str) -> Any:
        what = (
            value[name] if name in ("distogram", "masked_msa", "experimentally_resolved") else value
        )
        run = hk.transform(lambda: HEADS[name](heads[name], config.global_config).loss(what, batch))
        return run.apply({}, None)["loss"]

    backbone, chi, violation = {"loss": 0.0}, {"loss": 0.0}, {"loss": 0.0}
    folding.backbone_loss(backbone, batch, value, structure)
    folding.supervised_chi_loss(chi, batch, value, structure)
    atom14 = value["final_atom14_positions"]
    renamed = folding.compute_renamed_ground_truth(batch, atom14)
    found = folding.find_structural_violations(batch, atom14, structure)
    folding.structural_violation_loss(violation, batch, {"violations": found}, structure)
    terms = {
        "backbone_fape": backbone["loss"],
        "sidechain_fape": folding.sidechain_loss(batch, {**value, **renamed}, structure)["fape"],
        "chi": chi["chi_loss"],
        "angle_norm": chi["angle_norm_loss"],
        "violation": violation["loss"],
        "distogram": head("distogram"),
        "masked_msa": head("masked_msa"),
        "experimentally_resolved": head("experimentally_resolved"),
        "plddt": head("predicted_lddt"),
        "aligned_error": head("predicted_aligned_error"),
    }
    return terms, {**terms, "alt_naming_is_better": renamed["alt_naming_is_better"]}


def as_returned(outputs: Tree, batch: Tree) -> dict[str, Any]:
    """Our outputs in the nested form that DeepMind's losses read."""

    def head(name: str) -> dict[str, Any]:
        return {"logits": outputs[f"{name}_logits"]}

    rotation, translation = (outputs[f"sidechain_frames_{x}"] for x in ("rotation", "translation"))
    frames = r3.Rigids(r3.rots_from_tensor3x3(rotation), r3.vecs_from_tensor(translation))
    atoms = r3.vecs_from_tensor(outputs["final_atom14_positions"])
    structure = {
        "traj": outputs["traj"],
        "final_affines": outputs["traj"][-1],
        "final_atom14_positions": outputs["final_atom14_positions"],
        "final_atom_positions": outputs["final_atom37_positions"],
        "sidechains": {
            "angles_sin_cos": outputs["angles"],
            "unnormalized_angles_sin_cos": outputs["unnormalized_angles"],
            "frames": jax.tree.map(lambda x: x[None], frames),
            "atom_pos": jax.tree.map(lambda x: x[None], atoms),
        },
    }
    dtype = outputs["distogram_logits"].dtype
    return {
        **structure,
        "structure_module": structure,
        "distogram": head("distogram")
        | {"bin_edges": jnp.linspace(2.3125, 21.6875, 63, dtype=dtype)},
        "masked_msa": head("masked_msa"),
        "experimentally_resolved": head("experimentally_resolved"),
        "predicted_lddt": head("plddt"),
        "predicted_aligned_error": head("aligned_error")
        | {"breaks": jnp.linspace(0.0, 31.0, 63, dtype=dtype)},
    }
