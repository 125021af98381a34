"""Examples written over earlier ones: nothing of them is left, and nothing is overlooked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_examples import random_raw

from foldcore.config import DataConfig
from foldcore.data.canvas import check_finite
from foldcore.data.transforms import empty_example, make_example
from foldcore.features import FEATURES, FeatureError

CONFIG = DataConfig(crop_size=16, num_msa_clusters=6, num_extra_msa=8, num_templates=2)
SIZES = st.tuples(st.integers(1, 20), st.integers(1, 70), st.integers(0, 3))
NUMBERS = {name: np.zeros((), np.int32) for name in ("example_id", "num_iter_recycling")}


@settings(max_examples=30, deadline=None)
@given(st.lists(SIZES, min_size=2, max_size=4))
def test_nothing_of_an_earlier_example_is_left(sizes: list[tuple[int, int, int]]) -> None:
    shared = empty_example(CONFIG)
    for index, (length, rows, templates) in enumerate(sizes):
        raw = random_raw(length=length, rows=rows, templates=templates, seed=index)
        make_example(raw, CONFIG, (index,), out=shared)
        fresh = make_example(raw, CONFIG, (index,))
        for name, value in fresh.items():
            np.testing.assert_array_equal(shared[name], value, err_msg=name)


FROM_FILES = [n for n, f in FEATURES.items() if f.dtype == "float32" and "recycle" not in f.dims]


@pytest.mark.parametrize("name", FROM_FILES)
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_a_number_that_is_not_finite_is_found(name: str, number: float) -> None:
    example = make_example(random_raw(length=12, templates=9), CONFIG, (3,)) | NUMBERS
    check_finite(example)
    sizes = {"r": 12, "t": np.count_nonzero(example["template_mask"])}
    last = tuple((sizes[dim] if isinstance(dim, str) else dim) - 1 for dim in FEATURES[name].dims)
    assert all(index >= 0 for index in last)
    example[name][last] = 1e30  # its square is infinite, but not itself
    check_finite(example)
    example[name][last] = number
    with pytest.raises(FeatureError, match=f"{name}: contains non-finite"):
        check_finite(example)
