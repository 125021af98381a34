"""A training step in two parts that are captured as CUDA graphs and replayed.

How many passes a step makes varies; a graph does not. So one graph holds one pass without gradient,
replayed as often as the batch asks, and the other everything after: the last pass, its gradient and
the update. Both read the batch, the pass they are at and the state from fixed buffers.
"""

import gc
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from foldcore.config import Config
from torchfold import _compiled, ops
from torchfold._arrays import map_tree
from torchfold.model import RESAMPLED, Recycled
from torchfold.ops import UnsupportedOp
from torchfold.primitives import DropoutKey

COUNT = "num_iter_recycling"
# one pass: (parameters, the same rounded or None, batch of one slot, what the pass before left or
# None, dropout key)
NextPass = Callable[
    [Tensor, Tensor | None, dict[str, Tensor], Recycled | None, DropoutKey | None], Recycled
]


class TwoParts:
    """``function(state, batch)``, a training step, with its passes without gradient run apart.

    All buffers keep their places: batches are copied in, the state is updated where it is.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        next_pass: NextPass,
        config: Config,
        state: Any,
        batch: Mapping[str, Tensor],
    ) -> None:
        self._function, self._next_pass, self._config = function, next_pass, config
        self.state = state
        self._batch = {name: x.clone() for name, x in batch.items() if name != COUNT}
        device = batch["aatype"].device
        self._pass = torch.zeros(1, dtype=torch.int64, device=device)
        self._recycled = next_pass(state.params, state.rounded, self._batch, None, None)

    def load(self, batch: Mapping[str, Tensor]) -> None:
        """Take a new batch, and go back to its first pass."""
        names = list(self._batch)
        for dtype in {self._batch[name].dtype for name in names}:  # one kernel for each dtype
            same = [name for name in names if self._batch[name].dtype == dtype]
            new = [batch[name] for name in same]
            torch._foreach_copy_([self._batch[name] for name in same], new, non_blocking=True)
        for buffer in (*self._recycled, self._pass):
            buffer.zero_()

    def one_pass(self, state: Any) -> None:
        """One pass without gradient of every example, one after another as in the step itself."""
        batch = self._at_this_pass()
        for i in range(batch["aatype"].shape[0]):
            example = {name: x[i : i + 1] for name, x in batch.items()}
            before = Recycled(*(buffer[i : i + 1] for buffer in self._recycled))
            key = None
            if self._config.train.dropout:  # the key of ``loss_fn``
                step = state.step + 1
                key = DropoutKey(self._config.train.seed, step, example["example_id"])
            after = self._next_pass(state.params, state.rounded, example, before, key)
            map_tree(lambda buffer, new: buffer.copy_(new), before, after)
        self._pass += 1

    def finish(self, state: Any) -> dict[str, Tensor]:
        """The last pass and the update of ``state``, in place; the metrics of the step."""
        updated, metrics = self._function(
            state, {**self._at_this_pass(), **self._recycled._asdict()}
        )
        map_tree(lambda old, new: old.copy_(new), state, updated)
        return metrics

    def _at_this_pass(self) -> dict[str, Tensor]:
        """The features of this pass alone; the number of the pass, on the device."""
        count: Int[Tensor, " b"] = self._pass.to(torch.int32).expand(len(self._batch["aatype"]))
        features = {
            name: x.index_select(1, self._pass) if name in RESAMPLED else x
            for name, x in self._batch.items()
        }
        return {**features, COUNT: count}


class GraphedStep:
    """The two parts as CUDA graphs; captured when this is made, from a first batch."""

    def __init__(self, parts: TwoParts, batch: Mapping[str, Tensor]) -> None:
        self._parts = parts
        self._addresses = _addresses(parts.state)
        start = time.perf_counter()
        parts.load(batch)
        self._compile_kernels()
        parts.load(batch)
        self._warm_up()
        self.compile_seconds = time.perf_counter() - start
        start = time.perf_counter()
        self._pass, _ = _capture("a pass without gradient", lambda: parts.one_pass(parts.state))
        self._rest, self._metrics = _capture("the update", self._packed, self._pass.pool())
        self.capture_seconds = time.perf_counter() - start

    def __call__(self, state: Any, batch: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Start the step; ``state`` must be the one given first, whose memory the graphs know."""
        if _addresses(state) != self._addresses:
            raise ValueError("a captured step updates the state it was captured with, and no other")
        self._parts.load(batch)
        for _ in range(int(batch[COUNT][0])):
            self._pass.replay()
        self._rest.replay()
        # the next replay overwrites them
        return state, dict(zip(self._names, self._metrics.clone().unbind(), strict=True))

    def _packed(self) -> Tensor:
        """The update; its metrics in one array."""
        metrics = self._parts.finish(self._parts.state)
        self._names = list(metrics)
        return torch.stack([value.to(torch.float64) for value in metrics.values()])

    def _compile_kernels(self) -> None:
        """All kernels of both parts side by side: met one after another they take a minute."""
        if ops._chosen != "triton":
            return
        from torchfold._triton import compile_ahead

        def both() -> None:
            state = map_tree(torch.clone, self._parts.state)
            self._parts.one_pass(state)
            self._parts.finish(state)

        with _compiled.paused():  # pieces are compiled when they run
            compile_ahead(both)
        _release()

    def _warm_up(self) -> None:
        """Compile, load kernels and fill tables; then once more, where nothing may be waited for.

        Runs on a copy of the state, beside the stream in use, as capturing asks for.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for strict in (False, True):
                state = map_tree(torch.clone, self._parts.state)
                torch.cuda.synchronize()
                _forbid_waiting(strict)
                try:
                    self._parts.one_pass(state)
                    self._parts.finish(state)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    if not strict:
                        raise
                    raise _refused("a step", error) from error
                finally:
                    _forbid_waiting(False)
                del state
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        _release()


def _addresses(state: Any) -> list[int]:
    found: list[int] = []
    map_tree(lambda buffer: found.append(buffer.data_ptr()), state)
    return found


def _capture(
    what: str, function: Callable[[], Any], pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what ``function`` starts, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    try:
        # "thread_local": other threads (NCCL's, pinning, saving) may do as they like meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _refused(what, error) from error
    return graph, result


def _forbid_waiting(forbidden: bool) -> None:
    """Let operations raise that make the host wait for the device, or no longer."""
    with warnings.catch_warnings():  # it calls itself a prototype
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


def _release() -> None:
    """Give back the memory of the warm-up: the pool of a graph cannot take it from the cache."""
    gc.collect()
    torch.cuda.empty_cache()


def _refused(what: str, error: RuntimeError) -> UnsupportedOp:
    """The error that names the operation at fault: the innermost line outside PyTorch."""
    library = str(Path(torch.__file__).parent)
    frames = reversed(traceback.extract_tb(error.__traceback__))
    ours = (f for f in frames if not f.filename.startswith((library, __file__)))
    place = next(ours, None)
    where = f"{Path(place.filename).name}:{place.lineno}: {place.line}" if place else "in backward"
    return UnsupportedOp(
        f"{what} cannot be captured as a CUDA graph: {where}: {str(error).splitlines()[0]} "
        "(train.cuda_graphs=false runs without)"
    )
