"""Compiling Triton kernels for JAX: all of a program's at once, and each only once on a machine.

Triton's compiler does it, down to machine code, and keeps what it made on the disk.
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from foldcore.kernels.launch import overlap
from jaxfold._launcher import Kernel, add, launcher

PRIMITIVE = "triton_kernel_call"
_coming: set["Request"] = set()  # kernels that threads compile
# as Triton writes what pointers point to
TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "bool": "i1",
    "int8": "i8",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "uint32": "u32",
}
# of a call by jax-triton; all its others are the kernel's constants
PARAMETERS = frozenset(
    "fn scalar_args name custom_call_target_name out_shapes grid num_warps num_stages num_ctas "
    "compute_capability enable_fp_fusion input_output_aliases zeroed_outputs debug "
    "serialized_metadata".split()
)


@dataclass(frozen=True)
class Request:
    """All that decides what a kernel is compiled to, and the values of its scalars."""

    function: Any  # what triton.jit returns
    types: tuple[str, ...]  # of inputs, scalars and outputs, as Triton writes them
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    architecture: int
    scalars: tuple[int | float, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, inputs: Sequence[Any], params: Mapping[str, Any]) -> "Request":
        """What a call by jax-triton asks for, with ``inputs`` of these abstract values."""
        scalars = params["scalar_args"]
        if [i for i, _, _ in scalars] != list(range(len(inputs), len(inputs) + len(scalars))):
            raise ValueError(f"scalars of {params['name']} come after its arrays")
        return cls(
            params["fn"],
            (
                *(f"*{TYPES[x.dtype.name]}" for x in inputs),
                *(kind for _, kind, _ in scalars),
                *(f"*{TYPES[np.dtype(x.dtype).name]}" for x in params["out_shapes"]),
            ),
            tuple(sorted((k, v) for k, v in params.items() if k not in PARAMETERS)),
            params["num_warps"],
            params["num_stages"],
            params["compute_capability"],
            tuple(value for _, _, value in scalars),
        )

    def words(self) -> np.ndarray:
        """The scalars in 8 bytes each, of which a kernel may read only the first 4."""
        return np.array(
            [np.float32(x).view(np.int32) if isinstance(x, float) else x for x in self.scalars],
            np.int64,
        )

    @functools.cached_property
    def key(self) -> str:
        """A name that tells it from all others, known before it is compiled."""
        import triton

        parts = (triton.__version__, self.source().hash(), *self._options().items())
        digest = hashlib.sha256(f"{self.architecture} {parts}".encode()).hexdigest()
        return f"{self.function.fn.__name__}-{digest}"

    def source(self) -> Any:
        """The kernel as Triton's compiler takes it."""
        from foldcore.kernels.source import source_type

        names = self.function.arg_names
        constants = dict(self.constants)
        arguments = dict(zip([n for n in names if n not in constants], self.types, strict=True))
        return source_type(self.function)(
            self.function,
            signature={name: arguments.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            # XLA aligns arrays to more than that
            attrs={
                (names.index(name),): [["tt.divisibility", 16]]
                for name, kind in arguments.items()
                if kind.startswith("*")
            },
        )

    def compile(self) -> Kernel:
        """The kernel: from Triton's folder, or compiled and kept there."""
        import triton
        from triton.backends.compiler import GPUTarget

        target = GPUTarget("cuda", self.architecture, 32)
        made = triton.compile(self.source(), target=target, options=self._options())
        data = made.metadata
        if data.global_scratch_size or data.profile_scratch_size or data.num_ctas != 1:
            raise ValueError(f"{data.name} needs scratch memory or clusters of programs")
        threads = 32 * data.num_warps
        sizes = threads, data.shared
        return Kernel(self.key, data.name, made.asm["cubin"], *sizes, data.launch_pdl)

    def _options(self) -> dict[str, int]:
        sizes = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return sizes | overlap(self.architecture)


@functools.cache
def provide(request: Request) -> None:
    """Compile a kernel, once in a process, and make it known to the launcher."""
    add(launcher(), request.compile())


def is_coming(request: Request) -> bool:
    """Whether threads are at it, so that a program may be compiled without the kernel."""
    return request in _coming


@contextmanager
def compiling(program: ClosedJaxpr) -> Iterator[None]:
    """Compile the kernels that a traced program calls; all are there at the end of the block.

    Threads do it, while the block lowers and compiles the program, which needs their keys only:
    Triton lets go of Python's lock while its compiler runs, and so does XLA.
    """
    found = {
        Request.of([v.aval for v in call.invars], call.params)
        for call in calls(program.jaxpr, PRIMITIVE)
    }
    if found:
        from foldcore.kernels.source import parse_in_turn

        launcher()  # XLA refuses to compile calls that it does not know
        parse_in_turn()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        _coming.update(found)
        begun = [pool.submit(provide, request) for request in found]
        try:
            yield
        finally:
            _coming.difference_update(found)
        for one in begun:
            one.result()


def calls(program: Jaxpr, primitive: str) -> Iterator[JaxprEqn]:
    """The equations of this primitive, those of inner programs included."""
    for equation in program.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, Jaxpr):
                    yield from calls(inner, primitive)
