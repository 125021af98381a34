"""Launches that begin while the launch before them ends (programmatic dependent launch).

A launch with CUDA's attribute for it may put its programs on the device as soon as all programs of
the launch before have asked for it, or ended; they then wait there, at ``await_previous``, which
is therefore the first thing that every kernel does.

Why nothing is read too early or overwritten too soon: all programs of a kernel wait, before they
touch memory, until the launch before has ended and what it wrote is seen. So a launch that has
ended knows that the one before it has, and by that all before. A launch without the attribute, such
as a library's, starts after the end of the one before it, as ever. Kernels ask for their successor
only after they have waited: what starts meanwhile has this one launch before it, and no other, even
if it is a library's that is launched likewise and writes to memory of its own before it waits.

Whether a kernel waits and whether its launches have the attribute is one option of Triton's
compiler, ``launch_pdl``: neither can be without the other.
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Programs ask for the next launch at their start, or (False) only by their end. Once all of them
# have asked, all of them run: the next launch's programs take no place that these need.
EARLY = tl.constexpr(True)


def overlapped(_semantic: Any = None) -> tl.constexpr | bool:
    """Whether the kernel that is compiled is launched so; never in the interpreter."""
    if _semantic is None:
        return False
    return tl.constexpr(_semantic.builder.options.launch_pdl)


setattr(overlapped, tl.core.TRITON_BUILTIN, True)  # the compiler calls it with ``_semantic``


@triton.jit
def await_previous():
    """Wait until all launches before this one have ended; let the next begin to start."""
    if overlapped():
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
