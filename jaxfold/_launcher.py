"""The C side of a launch: built at first use, told to XLA, and given kernels' machine code."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib

from jaxfold.ops import UnsupportedOp

TARGET = "twinfold_triton"
SOURCE = Path(__file__).with_name("_launch.c")
DRIVER = "libcuda.so.1"
STAGES = ("initialize", "execute")
_starting = threading.Lock()  # threads may lower programs at once


class Kernel(NamedTuple):
    """Machine code for one architecture; equal keys mean equal kernels, in every process."""

    key: str
    name: str  # of its function
    image: bytes
    threads: int  # in a block
    shared: int  # bytes of shared memory
    overlapped: bool  # it may be launched while the launch before it ends


def launcher() -> ctypes.CDLL:
    """The library, whose handlers XLA knows from now on.

    Raises:
        UnsupportedOp: without a C compiler or NVIDIA's driver.
    """
    with _starting:
        return _launcher()


@functools.cache
def _launcher() -> ctypes.CDLL:
    from triton import knobs

    library = load(build(Path(knobs.cache.dir)), DRIVER)
    register(library, "CUDA")
    return library


def add(library: ctypes.CDLL, kernel: Kernel) -> None:
    """Let programs launch the kernel, under its key."""
    names = (kernel.key.encode(), kernel.name.encode())
    size = ctypes.c_size_t(len(kernel.image))
    sizes = (kernel.threads, kernel.shared, kernel.overlapped)
    if library.twinfold_add(*names, kernel.image, size, *sizes):
        raise MemoryError(f"no memory for the Triton kernel {kernel.key}")


def register(library: ctypes.CDLL, platform: str) -> None:
    """Tell XLA of the handlers; they say themselves that they may be captured."""
    handlers: dict[str, Any] = {
        stage: jax.ffi.pycapsule(getattr(library, f"twinfold_{stage}")) for stage in STAGES
    }
    jax.ffi.register_ffi_target(TARGET, handlers, platform=platform)


def load(path: Path, driver: str) -> ctypes.CDLL:
    """The built library with CUDA's driver."""
    library = ctypes.CDLL(str(path))
    library.twinfold_open.restype = ctypes.c_char_p
    if (missing := library.twinfold_open(driver.encode())) is not None:
        raise UnsupportedOp(f"Triton kernels need NVIDIA's driver: {missing.decode()}")
    return library


def build(folder: Path, *options: str) -> Path:
    """Compile the C source, unless the folder has the library already."""
    import triton

    include = [jax.ffi.include_dir(), f"{Path(triton.__file__).parent}/backends/nvidia/include"]
    parts = (SOURCE.read_text(), jaxlib.__version__, triton.__version__, *options)
    digest = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()
    library = folder / f"twinfold-launch-{digest[:32]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UnsupportedOp("Triton kernels need a C compiler: install gcc, or name one in CC")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        part = f"{work}/launch.so"
        command = [compiler, "-O2", "-shared", "-fPIC", "-pthread", *options, "-o", part]
        run = [*command, str(SOURCE), *(f"-I{path}" for path in include)]
        made = subprocess.run(run, capture_output=True, text=True)
        if made.returncode:
            raise UnsupportedOp(f"{compiler} cannot compile {SOURCE}:\n{made.stderr}")
        os.replace(part, library)
    return library
