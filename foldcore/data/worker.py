"""One loader process: it prepares examples one after another into memory shared with its parent.

A worker is a fresh interpreter that runs this module, never a fork and never a second run of the
user's script: it imports neither jax nor torch, and scripts need no ``if __name__ == "__main__"``.
It ends when its parent closes the connection or dies, by whatever cause. Starting one takes about
half a second of a free core. Only short messages cross the connection.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from foldcore.data.examples import Prepared
from foldcore.data.slots import Slots
from foldcore.features import Batch

PARENT_CHECK_SECONDS = 5.0
DUMP_SECONDS = 0.5  # a hung process gets to write where it hangs
END_SECONDS = 5.0  # a killed process that stays longer is stuck inside the operating system
LAST_WORDS = 8192  # bytes of a dead worker's output that are kept
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Task:
    """A position to prepare, from which attempt on, and the slot that takes the example."""

    position: int
    first_attempt: int = 0
    slot: int = -1


def setup_message(preparer: Any, slots: Slots) -> bytes:
    """What each worker gets first."""
    return bytes(ForkingPickler.dumps((preparer, slots.sizes, slots.count)))


class Worker:
    """The parent's side of one process."""

    def __init__(self, number: int, setup: bytes, slots: Slots) -> None:
        self.number = number
        self.task: Task | None = None  # in work
        self.ready = False  # whether it has started up
        self.since = time.monotonic()  # of its start, or of the task in work
        self._output = tempfile.TemporaryFile()
        self.connection, child = Pipe()
        arguments = f"{child.fileno()}, {os.getpid()}, {slots.descriptor}"
        command = f"from foldcore.data.worker import serve; serve({arguments})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", command],
            pass_fds=(child.fileno(), slots.descriptor),
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stderr=self._output,
            # a signal to the parent's group must not end a worker that is still starting
            start_new_session=True,
        )
        child.close()
        # in a thread: it takes until the process has started up, and others must not wait for that
        threading.Thread(target=self._set_up, args=(setup,), daemon=True).start()

    def give(self, task: Task) -> None:
        """Have it prepare a position; ``receive`` will notice if it is dead."""
        self.task, self.since = task, time.monotonic()
        try:
            self.connection.send((task.position, task.first_attempt, task.slot))
        except OSError:
            pass

    def receive(self) -> tuple[Prepared, int] | None:
        """What became of its task, and the bytes it holds; None once it has started up.

        Raises EOFError or OSError where it is dead.
        """
        message: tuple[Prepared, int] | None = self.connection.recv()
        self.ready, self.task = True, None
        return message

    def dump(self) -> None:
        """Have a hung process write where it hangs."""
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(DUMP_SECONDS)

    def end(self) -> bool:
        """Kill it; false where it cannot be seen to end, so that it may write its slots yet."""
        self.connection.close()
        self.process.kill()
        try:
            self.process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def cause(self) -> str:
        """Why the process is gone, as far as the system tells."""
        try:
            status = self.process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its connection and stays"
        if status >= 0:
            return f"ended with exit status {status}"
        memory = " (out of memory? fewer data.workers need less)" if status == -9 else ""
        return f"was killed by {signal.Signals(-status).name}{memory}"

    def last_words(self) -> str:
        """The end of what it wrote to its standard error: a traceback, in most cases."""
        size = os.fstat(self._output.fileno()).st_size
        start = max(size - LAST_WORDS, 0)
        return os.pread(self._output.fileno(), LAST_WORDS, start).decode(errors="replace").strip()

    def _set_up(self, setup: bytes) -> None:
        try:
            self.connection.send_bytes(setup)
        except OSError:
            pass  # it is dead, which whoever receives from it notices


def child_environment() -> dict[str, str]:
    """The environment of a process of ours: it finds the same modules, and computes alone."""
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return os.environ | {name: "1" for name in ONE_THREAD} | {"PYTHONPATH": path}


def serve(descriptor: int, parent: int, slots_descriptor: int) -> None:
    """What a worker runs: prepare what the parent (a process id) asks for until it is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with Connection(descriptor) as connection:
        try:
            preparer, sizes, count = connection.recv()
            slots = Slots(slots_descriptor, sizes, count)
            connection.send(None)
            while True:
                while not connection.poll(PARENT_CHECK_SECONDS):
                    if os.getppid() != parent:  # a fork of the parent may hold the connection open
                        return
                task = Task(*connection.recv())
                connection.send((_prepare(preparer, slots, task), own_memory()))
        except (EOFError, ConnectionError):
            return  # the parent closed the connection, or died


def _prepare(preparer: Any, slots: Slots, task: Task) -> Prepared:
    def begin(attempt: int) -> Batch:
        slots.begin(task.slot, attempt)
        return slots.room(task.slot)

    prepared: Prepared = preparer.prepare(task.position, task.first_attempt, begin)
    if prepared.features is None:
        return replace(prepared, attempt=-1)
    slots.finish(task.slot)
    return replace(prepared, features=None)


def own_memory() -> int:
    """Bytes that this process alone holds; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return 0
    _, resident, shared = path.read_text().split()[:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
