"""Level 2, part two: the whole network with recycling: outputs, loss terms, every gradient."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import torch

import jaxfold.losses
import jaxfold.step
import torchfold.losses
import torchfold.step
from parity import example
from parity.case import Case, Run, Setting, flip
from parity.loss_cases import LOSS, join_tied_bins
from parity.module_cases import CONFIG, make_parameters
from parity.tracks import JAX, TORCH, Arrays, Named, cast, to_numpy, using

PASSES = (0, 1, 2, 3)
MUTATED = "evoformer/left_single//weights"
PAE = "predicted_aligned_error_head/logits//"
# outputs with an axis of structure iterations before the batch axis
PER_ITERATION = ("traj", "traj_rotation", "angles", "unnormalized_angles")
IN_STRUCTURE = ("backbone_fape", "sidechain_fape", "chi", "angle_norm", "violation")


def make(passes: Sequence[int]) -> tuple[Arrays, dict[str, Arrays]]:
    """One example with these numbers of recycling passes."""
    return make_parameters(), {variant(n): example.make_batch(0, n) for n in passes}


def variant(passes: int) -> str:
    """What the report says of a number of recycling passes."""
    return f"{passes} recycling passes"


def _config(setting: Setting) -> Any:
    return replace(CONFIG, dtype=setting.dtype)


def jax_run(setting: Setting) -> Run:
    """In the JAX track: one program for every number of passes."""
    network = jaxfold.step.Network(_config(setting))

    def loss(params: Named, batch: Named) -> Any:
        outputs = network(params, batch, None)
        total, terms = jaxfold.losses.alphafold_loss(outputs, batch, LOSS)
        return total.mean(), {"outputs": outputs, "terms": {**terms, "total": total}}

    program = jax.jit(jaxfold.step.value_and_grad(loss, network))

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        flat = network.layout.flatten(parameters).astype(setting.wide)
        x = cast(JAX, dict.fromkeys(inputs, setting.wide), inputs, "")
        found, gradient = program(flat, None, x)
        return table(inputs, found, network.layout.unflatten(np.asarray(gradient)))

    return using(JAX, setting.implementation, run)


def torch_run(setting: Setting) -> Run:
    """In the PyTorch track."""
    device = "cuda" if setting.device == "gpu" else setting.device
    network = torchfold.step.Network(_config(setting))

    def loss(params: Named, batch: Named) -> Any:
        outputs = network(params, batch, None)
        total, terms = torchfold.losses.alphafold_loss(outputs, batch, LOSS)
        # flat, because the gradient's bookkeeping keeps one level
        named = {f"outputs {n}": x for n, x in outputs.items()}
        named |= {f"terms {n}": x for n, x in {**terms, "total": total}.items()}
        return total.mean(), named

    program = torchfold.step.value_and_grad(loss, network)

    def run(parameters: Arrays, inputs: Arrays) -> Arrays:
        flat = network.layout.flatten(parameters).astype(setting.wide)
        x = cast(TORCH, dict.fromkeys(inputs, setting.wide), inputs, device)
        x["num_iter_recycling"] = x["num_iter_recycling"].cpu()
        found, gradient = program(torch.tensor(flat, device=device), None, x)
        parts: dict[str, Named] = {"outputs": {}, "terms": {}}
        for name, value in found.items():
            kind, _, rest = name.partition(" ")
            parts[kind][rest] = value
        return table(inputs, parts, network.layout.unflatten(to_numpy(gradient)))

    return using(TORCH, setting.implementation, run)


def table(
    inputs: Arrays, found: Mapping[str, Mapping[str, Any]], gradient: Mapping[str, np.ndarray]
) -> Arrays:
    """Everything compared, by name: outputs where they count, losses, gradients."""
    outputs = {n: first_example(n, to_numpy(x)) for n, x in found["outputs"].items()}
    terms = {n: to_numpy(x)[0] for n, x in found["terms"].items()}
    terms["structure_module"] = sum(getattr(LOSS, n) * terms[n] for n in IN_STRUCTURE)
    return {
        **{f"output {n}": unpadded(n, x, inputs) for n, x in outputs.items()},
        **{f"output loss {n}": np.asarray(x) for n, x in terms.items()},
        **gradients(gradient),
        **steps(inputs, outputs),
    }


def gradients(gradient: Mapping[str, np.ndarray]) -> Arrays:
    """By every parameter."""
    return {
        f"gradient {n}": join_tied_bins(x) if n.startswith(PAE) else x for n, x in gradient.items()
    }


def first_example(name: str, output: np.ndarray) -> np.ndarray:
    """An output without its batch axis."""
    return output[:, 0] if name in PER_ITERATION else output[0]


def unpadded(name: str, value: np.ndarray, inputs: Arrays) -> np.ndarray:
    """An output at real residues and sequences only: padding holds arbitrary numbers."""
    residues = np.flatnonzero(inputs["seq_mask"][0])
    if name in ("pair", "distogram_logits", "aligned_error_logits"):
        return value[residues][:, residues]
    if name in ("msa", "masked_msa_logits"):
        rows = np.flatnonzero(inputs["msa_mask"][0, 0].any(axis=-1))
        return value[rows][:, residues]
    return np.take(value, residues, axis=1 if name in PER_ITERATION else 0)


def steps(inputs: Arrays, outputs: Arrays) -> Arrays:
    """Choices that the positions decide: bins of distances and scores, names of symmetric atoms."""
    # on the host: PyTorch's device may be under another thread's orders, to wait for nothing
    atom14 = torch.tensor(outputs["final_atom14_positions"], dtype=torch.float64)[None]
    batch = {n: torch.tensor(x) for n, x in inputs.items()}
    renamed = TORCH.structure_losses.rename_symmetric_ground_truth_atoms(
        {n: x.double() if x.dtype == torch.float32 else x for n, x in batch.items()}, atom14
    )
    bins = TORCH.embedders.distance_bins(atom14[:, :, 1], 3.25, 20.75, 15, torch.float64)
    truth, seen = batch["all_atom_positions"][..., 1, :], batch["all_atom_mask"][..., 1]
    scores = TORCH.losses.lddt_ca(atom14[:, :, 1], truth.double(), seen.double())
    real = inputs["seq_mask"][0] > 0
    return {
        "steps plddt": to_numpy(TORCH.losses.lddt_bin(scores, 50)[0])[real],
        "steps symmetric atoms renamed": to_numpy(renamed.alt_naming_is_better[0])[real],
        "steps recycled distances": to_numpy(bins[0].argmax(-1))[real][:, real],
    }


def _oracle() -> Run:
    from parity.oracle import network

    return network.run()


def cases(passes: Sequence[int] = PASSES) -> list[Case]:
    """One: the network with 0 to 3 recycling passes."""
    return [
        Case(
            name="network",
            level=2,
            make=functools.partial(make, passes),
            jax=jax_run,
            torch=torch_run,
            mutate=flip(MUTATED),
            oracle=_oracle,
            variants=tuple(map(variant, passes)),
        )
    ]
