"""The optimizer against optax and PyTorch, and the schedules against their definitions."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from foldcore.config import OptimizerConfig
from jaxfold.optimizer import adam, clip_by_global_norm, ema_decay, learning_rate

CONFIG = OptimizerConfig(learning_rate=1e-3)


def gradients(steps: int, size: int = 200) -> np.ndarray:
    draw = np.random.default_rng(0)
    # ten orders of magnitude, so that epsilon, inside or outside the root, matters for some
    scale = 10.0 ** draw.uniform(-9, 1, size)
    return (draw.standard_normal((steps, size)) * scale).astype(np.float32)


def our_path(steps: int) -> np.ndarray:
    params = np.zeros(gradients(1).shape[1], np.float32)
    mu, nu = jnp.zeros_like(params), jnp.zeros_like(params)
    path = []
    for n, gradient in enumerate(gradients(steps), start=1):
        direction, mu, nu = adam(jnp.asarray(gradient), mu, nu, jnp.asarray(n), CONFIG)
        params = params - CONFIG.learning_rate * direction
        path.append(np.asarray(params))
    return np.stack(path)


def test_adam_is_optax_adam() -> None:
    transform = optax.adam(1e-3, b1=0.9, b2=0.999, eps=1e-6)
    params = jnp.zeros(gradients(1).shape[1])
    state = transform.init(params)
    path = []
    for gradient in gradients(30):
        updates, state = transform.update(jnp.asarray(gradient), state)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params))
    # optax computes 1 - 0.999**n in float32: at n = 1 that alone is 3e-5 wrong, 1.5e-5 in the root,
    # of an update of 1e-3; it shrinks as 1/n
    np.testing.assert_allclose(our_path(30), np.stack(path), rtol=2e-5, atol=6e-8)


def test_adam_is_pytorch_adam() -> None:
    params = torch.zeros(gradients(1).shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([params], lr=1e-3, betas=(0.9, 0.999), eps=1e-6)
    path = []
    for gradient in gradients(30):
        params.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        path.append(params.detach().numpy().copy())
    # 30 updates of at most 1e-3, each rounded to float32
    np.testing.assert_allclose(our_path(30), np.stack(path), rtol=2e-6, atol=5e-9)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (1, 1e-6), (500, 5e-4), (1000, 1e-3), (50_000, 1e-3), (50_001, 9.5e-4)],
)
def test_the_papers_schedule(step: int, expected: float) -> None:
    rate = float(learning_rate(jnp.asarray(step), OptimizerConfig()))
    assert rate == pytest.approx(expected, rel=1e-6)


def test_schedule_without_decay_warmup_from_a_start_and_none() -> None:
    mlperf = OptimizerConfig(warmup_start=1e-5, warmup_steps=10, decay_after_steps=0)
    assert float(learning_rate(jnp.asarray(5), mlperf)) == pytest.approx(5.05e-4)
    assert float(learning_rate(jnp.asarray(10**6), mlperf)) == pytest.approx(1e-3)
    finetuning = OptimizerConfig(learning_rate=5e-4, warmup_steps=0, decay_after_steps=0)
    assert float(learning_rate(jnp.asarray(1), finetuning)) == pytest.approx(5e-4)


def test_ema_decay() -> None:
    assert float(ema_decay(jnp.asarray(1), OptimizerConfig())) == pytest.approx(0.999)
    warm = OptimizerConfig(ema_decay=0.98, ema_warmup=True)
    assert float(ema_decay(jnp.asarray(1), warm)) == pytest.approx(2 / 11)
    assert float(ema_decay(jnp.asarray(10_000), warm)) == pytest.approx(0.98)


def test_clipping_scales_long_gradients_only() -> None:
    gradient = jnp.array([3.0, 4.0])
    clipped, norm = clip_by_global_norm(gradient, 0.1)
    assert float(norm) == pytest.approx(5.0)
    np.testing.assert_allclose(clipped, gradient * 0.02, rtol=1e-6)
    short, norm = clip_by_global_norm(gradient, 10.0)
    chex.assert_trees_all_equal(short, gradient)
    zero, norm = clip_by_global_norm(jnp.zeros(3), 0.1)
    assert float(norm) == 0.0 and not zero.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_stays_visible(bad: float) -> None:
    clipped, norm = clip_by_global_norm(jnp.array([1.0, bad]), 0.1)
    assert not np.isfinite(norm)
    assert not np.isfinite(clipped).all()
