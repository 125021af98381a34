"""What Triton's compiler takes kernels as: those in Triton, and those in Gluon, its lower level."""

from typing import Any

from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource


def source_type(kernel: Any) -> type[ASTSource]:
    """The type of the source of a kernel, what ``triton.jit`` or ``gluon.jit`` returns."""
    return GluonASTSource if kernel.is_gluon() else ASTSource
