"""Every loss term in both codes: its value and its gradient by everything the network predicts.

    python -m parity.oracle.losses float64 table.json

The predictions are random numbers near the true structure, each independent of the others.
"""

import sys
from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from foldcore import constants
from jaxfold.losses import alphafold_loss
from jaxfold.rigid import quaternion_to_rotation
from jaxfold.structure_losses import rename_symmetric_ground_truth_atoms
from parity.oracle import compare, example, ours, published
from parity.oracle.compare import Comparison
from parity.oracle.published import folding, modules, r3

Arrays = dict[str, np.ndarray]
Tree = Mapping[str, Any]

HEADS = {
    "distogram": modules.DistogramHead,
    "masked_msa": modules.MaskedMsaHead,
    "experimentally_resolved": modules.ExperimentallyResolvedHead,
    "predicted_lddt": modules.PredictedLDDTHead,
    "predicted_aligned_error": modules.PredictedAlignedErrorHead,
}
_WITH_ITERATIONS = ("traj", "angles", "unnormalized_angles")


def main(precision: str, path: str) -> None:
    """Compare in one precision and write the table."""
    batches = [example.make_batch(seed) for seed in (0, 1)]
    batches[1] |= {"resolution": np.zeros(1, np.float32)}  # unknown: no confidence losses
    batches[1] |= {"use_clamped_fape": np.ones(1, np.float32)}
    outputs = [predictions(batch, seed) for seed, batch in enumerate(batches)]
    broken = [mutate(batch, each) for batch, each in zip(batches, outputs, strict=True)]
    jax.config.update("jax_enable_x64", precision == "float64")

    oracle = Oracle(batches, precision)
    results = [oracle(outputs), our_terms(batches, outputs, precision)]
    results += [our_terms(batches, broken, precision)]
    perturbed = []
    if precision == "float32":
        for seed in range(compare.PERTURBED_RUNS):
            perturbed.append(oracle([compare.perturb(each, seed) for each in outputs]))
    compare.write(path, tabulate(*results, perturbed))


def predictions(batch: example.Arrays, seed: int) -> Arrays:
    """What a network would predict for one example: the truth, and noise."""
    random = np.random.default_rng([seed, 1])
    length, rows = batch["aatype"].shape[1], batch["msa_mask"].shape[2]

    def noise(*shape: int) -> np.ndarray:
        return random.standard_normal(shape)

    quaternion = batch["backbone_affine_tensor"][0, :, :4] + 0.2 * noise(2, length, 4)
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    translation = batch["backbone_affine_tensor"][0, :, 4:] + 3 * noise(2, length, 3)
    raw = noise(2, length, 7, 2)
    frames = batch["rigidgroups_gt_frames"][0] + 0.3 * noise(length, 8, 12)
    atom14 = batch["atom14_gt_positions"][0] + noise(length, 14, 3)
    aligned_error = noise(length, length, 64)
    aligned_error[..., 1] = aligned_error[..., 0]  # see network.make_params
    arrays = {
        "traj": np.concatenate([quaternion, translation], axis=-1),
        "angles": raw / np.linalg.norm(raw, axis=-1, keepdims=True),
        "unnormalized_angles": raw,
        "sidechain_frames_rotation": frames[..., :9].reshape(length, 8, 3, 3),
        "sidechain_frames_translation": frames[..., 9:],
        "final_atom14_positions": atom14,
        "final_atom37_positions": batch["all_atom_positions"][0] + noise(length, 37, 3),
        "distogram_logits": noise(length, length, 64),
        "masked_msa_logits": noise(rows, length, 23),
        "experimentally_resolved_logits": noise(length, 37),
        "plddt_logits": noise(length, 50),
        "aligned_error_logits": aligned_error,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def mutate(batch: example.Arrays, outputs: Arrays) -> Arrays:
    """Other predictions: a little noise, and the other names for all symmetric atoms."""
    random = np.random.default_rng(2)
    mutated = {n: x + 0.01 * random.standard_normal(x.shape) for n, x in outputs.items()}
    partner = constants.restype_atom14_renaming[batch["aatype"][0]]
    atom14 = mutated["final_atom14_positions"]
    mutated["final_atom14_positions"] = np.take_along_axis(atom14, partner[..., None], axis=1)
    return {name: array.astype(np.float32) for name, array in mutated.items()}


class Oracle:
    """DeepMind's terms of several examples, one after another."""

    def __init__(self, batches: list[example.Arrays], precision: str):
        self.precision = precision
        self.batches = [published.cast(example.one_pass(batch), precision) for batch in batches]
        self.gradients = jax.jit(jax.jacrev(published_terms, has_aux=True))

    def __call__(self, outputs: list[Arrays]) -> Arrays:
        """Values and gradients by name, a leading axis counting the examples."""
        tables = []
        for batch, arrays in zip(self.batches, outputs, strict=True):
            gradients, values = self.gradients(published.cast(arrays, self.precision), batch)
            tables.append(_table(values, gradients))
        return {name: np.stack([table[name] for table in tables]) for name in tables[0]}


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


def our_terms(batches: list[example.Arrays], outputs: list[Arrays], precision: str) -> Arrays:
    """Our terms of the same examples, in one batch."""
    whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    batch = published.cast(whole, precision)
    stacked = {
        name: np.stack([each[name] for each in outputs], axis=int(name in _WITH_ITERATIONS))
        for name in outputs[0]
    }

    def terms(outputs: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        rotation = quaternion_to_rotation(outputs["traj"][..., :4])
        each = alphafold_loss({**outputs, "traj_rotation": rotation}, batch, ours.LOSS)[1]
        renamed = rename_symmetric_ground_truth_atoms(batch, outputs["final_atom14_positions"])
        summed = {name: jnp.sum(term) for name, term in each.items()}
        return summed, {**each, "alt_naming_is_better": renamed.alt_naming_is_better}

    derive = jax.jit(jax.jacrev(terms, has_aux=True))
    gradients, values = jax.tree.map(np.asarray, derive(published.cast(stacked, precision)))
    for by_input in gradients.values():
        for name in _WITH_ITERATIONS:
            by_input[name] = np.moveaxis(by_input[name], 1, 0)
    return _table(values, gradients)


def _table(values: Tree, gradients: Mapping[str, Tree]) -> Arrays:
    """By name: values of terms, and the gradients that are not zero everywhere."""
    table = {f"{name} value": np.asarray(x) for name, x in values.items()}
    for term, by_input in gradients.items():
        for name, gradient in by_input.items():
            gradient = np.asarray(gradient)
            if name == "aligned_error_logits":
                first = gradient[..., :1] + gradient[..., 1:2]
                gradient = np.concatenate([first, gradient[..., 2:]], axis=-1)
            table[f"{term} gradient by {name}"] = gradient
    return table


def tabulate(
    oracle: Arrays, mine: Arrays, mutated: Arrays, perturbed: list[Arrays]
) -> dict[str, Comparison]:
    """One comparison for each term, and for each prediction that the oracle's term depends on."""
    table = {}
    for name, expected in oracle.items():
        if not expected.any():
            if mine[name].any():
                raise ValueError(f"{name} is zero in the oracle only")
            continue
        runs = [each[name] for each in perturbed]
        table[name] = compare.compare(mine[name], expected, mutated[name], runs)
    return table


if __name__ == "__main__":
    main(*sys.argv[1:])
