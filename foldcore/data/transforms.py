"""From one chain as read to the features of one training example (Suppl. 1.2.5-1.2.8).

``make_example`` is a pure function of the chain, the configuration and a key of integers, normally
(seed, epoch, index). Every transform draws from its own named stream of that key, so changing one
leaves the draws of all others as they were.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8

from foldcore.config import DataConfig
from foldcore.data import crop, msa_features
from foldcore.data.canvas import Used, clear_beyond, used
from foldcore.data.chance import Chance
from foldcore.data.hits import count_templates, pick_templates
from foldcore.data.labels import make_labels, pseudo_beta
from foldcore.features import FEATURES, RECYCLE_SLOTS, Feature, dimensions

# Numbers are part of every seed: never reuse or renumber them.
_STREAMS = {
    "clamp": 0,
    "crop": 1,
    "templates": 2,
    "block_deletion": 3,
    "distillation_rows": 4,
    "cluster_rows": 5,
    "masking": 6,
    "extra_rows": 7,
}
_TEMPLATE_KEYS = (
    "template_aatype",
    "template_all_atom_positions",
    "template_all_atom_masks",
    "template_sum_probs",
)
Draw = Callable[..., np.random.Generator]  # (stream, recycling pass)


class Rows(NamedTuple):
    """Rows of an alignment that one recycling pass sees."""

    centres: Int[np.ndarray, "s"]
    others: Int[np.ndarray, "m"]  # that join a cluster
    extra: Int[np.ndarray, "e"]  # of those, what is seen one by one


@dataclass(frozen=True, kw_only=True)
class RawExample:
    """One whole chain: structure, alignment and candidate templates, nothing drawn or cut yet."""

    chain_id: str
    aatype: Int[np.ndarray, "r"]  # 0..20
    residue_index: Int[np.ndarray, "r"]  # 0-based position in the chain
    positions: Float[np.ndarray, "r 37 3"]  # angstrom; 0 where missing
    mask: Float[np.ndarray, "r 37"]
    msa: UInt8[np.ndarray, "n r"]  # codes 0..21, duplicates removed; row 0 is the chain
    deletions: Integer[np.ndarray, "n r"]  # letters deleted before each column
    templates: Mapping[str, np.ndarray]  # template_* arrays of candidates, best first
    profile: Float[np.ndarray, "r 22"] | None = None  # share of each code, where it is counted
    resolution: float  # angstrom; 0 = unknown, NMR or distillation
    is_distillation: bool = False

    def __post_init__(self) -> None:
        length = len(self.aatype)
        shapes: dict[str, tuple[np.ndarray, tuple[int, ...]]] = {
            "residue_index": (self.residue_index, (length,)),
            "positions": (self.positions, (length, 37, 3)),
            "mask": (self.mask, (length, 37)),
            "msa": (self.msa, (len(self.msa), length)),
            "deletions": (self.deletions, (len(self.msa), length)),
        }
        for name, (array, expected) in shapes.items():
            if array.shape != expected or not array.size:
                raise ValueError(f"{self.chain_id}: {name} is {array.shape}, expected {expected}")
        if missing := set(_TEMPLATE_KEYS) - set(self.templates):
            raise ValueError(f"{self.chain_id}: templates lack {', '.join(sorted(missing))}")


def make_example(
    raw: RawExample,
    config: DataConfig,
    rng_key: tuple[int, ...],
    training: bool = True,
    out: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """All features of ``foldcore.features`` but example_id and num_iter_recycling, no batch axis.

    Evaluation (``training=False``) cuts the centre of the chain, takes the best templates and
    deletes no blocks; it samples and masks the alignment as training does, so a repeatable
    evaluation passes the same key each time. ``out`` is an earlier result of the same sizes, as it
    was returned, to be written over: taking fresh memory costs as much time as filling it.
    """

    chance = Chance(rng_key, (len(_STREAMS), RECYCLE_SLOTS))

    def draw(stream: str, slot: int = 0) -> np.random.Generator:
        return chance.generator(_STREAMS[stream], slot)

    clamped = crop.is_clamped(config.unclamped_fraction, draw("clamp"), training)
    start = crop.crop_start(len(raw.aatype), config.crop_size, clamped, draw("crop"), training)
    window = slice(start, start + config.crop_size)
    candidates = min(count_templates(raw.templates), config.max_template_hits)
    chosen = crop.choose_templates(candidates, config.num_templates, draw("templates"), training)
    rows = [_choose_rows(raw, config, draw, slot, training) for slot in range(RECYCLE_SLOTS)]
    example = empty_example(config) if out is None else out
    values = {
        **sequence_features(raw, window),
        **structure_features(raw, window),
        **template_features(raw.templates, chosen, window),
        "use_clamped_fape": np.asarray(clamped),
    }
    counts = [len(part.centres) for part in rows], [len(part.extra) for part in rows]
    now = Used(len(values["aatype"]), len(chosen), *counts)
    clear_beyond(example, used(example), now)
    for name, value in values.items():
        example[name][tuple(map(slice, value.shape))] = value
    _write_msa(raw, window, rows, config.masked_msa_fraction, draw, example)
    return example


def empty_example(config: DataConfig) -> dict[str, np.ndarray]:
    """Zeros in the sizes of one example, without batch axis."""
    sizes = dimensions(config)
    return {
        name: np.zeros(_sizes(feature, sizes), feature.dtype)
        for name, feature in FEATURES.items()
        if name not in ("example_id", "num_iter_recycling")
    }


def _sizes(feature: Feature, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in feature.dims)


def sequence_features(raw: RawExample, window: slice) -> dict[str, np.ndarray]:
    """What is known of the chain itself inside the crop."""
    aatype = raw.aatype[window]
    target_feat = np.zeros((len(aatype), 22), np.float32)  # column 0: chain break, never in a chain
    target_feat[np.arange(len(aatype)), 1 + aatype] = 1
    return {
        "aatype": aatype,
        "residue_index": raw.residue_index[window],
        "seq_length": np.asarray(len(aatype)),
        "seq_mask": np.ones(len(aatype)),
        "target_feat": target_feat,
    }


def structure_features(raw: RawExample, window: slice) -> dict[str, np.ndarray]:
    """The labels inside the crop."""
    aatype, positions, mask = raw.aatype[window], raw.positions[window], raw.mask[window]
    return {
        **make_labels(aatype, positions, mask),
        "all_atom_positions": positions,
        "all_atom_mask": mask,
        "resolution": np.asarray(0.0 if raw.is_distillation else raw.resolution),
    }


def template_features(
    templates: Mapping[str, np.ndarray], chosen: Int[np.ndarray, "t"], window: slice
) -> dict[str, np.ndarray]:
    """The chosen templates inside the crop."""
    picked = pick_templates(templates, chosen, window)
    beta, beta_mask = pseudo_beta(*(picked[k] for k in _TEMPLATE_KEYS[:3]))
    return {
        **picked,
        "template_pseudo_beta": beta,
        "template_pseudo_beta_mask": beta_mask,
        "template_mask": np.ones(len(chosen)),
    }


def _choose_rows(
    raw: RawExample, config: DataConfig, draw: Draw, slot: int, training: bool
) -> Rows:
    """The rows of one pass, at random."""
    rows = np.arange(len(raw.msa))
    if training:
        rows = msa_features.delete_blocks(
            len(rows),
            config.block_deletion_fraction,
            config.block_deletion_count,
            draw("block_deletion", slot),
        )
    if raw.is_distillation:
        size = config.distillation_msa_rows
        rows, _ = msa_features.sample_rows(rows, size, draw("distillation_rows", slot))
    size = config.num_msa_clusters
    centres, others = msa_features.sample_rows(rows, size, draw("cluster_rows", slot))
    extra = draw("extra_rows", slot).permutation(others)[: config.num_extra_msa]
    return Rows(centres, others, extra)


def _write_msa(
    raw: RawExample,
    window: slice,
    rows: Sequence[Rows],
    fraction: float,
    draw: Draw,
    example: Mapping[str, np.ndarray],
) -> None:
    """The MSA features: every recycling pass has its own rows, mask and clusters."""
    centre_rows = np.concatenate([part.centres for part in rows])
    true_msa, deletions = raw.msa[centre_rows], raw.deletions[centre_rows, window]
    counts = [len(part.centres) for part in rows]
    masked, bert_mask = _mask(raw, true_msa, counts, fraction, draw)
    ends, length = np.cumsum(counts).tolist(), deletions.shape[1]
    parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    for slot, (count, part) in enumerate(zip(counts, parts, strict=True)):
        corner = (slot, slice(count), slice(length))
        msa_features.write_letters(masked[part, window], example["msa_feat"][slot, :count])
        example["msa_mask"][corner] = example["msa_row_mask"][corner[:2]] = 1
        example["bert_mask"][corner] = bert_mask[part, window]
        example["true_msa"][corner] = true_msa[part, window]
    places = np.repeat(range(RECYCLE_SLOTS), counts), np.concatenate([*map(np.arange, counts)])
    msa_features.write_deletions(deletions, places, example["msa_feat"])
    for slot, part in enumerate(parts):
        if len(others := rows[slot].others):
            nearest = msa_features.assign_clusters(masked[part], raw.msa[others])
            members = raw.msa[others, window], raw.deletions[others, window]
            features = example["msa_feat"][slot, : counts[slot]]
            centres = masked[part, window], deletions[part]
            msa_features.write_clusters(*centres, *members, nearest, features)
            _write_extra(raw, rows[slot].extra, window, slot, example)


def _mask(
    raw: RawExample,
    msa: UInt8[np.ndarray, "s r"],
    counts: Sequence[int],
    fraction: float,
    draw: Draw,
) -> tuple[UInt8[np.ndarray, "s r"], Bool[np.ndarray, "s r"]]:
    """BERT masking of the rows of all passes, so many of each."""
    profile = msa_features.alignment_profile(raw.msa) if raw.profile is None else raw.profile
    sizes = [count * msa.shape[1] for count in counts]
    maskings = [
        msa_features.draw_masking(size, fraction, draw("masking", slot))
        for slot, size in enumerate(sizes)
    ]
    masking = msa_features.join_maskings(maskings, sizes)
    return msa_features.mask_msa(msa, msa_features.cumulative(profile), masking)


def _write_extra(
    raw: RawExample,
    rows: Int[np.ndarray, "e"],
    window: slice,
    slot: int,
    example: Mapping[str, np.ndarray],
) -> None:
    """The features of rows that are not cluster centres."""
    extra, deletions = raw.msa[rows, window], raw.deletions[rows, window]
    corner = (slot, slice(len(rows)), slice(extra.shape[1]))
    example["extra_msa"][corner] = extra
    example["extra_has_deletion"][corner] = deletions > 0
    example["extra_deletion_value"][corner] = msa_features.deletion_values(deletions)
    example["extra_msa_mask"][corner] = example["extra_msa_row_mask"][corner[:2]] = 1


def collate(examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack examples of equal sizes along a new batch axis."""
    if any(example.keys() != examples[0].keys() for example in examples):
        raise ValueError("examples with different features cannot be one batch")
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
