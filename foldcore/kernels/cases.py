"""Small calls of every operation that has kernels, by which a start-up test knows a wrong one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

# Relative error of a norm in bfloat16, of which operands and results carry 8 bits: twice what was
# seen on H200; what a wrong index or a race leaves is of order 1.
TOLERANCE = 0.02
# Rounding also switches some hidden units on or off, in the plain implementation as well.
SWITCHED = 0.06


class WrongKernel(RuntimeError):
    """A kernel's results on this device are not the reference's; the message names it."""


@dataclass(frozen=True)
class Case:
    """A call of ``ops.<op>``: shapes of its arrays in order, and its keyword arguments."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    masks: tuple[str, ...] = ("mask",)  # arrays of zeros and ones in float32, without gradient
    tolerance: float = TOLERANCE

    def draw(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """Fixed random arrays."""
        generator = np.random.default_rng(0)
        arrays = {name: generator.normal(size=shape) for name, shape in self.shapes.items()}
        return {
            name: (x > -1 if name in self.masks else x).astype(np.float32)
            for name, x in arrays.items()
        }

    def check(self, errors: Mapping[str, float]) -> None:
        """Raise for the first array of (output, gradients) that is wrong; NaN is wrong."""
        for name, error in errors.items():
            if not error < self.tolerance:
                raise WrongKernel(
                    f"the Triton kernels of {self.op} are wrong on this device: {name} differs "
                    f"from the reference by {error:.1%} of its norm, at {dict(self.shapes)} "
                    f'{dict(self.options)}. Train with model.implementation="reference", and '
                    "please report this with the versions of triton and the driver"
                )


C, HIDDEN = 64, 128
_TRANSITION = {
    "x": (300, C),
    "scale": (C,),
    "offset": (C,),
    "weights1": (C, HIDDEN),
    "bias1": (HIDDEN,),
    "weights2": (HIDDEN, C),
    "bias2": (C,),
}
_TRIANGLE = {
    "pair": (1, 24, 24, C),
    "pair_mask": (1, 24, 24),
    "factor": (1, 1, 24, C),
    "norm_scale": (C,),
    "norm_offset": (C,),
    **{
        f"{side}{part}": (C,) if part.endswith("bias") else (C, C)
        for side in ("left", "right")
        for part in ("", "_bias", "_gate", "_gate_bias")
    },
    "center_scale": (C,),
    "center_offset": (C,),
    "output": (C, C),
    "output_bias": (C,),
    "gating": (C, C),
    "gating_bias": (C,),
}
# With and without a bias, along both axes, edges masked; the last has more keys than one program
# holds.
CASES = (
    Case(
        "gated_attention",
        {"projected": (1, 9, 200, 4, 2, 32), "mask": (1, 9, 200), "bias": (1, 2, 200, 200)},
        {"axis": 2, "scale": 0.2},
    ),
    Case(
        "gated_attention",
        {"projected": (1, 128, 9, 4, 2, 32), "mask": (1, 128, 9)},
        {"axis": 1, "scale": 0.2},
    ),
    Case(
        "gated_attention",
        {"projected": (1, 3, 264, 4, 2, 16), "mask": (1, 3, 264), "bias": (1, 2, 264, 264)},
        {"axis": 2, "scale": 0.2},
    ),
    Case(
        "outer_product_mean",
        {
            "left": (1, 20, 24, 16),
            "right": (1, 20, 24, 16),
            "mask": (1, 20, 24),
            "weights": (16, 16, C),
            "bias": (C,),
        },
    ),
    Case(
        "attention_projection",
        {"x": (1, 10, 30, C), "weights": (C, 4, 2, 16), "gate_bias": (2, 16)},
    ),
    Case("layer_norm", {"x": (300, 128), "scale": (128,), "offset": (128,)}),
    Case(
        "linear_update",
        {
            "x": (2, 5, 30, C),
            "y": (2, 5, 30, HIDDEN),
            "weights": (HIDDEN, C),
            "bias": (C,),
            "factor": (2, 5, 1, C),
        },
        {"residual": True},
        masks=("factor",),
    ),
    Case("transition", _TRANSITION, {"residual": True}, tolerance=SWITCHED),
    *(
        Case(
            "triangle_multiplication",
            _TRIANGLE,
            {"outgoing": outgoing, "residual": True},
            masks=("pair_mask", "factor"),
        )
        for outgoing in (True, False)
    ),
)
