"""How a step is compiled and run: JAX's settings, flat parameters, the gradient, jit with donation.

``train.py`` says what a step computes; this file knows that JAX compiles it.
"""

import os
import platform
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32

from foldcore import __version__
from foldcore.config import Config, ModelConfig
from foldcore.data.loader import Loader
from foldcore.deepmind import canonical_name
from foldcore.layout import make_layout
from jaxfold import _triton, ops
from jaxfold._triton_cache import compiling
from jaxfold.distributed import over_mesh, place
from jaxfold.model import AlphaFold
from jaxfold.params import initialize, parameters
from jaxfold.primitives import DropoutKey

TRUNK = "evoformer/"  # names of the parameters that compute in config.model.dtype
MATMUL_PRECISION = {"ieee": "highest", "tf32": "tensorfloat32"}
_ALIGNMENT = 16  # bytes, of the arrays that kernels read
IN_FLIGHT = 2  # steps the host may run ahead of the device; more would only hold more batches


def configure(config: Config) -> None:
    """Set what is global in JAX; must run before the first device is used."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    cache = Path(os.environ.get("TWINFOLD_CACHE", "~/.cache/twinfold")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / "jax"))
    jax.config.update(
        "jax_default_matmul_precision", MATMUL_PRECISION[config.model.matmul_precision]
    )
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    ops.use(config.model.implementation)
    _triton.keep_in(cache / "triton")


def _compiler_options(config: Config) -> dict[str, bool]:
    """XLA's options for this run's programs."""
    if jax.default_backend() != "gpu":
        return {}
    # Kernels read a block's slice of the stacked parameters where it is. In a loop that saves what
    # they compute for the backward pass, XLA would run them twice.
    options = {"xla_gpu_enable_dynamic_slice_fusion": config.model.unroll}
    if config.train.deterministic:
        options["xla_gpu_exclude_nondeterministic_ops"] = True
    return options


class Network:
    """AlphaFold as a pure function of its parameters, which live in one flat buffer."""

    def __init__(self, config: ModelConfig) -> None:
        model = nnx.eval_shape(lambda: AlphaFold(config))
        self.layout = make_layout({name: p.shape for name, p in parameters(model).items()})
        self._dtype = jnp.dtype(config.dtype)
        self._graph, self._variables = nnx.split(model)
        model.set_attributes(unroll=False)
        self._looped = nnx.graphdef(model)
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(self._variables)
        paths = [[str(key.key) for key in path[:-1]] for path, _ in leaves]  # the last is "value"
        self._names = [canonical_name(path) for path in paths]  # in the order of nnx

    def __call__(
        self, params: Mapping[str, Array], batch: Mapping[str, Array], dropout: DropoutKey | None
    ) -> dict[str, Array]:
        """The model's outputs for parameters by name; only with dropout are blocks written out."""
        variables = jax.tree.unflatten(self._structure, [params[name] for name in self._names])
        graph = self._looped if dropout is None else self._graph
        return nnx.merge(graph, variables)(batch, dropout)

    def initialize(self, seed: int) -> Float32[np.ndarray, " n"]:
        """The initial values of all parameters, on the host."""
        model = nnx.merge(self._graph, self._variables)
        initialize(model, seed)
        return self.layout.flatten(jax.device_get(parameters(model)))

    def with_rounded(self, state: Any) -> Any:
        """The state with the parameters in the trunk's dtype as well, where that is narrower."""
        if self._dtype.itemsize >= state.params.dtype.itemsize:
            return state
        return replace(state, rounded=state.params.astype(self._dtype))

    def unflatten(
        self, flat: Float[Array, " n"], rounded: Float[Array, " n"] | None = None
    ) -> dict[str, Array]:
        """Parameters by name; the trunk's in the dtype it computes in, ``rounded`` or cast now."""
        wide = self.layout.unflatten(flat)
        narrow = wide if rounded is None else self.layout.unflatten(rounded)

        def placed(name: str, offset: int) -> Array:
            part = wide[name]
            if name.startswith(TRUNK) and part.dtype != self._dtype:
                part = narrow[name].astype(self._dtype)
                if rounded is None or offset * self._dtype.itemsize % _ALIGNMENT == 0:
                    return part
            # an array of its own: a part of the buffer begins at addresses that no kernel can read
            return jax.lax.optimization_barrier(part)

        return {name: placed(name, offset) for name, _, offset in self.layout}

    def flatten(self, tree: Mapping[str, Array]) -> Float[Array, " n"]:
        """Arrays by name as one buffer in at least float32."""
        wide = [p.astype(ops.at_least_float32(p.dtype)).ravel() for _, p in sorted(tree.items())]
        return jnp.concatenate(wide)


def value_and_grad(
    loss_fn: Callable[..., tuple[Array, dict[str, Array]]], network: Network
) -> Callable[..., tuple[dict[str, Array], Float[Array, " n"]]]:
    """``loss_fn(params, ...)`` -> its metrics and its gradient by the flat parameters.

    The function takes these, and in their place for the trunk ``rounded``, as ``unflatten`` does.
    """
    function = jax.value_and_grad(loss_fn, has_aux=True)

    def run(
        flat: Float[Array, " n"], rounded: Float[Array, " n"] | None, *rest: Any
    ) -> tuple[dict[str, Array], Float[Array, " n"]]:
        (_, metrics), gradient = function(network.unflatten(flat, rounded), *rest)
        return metrics, network.flatten(gradient)

    return run


def mean_over_examples(function: Callable[..., Any], batch: Mapping[str, Array]) -> Any:
    """Mean of ``function(example)`` over a device's examples, which run one after another.

    Each example keeps a batch axis, of size 1: its gradient is clipped apart from the others', and
    memory does not grow with their number.
    """
    count = batch["aatype"].shape[0]
    if count == 1:
        return function(batch)
    examples = {name: array[:, None] for name, array in batch.items()}
    first = {name: array[0] for name, array in examples.items()}
    program, shapes = jax.make_jaxpr(function, return_shape=True)(first)  # traced only once
    structure = jax.tree.structure(shapes)

    def add(sums: Any, example: Any) -> tuple[Any, None]:
        values = jaxpr_as_fun(program)(*jax.tree.leaves(example))
        return jax.tree.map(jnp.add, sums, jax.tree.unflatten(structure, values)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, examples)
    return jax.tree.map(lambda x: x / count, total)


def keep_where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """``new`` where the condition holds, else ``old``, decided on the device."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


class CompiledStep:
    """``function(state, local_batch)`` over the mesh as one program, compiled by the first call.

    With ``donate`` the state given is used up: its memory holds the state returned.
    """

    def __init__(
        self, function: Callable[..., Any], config: Config, mesh: Mesh, donate: bool
    ) -> None:
        self._jitted = jax.jit(
            over_mesh(function, mesh),
            donate_argnums=(0,) if donate else (),
            compiler_options=_compiler_options(config),
        )
        self._program: Any = None
        self._results: deque[Any] = deque()
        self._compiling = ""  # what took how long
        self._started = 0.0

    def __call__(self, state: Any, batch: Mapping[str, Array]) -> Any:
        """Start the step; the result may still be on its way when this returns."""
        if self._program is None:
            self._prepare(state, batch)
        if len(self._results) == IN_FLIGHT:
            jax.block_until_ready(self._results.popleft())
        with jax.transfer_guard("disallow"):  # nothing may cross between host and device unnoticed
            result = self._program(state, batch)
        # of a donating step only the second part outlives the next call
        self._results.append(result[1] if isinstance(result, tuple) else result)
        return result

    def _prepare(self, state: Any, batch: Mapping[str, Array]) -> None:
        times = [time.perf_counter()]
        traced = self._jitted.trace(state, batch)
        times.append(time.perf_counter())
        with compiling(traced.jaxpr):
            lowered = traced.lower()
            times.append(time.perf_counter())
            self._program = lowered.compile()
            times.append(time.perf_counter())
        self._started = time.perf_counter()
        times.append(self._started)
        names = ("trace", "lower", "compile or read", "wait for kernels")
        spent = zip(names, np.diff(times), strict=True)
        self._compiling = ", ".join(f"{seconds:.1f} s to {what}" for what, seconds in spent)

    def first_step(self, result: Any) -> str:
        """What the first step cost, once its ``result`` has arrived."""
        jax.block_until_ready(result)
        seconds = time.perf_counter() - self._started
        return f"first step: {self._compiling}, {seconds:.2f} s to run, peak memory {peak_memory()}"


def prefetch(loader: Loader, mesh: Mesh) -> Iterator[tuple[dict[str, Array], Any, float]]:
    """(batch on the devices, the loader's state after it, seconds waited for it).

    One more is moved there ahead if it is ready: a step never waits for the batch of the next.
    """
    ahead: deque[tuple[dict[str, Array], Any, float]] = deque()
    while True:
        while not ahead or (len(ahead) < 2 and loader.is_ready()):
            start = time.perf_counter()
            batch = next(loader)
            waited = time.perf_counter() - start
            ahead.append((place(mesh, batch), loader.state(), waited))
        yield ahead.popleft()


def fetch(tree: Any) -> Any:
    """Device arrays as numpy arrays, waiting for them."""
    return jax.device_get(tree)


def versions() -> dict[str, str]:
    """What this run computes with, for the record in its checkpoints."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"twinfold": __version__, "python": platform.python_version(), **packages}


def peak_memory() -> str:
    """The most memory used so far: of the fullest device, or of the process where they share it."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return f"{max(s['peak_bytes_in_use'] for s in stats if s) / 2**30:.2f} GiB on the device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB in the process"
