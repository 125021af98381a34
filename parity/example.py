"""One small example in our batch form, with everything that has a special case in some formula.

A stretch of a real protein, so that the labels are possible ones, with a chain break, an unknown
residue, missing atoms and padding. The first residues of BPTI hold all residue types with ambiguous
atoms, glycine, proline and cysteine. Alignment and masks are random numbers.
"""

from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

from foldcore import constants, features
from foldcore.data.labels import make_labels, pseudo_beta
from foldcore.data.mmcif import Chain, read_structure

SIZES = {"b": 1, "recycle": features.RECYCLE_SLOTS, "s": 6, "e": 8, "t": 3, "r": 16}
PADDING = 2  # residues
UNKNOWN = 10  # this residue's type counts as X
BREAK_AFTER = 8  # residues missing from the chain follow this one
Arrays = dict[str, np.ndarray]


def make_batch(seed: int = 0, num_iter_recycling: int = 0, ragged_templates: bool = True) -> Arrays:
    """A batch of one example, as ``foldcore.features`` describes it.

    Without ``ragged_templates`` the unaligned residues of templates are the last ones: elsewhere
    DeepMind's code takes torsions between coinciding atoms, whose direction is round-off: up to
    1e-2 in float32, nothing in float64.
    """
    random = np.random.default_rng(seed)
    parts: dict[str, Any] = {
        "example_id": np.int32(seed),
        "num_iter_recycling": np.int32(num_iter_recycling),
        **_structure(random),
        **_clusters(random),
        **_extra(random),
        **_templates(random),
        "resolution": np.float32(1.5),
        "use_clamped_fape": np.float32(0.75),  # both parts of the backbone loss count
    }
    for name in ("msa_mask", "extra_msa_mask", "bert_mask"):
        parts[name][..., -PADDING:] = 0
    parts["bert_mask"] *= parts["msa_mask"]
    batch = {name: np.asarray(array)[None] for name, array in parts.items()}
    features.validate(batch, SIZES)
    return batch


def to_deepmind(batch: Mapping[str, np.ndarray], example: int = 0) -> Arrays:
    """The same example in DeepMind's form: no batch axis, but a recycling axis on every feature."""
    passes = features.RECYCLE_SLOTS
    return {
        name: array[example]
        if "recycle" in features.FEATURES[name].dims
        else np.repeat(array[example][None], passes, axis=0)
        for name, array in batch.items()
        if name != "example_id"
    }


def one_pass(batch: Mapping[str, np.ndarray], example: int = 0, slot: int = 0) -> Arrays:
    """What a part of DeepMind's network sees in one recycling pass: no leading axes at all."""
    return {name: array[slot] for name, array in to_deepmind(batch, example).items()}


def _chain() -> Chain:
    source = resources.files("foldcore") / "data" / "embedded" / "mmcif" / "5pti.cif.gz"
    with resources.as_file(source) as path:
        return read_structure(path).chain("A")


def _structure(random: np.random.Generator) -> Arrays:
    length, total = SIZES["r"] - PADDING, SIZES["r"]
    chain = _chain()
    aatype = np.array([constants.restype_order[x] for x in chain.sequence[:length]], np.int32)
    aatype[UNKNOWN] = constants.unknown_restype
    mask = chain.mask[:length] * (random.random((length, 37)) > 0.04)
    mask[UNKNOWN, 3:] = 0  # of an unknown residue only N, CA and C are known
    positions = chain.positions[:length] * mask[..., None]
    residue_index = np.arange(length) + 5 * (np.arange(length) > BREAK_AFTER)
    parts = {
        "aatype": aatype,
        "residue_index": residue_index.astype(np.int32),
        "seq_mask": np.ones(length, np.float32),
        "target_feat": np.eye(22, dtype=np.float32)[1 + aatype],
        "all_atom_positions": positions.astype(np.float32),
        "all_atom_mask": mask.astype(np.float32),
        **make_labels(aatype, positions, mask),
    }
    padded = {
        name: np.concatenate([array, np.zeros((total - length, *array.shape[1:]), array.dtype)])
        for name, array in parts.items()
    }
    return {**padded, "seq_length": np.array(length, np.int32)}


def _clusters(random: np.random.Generator) -> Arrays:
    shape = tuple(SIZES[dim] for dim in ("recycle", "s", "r"))
    row_mask = np.ones(shape[:2], np.float32)
    row_mask[:, -1] = 0  # fewer sequences than rows
    return {
        "msa_feat": random.random((*shape, 49), np.float32),
        "msa_mask": np.repeat(row_mask[..., None], shape[-1], axis=-1),
        "msa_row_mask": row_mask,
        "bert_mask": (random.random(shape) < 0.3).astype(np.float32),
        "true_msa": random.integers(0, 22, shape, dtype=np.int32),
    }


def _extra(random: np.random.Generator) -> Arrays:
    shape = tuple(SIZES[dim] for dim in ("recycle", "e", "r"))
    row_mask = np.ones(shape[:2], np.float32)
    row_mask[:, -2:] = 0
    deletions = random.poisson(0.3, shape).astype(np.float32)
    return {
        "extra_msa": random.integers(0, 23, shape, dtype=np.int32),
        "extra_has_deletion": np.minimum(deletions, 1),
        "extra_deletion_value": (2 / np.pi * np.arctan(deletions / 3)).astype(np.float32),
        "extra_msa_mask": np.repeat(row_mask[..., None], shape[-1], axis=-1),
        "extra_msa_row_mask": row_mask,
    }


def _templates(random: np.random.Generator) -> Arrays:
    """Other stretches of the protein, each aligned in part; the last template is missing."""
    count, length = SIZES["t"], SIZES["r"]
    chain = _chain()
    letters = np.array([constants.restype_order[x] for x in chain.sequence], np.int32)
    stretch = np.stack([np.arange(length) + start for start in (18, 30, 40)][:count])
    first, last = random.integers(0, 3, count), random.integers(10, 13, count)
    last[-1] = first[-1]
    place = np.arange(length)
    aligned = (place >= first[:, None]) & (place < last[:, None])
    aatype = np.where(aligned, letters[stretch], constants.gap_code)
    mask = chain.mask[stretch] * aligned[..., None]
    moved = [_move(chain.positions[s], start) for s, start in zip(stretch, first, strict=True)]
    positions = np.stack(moved) * mask[..., None]
    beta, beta_mask = pseudo_beta(aatype, positions, mask)
    return {
        "template_aatype": aatype.astype(np.int32),
        "template_all_atom_positions": positions.astype(np.float32),
        "template_all_atom_masks": mask.astype(np.float32),
        "template_pseudo_beta": beta.astype(np.float32),
        "template_pseudo_beta_mask": beta_mask.astype(np.float32),
        "template_mask": np.array([1.0] * (count - 1) + [0.0], np.float32),
        "template_sum_probs": np.ones((count, 1), np.float32),
    }


def _move(positions: np.ndarray, first: int) -> np.ndarray:
    """Bring N of the first residue to (10, 0, 0) and its CA straight above, on y.

    The torsion before the first residue is between the atoms of a missing one, all zero. Ours is
    zero then; DeepMind's is the direction of a round-off error, but zero as well in this place.
    """
    n, ca, c = positions[first, :3].astype(np.float64)
    y = (ca - n) / np.linalg.norm(ca - n)
    x = (c - n) - y * np.dot(y, c - n)
    x /= np.linalg.norm(x)
    moved = (positions - n) @ np.stack([x, y, np.cross(x, y)], axis=1)
    moved[first, 1, [0, 2]] = 0  # exactly
    return moved + np.array([10.0, 0.0, 0.0])
