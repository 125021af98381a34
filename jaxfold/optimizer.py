"""Learning rate, clipping, Adam and averaged weights on flat buffers (supplement section 1.11.3).

Updates are numbered from 1: the n-th update uses the learning rate and averaging decay of step n.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from foldcore.config import OptimizerConfig
from jaxfold.ops import _kernel_runs


def learning_rate(step: Int[Array, ""], config: OptimizerConfig) -> Float[Array, ""]:
    """Linear warm-up from ``warmup_start``; lowered once after ``decay_after_steps``."""
    count = jnp.asarray(step).astype(jnp.float32)
    progress = jnp.minimum(count / max(config.warmup_steps, 1), 1.0)
    if config.warmup_steps == 0:
        progress = jnp.ones_like(count)
    rate = config.warmup_start + (config.learning_rate - config.warmup_start) * progress
    decayed = (count > config.decay_after_steps) & (config.decay_after_steps > 0)
    return jnp.where(decayed, rate * config.decay_factor, rate)


def ema_decay(step: Int[Array, ""], config: OptimizerConfig) -> Float[Array, ""]:
    """Decay of the averaged weights; with ``ema_warmup`` it grows from 2/11 to ``ema_decay``."""
    count = jnp.asarray(step).astype(jnp.float32)
    limit = jnp.full_like(count, config.ema_decay)
    return jnp.minimum(limit, (1 + count) / (10 + count)) if config.ema_warmup else limit


def clip_by_global_norm(
    gradient: Float[Array, " n"], max_norm: float
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """The gradient scaled to at most ``max_norm``, and its norm before that."""
    factor, norm = clip_factor(gradient, max_norm)
    return gradient * factor, norm


def clip_factor(
    gradient: Float[Array, " n"], max_norm: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What scales the gradient to at most ``max_norm``, and its norm."""
    if _kernel_runs("clip_factor", None, gradient):
        from jaxfold import _optimizer

        norm = _optimizer.norm(gradient)
    else:
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient)))
    # the largest of both: no division by zero, and a non-finite norm stays visible in the result
    return max_norm / jnp.maximum(norm, max_norm), norm


def adam(
    gradient: Float[Array, " n"],
    mu: Float[Array, " n"],
    nu: Float[Array, " n"],
    step: Int[Array, ""],
    config: OptimizerConfig,
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
    """Adam's direction (epsilon outside the root) and the new moments at update ``step``."""
    count = jnp.asarray(step).astype(gradient.dtype)
    mu = config.beta1 * mu + (1 - config.beta1) * gradient
    nu = config.beta2 * nu + (1 - config.beta2) * jnp.square(gradient)
    mu_hat = mu / _bias_correction(count, config.beta1)
    nu_hat = nu / _bias_correction(count, config.beta2)
    return mu_hat / (jnp.sqrt(nu_hat) + config.eps), mu, nu


class Buffers(NamedTuple):
    """What an update changes, beside the count of updates."""

    params: Float[Array, " n"]
    mu: Float[Array, " n"]
    nu: Float[Array, " n"]
    ema: Float[Array, " n"]
    rounded: Float[Array, " n"] | None = None  # the parameters in the dtype of this buffer


def update(
    gradient: Float[Array, " n"],
    factor: Float[Array, ""],
    old: Buffers,
    step: Int[Array, ""],
    finite: Bool[Array, ""],
    config: OptimizerConfig,
) -> tuple[Buffers, dict[str, Float[Array, ""]]]:
    """Update ``step`` by the gradient times ``factor``, unless it is not finite; and its norms.

    The kernel, where it is chosen, uses ``old`` up: its memory holds the new buffers.
    """
    rate, decay = learning_rate(step, config), ema_decay(step, config)
    if _kernel_runs("update", None, old.params):
        from jaxfold import _optimizer

        count = jnp.asarray(step).astype(jnp.float32)
        corrections = [_bias_correction(count, beta) for beta in (config.beta1, config.beta2)]
        coefficients = (factor, rate, decay, *corrections, finite)
        buffers, rounded, norms = _optimizer.update(
            gradient, old[:4], old.rounded, coefficients, config
        )
        new = Buffers(*buffers)._replace(rounded=rounded)
    else:
        direction, mu, nu = adam(gradient * factor, old.mu, old.nu, step, config)
        params = old.params - rate * direction
        made = params, mu, nu, decay * old.ema + (1 - decay) * params
        new = Buffers(*(jnp.where(finite, a, b) for a, b in zip(made, old[:4], strict=True)))
        if old.rounded is not None:
            new = new._replace(rounded=new.params.astype(old.rounded.dtype))
        norms = jnp.linalg.norm(new.params), jnp.linalg.norm(direction)
    logged = {"param_norm": norms[0], "update_norm": rate * norms[1], "learning_rate": rate}
    return new, logged


def _bias_correction(count: Float[Array, ""], beta: float) -> Float[Array, ""]:
    """1 - beta**n, without the cancellation that costs three digits in float32."""
    return -jnp.expm1(count * (math.log(beta) if beta else -math.inf))
