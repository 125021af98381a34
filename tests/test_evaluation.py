"""The evaluation set: the same chains and features for every run, shared out over processes."""

import math
from dataclasses import replace

import numpy as np
import pytest

from foldcore.config import Config, DataConfig, ModelConfig, TrainConfig
from foldcore.data.dataset import Dataset, split
from foldcore.errors import DataError
from foldcore.evaluation import EvaluationSet, average, choose_chains, score, summarize
from foldcore.features import dimensions, validate

CONFIG = Config(
    model=ModelConfig(templates_enabled=False),
    data=DataConfig(
        crop_size=16, num_msa_clusters=4, num_extra_msa=4, num_templates=0, accept_unknown=True
    ),
    train=TrainConfig(eval_chains=3, eval_recycling_iters=2),
)


@pytest.fixture(scope="module")
def embedded() -> Dataset:
    return Dataset("embedded", CONFIG.data)


def batches(embedded: Dataset, size: int, share: tuple[int, int] = (0, 1), config: Config = CONFIG):
    return EvaluationSet(config, embedded, size, share).batches(pytest.fail)


def test_batches_are_held_out_chains_in_full_and_never_change(embedded: Dataset) -> None:
    chosen = EvaluationSet(CONFIG, embedded, 1).chains
    assert len(chosen) == 3 and set(chosen) <= set(split(embedded)[1])
    found = batches(embedded, 1)
    other_seed = replace(CONFIG, train=replace(CONFIG.train, seed=5))
    for (batch, scored), (again, _) in zip(
        found, batches(embedded, 1, config=other_seed), strict=True
    ):
        validate(batch, dimensions(CONFIG.data, 1))
        assert scored == 1 and batch["num_iter_recycling"] == 2
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name], err_msg=name)


def test_the_last_batch_is_filled_up_and_shared_out(embedded: Dataset) -> None:
    single = [batch["example_id"][0] for batch, _ in batches(embedded, 1)]
    (one, scored), (two, rest) = batches(embedded, 2)
    assert (scored, rest) == (2, 1)
    assert [*one["example_id"], *two["example_id"]] == [*single, single[0]]
    shares = [batches(embedded, 4, (number, 2)) for number in range(2)]
    assert [len(s) for s in shares] == [1, 1] and shares[0][0][1] == 3
    ids = np.concatenate([s[0][0]["example_id"] for s in shares])
    assert list(ids) == [*single, single[0]]


def test_an_unreadable_chain_is_reported_and_left_out(embedded: Dataset, monkeypatch) -> None:
    chosen = EvaluationSet(CONFIG, embedded, 1).chains
    raw = embedded.raw

    def damaged(chain_id: str):
        if chain_id == chosen[1]:
            raise DataError("file.cif", 3, "cut short")
        return raw(chain_id)

    monkeypatch.setattr(embedded, "raw", damaged)
    said: list[str] = []
    assert len(EvaluationSet(CONFIG, embedded, 1).batches(said.append)) == 2
    assert said == [f"left out of the evaluation: {chosen[1]}: file.cif:3: cut short"]


def test_the_choice_of_chains_depends_on_names_alone() -> None:
    names = [f"{i:04d}_A" for i in range(50)]
    chosen = choose_chains(names, 8)
    assert chosen == choose_chains(names[::-1], 8)
    assert choose_chains(names, 9)[:8] == chosen and len(choose_chains(names, 99)) == 50


def test_scores_are_averaged_over_the_structures_that_count() -> None:
    draw = np.random.default_rng(0)
    true = draw.normal(scale=8, size=(2, 12, 37, 3)).astype(np.float32)
    mask = np.ones((2, 12, 37), np.float32)
    found = {"predicted": true.copy(), "true": true, "mask": mask, "plddt": np.array([50.0, 70.0])}
    found["predicted"][1] = 0
    both = summarize([(found, 2)])
    wrong = score(found["predicted"][1], true[1], mask[1])
    assert both["eval/plddt"] == 60
    assert both["eval/lddt_ca"] == pytest.approx((1 + wrong["lddt_ca"]) / 2)
    first = summarize([(found, 1)])
    assert (first["eval/lddt_ca"], first["eval/plddt"]) == (1.0, 50.0)


def test_an_undefined_score_does_not_count() -> None:
    assert average([{"x": math.nan, "y": math.nan}, {"x": 3.0, "y": math.nan}])["x"] == 3.0
    assert math.isnan(average([{"x": math.nan}])["x"])
    assert average([]) == {}
