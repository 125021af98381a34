"""Runs kernels in Gluon with numpy, a program after another, and finds what they do too early.

What a kernel begins happens as late as it may: a copy leaves NaN in its place until it is waited
for, a product is taken when it is waited for, and must find its operands as they were when it was
begun. What comes of a race between the warps of a program is not seen.
"""

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from foldcore.kernels.launch import Launch, Output

LAYOUT = SimpleNamespace(layout=SimpleNamespace(parent=None))


class Hazard(RuntimeError):
    """A kernel reads what is not there yet, or overwrites what is still needed."""


class Tile(np.ndarray):
    """A tensor of a kernel, in float32 whatever it is rounded to."""

    def to(self, dtype: Any) -> "Tile":
        rounded = self.astype(dtype)
        return (rounded.astype(np.float32) if dtype == ml_dtypes.bfloat16 else rounded).view(Tile)

    @property
    def type(self) -> SimpleNamespace:
        return LAYOUT


class Pointers:
    """Places in an array in global memory."""

    type = LAYOUT

    def __init__(self, array: np.ndarray, at: Any = 0) -> None:
        self.array, self.at = array, at

    def __add__(self, steps: Any) -> "Pointers":
        return Pointers(self.array, self.at + steps)

    @property
    def index(self) -> np.ndarray:
        return np.asarray(self.at, np.int64)


class Shared:
    """A part of shared memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def index(self, i: Any) -> "Shared":
        return Shared(self.array[int(i)])

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.array[start : start + length])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.array.transpose(order))

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> "Shared":
        return Shared(self.array.reshape(shape))

    def store(self, x: Tile) -> None:
        self.array[:] = x

    def load(self, layout: Any) -> Tile:
        if np.isnan(self.array).any():
            raise Hazard("shared memory is read before it is written")
        return tile(self.array.copy())


class Product:
    """A product that has been begun."""

    def __init__(self, a: Any, b: Shared, sum_: Any, use_acc: bool) -> None:
        self.operands, self.sum, self.use_acc = (a, b), sum_, use_acc
        self.begun = [contents(x) for x in self.operands]
        self.shape = (*self.begun[0].shape[:1], *self.begun[1].shape[1:])
        self.value: Tile | None = None

    def end(self) -> None:
        if any(np.isnan(x).any() for x in self.begun):
            raise Hazard("a product began before its operands were there")
        if any((contents(x) != y).any() for x, y in zip(self.operands, self.begun, strict=True)):
            raise Hazard("an operand was overwritten before its product had ended")
        start = self.sum.value if isinstance(self.sum, Product) else self.sum
        self.value = tile(self.begun[0] @ self.begun[1] + (start if self.use_acc else 0.0))


def as_array(x: Tensor) -> np.ndarray:
    return (x.contiguous().float() if x.is_floating_point() else x.contiguous()).numpy().ravel()


def buffer(output: Output) -> np.ndarray:
    """With what no kernel writes."""
    if output.dtype == "int32":
        return np.full(output.shape, 0x55555555, np.int32)
    return np.full(output.shape, np.nan, np.float32)


def contents(x: "Shared | Tile") -> np.ndarray:
    return np.array(x.array if isinstance(x, Shared) else x)


def tile(x: Any) -> Tile:
    return np.asarray(x).view(Tile)


def load(at: Pointers, mask: Any = True, other: float = np.nan) -> Tile:
    """Nothing is read where it is masked."""
    mask = np.broadcast_to(mask, at.index.shape)
    other = other if at.array.dtype == np.float32 else 0
    found = np.full(at.index.shape, other, at.array.dtype)
    found[mask] = at.array[at.index[mask]]
    return tile(found)


def choose(choice: Any, x: Any, y: Any) -> Tile:
    """Whole numbers, or in float32."""
    found = np.where(choice, x, y)
    return tile(found if found.dtype.kind == "i" else found.astype(np.float32))


def reciprocal(x: Tile) -> Tile:
    """1 / x by one instruction: less than the least normal number is 0."""
    with np.errstate(divide="ignore"):
        result = np.float32(1.0) / x
    return tile(np.where(abs(result) < np.finfo(np.float32).tiny, 0.0, result))


def pack(low: Tile, high: Tile) -> Tile:
    """The upper halves of two numbers."""
    low, high = (np.asarray(x, np.float32).view(np.uint32) for x in (low, high))
    return tile(low >> 16 | high & 0xFFFF0000)


def unpack(x: Tile) -> tuple[Tile, ...]:
    halves = np.asarray(x) << 16, np.asarray(x) & 0xFFFF0000
    return tuple(tile(half.astype(np.uint32).view(np.float32)) for half in halves)


# what instructions that kernels name themselves do
ASSEMBLY: dict[str, Callable[..., Any]] = {
    "lg2.approx.ftz.f32 $0, $1;": np.log2,
    "rcp.approx.ftz.f32 $0, $1;": reciprocal,
    "prmt.b32 $0, $1, $2, 0x7632;": pack,
    "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;": unpack,
}


def assembled(assembly: str, constraints: str, arguments: list[Tile], *_: Any, **__: Any) -> Any:
    found = ASSEMBLY[assembly](*arguments)
    return found if isinstance(found, tuple) else tile(found)


class Machine:
    """One program: its copies and products on their way."""

    def __init__(self, program: int, programs: int, num_warps: int) -> None:
        self.program, self.programs, self.num_warps = program, programs, num_warps
        self.groups: list[list[tuple[np.ndarray, Pointers, np.ndarray]]] = [[]]
        self.products: list[Product] = []

    def copy(self, place: Shared, source: Pointers, mask: Any = True) -> None:
        """Nothing is copied to what is masked, but zeros."""
        for array, *_ in itertools.chain(*self.groups):
            if np.shares_memory(array, place.array):
                raise Hazard("two copies to one place are on their way")
        mask = np.broadcast_to(np.asarray(mask), place.shape)
        place.array[:] = np.nan
        self.groups[-1].append((place.array, source, mask))

    def commit_group(self) -> None:
        self.groups.append([])

    def wait_group(self, left: int) -> None:
        while len(self.groups) - 1 > left:
            for array, source, mask in self.groups.pop(0):
                array[mask], array[~mask] = source.array[source.index[mask]], 0.0

    def multiply(self, a: Any, b: Any, sum_: Any, *, use_acc: bool = True, is_async: bool) -> Any:
        assert is_async
        self.products.append(Product(a, b, sum_, use_acc))
        return self.products[-1]

    def wait(self, left: int, deps: list[Any]) -> Any:
        while len(self.products) > left:
            self.products.pop(0).end()
        found = [x.value if isinstance(x, Product) else x for x in deps]
        if any(x is None for x in found):
            raise Hazard("a product is used before it has ended")
        return found[0] if len(found) == 1 else tuple(found)

    def allocate(self, dtype: Any, shape: list[int], layout: Any, value: Any = None) -> Shared:
        return Shared(np.full(shape, np.nan, np.float32) if value is None else np.array(value))

    def language(self) -> SimpleNamespace:
        """``triton.experimental.gluon.language`` as far as kernels use it."""
        nothing = lambda *args, **kwargs: None  # noqa: E731
        layouts = "BlockedLayout SliceLayout NVMMADistributedLayout NVMMASharedLayout"
        layouts += " DotOperandLayout DistributedLinearLayout SharedLinearLayout"
        layouts += " SwizzledSharedLayout"
        return SimpleNamespace(
            **dict.fromkeys(layouts.split(), nothing),
            **{"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "int64": np.int64},
            constexpr=None,
            num_warps=lambda: self.num_warps,
            program_id=lambda axis: tile(self.program),
            num_programs=lambda axis: tile(self.programs),
            arange=lambda start, end, layout: tile(np.arange(start, end)),
            zeros=lambda shape, dtype, layout: tile(np.zeros(shape, np.float32)),
            sum=lambda x, axis: tile(np.sum(x, axis)),
            max=lambda x, axis: tile(np.max(x, axis)),
            rsqrt=lambda x: tile(1 / np.sqrt(x)),
            exp2=lambda x: tile(np.exp2(x)),
            inline_asm_elementwise=assembled,
            maximum=lambda x, y: tile(np.maximum(x, y)),
            minimum=lambda x, y: tile(np.minimum(x, y)),
            full=lambda shape, value, dtype, layout: tile(np.full(shape, value, np.float32)),
            where=choose,
            permute=lambda x, order: tile(x.transpose(order)),
            reshape=lambda x, shape: tile(x.reshape(shape)),
            split=lambda x: (tile(x[..., 0]), tile(x[..., 1])),
            join=lambda x, y: tile(np.stack([x, y], -1)),
            int32=np.int32,
            load=load,
            store=lambda at, x, **hints: at.array.__setitem__(at.index, x),
            convert_layout=lambda x, layout, **checks: x,
            to_tensor=lambda x: x,
            static_range=range,
            allocate_shared_memory=self.allocate,
            thread_barrier=nothing,
        )

    def names(self) -> dict[str, Any]:
        """What a module of kernels imports."""
        return {
            "gl": self.language(),
            "async_copy": SimpleNamespace(
                async_copy_global_to_shared=self.copy,
                commit_group=self.commit_group,
                wait_group=self.wait_group,
            ),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_init": lambda x: x,
            "warpgroup_mma_wait": self.wait,
        }


class Hasty(Machine):
    """Waits for copies of a group less."""

    def wait_group(self, left: int) -> None:
        super().wait_group(left + 1)


class Impatient(Machine):
    """Waits for a product less."""

    def wait(self, left: int, deps: list[Any]) -> Any:
        return super().wait(left + 1, deps)


@contextmanager
def running(module: ModuleType, machine: Machine) -> Iterator[None]:
    """The functions of the module, and of those that it has some of, in numpy."""
    jitted = triton.JITFunction, InterpretedFunction
    given = [x for x in vars(module).values() if isinstance(x, jitted)]
    modules = {sys.modules[x.fn.__module__] for x in given} | {module}
    before = [(m, dict(vars(m))) for m in modules if "gl" in vars(m)]
    for one, names in before:
        functions = {k: x.fn for k, x in names.items() if isinstance(x, jitted)}
        numbers = {k: x.value for k, x in names.items() if isinstance(x, triton.language.constexpr)}
        vars(one).update({**functions, **numbers, **machine.names()})
    try:
        yield
    finally:
        for one, names in before:
            vars(one).update(names)


def run(
    launch: Launch, *inputs: Tensor, machine: Callable[[int, int, int], Machine] = Machine
) -> list[Tensor]:
    """The outputs of a launch, of inputs on the host, which stay as they are."""
    module = importlib.import_module(launch.kernel.fn.__module__)
    given = [Pointers(as_array(x)) for x in inputs]
    outputs = [buffer(o) for o in launch.outputs]
    for i, output in launch.in_place.items():
        outputs[output] = given[i].array.copy().reshape(launch.outputs[output].shape)
        given[i] = Pointers(outputs[output].reshape(-1))
    arrays = [*given, *(Pointers(x.reshape(-1)) for x in outputs)]
    for program in range(launch.grid[0]):
        state = machine(program, launch.grid[0], launch.num_warps)
        with running(module, state), np.errstate(over="ignore", invalid="ignore"):
            launch.kernel.fn(*arrays, **launch.constants)
        if state.products or any(state.groups):
            raise Hazard("something is on its way at the end")
    dtypes = [getattr(torch, o.dtype) for o in launch.outputs]
    return [torch.from_numpy(x).to(d) for x, d in zip(outputs, dtypes, strict=True)]
