"""Level 2, part one: every loss term, and its gradient by everything that the network predicts.

The predictions are random numbers near the true structure, each independent of the others.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from foldcore import constants
from foldcore.config import LossConfig
from parity import example
from parity.case import Case, Run, Setting, rounded
from parity.tracks import JAX, TORCH, Arrays, Named, Track, cast, to_numpy

# the released configuration's weights; 2.0.0 takes the C-N length's deviation for this angle
LOSS = LossConfig(
    violation=1.0,
    experimentally_resolved=0.01,
    aligned_error=0.1,
    scale_by_sqrt_length=False,
    ca_c_n_stddev=0.014,
)
PREDICTED = "predicted "  # begins the names of predictions among the inputs
WITH_ITERATIONS = ("traj", "angles", "unnormalized_angles")
TERMS = (
    *("backbone_fape", "sidechain_fape", "chi", "angle_norm", "violation"),
    *("distogram", "masked_msa", "plddt", "experimentally_resolved", "aligned_error"),
)


def make_batches() -> list[Arrays]:
    """Two examples; confidence is not trained on the second, and its backbone loss is clamped."""
    batches = [example.make_batch(seed) for seed in (0, 1)]
    batches[1] |= {"resolution": np.zeros(1, np.float32)}  # unknown
    batches[1] |= {"use_clamped_fape": np.ones(1, np.float32)}
    return batches


def predictions(batch: Arrays, seed: int) -> Arrays:
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
    aligned_error = noise(length, length, 64)
    aligned_error[..., 1] = aligned_error[..., 0]  # see module_cases.make_parameters
    arrays = {
        "traj": np.concatenate([quaternion, translation], axis=-1),
        "angles": raw / np.linalg.norm(raw, axis=-1, keepdims=True),
        "unnormalized_angles": raw,
        "sidechain_frames_rotation": frames[..., :9].reshape(length, 8, 3, 3),
        "sidechain_frames_translation": frames[..., 9:],
        "final_atom14_positions": batch["atom14_gt_positions"][0] + noise(length, 14, 3),
        "final_atom37_positions": batch["all_atom_positions"][0] + noise(length, 37, 3),
        "distogram_logits": noise(length, length, 64),
        "masked_msa_logits": noise(rows, length, 23),
        "experimentally_resolved_logits": noise(length, 37),
        "plddt_logits": noise(length, 50),
        "aligned_error_logits": aligned_error,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def make() -> tuple[Arrays, dict[str, Arrays]]:
    """Both examples as one batch, with predictions."""
    batches = make_batches()
    each = [predictions(batch, seed) for seed, batch in enumerate(batches)]
    stacked = {
        PREDICTED + name: np.stack([e[name] for e in each], axis=int(name in WITH_ITERATIONS))
        for name in each[0]
    }
    return {}, {"": {n: np.concatenate([b[n] for b in batches]) for n in batches[0]} | stacked}


def mutate(parameters: Arrays, inputs: Arrays) -> tuple[Arrays, Arrays]:
    """Other predictions: a little noise, and the other names for all symmetric atoms."""
    random, changed = np.random.default_rng(2), dict(inputs)
    for name in inputs:
        if name.startswith(PREDICTED):
            changed[name] = rounded(
                inputs[name] + 0.01 * random.standard_normal(inputs[name].shape)
            )
    partner = constants.restype_atom14_renaming[inputs["aatype"]]
    name = PREDICTED + "final_atom14_positions"
    changed[name] = np.take_along_axis(changed[name], partner[..., None], axis=2)
    return parameters, changed


def terms_of(track: Track, outputs: Named, batch: Named) -> tuple[Named, Any]:
    """The terms of each example, and which symmetric atoms take their other names."""
    rotation = track.rigid.quaternion_to_rotation(outputs["traj"][..., :4])
    full = {**outputs, "traj_rotation": rotation}
    terms = track.losses.alphafold_loss(full, batch, LOSS)[1]
    positions = outputs["final_atom14_positions"]
    renamed = track.structure_losses.rename_symmetric_ground_truth_atoms(batch, positions)
    return terms, renamed.alt_naming_is_better


def _split(track: Track, setting: Setting, inputs: Arrays) -> tuple[Named, Named]:
    """Predictions and batch."""
    device = "cuda" if setting.device == "gpu" else setting.device
    x = cast(track, dict.fromkeys(inputs, setting.wide), inputs, device)
    predicted = {n.removeprefix(PREDICTED): v for n, v in x.items() if n.startswith(PREDICTED)}
    return predicted, {n: v for n, v in x.items() if not n.startswith(PREDICTED)}


def jax_run(setting: Setting) -> Run:
    """In the JAX track."""

    def function(outputs: Named, batch: Named) -> Any:
        terms, renamed = terms_of(JAX, outputs, batch)
        return {name: jnp.sum(term) for name, term in terms.items()}, (terms, renamed)

    program = jax.jit(jax.jacrev(function, has_aux=True))

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        gradients, (terms, renamed) = program(*_split(JAX, setting, inputs))
        return table(terms, renamed, gradients)

    return run


def torch_run(setting: Setting) -> Run:
    """In the PyTorch track."""

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        outputs, batch = _split(TORCH, setting, inputs)
        leaves = [value.requires_grad_() for value in outputs.values()]
        terms, renamed = terms_of(TORCH, outputs, batch)
        gradients = {
            name: dict(
                zip(
                    outputs,
                    torch.autograd.grad(
                        term.sum(),
                        leaves,
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    ),
                    strict=True,
                )
            )
            for name, term in terms.items()
        }
        return table(terms, renamed, gradients)

    return run


def table(terms: Named, renamed: Any, gradients: Mapping[str, Named]) -> Arrays:
    """By name: values of terms, and the gradients that are not zero everywhere."""
    found = {
        f"output {name} of example {i}": x
        for name, value in terms.items()
        for i, x in enumerate(to_numpy(value))
    }
    found["steps symmetric atoms renamed"] = to_numpy(renamed)
    for term, by_input in gradients.items():
        for name, gradient in by_input.items():
            gradient = to_numpy(gradient)
            if name == "aligned_error_logits":
                gradient = join_tied_bins(gradient)
            if gradient.any():
                found[f"input {name} of {term}"] = gradient
    return found


def join_tied_bins(gradient: np.ndarray) -> np.ndarray:
    """The gradient by the first two bins of the aligned error as one, which is well defined."""
    return np.concatenate([gradient[..., :1] + gradient[..., 1:2], gradient[..., 2:]], axis=-1)


def _oracle() -> Run:
    from parity.oracle import losses

    return losses.run()


def cases() -> list[Case]:
    """One: all terms of two examples."""
    return [
        Case(
            name="loss terms",
            level=2,
            make=make,
            jax=jax_run,
            torch=torch_run,
            mutate=mutate,
            oracle=_oracle,
            dtypes=("float64", "float32"),
            perturbed_inputs=tuple(n for n in make()[1][""] if n.startswith(PREDICTED)),
        )
    ]
