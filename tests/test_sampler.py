"""The plan of examples: frequencies, random access, mixing, replacement, recycling counts."""

from collections import Counter

import numpy as np
import pytest

from foldcore.data.sampler import Plan, Source, example_id, recycling_iters


def source(weights: list[float], prefix: str = "") -> Source:
    return Source(tuple(f"{prefix}{i}" for i in range(len(weights))), np.array(weights))


def test_an_epoch_shows_each_chain_at_most_once_and_at_its_rate() -> None:
    weights = [1.0, 0.5, 0.25, 0.05]
    plan = Plan([source(weights)], seed=1)
    keys = [plan[p] for p in range(9000)]
    epochs = keys[-1].epoch
    for epoch in range(0, epochs, 97):
        chains = [k.chain_id for k in keys if k.epoch == epoch]
        assert len(chains) == len(set(chains))
        assert "0" in chains
    counts = Counter(k.chain_id for k in keys if k.epoch < epochs)
    for chain, weight in enumerate(weights):
        deviation = (weight * (1 - weight) / epochs) ** 0.5
        assert abs(counts[str(chain)] / epochs - weight) <= 4 * deviation


def test_keys_are_unique_and_indices_are_consecutive() -> None:
    plan = Plan([source([0.5] * 7)], seed=3)
    keys = [plan[p] for p in range(200)]
    assert len({(k.epoch, k.index) for k in keys}) == 200
    for before, after in zip(keys, keys[1:], strict=False):
        follows = after.epoch == before.epoch and after.index == before.index + 1
        assert follows or (after.epoch > before.epoch and after.index == 0)


def test_random_access_equals_reading_in_order() -> None:
    sources = [source([0.3] * 11, "a"), source([0.9] * 5, "b")]
    forward = [Plan(sources, 5, 0.75)[p] for p in range(300)]
    plan = Plan(sources, 5, 0.75)
    backward = [plan[p] for p in reversed(range(300))]
    assert forward == backward[::-1]
    assert Plan(sources, 5, 0.75)[299] == forward[299]


def test_orders_differ_between_epochs_sources_and_seeds() -> None:
    def order(seed: int, which: int, epoch: int) -> list[str]:
        plan = Plan([source([1.0] * 50), source([1.0] * 50)], seed, 0.5)
        keys = [plan[p] for p in range(300)]
        return [k.chain_id for k in keys if k.source == which and k.epoch == epoch]

    orders = [order(0, 0, 0), order(0, 0, 1), order(0, 1, 0), order(1, 0, 0)]
    assert all(sorted(o) == sorted(orders[0]) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert orders[0] != sorted(orders[0], key=int)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.75, 1.0])
def test_second_source_has_its_exact_share(share: float) -> None:
    plan = Plan(
        [source([1.0] * 9, "a"), source([1.0] * 4, "b")], seed=2, distillation_probability=share
    )
    drawn = np.array([plan[p].source for p in range(6400)])
    assert drawn.sum() == round(6400 * share)
    if 0 < share < 1:
        runs = np.diff(drawn[:640]) != 0
        assert 0.5 * share * (1 - share) < runs.mean() < 4 * share * (1 - share)


def test_one_source_ignores_the_share() -> None:
    assert {Plan([source([1.0] * 3)], 0, 0.75)[p].source for p in range(100)} == {0}


def test_replacements_keep_the_key_and_follow_the_weights() -> None:
    plan = Plan([source([1.0, 0.25, 0.5])], seed=4)
    keys = [plan.replacement(p, a) for p in range(500) for a in (1, 2)]
    assert keys[0] == Plan([source([1.0, 0.25, 0.5])], seed=4).replacement(0, 1)
    assert all(plan[i // 2].index == k.index for i, k in enumerate(keys))
    share = Counter(k.chain_id for k in keys)["0"] / 1000
    assert abs(share - 1 / 1.75) < 0.06


def test_fingerprint_tells_seed_chains_and_weights_apart() -> None:
    plans = [
        Plan([source(w)], s) for w, s in (([1, 0.5], 0), ([1, 0.5], 1), ([1, 0.6], 0), ([1], 0))
    ]
    assert len({p.fingerprint() for p in plans}) == 4
    assert plans[0].fingerprint() == Plan([source([1, 0.5])], 0).fingerprint()


def test_impossible_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="no chains to sample from"):
        Source((), np.zeros(0))
    with pytest.raises(ValueError, match="must lie in"):
        source([0.5, 0.0])
    with pytest.raises(ValueError, match="2 chains but 1 weights"):
        Source(("a", "b"), np.ones(1))
    with pytest.raises(ValueError, match="one or two sources"):
        Plan([], 0)


def test_far_positions_are_found_quickly_enough_to_resume() -> None:
    plan = Plan([source([0.5] * 40)], seed=0)
    assert plan[100_000].epoch == pytest.approx(5000, rel=0.05)


def test_recycling_counts_come_in_shuffled_blocks() -> None:
    counts = [recycling_iters(7, step, 3) for step in range(400)]
    blocks = [tuple(counts[i : i + 4]) for i in range(0, 400, 4)]
    assert all(sorted(b) == [0, 1, 2, 3] for b in blocks)
    assert len(set(blocks)) > 15  # of the 24 orders
    assert counts != [recycling_iters(8, step, 3) for step in range(400)]
    assert [recycling_iters(0, step, 0) for step in range(5)] == [0] * 5


def test_recycling_and_plan_are_frozen() -> None:
    """Values of another machine and numpy version would break every resumed run, so pin them."""
    assert [recycling_iters(0, step, 3) for step in range(8)] == [0, 3, 1, 2, 2, 3, 0, 1]
    plan = Plan([source([0.5] * 6), source([0.5] * 6)], 0, 0.5)
    assert [(k.source, k.epoch, k.index, k.chain_id) for k in map(plan.__getitem__, range(6))] == [
        (1, 0, 0, "5"),
        (1, 0, 1, "3"),
        (1, 2, 0, "1"),
        (1, 2, 1, "4"),
        (0, 0, 0, "0"),
        (0, 0, 1, "5"),
    ]
    assert example_id(0, 0, 0) == 1295354261


def test_example_ids_are_distinct_and_fit_int32() -> None:
    ids = [example_id(s, e, i) for s in range(2) for e in range(10) for i in range(100)]
    assert len(set(ids)) == 2000
    assert max(ids) < 2**31 and min(ids) >= 0
