"""An example written over an earlier one: taking fresh memory takes as long as filling it.

An example is zero beyond its residues, templates and rows. What an earlier one used its own masks
tell, so only that is cleared, and only where the new one does not reach.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from foldcore.features import FEATURES, RECYCLE_SLOTS, Batch, FeatureError


def _features(*dims: str) -> list[str]:
    """Those whose first dimensions are these."""
    return [n for n, feature in FEATURES.items() if feature.dims[: len(dims)] == dims]


_NUMBERS = [name for name, feature in FEATURES.items() if not feature.dims]
_OF_RESIDUES, _OF_TEMPLATES = _features("r"), _features("t")
_OF_TEMPLATE_RESIDUES = _features("t", "r")
_ROWS, _EXTRA_ROWS = "msa_row_mask", "extra_msa_row_mask"
_OF_ROWS, _OF_EXTRA_ROWS = _features("recycle", "s", "r"), _features("recycle", "e", "r")
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
        np.count_nonzero(example[_ROWS], axis=1).tolist(),
        np.count_nonzero(example[_EXTRA_ROWS], axis=1).tolist(),
    )


def check_finite(example: Mapping[str, np.ndarray]) -> None:
    """Raise :class:`FeatureError` for a number that is not finite in an example as it was made.

    Those of the alignment are made of whole numbers, and are: only the others are looked at.
    """
    part = used(example)
    sizes = {name: part.residues for name in _OF_RESIDUES}
    sizes |= {name: part.templates for name in _OF_TEMPLATES}
    for name in (*_NUMBERS, *sizes):
        array = example[name]
        if array.dtype.kind == "f":
            array = array[: sizes[name]] if array.ndim else array
            # a product is much faster than looking at each number; a large one may overflow
            if not math.isfinite(np.vdot(array, array)) and not np.isfinite(array).all():
                raise FeatureError(f"{name}: contains non-finite values")


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
        for mask, names, new, old in (
            (_ROWS, _OF_ROWS, now.rows[slot], before.rows[slot]),
            (_EXTRA_ROWS, _OF_EXTRA_ROWS, now.extra_rows[slot], before.extra_rows[slot]),
        ):
            if new < old:
                example[mask][slot, new:old] = 0
                for name in names:
                    example[name][slot, new:old, : before.residues] = 0
            for name in names if new and now.residues < before.residues else ():
                if name != _FULL_WIDTH:
                    example[name][slot, :new, residues] = 0
