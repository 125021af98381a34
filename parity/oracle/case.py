"""One part of the network, as DeepMind's code and ours call it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxfold.model import AlphaFold
from parity.oracle.published import Params

Inputs = Mapping[str, Any]
Outputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Both sides get the same inputs: DeepMind's those of one example, ours those of a batch.

    Both return arrays by kind. The kind says where padding is: ``pair``, ``msa``, ``extra`` and
    ``single`` name the leading axes (behind the batch axis); more letters may follow.
    """

    oracle: Callable[[Params, Inputs], Outputs]
    ours: Callable[[AlphaFold, Inputs], Outputs]
    scope: str = ""  # DeepMind's scope of the parameters
    layer: int | None = None  # which slice of them, where they are stacked
    # parameters, or inputs where there are none, changed to see whether the case can fail
    mutate: tuple[str, ...] = ()
    in_numpy: bool = False  # the oracle is plain numpy
