"""Evaluation on held-out chains: a fixed choice of chains, crops and alignments, and its scores.

Each chain is cut at its centre and its alignment sampled from a seed that depends on the chain
alone, so every evaluation of every run sees the same input.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from foldcore import metrics
from foldcore.config import Config
from foldcore.constants import atom_order
from foldcore.data.dataset import Dataset, open_validation
from foldcore.data.transforms import make_example
from foldcore.errors import DataError
from foldcore.features import Batch

SCORES = {"lddt_ca": metrics.lddt_ca, "drmsd": metrics.drmsd, "gdt_ts": metrics.gdt_ts}
CA = atom_order["CA"]


class EvaluationSet:
    """The batches of an evaluation, prepared when first needed and then kept in memory.

    The chains are those held out of the ``training`` set, or ``data.validation_path``. A batch has
    ``batch_size`` chains over all processes; this one prepares its ``share`` (number,
    count) of each. The last batch is filled up with chains that are not scored.
    """

    def __init__(
        self,
        config: Config,
        training: Dataset,
        batch_size: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._config = config
        self._dataset, chains = open_validation(config.data, training)
        self.chains = choose_chains(chains, config.train.eval_chains)
        self._batch_size, self._share = batch_size, share
        self._batches: list[tuple[Batch, int]] = []

    def batches(self, warn: Callable[[str], None]) -> list[tuple[Batch, int]]:
        """(this process's part of a batch, scored chains of the whole batch), in order.

        A chain that cannot be read is reported through ``warn`` and left out.
        """
        if not self._batches:
            readable = [chain_id for chain_id in self.chains if self._readable(chain_id, warn)]
            size, (number, count) = self._batch_size, self._share
            for start in range(0, len(readable), size):
                group = [readable[(start + i) % len(readable)] for i in range(size)]
                mine = group[number * size // count : (number + 1) * size // count]
                scored = min(size, len(readable) - start)
                self._batches.append((_stack([self._example(c) for c in mine]), scored))
        return self._batches

    def _readable(self, chain_id: str, warn: Callable[[str], None]) -> bool:
        try:
            self._dataset.raw(chain_id)
        except DataError as error:
            self._dataset.report.fail(chain_id, str(error))
            warn(f"left out of the evaluation: {chain_id}: {error}")
            return False
        return True

    def _example(self, chain_id: str) -> Batch:
        name = _number(chain_id)
        raw = self._dataset.raw(chain_id)
        example = make_example(raw, self._config.data, (name,), training=False)
        passes = self._config.train.eval_recycling_iters
        example["example_id"] = np.asarray(name, np.int32)
        example["num_iter_recycling"] = np.asarray(passes, np.int32)
        return example


def choose_chains(chains: Sequence[str], count: int) -> list[str]:
    """``count`` of the chains, or all where there are fewer; the choice depends on names alone."""
    return sorted(chains, key=lambda chain_id: (_number(chain_id), chain_id))[:count]


def summarize(batches: Sequence[tuple[Mapping[str, np.ndarray], int]]) -> dict[str, float]:
    """Mean over the structures of each score and value, by name under ``eval/``.

    A batch has ``predicted``, ``true`` (atom37 positions) and ``mask``, any other values with one
    number a structure, and how many of its structures count.
    """
    rows = []
    for found, scored in batches:
        values = {k: v for k, v in found.items() if k not in ("predicted", "true", "mask")}
        for i in range(scored):
            row = score(found["predicted"][i], found["true"][i], found["mask"][i])
            rows.append({**row, **{name: float(value[i]) for name, value in values.items()}})
    return {f"eval/{name}": mean for name, mean in average(rows).items()}


def score(
    predicted: Float[np.ndarray, "r 37 3"],
    true: Float[np.ndarray, "r 37 3"],
    mask: Float[np.ndarray, "r 37"],
) -> dict[str, float]:
    """The scores of one structure, from its alpha carbons; nan where one is not defined."""
    arguments = (predicted[:, CA], true[:, CA], mask[:, CA])
    return {name: metric(*arguments) for name, metric in SCORES.items()}


def average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over structures of each score, over those where it is defined."""
    means = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = math.fsum(values) / len(values) if values else math.nan
    return means


def _stack(examples: Sequence[Batch]) -> Batch:
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def _number(chain_id: str) -> int:
    digest = hashlib.blake2b(chain_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
