"""Levels 2 and 3 at the size of a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from foldcore.config import Config
from parity.case import Case
from parity.network_cases import PASSES
from parity.options import configuration
from parity.step_cases import StepCases
from parity.step_runs import batches, some_way_on
from parity.tracks import Arrays

LOOK_AT = 12  # examples of the loader of which the longest is taken
NETWORK_RUNS, STEP_RUNS = 3, 4  # that measure noise, in each track
STEP_PASSES = 1  # of recycling in the optimiser step


@dataclass(frozen=True)
class Example:
    """Parameters and a batch for a configuration."""

    config: Config

    def __call__(self) -> tuple[Arrays, Arrays]:
        """Parameters of a run some way on; the longest of the first examples with all passes."""
        found = islice(batches(self.config), LOOK_AT)
        whole = [batch for batch in found if batch["num_iter_recycling"][0] == max(PASSES)]
        longest = max(whole, key=lambda batch: int(batch["seq_length"][0]))
        return some_way_on(self.config), longest


def cases(path: str, overrides: Sequence[str]) -> list[Case]:
    """The network with 0 to 3 recycling passes, and one optimiser step."""
    config = configuration(path, overrides)
    both = StepCases(
        config,
        Example(config),
        config.train.name,
        STEP_PASSES,
        network_runs=NETWORK_RUNS,
        step_runs=STEP_RUNS,
    )
    return [both.network(PASSES), both.step()]
