"""The batch schema: every feature's dtype and named dimensions, and ``validate(batch)``.

Names and shapes are those of DeepMind's processed features; the axes in front are ours. Every array
has a leading batch axis ``b``; the MSA-derived features have a recycling axis second, always 4
slots, because every recycling pass sees a fresh MSA sample (pass k reads slot k); nothing else
repeats over passes.

Legend: b examples, recycle = 4 slots, s cluster rows, e extra rows, t templates, r residues.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from foldcore.config import DataConfig

RECYCLE_SLOTS = 4
Batch = dict[str, np.ndarray]


class FeatureError(ValueError):
    """A batch that breaks the schema; the message names the feature."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature: numpy dtype and the dimensions after the batch axis (a name or a number)."""

    dtype: str
    dims: tuple[str | int, ...]


def _f(dims: str, dtype: str = "float32") -> Feature:
    return Feature(dtype, tuple(int(d) if d.isdigit() else d for d in dims.split()))


FEATURES: dict[str, Feature] = {
    # identity of the example, and of the step it is used in
    "example_id": _f("", "int32"),  # names the dropout stream: a hash of (source, epoch, index)
    "num_iter_recycling": _f("", "int32"),  # extra passes of this step, equal over the batch
    # sequence
    "aatype": _f("r", "int32"),
    "residue_index": _f("r", "int32"),
    "seq_length": _f("", "int32"),  # residues in the crop before padding
    "seq_mask": _f("r"),
    "target_feat": _f("r 22"),
    # MSA, one sample for each recycling pass
    "msa_feat": _f("recycle s r 49"),
    "msa_mask": _f("recycle s r"),
    "msa_row_mask": _f("recycle s"),
    "bert_mask": _f("recycle s r"),
    "true_msa": _f("recycle s r", "int32"),
    "extra_msa": _f("recycle e r", "int32"),
    "extra_has_deletion": _f("recycle e r"),
    "extra_deletion_value": _f("recycle e r"),
    "extra_msa_mask": _f("recycle e r"),
    "extra_msa_row_mask": _f("recycle e"),
    # templates
    "template_aatype": _f("t r", "int32"),
    "template_all_atom_positions": _f("t r 37 3"),
    "template_all_atom_masks": _f("t r 37"),
    "template_pseudo_beta": _f("t r 3"),
    "template_pseudo_beta_mask": _f("t r"),
    "template_mask": _f("t"),
    "template_sum_probs": _f("t 1"),
    # chemistry
    "atom14_atom_exists": _f("r 14"),
    "atom37_atom_exists": _f("r 37"),
    "residx_atom14_to_atom37": _f("r 14", "int32"),
    "residx_atom37_to_atom14": _f("r 37", "int32"),
    # labels
    "all_atom_positions": _f("r 37 3"),
    "all_atom_mask": _f("r 37"),
    "atom14_gt_positions": _f("r 14 3"),
    "atom14_gt_exists": _f("r 14"),
    "atom14_alt_gt_positions": _f("r 14 3"),
    "atom14_alt_gt_exists": _f("r 14"),
    "atom14_atom_is_ambiguous": _f("r 14"),
    "rigidgroups_gt_frames": _f("r 8 12"),
    "rigidgroups_alt_gt_frames": _f("r 8 12"),
    "rigidgroups_gt_exists": _f("r 8"),
    "rigidgroups_group_exists": _f("r 8"),
    "rigidgroups_group_is_ambiguous": _f("r 8"),
    "backbone_affine_tensor": _f("r 7"),
    "backbone_affine_mask": _f("r"),
    "chi_angles": _f("r 4"),
    "chi_mask": _f("r 4"),
    "pseudo_beta": _f("r 3"),
    "pseudo_beta_mask": _f("r"),
    "resolution": _f(""),  # angstrom; 0 = unknown, NMR or distillation
    "use_clamped_fape": _f(""),
}


def dimensions(config: DataConfig, batch_size: int = 1) -> dict[str, int]:
    """Sizes of the named dimensions of a batch cut by ``config``."""
    return {
        "b": batch_size,
        "recycle": RECYCLE_SLOTS,
        "s": config.num_msa_clusters,
        "e": config.num_extra_msa,
        "t": config.num_templates,
        "r": config.crop_size,
    }


def shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of one feature, batch axis first, for the given dimension sizes."""
    dims = FEATURES[name].dims
    return (sizes["b"], *(d if isinstance(d, int) else sizes[d] for d in dims))


def validate(
    batch: Mapping[str, np.ndarray], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Check names, dtypes, shapes and finiteness; returns the sizes of the named dimensions.

    Without ``sizes`` the dimensions are read from the batch itself and must agree with each other.
    Raises :class:`FeatureError` naming the first feature that is missing, unknown or misshapen.
    """
    if missing := FEATURES.keys() - batch.keys():
        raise FeatureError(f"missing features: {', '.join(sorted(missing))}")
    if unknown := batch.keys() - FEATURES.keys():
        raise FeatureError(f"unknown features: {', '.join(sorted(unknown))}")
    found = dict(sizes or {"recycle": RECYCLE_SLOTS})
    for name, feature in FEATURES.items():
        _check(name, feature, batch[name], found)
    return found


def _check(name: str, feature: Feature, array: np.ndarray, sizes: dict[str, int]) -> None:
    dims: tuple[str | int, ...] = ("b", *feature.dims)
    if array.dtype != np.dtype(feature.dtype):
        raise FeatureError(f"{name}: dtype {array.dtype}, expected {feature.dtype}")
    if array.ndim != len(dims):
        raise FeatureError(f"{name}: shape {array.shape}, expected dimensions {dims}")
    for dim, size in zip(dims, array.shape, strict=True):
        expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
        if size != expected:
            raise FeatureError(f"{name}: shape {array.shape}, but {dim!r} is {expected}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FeatureError(f"{name}: contains non-finite values")
