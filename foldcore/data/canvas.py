"""An example written over an earlier one: taking fresh memory takes as long as filling it.

An example is zero beyond its residues, templates and rows. What an earlier one used its own masks
tell, so only that is cleared, and only where the new one does not reach.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from foldcore.features import FEATURES, RECYCLE_SLOTS, Batch


def _features(*dims: str) -> list[str]:
    """Those whose first dimensions are these."""
    return [n for n, feature in FEATURES.items() if feature.dims[: len(dims)] == dims]


_OF_RESIDUES, _OF_TEMPLATES = _features("r"), _features("t")
_OF_TEMPLATE_RESIDUES = _features("t", "r")
_OF_ROWS, _OF_EXTRA_ROWS = _features("recycle", "s"), _features("recycle", "e")
_FULL_WIDTH = "msa_feat"  # is always written in the width of the crop, zeros included


@dataclass(frozen=True)
class Used:
    """How much of its arrays an example uses; the rows are those of each recycling pass."""

    residues: int
    templates: int
    rows: Sequence[int]
    extra_rows: Sequence[int]


def used(example: Mapping[str, np.ndarray]) -> Used:
    """What an example as it was made uses; of zeros nothing."""
    return Used(
        int(example["seq_length"]),
        int(np.count_nonzero(example["template_mask"])),
        np.count_nonzero(example["msa_row_mask"], axis=1).tolist(),
        np.count_nonzero(example["extra_msa_row_mask"], axis=1).tolist(),
    )


def used_parts(example: Mapping[str, np.ndarray]) -> Batch:
    """Views of the part of each feature that can be other than zero, without batch axis."""
    part = used(example)
    sizes = {"r": part.residues, "t": part.templates}
    sizes |= {"s": max(part.rows), "e": max(part.extra_rows)}
    return {
        name: array[tuple(slice(sizes.get(str(dim))) for dim in FEATURES[name].dims)]
        if array.ndim
        else array
        for name, array in example.items()
    }


def clear_beyond(example: Batch, before: Used, now: Used) -> None:
    """Zeros where an earlier example, but not this one, has its values."""
    residues = slice(now.residues, before.residues)
    if now.residues < before.residues:
        for name in _OF_RESIDUES:
            example[name][residues] = 0
        for name in _OF_TEMPLATE_RESIDUES:
            example[name][: now.templates, residues] = 0
    if now.templates < before.templates:
        for name in _OF_TEMPLATES:
            example[name][now.templates : before.templates] = 0
    for slot in range(RECYCLE_SLOTS):
        for names, new, old in (
            (_OF_ROWS, now.rows[slot], before.rows[slot]),
            (_OF_EXTRA_ROWS, now.extra_rows[slot], before.extra_rows[slot]),
        ):
            for name in names if new < old else ():
                example[name][slot, new:old] = 0
            for name in names if new and now.residues < before.residues else ():
                if example[name].ndim > 2 and name != _FULL_WIDTH:
                    example[name][slot, :new, residues] = 0
