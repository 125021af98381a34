"""The loader's examples with more variety than a few crops of whole proteins have.

Some get an end of padding, some a template, which is the structure of the example before.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from foldcore.config import Config
from foldcore.features import FEATURES
from parity.step_runs import batches
from parity.tracks import Arrays

PADDING = 4  # the longest end of padding is one shorter
COUNTED = ("mask", "exists")  # in the names of features that say what is there
# feature of a template -> what it is in the example
TEMPLATE = {
    "template_aatype": "aatype",
    "template_all_atom_positions": "all_atom_positions",
    "template_all_atom_masks": "all_atom_mask",
    "template_pseudo_beta": "pseudo_beta",
    "template_pseudo_beta_mask": "pseudo_beta_mask",
}


def varied(config: Config) -> Iterator[Arrays]:
    """Batches of one example, from the second of the loader on."""
    for number, (before, batch) in enumerate(pairwise(batches(config))):
        if number % 2 == 0:
            batch = with_template(batch, before, number // 2 % config.data.num_templates)
        yield shortened(batch, number % PADDING)


def with_template(batch: Arrays, other: Arrays, slot: int) -> Arrays:
    """``batch`` with the structure of ``other`` in one of the slots for templates."""
    changed = {name: batch[name].copy() for name in (*TEMPLATE, "template_mask")}
    for name, source in TEMPLATE.items():
        changed[name][:, slot] = other[source]
    changed["template_mask"][:, slot] = 1
    return batch | changed


def shortened(batch: Arrays, residues: int) -> Arrays:
    """``batch`` whose last residues count as padding."""
    if not residues:
        return batch
    changed = {}
    for name, feature in FEATURES.items():
        if "r" in feature.dims and any(word in name for word in COUNTED):
            array = np.moveaxis(batch[name].copy(), 1 + feature.dims.index("r"), 0)
            array[-residues:] = 0
            changed[name] = np.moveaxis(array, 0, 1 + feature.dims.index("r"))
    return batch | changed | {"seq_length": batch["seq_length"] - np.int32(residues)}
