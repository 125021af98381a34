"""Small calls of everything that has kernels, by which a start-up test knows a wrong one.

Each case turns into a kernel or two that a training run does not have, and to compile them takes
nearly all of the test's time: cases are few, and share what they can.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from foldcore.config import OptimizerConfig

# Relative error of a norm in bfloat16, of which operands and results carry 8 bits: twice what was
# seen on H200; what a wrong index or a race leaves is of order 1.
TOLERANCE = 0.02
# Rounding also switches some hidden units on or off, in the plain implementation as well.
SWITCHED = 0.06
# Relative error of a norm in float32, some roundings of each number; masks have to be equal.
ROUNDINGS = 1e-5


class WrongKernel(RuntimeError):
    """A kernel's results on this device are not the reference's; the message names it."""


@dataclass(frozen=True)
class Case:
    """A call of ``<module>.<op>``: shapes of its arrays in order, and its keyword arguments."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    masks: tuple[str, ...] = ("mask",)  # arrays of zeros and ones in float32, without gradient
    tolerance: float = TOLERANCE
    module: str = "ops"

    def draw(self) -> dict[str, Float32[np.ndarray, "..."]]:
        """Fixed random arrays."""
        generator = np.random.default_rng(0)
        arrays = {name: generator.normal(size=shape) for name, shape in self.shapes.items()}
        return {
            name: (x > -1 if name in self.masks else x).astype(np.float32)
            for name, x in arrays.items()
        }

    def check(self, errors: Mapping[str, float]) -> None:
        """Raise for the first array of (outputs, gradients) that is wrong."""
        where = f"{dict(self.shapes)} {dict(self.options)}"
        _check(self.op, errors, self.tolerance, where)


@dataclass(frozen=True)
class UpdateCase:
    """Clipping and an update of so many parameters: ``optimizer.clip_factor`` and ``update``."""

    size: int = 5000
    max_norm: float = 10.0  # less than the gradient's
    step: int = 3
    # a step so large that errors of the update are errors of the parameters
    config: OptimizerConfig = OptimizerConfig(learning_rate=0.1, warmup_steps=0, ema_warmup=True)

    def draw(self) -> dict[str, Float32[np.ndarray, " n"]]:
        """The gradient and the buffers that an update changes, in its order."""
        generator = np.random.default_rng(0)
        names = ("gradient", "params", "mu", "nu", "ema")
        arrays = {name: generator.normal(size=self.size).astype(np.float32) for name in names}
        return arrays | {"nu": np.square(arrays["nu"])}

    def check(self, errors: Mapping[str, float]) -> None:
        """Raise for the first buffer or norm that is wrong."""
        _check("optimizer.update", errors, ROUNDINGS, f"{self.size} parameters")


@dataclass(frozen=True)
class MaskCase:
    """All dropout masks of a pass: (path, block, shape, rate) of each, of these examples."""

    masks: tuple[tuple[str, int, tuple[int, ...], float], ...]
    examples: tuple[int, ...] = (3, -2)
    seed: int = 2**31 + 7
    step: int = 11
    recycling: int = 2

    def draw(self) -> dict[str, np.ndarray]:
        """The examples' numbers."""
        return {"example_id": np.array(self.examples, np.int32)}

    def check(self, errors: Mapping[str, float]) -> None:
        """Raise for the first mask that is not the defined one."""
        _check("dropout", errors, ROUNDINGS, str(self.masks))


def _check(op: str, errors: Mapping[str, float], tolerance: float, where: str) -> None:
    """NaN is wrong."""
    for name, error in errors.items():
        if not error < tolerance:
            raise WrongKernel(
                f"the Triton kernels of {op} are wrong on this device: {name} differs from the "
                f"reference by {error:.1%} of its norm, at {where}. Train with "
                'model.implementation="reference", and please report this with the versions of '
                "triton and the driver"
            )


C, HIDDEN = 64, 256
# so many rows that programs take several tiles in turn, none with an edge, as at a crop of 256
ROWS = 40960
_TRANSITION = {
    "x": (ROWS, C),
    "scale": (C,),
    "offset": (C,),
    "weights1": (C, HIDDEN),
    "bias1": (HIDDEN,),
    "weights2": (HIDDEN, C),
    "bias2": (C,),
}
RESIDUES = 256  # as well
_TRIANGLE = {
    "pair": (1, RESIDUES, RESIDUES, C),
    "pair_mask": (1, RESIDUES, RESIDUES),
    "factor": (1, 1, RESIDUES, C),
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
# Programs take several tiles in turn here as well. 348 and 448 are no chance: the cosines by which
# the start-up test weighs the bias have a sum that is not near zero.
_NORM = {"scale": (C,), "offset": (C,), "weights": (C, 4)}
_SIDES = {
    f"{side}_{part}": (C, 32) if part == "weights" else (32,)
    for side in ("left", "right")
    for part in ("weights", "bias")
}
# With and without a bias, along both axes, edges masked. The first gets the gradients of queries
# and of its bias from one kernel, whose programs walk through two groups and more; the third has
# more keys than one program holds, the fourth so narrow heads that the bias stays on chip.
CASES = (
    Case(
        "gated_attention",
        {
            "projected": (1, 70, 256, 4, 2, 32),
            "gate_bias": (2, 32),
            "mask": (1, 70, 256),
            "bias": (1, 2, 256, 256),
        },
        {"axis": 2, "scale": 0.2},
    ),
    Case(
        "gated_attention",
        {"projected": (1, 128, 9, 4, 2, 32), "gate_bias": (2, 32), "mask": (1, 128, 9)},
        {"axis": 1, "scale": 0.2},
    ),
    Case(
        "gated_attention",
        {
            "projected": (1, 3, 264, 4, 2, 16),
            "gate_bias": (2, 16),
            "mask": (1, 3, 264),
            "bias": (1, 2, 264, 264),
        },
        {"axis": 2, "scale": 0.2},
    ),
    # sizes with a kernel of their own
    Case(
        "gated_attention",
        {
            "projected": (1, 18, 256, 4, 1, 32),
            "gate_bias": (1, 32),
            "mask": (1, 18, 256),
            "bias": (1, 1, 256, 256),
        },
        {"axis": 2, "scale": 0.2},
    ),
    # so few members of a group that its mean has a share in the gradient
    Case(
        "project_with_mean",
        {"x": (1, 5, 40, C), "mask": (1, 5, 40), "weights": (C, 16)},
        {"axis": 1},
    ),
    Case(
        "global_attention",
        {
            "query": (1, 9, 8, 8),
            "projected": (1, 256, 9, 80),
            "gate_bias": (8, 8),
            "mask": (1, 256, 9),
        },
        {"axis": 1, "scale": 0.35},
    ),
    Case(
        "gated_attention",
        {
            "projected": (1, 17, 200, 4, 2, 8),
            "gate_bias": (2, 8),
            "mask": (1, 17, 200),
            "bias": (1, 2, 200, 200),
        },
        {"axis": 2, "scale": 0.2},
    ),
    Case(
        "template_attention",
        {"query": (2, 9, 16, 4, 16), "projected": (2, 3, 9, 16, 2, 4, 16), "mask": (2, 3)},
        {"scale": 0.25},
    ),
    *(
        Case(
            "outer_product_mean",
            {
                "left": (1, sequences, 24, 16),
                "right": (1, sequences, 24, 16),
                "mask": (1, sequences, 24),
                "weights": (16, 16, C),
                "bias": (C,),
            },
        )
        for sequences in (12, 136)  # with and without the outer products kept on chip
    ),
    Case("pair_bias", {"pair": (1, 352, 348, C)} | _NORM, module="projections"),
    Case(
        "layer_norm_pair_bias",
        {"pair": (1, 448, 320, C)} | _NORM,
        {"axis": 1},
        module="projections",
    ),
    Case(
        "outer_product_sides",
        {"msa": (2, 256, 320, C), "mask": (2, 256, 320), "scale": (C,), "offset": (C,)} | _SIDES,
        module="projections",
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
    # what is projected is of the transposed table
    Case(
        "linear_update",
        {
            "x": (2, 40, 30, C),
            "y": (2, 30, 40, C),
            "weights": (C, C),
            "bias": (C,),
            "factor": (2, 40, 1, C),
        },
        {"residual": True, "transposed": True},
        masks=("factor",),
    ),
    # sizes with a kernel of their own, whose programs take several tiles
    Case(
        "linear_update",
        {
            "x": (1, 192, 256, C),
            "y": (1, 256, 192, C),
            "weights": (C, C),
            "bias": (C,),
            "factor": (1, 192, 1, C),
        },
        {"residual": True, "transposed": True},
        masks=("factor",),
    ),
    *(
        # rows that fill their tiles are taken in one pass, where there is a kernel for that
        Case("transition", _TRANSITION | {"x": (rows, C)}, {"residual": True}, tolerance=SWITCHED)
        for rows in (ROWS, ROWS - 3)
    ),
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
UPDATE = UpdateCase()
MASKS = MaskCase((("a/b", 0, (300, 16), 0.25), ("a/b", 7, (65,), 0.25), ("a/c", 1, (9, 9), 0.15)))
