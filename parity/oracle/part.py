"""One part of the network as DeepMind's code calls it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parity.oracle.published import Params

Inputs = Mapping[str, Any]
Outputs = dict[str, Any]
Function = Callable[[Params, Inputs], Outputs]


@dataclass(frozen=True)
class Part:
    """``function`` gets parameters under the name ``part``, and the inputs of one example.

    It returns what our side of the case of the same name does, without the batch axis.
    """

    function: Function
    scope: str = ""  # DeepMind's scope of the parameters
    layer: int | None = None  # which slice of them, where they are stacked
    in_numpy: bool = False  # the published code is plain numpy
