"""The batch schema: what it accepts and what it names when it does not."""

import numpy as np
import pytest

from foldcore.config import DataConfig
from foldcore.features import FEATURES, FeatureError, dimensions, shape, validate

CONFIG = DataConfig(crop_size=8, num_msa_clusters=4, num_extra_msa=3, num_templates=2)
SIZES = dimensions(CONFIG, batch_size=2)


def batch() -> dict[str, np.ndarray]:
    return {n: np.ones(shape(n, SIZES), f.dtype) for n, f in FEATURES.items()}


def test_a_whole_batch_passes_and_its_dimensions_are_read() -> None:
    assert validate(batch()) == SIZES
    assert validate(batch(), SIZES) == SIZES


def test_msa_features_alone_have_recycling_slots() -> None:
    recycled = {n for n, f in FEATURES.items() if "recycle" in f.dims}
    assert recycled == {n for n in FEATURES if "msa" in n and n != "seq_mask"} | {
        "bert_mask",
        "extra_has_deletion",
        "extra_deletion_value",
    }
    assert all(FEATURES[n].dims[0] == "recycle" for n in recycled)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda b: b.pop("aatype"), "missing features: aatype"),
        (lambda b: b.update(extra=b["aatype"]), "unknown features: extra"),
        (lambda b: b.update(aatype=b["aatype"].astype(np.int64)), "aatype: dtype int64"),
        (lambda b: b.update(seq_mask=b["seq_mask"][:, :5]), "seq_mask: shape .2, 5., but 'r' is 8"),
        (lambda b: b.update(msa_feat=b["msa_feat"][:, :2]), "msa_feat: .*'recycle' is 4"),
        (lambda b: b.update(chi_mask=b["chi_mask"][0]), "chi_mask: shape .8, 4., expected dim"),
        (lambda b: b["resolution"].fill(np.nan), "resolution: contains non-finite"),
    ],
)
def test_a_broken_batch_is_named(break_it, words: str) -> None:
    broken = batch()
    break_it(broken)
    with pytest.raises(FeatureError, match=words):
        validate(broken)
