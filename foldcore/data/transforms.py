"""From one chain as read to the features of one training example (Suppl. 1.2.5-1.2.8).

``make_example`` is a pure function of the chain, the configuration and a key of integers, normally
(seed, epoch, index). Every transform draws from its own named stream of that key, so changing one
leaves the draws of all others as they were.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8, UInt64

from foldcore.config import DataConfig
from foldcore.data import crop, msa_features
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
    example = empty_example(config) if out is None else out
    written = [(0, 0)] * RECYCLE_SLOTS if out is None else _clear(out)
    single = {
        **sequence_features(raw, window),
        **structure_features(raw, window),
        **template_features(raw.templates, chosen, window),
        "use_clamped_fape": np.asarray(clamped),
    }
    for name, value in single.items():
        example[name][tuple(slice(size) for size in value.shape)] = value
    draws = [partial(draw, slot=slot) for slot in range(RECYCLE_SLOTS)]
    _write_msa_samples(raw, window, config, draws, training, example, written)
    return example


def empty_example(config: DataConfig) -> dict[str, np.ndarray]:
    """Zeros in the sizes of one example, without batch axis."""
    sizes = dimensions(config)
    return {
        name: np.zeros(_sizes(feature, sizes), feature.dtype)
        for name, feature in FEATURES.items()
        if name not in ("example_id", "num_iter_recycling")
    }


def _clear(example: Mapping[str, np.ndarray]) -> list[tuple[int, int]]:
    """Back to zeros: of the MSA features what the example says it used, of the others all.

    ``msa_feat``, the largest, is left to be written over; returned is what it used in each slot.
    """
    rows = np.count_nonzero(example["msa_row_mask"], axis=1).tolist()
    length = int(example["seq_length"])
    row_masks = ("msa_row_mask", "extra_msa_row_mask")  # they tell what was used: cleared last
    for name in (*(example.keys() - {"msa_feat", *row_masks}), *row_masks):
        array = example[name]
        if array.ndim < 3 or "recycle" not in FEATURES[name].dims:
            array.fill(0)
            continue
        mask = "extra_msa_row_mask" if name.startswith("extra") else "msa_row_mask"
        for slot in range(RECYCLE_SLOTS):
            array[slot, : np.count_nonzero(example[mask][slot]), :length] = 0
    return [(count, length) for count in rows]


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


def _write_msa_samples(
    raw: RawExample,
    window: slice,
    config: DataConfig,
    draws: Sequence[Callable[[str], np.random.Generator]],
    training: bool,
    example: Mapping[str, np.ndarray],
    written: Sequence[tuple[int, int]],
) -> None:
    """The MSA features: every recycling pass has its own rows, mask and clusters."""
    profile = msa_features.alignment_profile(raw.msa) if raw.profile is None else raw.profile
    compared = raw.msa if len(raw.msa) > config.num_msa_clusters else raw.msa[:0]
    planes = msa_features.bit_planes(compared)  # of few rows all are centres
    names = [name for name, feature in FEATURES.items() if "recycle" in feature.dims]
    for slot, draw in enumerate(draws):
        out = {name: example[name][slot] for name in names}
        _write_msa_sample(raw, profile, planes, window, config, draw, training, out, written[slot])


def _write_msa_sample(
    raw: RawExample,
    profile: Float[np.ndarray, "r 22"],
    planes: UInt64[np.ndarray, "5 w n"],
    window: slice,
    config: DataConfig,
    draw: Callable[[str], np.random.Generator],
    training: bool,
    out: Mapping[str, np.ndarray],
    written: tuple[int, int],
) -> None:
    """The MSA features of one pass, into zeros; ``msa_feat`` has the rows and columns written."""
    centre_rows, extra_rows = _choose_rows(raw, config, draw, training)
    true_msa = raw.msa[centre_rows]
    fraction = config.masked_msa_fraction
    centres, bert_mask = msa_features.mask_msa(true_msa, profile, fraction, draw("masking"))
    nearest = msa_features.nearest_centres(centres, planes[..., extra_rows])
    centres, extra = centres[:, window], raw.msa[extra_rows, window]
    deletions = raw.deletions[centre_rows, window]
    extra_deletions = raw.deletions[extra_rows, window]
    rows, length = centres.shape
    corner = (slice(rows), slice(length))
    msa_features.msa_feat(
        centres, deletions, extra, extra_deletions, nearest, out["msa_feat"][:rows]
    )
    out["msa_feat"][rows : written[0], : written[1]] = 0
    out["msa_mask"][corner] = 1
    out["msa_row_mask"][:rows] = 1
    out["bert_mask"][corner] = bert_mask[:, window]
    out["true_msa"][corner] = true_msa[:, window]
    kept = draw("extra_rows").permutation(len(extra))[: config.num_extra_msa]
    msa_features.extra_features(extra[kept], extra_deletions[kept], out)


def _choose_rows(
    raw: RawExample,
    config: DataConfig,
    draw: Callable[[str], np.random.Generator],
    training: bool,
) -> tuple[Int[np.ndarray, "s"], Int[np.ndarray, "e"]]:
    """Rows of the alignment that become cluster centres, and all others still in play."""
    rows = np.arange(len(raw.msa))
    if training:
        rows = msa_features.delete_blocks(
            len(rows),
            config.block_deletion_fraction,
            config.block_deletion_count,
            draw("block_deletion"),
        )
    if raw.is_distillation:
        size = config.distillation_msa_rows
        rows, _ = msa_features.sample_rows(rows, size, draw("distillation_rows"))
    return msa_features.sample_rows(rows, config.num_msa_clusters, draw("cluster_rows"))


def collate(examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack examples of equal sizes along a new batch axis."""
    if any(example.keys() != examples[0].keys() for example in examples):
        raise ValueError("examples with different features cannot be one batch")
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
