"""How a step is run: PyTorch's settings, flat parameters, the gradient, state updated in place.

``train.py`` says what a step computes; this file knows that PyTorch runs it. A step starts work on
the device and never waits for it: shapes are fixed and the host reads no result. On a GPU its parts
are compiled (``_compiled.py``) and the whole is captured in CUDA graphs (``_graphs.py``).
"""

import math
import os
import platform
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.func import functional_call

from foldcore import __version__
from foldcore.config import Config, ModelConfig
from foldcore.data.loader import Loader
from foldcore.layout import make_layout
from torchfold import _compiled, ops
from torchfold._arrays import map_tree
from torchfold._graphs import GraphedStep, TwoParts
from torchfold._masks import MaskPlan, Rehearsal
from torchfold.distributed import _beside, over_mesh
from torchfold.model import AlphaFold, Recycled
from torchfold.params import _name, _paths, initial_parameters, parameters
from torchfold.primitives import DropoutKey

TRUNK = "evoformer/"  # names of the parameters that compute in config.model.dtype
MATMUL_PRECISION = {"ieee": "highest", "tf32": "high"}
IN_FLIGHT = 2  # steps the host may run ahead of the device; more would only hold more batches


def configure(config: Config) -> None:
    """Set what is global in PyTorch; must run before the first device is used."""
    torch.set_float32_matmul_precision(MATMUL_PRECISION[config.model.matmul_precision])
    # sums of bfloat16 products stay in float32, as XLA keeps them
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # one core for everything else: the threads spin while they wait for each other, thousands
        # of times a step, and a step takes 20 times longer once one of them has lost its core
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    cache = Path(os.environ.get("TWINFOLD_CACHE", "~/.cache/twinfold")).expanduser()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "torch"))
    # a CPU runs small models as they are: compiling takes longer than it saves
    _compiled.enable(config.train.compile if torch.cuda.is_available() else "none")
    ops.use(config.model.implementation)


class _OnePass(nn.Module):
    """A model's passes one at a time."""

    def __init__(self, model: AlphaFold) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Mapping[str, Tensor], before: Recycled | None, dropout: DropoutKey | None
    ) -> Recycled:
        """What the pass at hand leaves to the next; before the first, what that one starts from."""
        if before is None:
            return self.model._first_state(batch)
        return self.model._next({**batch, **before._asdict()}, dropout)


class Network:
    """AlphaFold as a pure function of its parameters, which live in one flat buffer."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            self._model = AlphaFold(config)
        self._apart = _OnePass(self._model)
        self.layout = make_layout({k: tuple(p.shape) for k, p in parameters(self._model).items()})
        self._dtype = getattr(torch, config.dtype)
        # neighbours in the flat buffer with one dtype: whether they are in the trunk, their sizes
        sizes = [math.prod(shape) for shape in self.layout.shapes]
        named = zip(self.layout.names, sizes, strict=True)
        groups = groupby(named, key=lambda both: both[0].startswith(TRUNK))
        self._groups = [(trunk, [size for _, size in group]) for trunk, group in groups]
        self._names = {path: _name(path) for path in _paths(self._model)}
        self._plans: dict[Any, MaskPlan] = {}  # of dropout, by the shapes of the features

    def __call__(
        self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], dropout: DropoutKey | None
    ) -> dict[str, Tensor]:
        """The model's outputs for parameters by name."""
        by_path = {path: params[name] for path, name in self._names.items()}
        if dropout is not None:
            dropout = replace(dropout, _plan=self._plan(by_path, batch, dropout))
        return functional_call(self._model, by_path, (batch, dropout))

    def _plan(
        self, by_path: dict[str, Tensor], batch: Mapping[str, Tensor], dropout: DropoutKey
    ) -> MaskPlan:
        """Which masks the model draws for features of such shapes, known from a rehearsal."""
        names = ("msa_mask", "extra_msa_mask", "template_aatype")
        shapes = tuple(tuple(batch[name].shape[-2:]) for name in names)
        if shapes not in self._plans:
            plan = MaskPlan()
            key = replace(dropout, _masks=Rehearsal(plan, dropout.example_id.device))
            count = batch["aatype"].shape[0]
            once = {**batch, "num_iter_recycling": torch.zeros(count, dtype=torch.int32)}
            # as it is written: a piece that notes masks is no program of the step; and the tables
            # that pieces read are filled by it
            with torch.no_grad(), _compiled.paused():
                functional_call(self._model, by_path, (once, key))
            self._plans[shapes] = plan
        return self._plans[shapes]

    @torch.no_grad()
    def _next_pass(
        self,
        flat: Float[Tensor, " n"],
        rounded: Float[Tensor, " n"] | None,
        batch: dict[str, Tensor],
        before: Recycled | None,
        dropout: DropoutKey | None,
    ) -> Recycled:
        """What one pass leaves to the next, by flat parameters; ``batch`` has its slot alone."""
        params = self.unflatten(flat, rounded)
        by_path = {path: params[name] for path, name in self._names.items()}
        if dropout is not None and before is not None:
            known = {**batch, **before._asdict()}
            dropout = replace(dropout, _plan=self._plan(by_path, known, dropout))
        apart = {f"model.{path}": parameter for path, parameter in by_path.items()}
        return functional_call(self._apart, apart, (batch, before, dropout))

    def initialize(self, seed: int) -> Float32[np.ndarray, " n"]:
        """The initial values of all parameters, on the host."""
        return self.layout.flatten(initial_parameters(self._model, seed))

    def with_rounded(self, state: Any) -> Any:
        """The state with the parameters in the trunk's dtype as well, where that is narrower."""
        if self._dtype.itemsize >= state.params.dtype.itemsize:
            return state
        return state._replace(rounded=state.params.to(self._dtype))

    def unflatten(
        self, flat: Float[Tensor, " n"], rounded: Float[Tensor, " n"] | None = None
    ) -> dict[str, Tensor]:
        """Parameters by name; the trunk's in the dtype it computes in, ``rounded`` or cast now."""
        # products need equal types: with a trunk in float64, what follows is in float64 as well
        others = ops.at_least_float32(self._dtype)
        parts: list[Tensor] = []
        lengths = [sum(sizes) for _, sizes in self._groups]
        rounded = flat if rounded is None else rounded
        sources = zip(self._groups, flat.split(lengths), rounded.split(lengths), strict=True)
        for (trunk, sizes), wide, narrow in sources:
            # one cast for all, not one for each parameter; none of what is there already
            parts += (narrow.to(self._dtype) if trunk else wide.to(others)).split(sizes)
        shaped = zip(self.layout, parts, strict=True)
        return {name: part.view(shape) for (name, shape, _), part in shaped}

    def flatten(self, tree: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        """Arrays by name as one buffer in at least float32."""
        arrays = [array for _, array in sorted(tree.items())]
        groups = groupby(arrays, key=lambda array: array.dtype)
        # of one dtype at a time, which takes one kernel; together they take the wider one
        flat = torch.cat([torch.cat([array.ravel() for array in group]) for _, group in groups])
        return flat.to(ops.at_least_float32(flat.dtype))


def value_and_grad(
    loss_fn: Callable[..., tuple[Tensor, dict[str, Tensor]]], network: Network
) -> Callable[..., tuple[dict[str, Tensor], Float[Tensor, " n"]]]:
    """``loss_fn(params, ...)`` -> its metrics and its gradient by the flat parameters.

    The function takes these, and in their place for the trunk ``rounded``, as ``unflatten`` does.
    """

    def run(
        flat: Float[Tensor, " n"], rounded: Float[Tensor, " n"] | None, *rest: Any
    ) -> tuple[dict[str, Tensor], Float[Tensor, " n"]]:
        named = network.unflatten(flat, rounded)
        params = {name: p.detach().requires_grad_() for name, p in named.items()}
        with torch.enable_grad():
            loss, metrics = loss_fn(params, *rest)
        gradients = torch.autograd.grad(
            loss, list(params.values()), allow_unused=True, materialize_grads=True
        )
        by_name = dict(zip(params, gradients, strict=True))
        return {k: value.detach() for k, value in metrics.items()}, network.flatten(by_name)

    return run


def mean_over_examples(function: Callable[..., Any], batch: Mapping[str, Tensor]) -> Any:
    """Mean of ``function(example)`` over a device's examples, which run one after another.

    Each example keeps a batch axis, of size 1: its gradient is clipped apart from the others', and
    memory does not grow with their number.
    """
    count = batch["aatype"].shape[0]
    if count == 1:
        return function(batch)
    total = None
    for i in range(count):
        values = function({name: array[i : i + 1] for name, array in batch.items()})
        total = values if total is None else map_tree(torch.add, total, values)
    return map_tree(lambda x: x / count, total)


def keep_where(condition: Bool[Tensor, ""], new: Any, old: Any) -> Any:
    """``new`` where the condition holds, else ``old``, decided on the device."""
    return map_tree(lambda a, b: torch.where(condition, a, b), new, old)


class CompiledStep:
    """``function(state, local_batch)`` over the mesh; on a GPU, captured by the first call.

    With ``donate`` the state given is used up: its memory holds the state returned. Only such a
    step, a training step, is captured.
    """

    def __init__(
        self, function: Callable[..., Any], config: Config, mesh: DeviceMesh, donate: bool
    ) -> None:
        self._function = over_mesh(function, mesh)
        self._config = config
        self._donate = donate
        self._cuda = mesh.device_type == "cuda"
        self._graphed: GraphedStep | None = None
        self._events: deque[torch.cuda.Event] = deque()
        self._first = True
        self._compiling = self._started = 0.0  # seconds, and a time

    @torch.no_grad()
    def __call__(self, state: Any, batch: Mapping[str, Tensor]) -> Any:
        """Start the step; the result may still be on its way when this returns."""
        if self._first:
            self._prepare(state, batch)
        if len(self._events) == IN_FLIGHT:
            self._events.popleft().synchronize()
        if self._cuda and not self._first:  # constants of the first step have to be copied
            torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device unnoticed
        try:
            result = self._run(state, batch)
        finally:
            if self._cuda:
                torch.cuda.set_sync_debug_mode("default")
        self._first = False
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
        return result

    def _prepare(self, state: Any, batch: Mapping[str, Tensor]) -> None:
        start = time.perf_counter()
        if self._cuda and self._donate and self._config.train.cuda_graphs:
            next_pass = Network(self._config.model)._next_pass
            parts = TwoParts(self._function, next_pass, self._config, state, batch)
            self._graphed = GraphedStep(parts, batch)
        self._started = time.perf_counter()
        self._compiling = self._started - start

    def _run(self, state: Any, batch: Mapping[str, Tensor]) -> Any:
        if self._graphed:
            return self._graphed(state, batch)
        result = self._function(state, batch)
        if not self._donate:
            return result
        updated, rest = result
        map_tree(lambda old, new: old.copy_(new), state, updated)
        return state, rest

    def first_step(self, result: Any) -> str:
        """What the first step cost, once its ``result`` has arrived."""
        fetch(result)
        seconds = time.perf_counter() - self._started
        capturing = f"{self._compiling:.1f} s to compile and capture, " if self._graphed else ""
        return f"first step: {capturing}{seconds:.2f} s to run, peak memory {peak_memory()}"


def prefetch(loader: Loader, mesh: DeviceMesh) -> Iterator[tuple[dict[str, Tensor], Any, float]]:
    """(batch on the devices, the loader's state after it, seconds waited for it).

    One more is moved there ahead if it is ready: a step never waits for the batch of the next.
    """
    ahead: deque[tuple[Callable[[], dict[str, Tensor]], Any, float]] = deque()
    while True:
        while not ahead or (len(ahead) < 2 and loader.is_ready()):
            start = time.perf_counter()
            batch = next(loader)
            waited = time.perf_counter() - start
            ahead.append((_beside(mesh, batch), loader.state(), waited))
        arrived, *rest = ahead.popleft()
        yield arrived(), *rest


def fetch(tree: Any) -> Any:
    """Device arrays as numpy arrays, waiting for them."""
    return map_tree(lambda x: x.cpu().numpy() if isinstance(x, Tensor) else x, tree)


def versions() -> dict[str, str]:
    """What this run computes with, for the record in its checkpoints."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy")}
    return {"twinfold": __version__, "python": platform.python_version(), **packages}


def peak_memory() -> str:
    """The most memory used so far: of the fullest device, or of the process where they share it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the device"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB in the process"
