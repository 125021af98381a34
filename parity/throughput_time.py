"""Times of the modules of a step, each by itself, in either track.

On a GPU PyTorch's are replays of CUDA graphs, as a step replays them; JAX's are calls that queue
up, of one program for several calls where a step has many. The forward pass is the one without a
gradient. Backward is what a call with its gradient takes more than that.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from foldcore.config import Config
from parity import derived
from parity.case import Setting
from parity.module_run import Module, _load_in_jax, _load_in_torch, abstract, is_float
from parity.throughput_modules import NARROW, Part, draw_parameters, make_inputs, parts
from parity.throughput_roofline import UPDATE, ask
from parity.timing import graph_ms, jax_ms
from parity.tracks import JAX, TORCH, Arrays, Named, Track, cast, flatten

SETS = 4  # of inputs, in turn: together they are more than the cache holds
QUEUED = 4  # programs of JAX with all of them
COMPILERS = 8  # programs of JAX at once
REPEATS = 5  # on a CPU
Milliseconds = tuple[float, float]  # forward; with its gradient
Row = dict[str, Any]


def module_times(track: str, config: Config, batch: Arrays, only: str = "") -> Iterator[Row]:
    """A row for each module whose name contains ``only``; one that cannot run says why."""
    inputs = make_inputs(config, batch)
    prepare = _InJax(config, inputs).prepare if track == "jax" else _InTorch(config, inputs).prepare
    update = partial(_update_in_jax if track == "jax" else _update_in_torch, config)
    chosen = [part for part in parts(config) if only in part.name]
    waiting = [(part, _try(partial(prepare, part))) for part in chosen]
    for part, prepared in waiting:
        row = {"module": part.name, "calls": part.calls, "every_pass": part.every_pass}
        yield row | (prepared if isinstance(prepared, dict) else _try(partial(_row, prepared)))
    if only in UPDATE:
        yield {"module": UPDATE, "calls": 1, "every_pass": False} | _try(partial(_row, update))


def _try(function: Callable[[], Any]) -> Any:
    """What it returns, or a row with the error: others can still be timed."""
    try:
        return function()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return {"failed": f"{type(error).__name__}: {first[:160]}"}


def _row(times: Callable[[], Milliseconds]) -> Row:
    forward, both = times()
    return {"forward_ms": round(forward, 5), "backward_ms": round(max(both - forward, 0), 5)}


def _on_device(track: Track, setting: Setting, inputs: Arrays, device: str = "") -> Named:
    """Activations of the trunk in its precision, all other inputs in at least float32."""
    dtypes = {name: setting.dtype if name in NARROW else setting.wide for name in inputs}
    return cast(track, dtypes, inputs, device)


# PyTorch ------------------------------------------------------------------------------------------


class _InTorch:
    """Modules of the PyTorch track, with the operations that are switched on."""

    def __init__(self, config: Config, inputs: Arrays) -> None:
        self._setting = Setting(dtype=config.model.dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._inputs = _on_device(TORCH, self._setting, inputs, self._device)

    def prepare(self, part: Part) -> Callable[[], Milliseconds]:
        """Nothing is done before the times are asked for."""
        return partial(self._times, part)

    def _times(self, part: Part) -> Milliseconds:
        forward, both = self._functions(part, draw_parameters(part))
        times = torch_ms(forward), torch_ms(both)
        del forward, both
        gc.collect()
        torch.cuda.empty_cache()
        return times

    def _functions(
        self, part: Part, parameters: Arrays
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        module, modules = part.module, abstract(TORCH, part.module)
        dtypes = module.dtypes(self._setting, parameters, {})
        own = _load_in_torch(modules, cast(TORCH, dtypes, parameters, self._device), self._device)
        if part.in_stack:
            own = derived.give_in_torch(modules)
        given = {name: self._inputs[name].detach().requires_grad_() for name in module.derive}
        leaves, x = [*own.values(), *given.values()], self._inputs | given

        def call() -> list[Tensor]:
            return [o for o in flatten(module.call(TORCH, modules, x)).values() if is_float(o)]

        def forward() -> Any:
            with torch.no_grad():
                return call()

        def both() -> Any:
            with torch.enable_grad():
                found = [o for o in call() if o.requires_grad]
            return torch.autograd.grad(found, leaves, gradients, allow_unused=True)

        with torch.enable_grad():
            gradients = [torch.randn_like(o) for o in call() if o.requires_grad]
        return forward, both


def torch_ms(function: Callable[[], Any]) -> float:
    """Of one call, in milliseconds."""
    if torch.cuda.is_available():
        return graph_ms(function)
    return _median(function)


def _median(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def _update_in_torch(config: Config) -> Milliseconds:
    """Clipping, Adam and the averages; it has no gradient."""
    settings, optimizer = config.optimizer, TORCH.optimizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = TORCH.step.Network(config.model).layout.size
    old = optimizer.Buffers(*(torch.rand(size, device=device) for _ in range(4)))
    if config.model.dtype == "bfloat16":
        old = old._replace(rounded=old.params.bfloat16())
    gradient, step = torch.rand(size, device=device), torch.ones((), device=device)

    def run() -> Any:
        factor, norm = optimizer.clip_factor(gradient, settings.clip_norm)
        return optimizer.update(gradient, factor, old, step, torch.isfinite(norm), settings)

    with torch.no_grad():
        spent = torch_ms(run)
    return spent, spent


# JAX ----------------------------------------------------------------------------------------------


class _InJax:
    """Modules of the JAX track; programs are compiled side by side."""

    def __init__(self, config: Config, inputs: Arrays) -> None:
        self._setting = Setting(dtype=config.model.dtype)
        self._inputs = _on_device(JAX, self._setting, inputs)
        self._options = JAX.step._compiler_options(config)
        self._compilers = ThreadPoolExecutor(COMPILERS)

    def prepare(self, part: Part) -> Callable[[], Milliseconds]:
        """Start to compile; what is returned waits for it."""
        module, parameters, x = part.module, draw_parameters(part), self._inputs
        own = cast(JAX, module.dtypes(self._setting, parameters, {}), parameters, "")
        shapes, asked = ask(module, own, x)
        gradients = {name: jnp.ones(o.shape, o.dtype) for name, o in shapes.items()}
        if part.in_stack:
            own = jax.jit(derived.InJax(module).arrays)(own)
        rest = {name: x[name] for name in asked if name not in module.derive}
        sets = [{name: x[name] + 0 for name in module.derive} for _ in range(SETS)]
        # what a step calls often is called several times by a program: starting one takes a while
        count = SETS if part.calls > 1 else 1
        groups = [tuple(sets[i : i + count]) for i in range(0, SETS, count)]
        calls = [(own, rest, group, gradients) for group in groups] * (QUEUED * count // SETS or 1)
        functions = jax_functions(part)
        lowered = [jax.jit(function).lower(*calls[0]) for function in functions]
        compiled = [self._compilers.submit(one.compile, self._options) for one in lowered]

        def times() -> Milliseconds:
            forward, both = (jax_ms(one.result(), calls) / count for one in compiled)
            return forward, both

        return times


def jax_functions(part: Part) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward passes of several inputs, and the same with their gradients.

    Parameters are given by name; in a stack, what ``derived.InJax`` makes of them.
    """
    load = derived.InJax(part.module).modules if part.in_stack else partial(_loaded, part.module)

    def one(parameters: Any, rest: Named, given: Named) -> Named:
        outputs = flatten(part.module.call(JAX, load(parameters), {**given, **rest}))
        return {name: o for name, o in outputs.items() if is_float(o)}

    def forward(parameters: Any, rest: Named, inputs: tuple[Named, ...], _: Named) -> Any:
        return [one(parameters, rest, given) for given in inputs]

    def both(parameters: Any, rest: Named, inputs: tuple[Named, ...], gradients: Named) -> Any:
        found = []
        for given in inputs:
            outputs, backward = jax.vjp(lambda p, d: one(p, rest, d), parameters, given)
            found.append((outputs, backward(gradients)))
        return found

    return forward, both


def _loaded(module: Module, parameters: Named) -> Named:
    modules = abstract(JAX, module)
    _load_in_jax(modules, parameters)
    return modules


def _update_in_jax(config: Config) -> Milliseconds:
    """The same; its program takes the place of the state, as a step does."""
    settings, optimizer = config.optimizer, JAX.optimizer
    size = JAX.step.Network(config.model).layout.size
    random = np.random.default_rng(0)

    def run(old: Any, gradient: Any, step: Any) -> Any:
        factor, norm = optimizer.clip_factor(gradient, settings.clip_norm)
        return optimizer.update(gradient, factor, old, step, jnp.isfinite(norm), settings)

    program = jax.jit(run, donate_argnums=0)
    state = [optimizer.Buffers(*(jnp.asarray(random.random(size, np.float32)) for _ in range(4)))]
    if config.model.dtype == "bfloat16":
        state[0] = state[0]._replace(rounded=state[0].params.astype(jnp.bfloat16))

    def call(gradient: Any, step: Any) -> Any:
        state[0], norms = program(state[0], gradient, step)
        return norms

    gradient = jnp.asarray(random.random(size, np.float32))
    spent = jax_ms(call, [(gradient, jnp.ones(()))])
    return spent, spent
