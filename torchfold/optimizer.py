"""Learning rate, clipping, Adam and averaged weights on flat buffers (supplement section 1.11.3).

Updates are numbered from 1: the n-th update uses the learning rate and averaging decay of step n.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foldcore.config import OptimizerConfig
from torchfold._compiled import piece
from torchfold.ops import _kernel_runs


def learning_rate(step: Int[Tensor, ""], config: OptimizerConfig) -> Float[Tensor, ""]:
    """Linear warm-up from ``warmup_start``; lowered once after ``decay_after_steps``."""
    count = torch.as_tensor(step).to(torch.float32)
    progress = torch.clamp(count / max(config.warmup_steps, 1), max=1.0)
    if config.warmup_steps == 0:
        progress = torch.ones_like(count)
    rate = config.warmup_start + (config.learning_rate - config.warmup_start) * progress
    decayed = (count > config.decay_after_steps) & (config.decay_after_steps > 0)
    return torch.where(decayed, rate * config.decay_factor, rate)


def ema_decay(step: Int[Tensor, ""], config: OptimizerConfig) -> Float[Tensor, ""]:
    """Decay of the averaged weights; with ``ema_warmup`` it grows from 2/11 to ``ema_decay``."""
    count = torch.as_tensor(step).to(torch.float32)
    limit = torch.full_like(count, config.ema_decay)
    return torch.minimum(limit, (1 + count) / (10 + count)) if config.ema_warmup else limit


def clip_by_global_norm(
    gradient: Float[Tensor, " n"], max_norm: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
    """The gradient scaled to at most ``max_norm``, and its norm before that."""
    factor, norm = clip_factor(gradient, max_norm)
    return gradient * factor, norm


def clip_factor(
    gradient: Float[Tensor, " n"], max_norm: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What scales the gradient to at most ``max_norm``, and its norm."""
    if _kernel_runs("clip_factor", None, gradient):
        from torchfold import _optimizer

        norm = _optimizer.norm(gradient)
    else:
        norm = _norm(gradient)
    # the largest of both: no division by zero, and a non-finite norm stays visible in the result
    return max_norm / torch.clamp(norm, min=max_norm), norm


@piece
def _norm(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return torch.sqrt(torch.sum(torch.square(x)))


@piece
def adam(
    gradient: Float[Tensor, " n"],
    mu: Float[Tensor, " n"],
    nu: Float[Tensor, " n"],
    step: Int[Tensor, ""],
    config: OptimizerConfig,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Adam's direction (epsilon outside the root) and the new moments at update ``step``."""
    count = torch.as_tensor(step).to(gradient.dtype)
    mu = config.beta1 * mu + (1 - config.beta1) * gradient
    nu = config.beta2 * nu + (1 - config.beta2) * torch.square(gradient)
    mu_hat = mu / _bias_correction(count, config.beta1)
    nu_hat = nu / _bias_correction(count, config.beta2)
    return mu_hat / (torch.sqrt(nu_hat) + config.eps), mu, nu


class Buffers(NamedTuple):
    """What an update changes, beside the count of updates."""

    params: Float[Tensor, " n"]
    mu: Float[Tensor, " n"]
    nu: Float[Tensor, " n"]
    ema: Float[Tensor, " n"]
    rounded: Float[Tensor, " n"] | None = None  # the parameters in the dtype of this buffer


def update(
    gradient: Float[Tensor, " n"],
    factor: Float[Tensor, ""],
    old: Buffers,
    step: Int[Tensor, ""],
    finite: Bool[Tensor, ""],
    config: OptimizerConfig,
) -> tuple[Buffers, dict[str, Float[Tensor, ""]]]:
    """Update ``step`` by the gradient times ``factor``, unless it is not finite; and its norms.

    The kernel, where it is chosen, uses ``old`` up: its memory holds the new buffers.
    """
    rate, decay = learning_rate(step, config), ema_decay(step, config)
    if _kernel_runs("update", None, old.params):
        from torchfold import _optimizer

        count = torch.as_tensor(step).to(torch.float32)
        corrections = [_bias_correction(count, beta) for beta in (config.beta1, config.beta2)]
        coefficients = (factor, rate, decay, *corrections, finite)
        buffers, rounded, norms = _optimizer.update(
            gradient, old[:4], old.rounded, coefficients, config
        )
        new = Buffers(*buffers)._replace(rounded=rounded)
    else:
        new, norms = _update(gradient, factor, old, step, finite, rate, decay, config)
    logged = {"param_norm": norms[0], "update_norm": rate * norms[1], "learning_rate": rate}
    return new, logged


@piece
def _update(
    gradient: Float[Tensor, " n"],
    factor: Float[Tensor, ""],
    old: Buffers,
    step: Int[Tensor, ""],
    finite: Bool[Tensor, ""],
    rate: Float[Tensor, ""],
    decay: Float[Tensor, ""],
    config: OptimizerConfig,
) -> tuple[Buffers, tuple[Float[Tensor, ""], Float[Tensor, ""]]]:
    """The plain update; the norms of its parameters and of its direction."""
    direction, mu, nu = adam(gradient * factor, old.mu, old.nu, step, config)
    params = old.params - rate * direction
    made = params, mu, nu, decay * old.ema + (1 - decay) * params
    new = Buffers(*(torch.where(finite, a, b) for a, b in zip(made, old[:4], strict=True)))
    if old.rounded is not None:
        new = new._replace(rounded=new.params.to(old.rounded.dtype))
    # torch.linalg.vector_norm adds one number after another on a CPU: 1e-5 off for a million
    return new, (_norm(new.params), _norm(direction))


def _bias_correction(count: Float[Tensor, ""], beta: float) -> Float[Tensor, ""]:
    """1 - beta**n, without the cancellation that costs three digits in float32."""
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))
