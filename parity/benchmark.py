"""One operation at one shape: who can run it, how fast, and how exactly."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from parity.throughput_trace import TRACERS
from parity.timing import Ceilings, graph_ms, jax_ms
from parity.tracks import to_numpy
from torchfold._triton import compile_ahead

Row = dict[str, Any]
Arrays = Mapping[str, Tensor]
Version = Callable[..., Any]  # a function of arrays, in their order
SETS = 4  # copies of JAX's inputs, in turn: together they are more than the cache holds
QUEUED = 4  # calls that replace their arrays, one after another
TRACES = 2  # of a program of JAX
COMPILERS = 8  # programs of JAX at once
ZERO = 1e-12  # of the largest norm: no more than rounding in float64


@dataclass(frozen=True)
class Timed:
    """A version as it is timed: of arrays that are made of a benchmark's before.

    Gradients are taken by arrays that have new names, and by those they are taken by anyway.
    """

    arrays: Callable[[dict[str, Any]], dict[str, Any]]
    version: Version

    def make(self, names: Sequence[str]) -> tuple[Callable[..., list[Any]], list[str]]:
        """``arrays`` as a function of values in this order; the names of what it makes, as soon as
        it is traced."""
        made: list[str] = []

        def make(*values: Any) -> list[Any]:
            found = self.arrays(dict(zip(names, values, strict=True)))
            made[:] = found
            return list(found.values())

        return make, made


@dataclass(frozen=True)
class Benchmark:
    """Versions of an operation, functions of the arrays that ``draw`` makes, in their order.

    ``operations`` counts the matrix products of the forward and of the backward pass, a
    multiplication and an addition as two. ``best`` holds the shortest times known of others, in
    milliseconds on an H200: forward, and with the gradient. Of arrays that are ``replaced`` the
    results take the place. Without ``differentiable`` arrays there is no backward pass. Versions
    may be ``timed`` otherwise than they are compared with the reference.
    """

    op: str
    shape: str
    draw: Callable[[], dict[str, Tensor]]
    reference: Version
    versions: Mapping[str, Version]
    jax_versions: Mapping[str, Version]
    differentiable: tuple[str, ...] = ()
    operations: tuple[float, float] = (0, 0)
    best: tuple[float, float] | None = None
    replaced: tuple[str, ...] = ()
    timed: Mapping[str, Timed] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape}"

    def rows(self, ceilings: Ceilings, names: Iterable[str]) -> Iterator[Row]:
        """One row for each of these versions; one that fails says why."""
        heads = {n: {"op": self.op, "shape": self.shape, "implementation": n} for n in names}
        if not heads:
            return
        try:
            run = _Run(self)
            run.compile(heads)
        except Exception as error:  # other benchmarks still have something to say
            yield from (head | failure(error) for head in heads.values())
            return
        for name, head in heads.items():
            try:
                measured = run.torch_row(name) if name in self.versions else run.jax_row(name)
                yield head | measured | self._shares(run, measured, ceilings)
            except Exception as error:  # a peer that cannot run this shape is a result as well
                yield head | failure(error)
            gc.collect()
            torch.cuda.empty_cache()

    def _shares(self, run: "_Run", row: Row, ceilings: Ceilings) -> Row:
        """How much of the time the roofline explains; multiples of the best times."""
        (forward, bound), (backward, _) = (
            ceilings.floor_ms(moved, operations)
            for moved, operations in zip(run.moved(), self.operations, strict=True)
        )
        found: Row = {"bound": bound, "forward_share": forward / row["forward_ms"]}
        if self.differentiable:
            found["both_share"] = (forward + backward) / row["both_ms"]
        if self.best:
            names = ("forward", "both") if self.differentiable else ("forward",)
            times = zip(names, self.best, strict=False)
            found["of_best"] = [row[f"{name}_ms"] / best for name, best in times]
        return found


def failure(error: Exception) -> Row:
    """What a row says instead of times."""
    return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}


class _Run:
    """The arrays of a benchmark, and what the reference makes of them in float64.

    With ``instead`` it is that version which runs, in the precision of the arrays.
    """

    def __init__(self, benchmark: Benchmark, instead: str = "") -> None:
        torch.manual_seed(0)
        self._benchmark = benchmark
        self.arrays = benchmark.draw()
        self._grad: Tensor | None = None
        if instead:
            self._expected = self._results(benchmark.versions[instead])
        else:
            self._expected = self._results(benchmark.reference, torch.float64)
        self._programs: dict[str, list[Any]] = {}
        self._refused: dict[str, Exception] = {}

    def compile(self, names: Iterable[str]) -> None:
        """Whatever has to be compiled: it shall not disturb the timing."""
        chosen, versions = list(names), self._benchmark.jax_versions
        with ThreadPoolExecutor(COMPILERS) as pool:
            # each version sets for itself which operations are traced: one after another
            lowered = {n: _try(self._lower, n) for n in chosen if n in versions}
            started = {
                name: [pool.submit(program.compile) for program in programs]
                for name, programs in lowered.items()
                if not isinstance(programs, Exception)
            }
            for name in chosen:
                if name in self._benchmark.versions:
                    _try(self._warm_up, name)
        self._programs = started
        self._refused = {n: e for n, e in lowered.items() if isinstance(e, Exception)}

    def moved(self) -> tuple[int, int]:
        """The least bytes forward and backward: each array is read or written once."""
        given, output = _bytes(self.arrays.values()), self._output_bytes
        return given + output, given + output + _bytes(self._leaves())

    def torch_row(self, name: str) -> Row:
        """Errors and times of a version in PyTorch."""
        version, arrays = self._benchmark.versions[name], self._own()
        found: Row = {"errors": self._errors(self._results(version))}
        if timed := self._benchmark.timed.get(name):
            version, arrays = timed.version, timed.arrays(arrays)

        def forward() -> None:
            with torch.no_grad():
                version(*arrays.values())

        found["forward_ms"] = graph_ms(forward)
        if self._grad is not None:
            wanted = self._wanted(arrays)
            found["both_ms"] = graph_ms(lambda: self._gradients(version, arrays, wanted))
        return found

    def _wanted(self, names: Iterable[str]) -> list[str]:
        """Of these arrays, those by which gradients are taken."""
        constant = self.arrays.keys() - set(self._benchmark.differentiable)
        return [name for name in names if name not in constant]

    def jax_row(self, name: str) -> Row:
        """Errors and times of a version in JAX."""
        if name in self._refused:
            raise self._refused[name]
        forward, *both = (future.result() for future in self._programs[name])
        if timed := self._benchmark.timed.get(name):
            return self._timed_in_jax(timed, forward, *both)
        arrays = [to_numpy(x) for x in self.arrays.values()]
        grad = [] if self._grad is None else [to_numpy(self._grad)]
        sets = [tuple(jax.device_put(x) for x in (*grad, *arrays)) for _ in range(SETS)]
        given = [x[len(grad) :] for x in sets]
        if self._benchmark.replaced:
            errors = self._errors_of(forward(*sets[0]))
            return {"errors": errors, "forward_ms": self._in_place_ms(forward, list(sets[1]))}
        first, *_ = both[0](*sets) if both else forward(*given)
        found = {"errors": self._errors_of(first), "forward_ms": _device_ms(forward, given)}
        return found | ({"both_ms": _device_ms(both[0], sets)} if both else {})

    def _timed_in_jax(self, timed: Timed, forward: Any, both: Any, compared: Any) -> Row:
        """The last program is of the arrays as they are."""
        assert self._grad is not None
        grad, *arrays = (jax.device_put(to_numpy(x)) for x in (self._grad, *self.arrays.values()))
        (found,) = compared((grad, *arrays))
        made = jax.jit(timed.make(list(self.arrays))[0])(*arrays)
        sets = [(grad, *(x + 0 for x in made)) for _ in range(SETS)]
        return {
            "errors": self._errors_of(found),
            "forward_ms": _device_ms(forward, [given[1:] for given in sets]),
            "both_ms": _device_ms(both, sets),
        }

    def _errors_of(self, results: Any) -> dict[str, float]:
        return self._errors(self._named([_to_torch(x) for x in jax.tree.leaves(results)]))

    def _in_place_ms(self, program: Any, arrays: list[Any]) -> float:
        """The results of a call are the replaced arrays of the next."""
        names = list(self.arrays)
        places = [names.index(name) for name in self._benchmark.replaced]

        def call() -> Any:
            for _ in range(QUEUED):
                for place, new in zip(places, program(*arrays), strict=True):
                    arrays[place] = new
            return arrays[places[0]]

        return jax_ms(call, [()]) / QUEUED

    def _leaves(self) -> list[Tensor]:
        return [self.arrays[name] for name in self._benchmark.differentiable]

    def _own(self) -> dict[str, Tensor]:
        """Arrays of which the replaced ones are copies."""
        replaced = self._benchmark.replaced
        return {name: x.clone() if name in replaced else x for name, x in self.arrays.items()}

    def _results(self, version: Version, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The output and the gradients, computed in ``dtype``."""
        arrays = self._own() if dtype is None else dict(self.arrays)
        for name, x in arrays.items():
            if dtype and x.is_floating_point():
                arrays[name] = x.to(dtype)
        if wanted := self._benchmark.differentiable:
            return self._named(self._gradients(version, arrays, wanted))
        with torch.no_grad():
            output = version(*arrays.values())
        return self._named([output] if isinstance(output, Tensor) else list(output))

    def _gradients(self, version: Version, arrays: Arrays, wanted: Sequence[str]) -> list[Tensor]:
        """The output, and gradients by the wanted arrays."""
        given = {n: x.detach().requires_grad_(n in wanted) for n, x in arrays.items()}
        with torch.enable_grad():
            output = version(*given.values())
        if self._grad is None:
            self._grad = torch.randn_like(output).to(self._leaves()[0].dtype)
        leaves = [given[name] for name in wanted]
        gradients = torch.autograd.grad(output, leaves, self._grad.to(output.dtype))
        return [output.detach(), *gradients]

    def _named(self, found: list[Tensor]) -> dict[str, Tensor]:
        """Output and gradients by name; several outputs as one."""
        names = ("output", *self._benchmark.differentiable)
        if len(names) == 1 < len(found):
            found = [torch.cat([x.flatten() for x in found])]
        return dict(zip(names, found, strict=True))

    def _errors(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        return relative_errors(found, self._expected)

    @property
    def _output_bytes(self) -> int:
        """Of the output in the precision of what it is made from."""
        output = self._expected["output"]
        kinds = [x.element_size() for x in self.arrays.values() if x.is_floating_point()]
        return output.numel() * (kinds[0] if kinds else 1)

    def _warm_up(self, name: str) -> None:
        version = self._benchmark.versions[name]
        self._results(version)
        with torch.no_grad():
            version(*self._own().values())

    def _lower(self, name: str) -> list[Any]:
        """The programs of the forward pass and, where there is one, of both; see ``jax_row``.

        They compute with one set of arrays after another, so that starting a program counts little;
        where a call replaces its arrays, with one.
        """
        names, version = list(self.arrays), self._benchmark.jax_versions[name]
        shapes = [jax.ShapeDtypeStruct(x.shape, _jax_dtype(x)) for x in self.arrays.values()]
        if replaced := [names.index(name) for name in self._benchmark.replaced]:
            return [jax.jit(version, donate_argnums=replaced).lower(*shapes)]
        if timed := self._benchmark.timed.get(name):
            make, made = timed.make(names)
            found = jax.eval_shape(make, *shapes)
            compared = self._lower_of(version, names, shapes, 1)[1:]
            return [*self._lower_of(timed.version, made, found), *compared]
        return self._lower_of(version, names, shapes)

    def _lower_of(
        self, version: Version, names: Sequence[str], shapes: Sequence[Any], sets: int = SETS
    ) -> list[Any]:
        programs = [_with_each(version).lower(*[tuple(shapes)] * sets)]
        if self._grad is None:
            return programs
        wanted = [names.index(name) for name in self._wanted(names)]

        def both(grad: Any, *inputs: Any) -> tuple[Any, ...]:
            def of_wanted(*values: Any) -> Any:
                every = list(inputs)
                for i, value in zip(wanted, values, strict=True):
                    every[i] = value
                return version(*every)

            output, backward = jax.vjp(of_wanted, *(inputs[i] for i in wanted))
            return (output, *backward(grad))

        grad = jax.ShapeDtypeStruct(self._grad.shape, _jax_dtype(self._grad))
        return [*programs, _with_each(both).lower(*[(grad, *shapes)] * sets)]


def compile_kernels(benchmarks: Iterable[Benchmark]) -> None:
    """Compile our kernels of all benchmarks side by side; what fails here will say so later."""

    def run() -> None:
        for benchmark in benchmarks:
            _try(_Run, benchmark, "triton, torch")

    _try(compile_ahead, run)


def _with_each(function: Callable[..., Any]) -> Any:
    """A program that computes with one set of arrays after another."""
    return jax.jit(lambda *sets: [function(*arrays) for arrays in sets])


def _device_ms(program: Any, sets: list[tuple[Any, ...]]) -> float:
    """With one set, from the start of the first kernel to the end of the last, as traced.

    The host takes longer to start these programs than the device to run them.
    """
    spans = [TRACERS["jax"](lambda: program(*sets)).device for _ in range(TRACES)]
    if not all(spans):
        raise RuntimeError("the trace shows no kernel")
    return min(max(x.end for x in one) - one[0].start for one in spans) / len(sets)


def relative_errors(found: Arrays, expected: Arrays) -> dict[str, float]:
    """Norm of the difference by norm, each array by name; not of gradients that are always zero."""
    norms = {name: float(torch.linalg.norm(x.double())) for name, x in expected.items()}
    least = ZERO * max(norms.values())
    return {
        name: float(torch.linalg.norm(found[name].double() - expected[name].double())) / norm
        for name, norm in norms.items()
        if norm > least
    }


def _try(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or the error: it is reported where the row is made."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _bytes(arrays: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in arrays)


def _jax_dtype(x: Tensor) -> np.dtype:
    return to_numpy(x.new_empty(0)).dtype


def _to_torch(x: Any) -> Tensor:
    if x.dtype == bool:  # which PyTorch does not take from other libraries
        return torch.from_numpy(np.array(x)).to("cuda" if torch.cuda.is_available() else "cpu")
    return torch.utils.dlpack.from_dlpack(x)
