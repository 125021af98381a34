"""Clipping, Adam and averaged weights (supplement section 1.11.3) in one pass over flat buffers.

The buffers are updated in place; the parameters are written in bfloat16 as well, where asked. What
depends on the number of the update, and on the gradient's norm, is computed beforehand on the
device: COEFFICIENTS, in this order. Sums of squares are taken by each program apart and then over
the programs, in a fixed order.

Legend: n parameters, g groups.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from foldcore.config import OptimizerConfig
from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import INTERPRETER, Launch, Output, cdiv

# factor of the gradient, learning rate, decay of the averages, 1 - beta1**step, 1 - beta2**step,
# 1 if the update is finite and to be made, else 0
COEFFICIENTS = ("factor", "rate", "decay", "correction1", "correction2", "made")


@dataclass(frozen=True)
class Sizes:
    """Elements that a program has at a time; most programs, each a group of such blocks."""

    elements: int
    groups: int
    num_warps: int

    def constants(self, n: int) -> dict[str, int]:
        return {"N": n, "BLOCK": self.elements, "TILES": cdiv(n, self.elements * self.programs(n))}

    def programs(self, n: int) -> int:
        return min(self.groups, cdiv(n, self.elements))


MEASURED = Sizes(2048, 1056, 8)  # 8 programs a multiprocessor
_TESTED = Sizes(64, 4, 4)


@triton.jit
def optimizer_squares_kernel(
    x_ptr,  # [n] float32
    sums_ptr,  # [g, 1] of squares
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    await_previous()
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        start = (tile * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK
        index = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start + index, mask=index < N - start, other=0.0)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def optimizer_update_kernel(
    gradient_ptr,  # [n] float32, as are the following
    params_ptr,
    mu_ptr,
    nu_ptr,
    ema_ptr,
    rounded_ptr,  # [n] bfloat16; [1] unless ROUNDED
    coefficients_ptr,  # [6] float32: COEFFICIENTS
    new_params_ptr,  # [n] float32, in the places of the old
    new_mu_ptr,
    new_nu_ptr,
    new_ema_ptr,
    new_rounded_ptr,
    sums_ptr,  # [g, 2]: of the squares of the new parameters and of Adam's direction
    N: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    await_previous()
    factor, rate = tl.load(coefficients_ptr), tl.load(coefficients_ptr + 1)
    decay, made = tl.load(coefficients_ptr + 2), tl.load(coefficients_ptr + 5) > 0
    correction1, correction2 = tl.load(coefficients_ptr + 3), tl.load(coefficients_ptr + 4)
    params_total = tl.zeros([BLOCK], tl.float32)
    direction_total = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        start = (tile * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK
        index = tl.arange(0, BLOCK)
        inside = index < N - start
        gradient = tl.load(gradient_ptr + start + index, mask=inside, other=0.0) * factor
        old_params = tl.load(params_ptr + start + index, mask=inside, other=0.0)
        old_mu = tl.load(mu_ptr + start + index, mask=inside, other=0.0)
        old_nu = tl.load(nu_ptr + start + index, mask=inside, other=0.0)
        old_ema = tl.load(ema_ptr + start + index, mask=inside, other=0.0)
        mu = BETA1 * old_mu + (1.0 - BETA1) * gradient
        nu = BETA2 * old_nu + (1.0 - BETA2) * (gradient * gradient)
        root = tl.sqrt_rn(tl.div_rn(nu, correction2))
        direction = tl.div_rn(tl.div_rn(mu, correction1), root + EPS)
        params = old_params - rate * direction
        ema = decay * old_ema + (1.0 - decay) * params
        params = tl.where(made, params, old_params)
        tl.store(new_params_ptr + start + index, params, mask=inside)
        if ROUNDED:
            tl.store(new_rounded_ptr + start + index, params.to(tl.bfloat16), mask=inside)
        tl.store(new_mu_ptr + start + index, tl.where(made, mu, old_mu), mask=inside)
        tl.store(new_nu_ptr + start + index, tl.where(made, nu, old_nu), mask=inside)
        tl.store(new_ema_ptr + start + index, tl.where(made, ema, old_ema), mask=inside)
        params_total += params * params
        direction_total += direction * direction
    at = sums_ptr + 2 * tl.program_id(0)
    tl.store(at, tl.sum(params_total, 0))
    tl.store(at + 1, tl.sum(direction_total, 0))


def squares(n: int, architecture: int) -> Launch:
    """x [n] -> sums of squares [g, 1]."""
    sizes = _TESTED if architecture == INTERPRETER else MEASURED
    return Launch(
        kernel=optimizer_squares_kernel,
        grid=(sizes.programs(n),),
        outputs=(Output((sizes.programs(n), 1), "float32"),),
        constants=sizes.constants(n),
        num_warps=sizes.num_warps,
    )


def update(
    n: int, config: OptimizerConfig, architecture: int, rounded: bool, sizes: Sizes = MEASURED
) -> Launch:
    """(gradient, params, mu, nu, ema, rounded, coefficients) -> the new buffers, sums [g, 2].

    ``rounded`` are the parameters in bfloat16; where they are not wanted, one number, left alone.
    """
    sizes = _TESTED if architecture == INTERPRETER else sizes
    buffer, sums = Output((n,), "float32"), Output((sizes.programs(n), 2), "float32")
    narrow = Output((n if rounded else 1,), "bfloat16")
    constants = {"BETA1": config.beta1, "BETA2": config.beta2, "EPS": config.eps}
    return Launch(
        kernel=optimizer_update_kernel,
        grid=(sizes.programs(n),),
        outputs=(buffer, buffer, buffer, buffer, narrow, sums),
        constants=sizes.constants(n) | constants | {"ROUNDED": rounded},
        num_warps=sizes.num_warps,
        in_place={1: 0, 2: 1, 3: 2, 4: 3, 5: 4},
    )
