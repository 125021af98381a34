"""Transforms: what an example contains, what chance decides, and that it is always the same."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_examples import embedded_raw, random_raw
from scipy import stats

from foldcore.config import DataConfig
from foldcore.data.crop import choose_templates, crop_start, is_clamped
from foldcore.data.labels import make_labels
from foldcore.data.msa_features import deletion_value
from foldcore.data.templates import stack_templates
from foldcore.data.transforms import RawExample, collate, empty_example, make_example
from foldcore.features import FEATURES, dimensions, validate

KEY = (7, 0, 3)
CONFIG = DataConfig(crop_size=16, num_msa_clusters=6, num_extra_msa=8, num_templates=2)
STEP_FEATURES = {"example_id": np.int32(1), "num_iter_recycling": np.int32(0)}


def check_schema(example: dict[str, np.ndarray], config: DataConfig) -> None:
    validate(collate([example | STEP_FEATURES]), dimensions(config))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> set[str]:
    return {name for name in a if np.array_equal(a[name], b[name])}


@pytest.mark.parametrize("chain", ["1ubq_A", "1fki_A", "1a8o_A"])
@pytest.mark.parametrize("training", [True, False])
def test_real_chains_fit_the_schema(chain: str, training: bool) -> None:
    config = DataConfig(crop_size=96, num_msa_clusters=32, num_extra_msa=64)
    raw = embedded_raw(chain)
    example = make_example(raw, config, KEY, training)
    check_schema(example, config)
    length = min(len(raw.aatype), 96)
    assert example["seq_length"] == length == example["seq_mask"].sum()
    assert example["backbone_affine_mask"].sum() > 0.8 * length


@settings(max_examples=40, deadline=None)
@given(
    length=st.sampled_from([1, 2, 15, 16, 17, 64, 65]),
    rows=st.sampled_from([1, 2, 3, 7, 30]),
    templates=st.integers(0, 5),
    clusters=st.integers(1, 9),
    extra=st.sampled_from([0, 1, 40]),
    num_templates=st.integers(0, 3),
    distillation=st.booleans(),
    training=st.booleans(),
    index=st.integers(0, 2**31),
)
def test_odd_sizes_fit_the_schema(
    length: int,
    rows: int,
    templates: int,
    clusters: int,
    extra: int,
    num_templates: int,
    distillation: bool,
    training: bool,
    index: int,
) -> None:
    config = DataConfig(
        crop_size=16,
        num_msa_clusters=clusters,
        num_extra_msa=extra,
        num_templates=num_templates,
        distillation_msa_rows=5,
    )
    raw = random_raw(length, rows, templates, seed=index, distillation=distillation)
    example = make_example(raw, config, (0, 0, index), training)
    check_schema(example, config)
    assert (example["true_msa"][:, 0] == example["aatype"]).all()
    assert (example["msa_row_mask"][:, 0] == 1).all()
    check_padding(example, min(length, 16))


def check_padding(example: dict[str, np.ndarray], length: int) -> None:
    """Beyond the chain, the rows and the templates there is nothing but zeros."""
    for name, feature in FEATURES.items():
        if name in example and "r" in feature.dims:
            tail = np.moveaxis(example[name], feature.dims.index("r"), 0)[length:]
            assert not tail.any(), name
    for mask, prefixes in (
        ("msa_row_mask", ("msa_", "bert", "true")),
        ("extra_msa_row_mask", ("extra",)),
        ("template_mask", ("template",)),
    ):
        for name in example:
            if name.startswith(prefixes):
                assert not example[name][example[mask] == 0].any(), name


def test_an_example_is_a_pure_function_of_its_key() -> None:
    raw = random_raw()
    first = make_example(raw, CONFIG, KEY)
    make_example(raw, CONFIG, (1, 1, 1))
    assert same(first, make_example(raw, CONFIG, KEY)) == first.keys()
    for other in ((8, 0, 3), (7, 1, 3), (7, 0, 4)):
        changed = first.keys() - same(first, make_example(raw, CONFIG, other))
        assert {"msa_feat", "bert_mask", "extra_msa"} <= changed


def test_transforms_draw_from_streams_of_their_own() -> None:
    raw = random_raw(rows=60, templates=6)
    base = make_example(raw, CONFIG, KEY)
    for change, touched in (
        ({"masked_msa_fraction": 0.9}, {"bert_mask", "msa_feat"}),
        ({"num_templates": 1}, {n for n in FEATURES if n.startswith("template")}),
        ({"num_extra_msa": 3}, {n for n in FEATURES if n.startswith("extra")}),
        ({"unclamped_fraction": 1.0}, None),  # moves the crop, so compare the rows only
    ):
        example = make_example(raw, replace(CONFIG, **change), KEY)
        if touched is None:
            assert example["use_clamped_fape"] == 0 and base["use_clamped_fape"] == 1
            assert np.array_equal(example["template_sum_probs"], base["template_sum_probs"])
        else:
            # Masked centres may attract other members, so extra rows keep their draws all the same.
            assert base.keys() - same(base, example) <= touched


def test_every_pass_sees_its_own_sample_of_one_crop() -> None:
    example = make_example(random_raw(rows=100), CONFIG, KEY)
    for name in ("true_msa", "bert_mask", "msa_feat", "extra_msa"):
        slots = example[name]
        assert len(slots) == 4
        assert all(not np.array_equal(slots[i], slots[j]) for i in range(4) for j in range(i))
    assert (example["true_msa"][:, 0] == example["aatype"]).all()


def test_features_are_those_of_the_crop() -> None:
    raw = random_raw(length=40)
    example = make_example(raw, CONFIG, KEY)
    start = example["residue_index"][0]
    window = slice(start, start + 16)
    assert 0 < start < 24
    np.testing.assert_array_equal(example["residue_index"], np.arange(40)[window])
    np.testing.assert_array_equal(example["aatype"], raw.aatype[window])
    np.testing.assert_array_equal(example["target_feat"][:, 1:], np.eye(21)[raw.aatype[window]])
    assert not example["target_feat"][:, 0].any()
    np.testing.assert_array_equal(example["all_atom_positions"], raw.positions[window])
    for name, value in make_labels(raw.aatype, raw.positions, raw.mask).items():
        np.testing.assert_array_equal(example[name], value[window], err_msg=name)
    rows = {row.tobytes() for row in raw.msa[:, window].astype(np.int32)}
    sampled = example["true_msa"][example["msa_row_mask"] == 1]
    assert all(row.tobytes() in rows for row in sampled)
    for name in ("aatype", "all_atom_positions", "all_atom_masks"):
        candidates = {t.tobytes() for t in raw.templates[f"template_{name}"][:, window]}
        present = example[f"template_{name}"][example["template_mask"] == 1]
        assert all(t.tobytes() in candidates for t in present)


def test_rows_keep_their_deletions_and_masks_their_place() -> None:
    raw = random_raw(length=40, rows=60)
    raw = replace(raw, deletions=(raw.msa % 3).astype(np.uint16))  # the letter tells the count
    config = replace(CONFIG, masked_msa_fraction=0.5)
    example = make_example(raw, config, KEY)
    for msa, value, mask in (
        ("true_msa", example["msa_feat"][..., 24], "msa_mask"),
        ("extra_msa", example["extra_deletion_value"], "extra_msa_mask"),
    ):
        expected = deletion_value(example[msa] % 3) * example[mask]
        np.testing.assert_allclose(value, expected, atol=1e-6)
    shown = example["msa_feat"][..., :23].argmax(-1)
    changed = shown != example["true_msa"]
    assert not changed[example["bert_mask"] == 0].any()
    assert 0.8 < changed[example["bert_mask"] == 1].mean() < 1


def test_a_key_means_the_same_example_for_ever() -> None:
    """A change here changes every run that is resumed or replayed."""
    example = make_example(random_raw(length=200, rows=80, templates=9), CONFIG, KEY)
    got = {
        "start": int(example["residue_index"][0]),
        "clamped": float(example["use_clamped_fape"]),
        "templates": round(float(example["template_sum_probs"].sum()), 4),
        "centres": example["true_msa"].sum((1, 2)).tolist(),
        "masked": example["bert_mask"].sum((1, 2)).tolist(),
        "shown": example["msa_feat"][..., :23].argmax(-1).sum((1, 2)).tolist(),
        "extra": example["extra_msa"].sum((1, 2)).tolist(),
    }
    assert got == {
        "start": 96,
        "clamped": 1.0,
        "templates": 1.3429,
        "centres": [976, 941, 933, 1025],
        "masked": [22.0, 14.0, 16.0, 23.0],
        "shown": [1123, 1140, 1041, 1168],
        "extra": [1284, 675, 1268, 1310],
    }


def test_template_pseudo_beta_is_ca_for_glycine_and_cb_otherwise() -> None:
    raw = random_raw(templates=4)
    example = make_example(raw, CONFIG, KEY, training=False)
    atom = np.where(example["template_aatype"] == 7, 1, 3)
    for name, beta in (("all_atom_positions", "pseudo_beta"), ("all_atom_masks", None)):
        array = example[f"template_{name}"]
        atoms = atom[..., None, None] if array.ndim == 4 else atom[..., None]
        expected = np.take_along_axis(array, atoms, 2).squeeze(2)
        key = "template_pseudo_beta" if beta else "template_pseudo_beta_mask"
        np.testing.assert_array_equal(example[key], expected)


def test_evaluation_cuts_the_centre_takes_the_best_and_keeps_all_rows() -> None:
    raw = random_raw(length=41, rows=12)
    config = replace(CONFIG, num_extra_msa=20)
    example = make_example(raw, config, KEY, training=False)
    assert example["residue_index"][0] == (41 - 16) // 2
    assert example["use_clamped_fape"] == 1
    np.testing.assert_array_equal(
        example["template_sum_probs"], raw.templates["template_sum_probs"][:2]
    )
    rows = example["msa_row_mask"].sum(1) + example["extra_msa_row_mask"].sum(1)
    np.testing.assert_array_equal(rows, 12)
    assert example["bert_mask"].any(), "masking stays on, as in the published inference"
    in_training = make_example(raw, config, KEY)
    rows = in_training["msa_row_mask"].sum(1) + in_training["extra_msa_row_mask"].sum(1)
    assert (rows < 12).all(), "block deletion"


def test_distilled_chains_have_few_rows_and_no_resolution() -> None:
    config = replace(CONFIG, distillation_msa_rows=9, num_extra_msa=20, block_deletion_fraction=0.1)
    example = make_example(random_raw(rows=50, distillation=True), config, KEY)
    np.testing.assert_array_equal(example["msa_row_mask"].sum(1), 6)
    np.testing.assert_array_equal(example["extra_msa_row_mask"].sum(1), 3)
    assert example["resolution"] == 0
    assert make_example(random_raw(rows=50), config, KEY)["resolution"] == 2


def test_clusters_are_assigned_over_the_whole_chain() -> None:
    """Two rows that look like the query inside the crop, and like each other outside."""
    raw = random_raw(length=48, rows=3)
    msa = np.tile(np.arange(48, dtype=np.uint8) % 20, (3, 1))
    msa[1:, :16], msa[1:, 32:] = 0, 0  # the evaluation crop is 16..32
    msa[1, 16] = msa[2, 17] = 19
    raw = replace(raw, msa=msa)
    config = replace(CONFIG, num_msa_clusters=2, masked_msa_fraction=0.0)
    example = make_example(raw, config, KEY, training=False)
    profile = example["msa_feat"][..., 25:48]
    np.testing.assert_allclose(profile[:, 0].max(-1), 1, atol=2e-6)  # the query is alone
    np.testing.assert_allclose(profile[:, 1, :2].max(-1), 0.5, atol=2e-6)


def test_fraction_of_clamped_examples() -> None:
    draws = [is_clamped(0.1, np.random.default_rng(i), True) for i in range(2000)]
    assert stats.binomtest(sum(draws), 2000, 0.9).pvalue > 1e-3
    assert all(is_clamped(1.0, np.random.default_rng(i), False) for i in range(9))


@pytest.mark.parametrize("clamped", [True, False])
def test_crops_start_as_published(clamped: bool) -> None:
    slack, draws = 5, 6000
    rng = np.random.default_rng(1)
    starts = [crop_start(16 + slack, 16, clamped, rng, True) for _ in range(draws)]
    uniform = np.full(slack + 1, 1 / (slack + 1))
    nested = [np.mean([(s <= slack - x) / (slack - x + 1) for x in range(6)]) for s in range(6)]
    expected = draws * np.array(uniform if clamped else nested)
    counts = np.bincount(starts, minlength=slack + 1)
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert crop_start(9, 16, clamped, rng, True) == crop_start(9, 16, clamped, rng, False) == 0


def test_templates_are_chosen_as_published() -> None:
    rng = np.random.default_rng(2)
    chosen = [choose_templates(6, 4, rng, True) for _ in range(7000)]
    counts = np.bincount([len(c) for c in chosen], minlength=5)
    assert stats.chisquare(counts, 1000 * np.array([1, 1, 1, 1, 3])).pvalue > 1e-3
    members = np.bincount(np.concatenate(chosen), minlength=6)
    assert stats.chisquare(members).pvalue > 1e-3
    assert all(len(set(c)) == len(c) for c in chosen)
    np.testing.assert_array_equal(choose_templates(6, 4, rng, False), [0, 1, 2, 3])
    assert len(choose_templates(0, 4, rng, True)) == 0


def test_a_chain_without_templates() -> None:
    raw = replace(random_raw(), templates=stack_templates([], 0, 30))
    example = make_example(raw, CONFIG, KEY)
    check_schema(example, CONFIG)
    assert not any(example[name].any() for name in example if name.startswith("template"))


def test_only_the_first_candidates_are_templates() -> None:
    raw = random_raw(templates=5)
    best = set(raw.templates["template_sum_probs"][:2, 0].tolist()) | {0.0}
    config = replace(CONFIG, max_template_hits=2)
    seen = [make_example(raw, config, (0, 0, i))["template_sum_probs"] for i in range(20)]
    assert set(np.unique(seen).tolist()) == best


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": np.zeros((29, 37, 3))}, "1abc_A: positions is .29, 37, 3., expected .30"),
        ({"deletions": np.zeros((19, 30), int)}, "deletions is .19, 30., expected .20, 30."),
        ({"msa": np.zeros((0, 30), np.uint8)}, "msa is .0, 30."),
        ({"templates": {}}, "templates lack template_aatype"),
    ],
)
def test_a_misshapen_chain_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(random_raw(), **change)


def test_examples_of_different_features_are_not_collated() -> None:
    example = make_example(random_raw(), CONFIG, KEY)
    with pytest.raises(ValueError, match="different features"):
        collate([example, example | STEP_FEATURES])
    batch = collate([example | STEP_FEATURES] * 3)
    assert validate(batch) == dimensions(CONFIG, batch_size=3)


def test_raw_examples_are_left_as_they_are() -> None:
    raw = random_raw()
    before = {k: np.copy(v) for k, v in vars(raw).items() if isinstance(v, np.ndarray)}
    make_example(raw, CONFIG, KEY)
    assert all(np.array_equal(getattr(raw, name), value) for name, value in before.items())
    assert isinstance(raw, RawExample)


def test_an_earlier_example_may_be_written_over() -> None:
    """Longer, shorter, deeper and shallower chains one after another, in one memory."""
    config = replace(CONFIG, num_extra_msa=20)
    shared = empty_example(config)
    for index, (length, rows) in enumerate(((30, 90), (200, 8), (12, 3), (60, 60))):
        raw = random_raw(length=length, rows=rows, templates=index)
        shared = make_example(raw, config, (index,), out=shared)
        fresh = make_example(raw, config, (index,))
        assert same(fresh, shared) == fresh.keys()
