"""Compiles every kernel for an H100 on any machine, and looks at what it does before it waits.

A kernel that touches memory before it has waited for the launch before, or waits in some of its
programs only, reads what is not there yet, now and then. So the wait has to come first in PTX, by
all threads, and only then the word that the next launch may begin.

Run as a program, for Triton compiles in no process in which its interpreter is chosen.
"""

import re
import sys

import triton
import triton.language as tl

from foldcore.kernels.dependent import await_previous
from foldcore.kernels.launch import Launch, Output, options
from tests.compiled_kernels import TARGET, kernels, launches, lowered, source

STEPS = ("ttir", "ttgir", "llir", "ptx")
WAIT, NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
# what needs no memory but a program's own: arithmetic with parameters, zeros to shared memory
HARMLESS = (
    *"ld.param mov add sub mul mad shl shr and or xor cvt cvta bfe setp selp".split(),
    *("st.shared", "stmatrix"),
)


@triton.jit
def hasty_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """Loads before it waits."""
    x = tl.load(x_ptr + tl.arange(0, N))
    await_previous()
    tl.store(y_ptr + tl.arange(0, N), x)


@triton.jit
def selective_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """Waits in one of its programs only."""
    if tl.program_id(0) == 0:
        await_previous()
    tl.store(y_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))


@triton.jit
def forgetful_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """Does not wait."""
    tl.store(y_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))


def instructions(ptx: str) -> list[str]:
    """What a kernel does, in its order: a line each, without declarations and labels."""
    lines = [line.split("//")[0].strip() for line in ptx[ptx.index("\n{") :].splitlines()]
    return [x for x in lines if x and x[0] not in "{}.$" and not x.endswith(":")]


def fault(ptx: str) -> str | None:
    """What a kernel does wrong, if anything."""
    found = instructions(ptx)
    waits = [i for i, x in enumerate(found) if x.startswith(WAIT)]
    nexts = [i for i, x in enumerate(found) if x.startswith(NEXT)]
    if len(waits) != 1 or len(nexts) != 1 or nexts < waits:
        return f"waits at {waits}, lets the next begin at {nexts}"
    for line in found[: waits[0]]:
        if not any(re.match(rf"{re.escape(name)}[.\s]", line) for name in HARMLESS):
            return f"before it waits: {line}"
    return None


def ptx(launch: Launch, architecture: int) -> str:
    """PTX for an H100 with the options for an architecture."""
    return lowered(source(launch), options(launch, architecture), STEPS)


def main() -> str | None:
    """What is wrong, if anything."""
    output = Output((128,), "bfloat16")
    for kernel in (hasty_kernel, selective_kernel, forgetful_kernel):
        if fault(ptx(Launch(kernel, (2,), (output,), {"N": 128}), TARGET.arch)) is None:
            return f"{kernel.fn.__name__} is found to be right"
    seen: dict[str, str | None] = {}
    for launch in launches():
        if (name := launch.kernel.fn.__name__) not in seen:
            seen[name] = fault(ptx(launch, TARGET.arch))
    if missing := kernels() - set(seen):
        return f"not looked at: {sorted(missing)}"
    if "griddepcontrol" in ptx(launch, 80):
        return "a kernel waits although its launches do not overlap"
    return str(wrong) if (wrong := {k: v for k, v in seen.items() if v}) else None


if __name__ == "__main__":
    sys.exit(main())
