"""Lowers programs with kernels for an H100 on any machine, and says what became of them, as JSON.

Run as a program, for Triton compiles in no process in which its interpreter is chosen.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.gpu_triton
import numpy as np
import triton
import triton.language as tl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from triton import knobs

for name in ("get_compute_capability", "get_serialized_metadata"):  # without them jax-triton stops
    if not hasattr(jaxlib.gpu_triton, name):
        setattr(jaxlib.gpu_triton, name, None)

from foldcore.config import OptimizerConfig  # noqa: E402
from foldcore.kernels import (  # noqa: E402
    layer_norm,
    optimizer,
    transition_pipelined,
    transition_pipelined_backward,
)
from foldcore.kernels.launch import Launch, Output  # noqa: E402
from jaxfold import _triton, _triton_cache  # noqa: E402
from jaxfold._launcher import Kernel  # noqa: E402
from jaxfold._triton_cache import compiling  # noqa: E402

SHAPE = (64, 128)


@triton.jit
def scaled_kernel(x_ptr, factor, shift, y_ptr, N: tl.constexpr):
    """A number times another, and a whole number added."""
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) * factor + shift)


def scaled(x: jax.Array, factor: float, shift: int) -> jax.Array:
    output = Output(x.shape, "float32")
    launch = Launch(scaled_kernel, (1,), (output,), {"N": x.size}, scalars=(factor, shift))
    return _triton.call(launch, x)[0]


def norms(x: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """LayerNorms in a loop, on a mesh."""
    launch = layer_norm.forward(*SHAPE, "float32", 90)

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _triton.call(launch, x, scale, offset)[0], None

    def run(x: jax.Array) -> jax.Array:
        return body(jax.lax.scan(body, x, None, length=3)[0], None)[0]

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)(
        x
    )


def transitions(*inputs: jax.Array) -> list[jax.Array]:
    """In Gluon, with and without a hidden layer to be saved, and backward."""
    x, scale, offset, weights1, _, weights2, _ = inputs
    shape = x.shape[0], *weights1.shape
    (y,) = _triton.call(transition_pipelined.forward(*shape, True, save=False), *inputs)
    dy, hidden, signs = _triton.call(transition_pipelined.forward(*shape, True, save=True), *inputs)
    launch = transition_pipelined_backward.backward(*shape, True)
    return [y, hidden, *_triton.call(launch, x, scale, offset, weights1, weights2, signs, dy)]


def programs() -> dict[str, tuple[Any, list[Any]]]:
    size = 5000
    launch = optimizer.update(size, OptimizerConfig(), 90, rounded=True)
    coefficients = jnp.zeros(8)
    shapes = (256, 64), (64,), (64,), (64, 256), (256,), (256, 64), (64,)
    vectors = [*[jnp.zeros(size)] * 5, jnp.zeros(size, jnp.bfloat16)]
    return {
        "norms": (norms, [jnp.zeros(SHAPE), jnp.zeros(SHAPE[1]), jnp.zeros(SHAPE[1])]),
        "scaled": (lambda x: scaled(scaled(x, 0.5, -2), 3.0, 7), [jnp.zeros(64)]),
        "transitions": (transitions, [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]),
        "update": (lambda *x: _triton.call(launch, *x), [*vectors, coefficients]),
    }


def described(kernel: Kernel) -> list[Any]:
    image = hashlib.sha256(kernel.image).hexdigest()
    form = kernel.image[1:4].decode()
    return [kernel.name, form, kernel.threads, kernel.shared, kernel.overlapped, image]


def main() -> None:
    added: dict[str, Kernel] = {}
    hits: list[bool] = []
    knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    _triton_cache.launcher = lambda: None
    _triton_cache.add = lambda _, kernel: added.setdefault(kernel.key, kernel)
    _triton.architecture = lambda: 90
    report: dict[str, Any] = {"calls": {}, "hits": hits}
    for name, (function, arguments) in programs().items():
        traced = jax.jit(function).trace(*arguments)
        with compiling(traced.jaxpr):
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        lines = [line for line in text.splitlines() if "@twinfold_triton" in line]
        report["calls"][name] = {
            "keys": sorted(Counter(re.findall(r'kernel = "(.*?)"', text)).items()),
            "scalars": re.findall(r"scalars = dense<(.*?)> : tensor<(\w+)>", text),
            "grids": sorted(set(re.findall(r"grid = dense<(.*?)> : tensor<(\w+)>", text))),
            "aliases": max(line.count("operand_index") for line in lines),
            "text": hashlib.sha256(text.encode()).hexdigest(),
            "here": str(Path(__file__).parent.parent) in text,
        }
    report["kernels"] = {key: described(kernel) for key, kernel in added.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
