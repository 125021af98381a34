"""Which values each key of a configuration may have; the types are those of ``config.py``.

One table a section. A key without an entry takes any value of its type.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be: in words, which continue "must", and as a test."""

    words: str
    holds: Callable[[Any], bool]


def at_least(low: int) -> Rule:
    """A whole number from ``low`` on."""
    return Rule(f"be at least {low}", lambda value: value >= low)


def within(low: float, high: float) -> Rule:
    """A number between both, which are allowed too; never nan."""
    return Rule(f"lie in {low}..{high}", lambda value: low <= value <= high)


def _is_date(value: str) -> bool:
    try:
        return date.fromisoformat(value).isoformat() == value  # it reads other forms, too
    except ValueError:
        return False


def _is_run_name(value: str) -> bool:
    path = PurePath(value.strip())
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


COUNT, COUNT_OR_NONE = at_least(1), at_least(0)
SHARE = within(0.0, 1.0)
POSITIVE = Rule("be finite and greater than 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("be finite and at least 0", lambda value: 0 <= value < math.inf)
DECAY = Rule("be at least 0 and less than 1", lambda value: 0 <= value < 1)
LARGEST = Rule("be at least 0; inf allows any", lambda value: value >= 0)
DATE = Rule("be a date, YYYY-MM-DD", _is_date)
RUN_NAME = Rule("name a folder inside train.out, without '..'", _is_run_name)

MODEL = {
    "msa_dropout": within(0.0, 0.99),
    "pair_dropout": within(0.0, 0.99),
    "structure_dropout": within(0.0, 0.99),
}
DATA = {
    "distillation_probability": SHARE,
    "validation_fraction": SHARE,
    "crop_size": within(4, 100_000),
    "num_msa_clusters": within(1, 100_000),
    "num_extra_msa": within(0, 1_000_000),
    "num_templates": within(0, 1_000_000),
    "max_template_hits": COUNT_OR_NONE,
    "max_template_date": DATE,
    "masked_msa_fraction": SHARE,
    "block_deletion_fraction": SHARE,
    "block_deletion_count": COUNT_OR_NONE,
    "max_msa_rows": COUNT,
    "distillation_msa_rows": COUNT,
    "distillation_min_plddt": within(-1.0, 100.0),
    "unclamped_fraction": SHARE,
    "max_resolution": LARGEST,
    "max_single_residue_fraction": SHARE,
    "min_length": COUNT_OR_NONE,
    "workers": within(0, 1_000_000),
    "prefetch": within(1, 10_000),
    "reorder_window": within(1, 1_000_000),
    "example_timeout": within(0.01, 1e6),
}
LOSS = {
    "backbone_fape": NOT_NEGATIVE,
    "sidechain_fape": NOT_NEGATIVE,
    "chi": NOT_NEGATIVE,
    "angle_norm": NOT_NEGATIVE,
    "violation": NOT_NEGATIVE,
    "distogram": NOT_NEGATIVE,
    "masked_msa": NOT_NEGATIVE,
    "plddt": NOT_NEGATIVE,
    "experimentally_resolved": NOT_NEGATIVE,
    "aligned_error": NOT_NEGATIVE,
    "ca_c_n_stddev": POSITIVE,
    "min_resolution": NOT_NEGATIVE,
    "max_resolution": LARGEST,
}
OPTIMIZER = {
    "learning_rate": POSITIVE,
    "beta1": DECAY,
    "beta2": DECAY,
    "eps": POSITIVE,
    "warmup_start": NOT_NEGATIVE,
    "warmup_steps": COUNT_OR_NONE,
    "decay_after_steps": COUNT_OR_NONE,
    "decay_factor": SHARE,
    "clip_norm": POSITIVE,
    "ema_decay": SHARE,
}
TRAIN = {
    "name": RUN_NAME,
    "steps": within(1, 10**12),
    "seed": COUNT_OR_NONE,
    "batch_size": within(1, 10**12),
    "max_recycling_iters": within(0, 3),
    "log_every": within(1, 10**12),
    "eval_every": COUNT_OR_NONE,
    "eval_chains": within(1, 10**12),
    "eval_recycling_iters": within(0, 3),
    "save_every": within(1, 10**12),
    "keep": within(1, 10**12),
}


def mistake(section: object, rules: Mapping[str, Rule]) -> str | None:
    """The first value of a section that breaks its rule: "key=value: must ...", or None."""
    for key, rule in rules.items():
        if not rule.holds(value := getattr(section, key)):
            return f"{key}={value}: must {rule.words}"
    return None
