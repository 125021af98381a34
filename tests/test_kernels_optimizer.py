"""The update by a kernel, in both tracks: each buffer and norm beside the plain one."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from foldcore.config import OptimizerConfig
from foldcore.kernels.launch import INTERPRETER
from jaxfold import _optimizer as jax_kernels
from jaxfold import _rows, ops
from jaxfold import optimizer as jax_optimizer
from tests.triton_interpreter import jax_call
from torchfold import ops as torch_ops
from torchfold import optimizer as torch_optimizer

CONFIG = OptimizerConfig(warmup_steps=10, ema_warmup=True)
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

Results = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if ON_GPU:
        return
    for module in (jax_kernels, _rows):
        monkeypatch.setattr(module, "call", jax_call)
        monkeypatch.setattr(module, "architecture", lambda: INTERPRETER)


def arrays(n: int) -> Results:
    """A gradient and a state amid training, over ten orders of magnitude."""
    draw = np.random.default_rng(n)
    scale = 10.0 ** draw.uniform(-9, 1, n)
    made = {
        "gradient": draw.normal(size=n) * scale,
        "params": draw.normal(size=n),
        "mu": draw.normal(size=n) * scale,
        "nu": np.square(draw.normal(size=n) * scale),
        "ema": draw.normal(size=n),
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


def run(track: str, implementation: str, n: int, finite: bool, rounded: bool = False) -> Results:
    """The new buffers and all norms, by name; ``rounded`` parameters as float32."""
    ops_module: Any = ops if track == "jax" else torch_ops
    optimizer: Any = jax_optimizer if track == "jax" else torch_optimizer

    def bfloat16(x: Any) -> Any:
        return x.astype(jnp.bfloat16) if track == "jax" else x.bfloat16()

    def put(x: np.ndarray) -> Any:
        return jnp.asarray(x) if track == "jax" else torch.from_numpy(np.array(x)).to(DEVICE)

    gradient, *buffers = (put(x) for x in arrays(n).values())
    ops_module.use(implementation)
    try:
        factor, norm = optimizer.clip_factor(gradient, 0.1)
        old = optimizer.Buffers(*buffers)
        if rounded:  # what was there does not matter
            old = old._replace(rounded=bfloat16(buffers[1]))
        given = (gradient, factor, old, put(np.int32(3)), put(np.bool_(finite)), CONFIG)
        new, norms = optimizer.update(*given)
    finally:
        ops_module.use("reference")
    found = {**new._asdict(), **norms, "grad_norm": norm}
    assert (found["rounded"] is not None) == rounded
    if rounded:
        assert found["rounded"].dtype == bfloat16(gradient).dtype
    given = {name: x for name, x in found.items() if x is not None}
    if track == "jax":
        return {name: np.asarray(x.astype(jnp.float32)) for name, x in given.items()}
    return {name: x.float().cpu().numpy() for name, x in given.items()}


@pytest.mark.parametrize("track", ["jax", "torch"])
@pytest.mark.parametrize("n", [1, 257, 1000])
def test_update(track: str, n: int) -> None:
    found, plain = run(track, "triton", n, True), run(track, "reference", n, True)
    for name, expected in plain.items():
        np.testing.assert_allclose(found[name], expected, rtol=5e-7, atol=1e-37, err_msg=name)


@pytest.mark.parametrize("track", ["jax", "torch"])
def test_a_non_finite_update_leaves_the_buffers(track: str) -> None:
    found, before = run(track, "triton", 257, False), arrays(257)
    for name in ("params", "mu", "nu", "ema"):
        np.testing.assert_array_equal(found[name], before[name], err_msg=name)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("track", ["jax", "torch"])
@pytest.mark.parametrize("finite", [True, False])
def test_rounded_parameters_are_those_kept(track: str, implementation: str, finite: bool) -> None:
    found = run(track, implementation, 1000, finite, rounded=True)
    expected = found["params"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found.pop("rounded"), expected)
    for name, plain in run(track, implementation, 1000, finite).items():
        np.testing.assert_array_equal(found[name], plain, err_msg=name)
