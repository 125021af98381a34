"""Loader processes: each prepares examples one after another and hands them to its parent.

A worker is a fresh interpreter that runs this module, never a fork and never a second run of the
user's script: it imports neither jax nor torch, and scripts need no ``if __name__ == "__main__"``.
It ends when its parent closes the connection or dies, by whatever cause. Starting one takes about
half a second of a free core; the connection copies an example once, by pickling.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from multiprocessing.connection import Connection, Pipe, wait

from foldcore.data.examples import Prepared, Preparer

Task = tuple[int, int]  # position, num_iter_recycling
TASKS_AHEAD = 2  # given to a worker at a time: one in work, one waiting
PARENT_CHECK_SECONDS = 5.0
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerError(RuntimeError):
    """A loader process died; the message names it and what it was doing."""


class WorkerPool:
    """Processes that prepare positions in any order; results wait here until they are taken."""

    def __init__(self, preparer: Preparer, count: int) -> None:
        self._workers = _start(preparer, count)
        self._pending: deque[Task] = deque()
        self._ready: dict[int, Prepared] = {}
        self._error: WorkerError | None = None
        self._changed = threading.Condition()
        self._stop, self._stopped = Pipe()
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def submit(self, position: int, num_iter_recycling: int) -> None:
        """Have a position prepared."""
        with self._changed:
            self._pending.append((position, num_iter_recycling))
            self._hand_out()

    def take(self, position: int) -> Prepared:
        """Wait for a submitted position and remove it."""
        with self._changed:
            self._changed.wait_for(lambda: position in self._ready or self._error)
            if position not in self._ready and self._error:
                raise self._error
            return self._ready.pop(position)

    def close(self) -> None:
        """End the processes at once; they hold nothing that could be lost."""
        if not self._stop.closed:
            self._stop.send(None)
            self._receiver.join()
            self._stop.close()
            self._stopped.close()
            for worker in self._workers:
                worker.end()

    def _hand_out(self) -> None:
        for ahead in range(TASKS_AHEAD):  # evenly: a second task only when all have a first
            for worker in self._workers:
                if self._pending and len(worker.tasks) <= ahead and not self._error:
                    worker.tasks.append(self._pending.popleft())
                    try:
                        worker.connection.send(worker.tasks[-1])
                    except OSError:
                        self._error = worker.death()

    def _receive(self) -> None:
        by_connection = {worker.connection: worker for worker in self._workers}
        while not self._error:
            arrived = wait([self._stopped, *by_connection])
            if self._stopped in arrived:
                return
            for connection in arrived:
                worker = by_connection[connection]  # type: ignore[index]
                result = worker.receive()
                with self._changed:
                    if isinstance(result, WorkerError):
                        self._error = result
                    else:
                        self._ready[result.position] = result
                        self._hand_out()
                    self._changed.notify_all()


def _start(preparer: Preparer, count: int) -> "list[_Worker]":
    workers = [_Worker(number) for number in range(count)]  # all start up at the same time
    for worker in workers:
        try:
            worker.connection.send(preparer)
        except OSError:
            error = worker.death()
            for other in workers:
                other.end()
            raise error from None
    return workers


class _Worker:
    """The parent's side of one process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tasks: list[Task] = []
        self.connection, child = Pipe()
        environment = os.environ | {name: "1" for name in ONE_THREAD}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        arguments = f"{child.fileno()}, {os.getpid()}"
        command = f"from foldcore.data.worker import serve; serve({arguments})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", command],
            pass_fds=(child.fileno(),),
            env=environment,
            stdin=subprocess.DEVNULL,
            # a signal to the parent's group must not end a worker that is still starting
            start_new_session=True,
        )
        child.close()

    def receive(self) -> Prepared | WorkerError:
        """The next result, or that there will be none."""
        try:
            result: Prepared = self.connection.recv()
        except (EOFError, OSError):
            return self.death()
        except Exception as error:
            return WorkerError(f"loader process {self.number} sent an unusable result: {error!r}")
        self.tasks = [task for task in self.tasks if task[0] != result.position]
        return result

    def death(self) -> WorkerError:
        """Why the process is gone, as far as the system tells."""
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return WorkerError(f"loader process {self.number} closed its connection and hangs")
        if status < 0:
            cause = f"killed by {signal.Signals(-status).name}"
        else:
            cause = f"exit status {status}"
        memory = " (out of memory? fewer data.workers need less)" if status == -9 else ""
        positions = ", ".join(str(position) for position, _ in self.tasks) or "none"
        return WorkerError(
            f"loader process {self.number} (pid {self.process.pid}) died: {cause}{memory}; "
            f"positions in work: {positions}"
        )

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def serve(descriptor: int, parent: int) -> None:
    """What a worker runs: prepare what the parent (a process id) asks for until it is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    with Connection(descriptor) as connection:
        try:
            preparer: Preparer = connection.recv()
            while True:
                while not connection.poll(PARENT_CHECK_SECONDS):
                    if os.getppid() != parent:  # a fork of the parent may hold the connection open
                        return
                connection.send(preparer.prepare(*connection.recv()))
        except (EOFError, ConnectionError):
            return  # the parent closed the connection, or died
