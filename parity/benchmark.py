"""One operation at one shape: who can run it, how fast, and how exactly."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parity.timing import Ceilings, graph_ms, jax_ms

Row = dict[str, Any]
JAX_INPUT_SETS = 4


@dataclass(frozen=True)
class Cost:
    """The least that an implementation moves and computes: each array is read or written once."""

    moved: float  # bytes
    operations: float  # a multiplication and an addition are two


@dataclass(frozen=True)
class Benchmark:
    """Versions of an operation, functions of the arrays that ``draw`` makes, in their order."""

    op: str
    shape: str
    draw: Callable[[], dict[str, Tensor]]
    differentiable: tuple[str, ...]
    reference: Callable[..., Tensor]
    versions: Mapping[str, Callable[..., Tensor]]
    forward: Cost
    backward: Cost
    jax_versions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def rows(self, ceilings: Ceilings, only: str | None = None) -> Iterator[Row]:
        """One row a version; one that fails here says why."""
        torch.manual_seed(0)
        arrays = self.draw()
        expected = self._results(self.reference, arrays, torch.float64)
        grad = torch.randn_like(expected["output"]).to(next(iter(arrays.values())).dtype)
        expected = self._results(self.reference, arrays, torch.float64, grad)
        versions = [(name, v, self._torch_row) for name, v in self.versions.items()]
        versions += [(name, v, self._jax_row) for name, v in self.jax_versions.items()]
        for name, version, measure in versions:
            if only and only not in name:
                continue
            row: Row = {"op": self.op, "shape": self.shape, "implementation": name}
            try:
                row |= measure(version, arrays, grad, expected)
                row |= self._shares(row, ceilings)
            except Exception as error:  # a peer that cannot run this shape is a result as well
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            torch.cuda.empty_cache()
            gc.collect()
            yield row

    def _results(
        self,
        version: Callable[..., Tensor],
        arrays: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        grad: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The output and, with ``grad``, the gradients; computed in ``dtype``."""
        leaves = {name: x.to(dtype or x.dtype) for name, x in arrays.items()}
        for name in self.differentiable:
            leaves[name] = leaves[name].detach().requires_grad_(grad is not None)
        output = version(*leaves.values())
        if grad is None:
            return {"output": output}
        wanted = [leaves[name] for name in self.differentiable]
        gradients = torch.autograd.grad(output, wanted, grad.to(output.dtype))
        return {"output": output.detach()} | dict(zip(self.differentiable, gradients, strict=True))

    def _torch_row(
        self,
        version: Callable[..., Tensor],
        arrays: Mapping[str, Tensor],
        grad: Tensor,
        expected: Mapping[str, Tensor],
    ) -> Row:
        def forward() -> None:
            with torch.no_grad():
                version(*arrays.values())

        found = self._results(version, arrays, grad=grad)
        return {
            "errors": relative_errors(found, expected),
            "forward_ms": graph_ms(forward),
            "both_ms": graph_ms(lambda: self._results(version, arrays, grad=grad)),
        }

    def _jax_row(
        self,
        version: Callable[..., Any],
        arrays: Mapping[str, Tensor],
        grad: Tensor,
        expected: Mapping[str, Tensor],
    ) -> Row:
        import jax

        names = list(arrays)
        wanted = [names.index(name) for name in self.differentiable]

        def both(grad: Any, *inputs: Any) -> tuple[Any, ...]:
            def of_wanted(*values: Any) -> Any:
                every = list(inputs)
                for i, value in zip(wanted, values, strict=True):
                    every[i] = value
                return version(*every)

            output, backward = jax.vjp(of_wanted, *(inputs[i] for i in wanted))
            return (output, *backward(grad))

        inputs = [to_jax(x) for x in (grad, *arrays.values())]
        sets = [tuple(x + 0 for x in inputs) for _ in range(JAX_INPUT_SETS)]
        compiled = jax.jit(both)
        results = [torch.utils.dlpack.from_dlpack(x) for x in compiled(*sets[0])]
        found = dict(zip(("output", *self.differentiable), results, strict=True))
        return {
            "errors": relative_errors(found, expected),
            "forward_ms": jax_ms(jax.jit(version), [x[1:] for x in sets]),
            "both_ms": jax_ms(compiled, sets),
        }

    def _shares(self, row: Row, ceilings: Ceilings) -> Row:
        """How much of the time the roofline explains."""
        forward, bound = ceilings.floor_ms(self.forward.moved, self.forward.operations)
        backward, _ = ceilings.floor_ms(self.backward.moved, self.backward.operations)
        return {
            "bound": bound,
            "forward_share": forward / row["forward_ms"],
            "both_share": (forward + backward) / row["both_ms"],
        }


def relative_errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Norm of the difference by norm, each array by name."""
    return {
        name: float(torch.linalg.norm(found[name].double() - x) / torch.linalg.norm(x))
        for name, x in expected.items()
    }


def to_jax(x: Tensor) -> Any:
    """A JAX array on the same device, in memory of its own."""
    import jax.numpy as jnp

    array = jnp.asarray(x.float().cpu().numpy())
    return array.astype(jnp.bfloat16) if x.dtype == torch.bfloat16 else array
