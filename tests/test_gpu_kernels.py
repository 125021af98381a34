"""The kernels on a GPU: both tracks, at sizes of the model, against the reference in float64."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_kernels_attention import Case, check

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is here as well

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent
BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    "case",
    [
        Case(groups=128, length=256, heads=8, width=32, dtype=BFLOAT16),
        Case(groups=256, length=128, heads=8, width=32, axis=1, biased=False, dtype=BFLOAT16),
        Case(groups=256, length=256, heads=4, width=32, axis=1, dtype=BFLOAT16),
        Case(groups=37, length=256, heads=4, width=32, batch=2, dtype=BFLOAT16),
        Case(groups=256, length=256, heads=4, width=16, batch=4, dtype=BFLOAT16),
        Case(groups=1024, length=256, heads=8, width=8, dtype=BFLOAT16),
        Case(groups=64, length=384, heads=4, width=32, dtype=BFLOAT16),
        Case(groups=33, length=200, heads=4, width=32, dtype=BFLOAT16),
        Case(groups=19, length=100, heads=2, width=32, axis=1, biased=False, dtype=BFLOAT16),
        Case(groups=33, length=257, heads=4, width=32, dtype=BFLOAT16),
        Case(groups=16, length=256, heads=4, width=32),
        Case(groups=16, length=300, heads=4, width=32),
    ],
    ids=str,
)
def test_attention_at_model_sizes(case: Case) -> None:
    check(case)


def test_torch_kernels_pass_the_self_test() -> None:
    from torchfold import ops

    ops.self_test()


def test_torch_attention_compiles() -> None:
    from torchfold import ops

    projected = torch.randn(1, 8, 64, 4, 2, 32, device="cuda", dtype=BFLOAT16)
    gate_bias = torch.randn(2, 32, device="cuda", dtype=BFLOAT16)
    bias = torch.randn(1, 2, 64, 64, device="cuda", dtype=BFLOAT16)
    mask = torch.ones(1, 8, 64, device="cuda")

    def loss(projected: torch.Tensor, gate_bias: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        given = (2 * projected, gate_bias, mask, bias)
        output = ops.gated_attention(*given, scale=0.2, implementation="triton")
        return output.square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (projected, gate_bias, bias)]
        function(*leaves).backward()
        results.append([x.grad for x in leaves])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2e-2, atol=2e-2)


def test_jax_kernels_pass_the_self_test() -> None:
    from jaxfold import ops

    ops.self_test()


def test_jax_attention_in_scan_and_shard_map() -> None:
    import jax
    import jax.numpy as jnp

    from jaxfold import distributed, ops

    count = jax.device_count()
    mesh = distributed.make_mesh(count)
    mask, gate_bias = jnp.ones((1, 8, 64)), jnp.ones((2, 32))

    def loss(projected: jax.Array, implementation: str) -> jax.Array:
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            given = (x, gate_bias, mask)
            y = ops.gated_attention(*given, scale=0.2, implementation=implementation)
            return x + y[:, :, :, None], None

        final, _ = jax.lax.scan(layer, projected, None, length=3)
        return jnp.sum(jnp.square(final.astype(jnp.float32)))

    def gradient(implementation: str) -> np.ndarray:
        def local(factor: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
            gradient = jax.grad(lambda x: loss(factor * x, implementation))(batch["x"])
            return distributed.gather_over_data(gradient)

        x = np.random.default_rng(0).normal(size=(count, 8, 64, 4, 2, 32)).astype(np.float32)
        step = jax.jit(distributed.over_mesh(local, mesh))
        factor = distributed.replicate(mesh, np.float32(1))
        return np.asarray(step(factor, distributed.place(mesh, {"x": x})))

    with jax.default_matmul_precision("highest"):  # as the kernels; TF32 alone errs by 3e-4
        expected = gradient("reference")
    error = np.linalg.norm(gradient("triton") - expected) / np.linalg.norm(expected)
    assert error < 1e-4


def test_jax_attention_adds_no_copies() -> None:
    import jax
    import jax.numpy as jnp

    from jaxfold import ops

    def attend(x: jax.Array, weights: jax.Array, *rest: jax.Array) -> jax.Array:
        projected = (x @ weights).reshape(1, 64, 64, 4, 2, 32)
        return ops.gated_attention(projected, *rest, axis=1, implementation="triton")

    def step(grad: jax.Array, *given: jax.Array) -> tuple:
        output, backward = jax.vjp(attend, *given)
        return output, *backward(grad)

    # gradient, x, weights, bias of the gate, mask, bias
    shapes = ((1, 64, 64, 2, 32), (1, 64, 64, 64), (64, 256), (2, 32), (1, 64, 64), (1, 2, 64, 64))
    arrays = [
        jax.ShapeDtypeStruct(s, jnp.float32 if i == 4 else jnp.bfloat16)
        for i, s in enumerate(shapes)
    ]
    text = jax.jit(step).lower(*arrays).compile().as_text() or ""
    assert text.count('custom_call_target="twinfold_triton"') >= 3
    assert not re.findall(r"= \S+ (?:copy|transpose)\(", text)


def norms(x: Any, scale: Any, offset: Any) -> Any:
    """LayerNorms one after another."""
    from jaxfold import ops

    for _ in range(20):
        x = ops.layer_norm(x, scale, offset, implementation="triton")
    return x


def norm_arguments() -> list[Any]:
    import jax.numpy as jnp

    x = np.random.default_rng(0).normal(size=(512, 128)).astype(np.float32)
    return [jnp.asarray(x), jnp.full(128, 1.5), jnp.full(128, 0.5)]


def test_jax_kernels_are_captured_in_command_buffers(tmp_path: Path) -> None:
    """And right on arrays at other addresses than those of the capture."""
    import jax
    import jax.numpy as jnp

    given = norm_arguments()
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    program = jax.jit(norms).lower(*given).compile(compiler_options=options)
    (dump,) = tmp_path.rglob("*thunk_sequence_after_thunk_passes.txt")
    calls = re.findall(r"^( *)\d+: kCustomCall", dump.read_text(), re.M)
    assert len(calls) == 20 and all(calls), dump.read_text()
    first = program(*given)
    again = [program(jnp.copy(given[0]), *given[1:]) for _ in range(20)]
    assert all(bool(jnp.all(x == first)) for x in again)


def test_jax_update_overwrites_donated_buffers() -> None:
    import jax
    import jax.numpy as jnp

    from foldcore.config import OptimizerConfig
    from foldcore.kernels import optimizer
    from jaxfold import _triton

    size = 100_003
    launch = optimizer.update(size, OptimizerConfig(), _triton.architecture(), rounded=True)

    def update(old: list[jax.Array], gradient: jax.Array) -> list[jax.Array]:
        return list(_triton.call(launch, gradient, *old, jnp.ones(8))[:5])

    old = [jnp.full(size, float(i)) for i in range(4)]
    old.append(jnp.zeros(size, jnp.bfloat16))
    places = [x.unsafe_buffer_pointer() for x in old]
    new = jax.jit(update, donate_argnums=0)(old, jnp.ones(size))
    assert [x.unsafe_buffer_pointer() for x in new] == places


def test_jax_program_runs_from_the_compilation_cache(tmp_path: Path) -> None:
    """In another process, which finds program and kernels on the disk."""
    names = ("JAX_COMPILATION_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = dict(os.environ, **{name: str(tmp_path / name) for name in names})
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    code = (
        "import jax, numpy; from jax import monitoring; from tests import test_gpu_kernels as t\n"
        "hits = []; monitoring.register_event_listener(lambda name, **_: hits.append(name))\n"
        "result = numpy.asarray(jax.jit(t.norms)(*t.norm_arguments()))\n"
        "print(any('cache_hits' in name for name in hits), result.tobytes().hex()[:1000])"
    )
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.split())
    assert [hit for hit, _ in found] == ["False", "True"]
    assert found[0][1] == found[1][1]
