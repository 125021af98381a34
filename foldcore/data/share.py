"""Several processes of one host that work on the same examples: each is prepared once for all.

The first of them prepares, as if it were alone, and lends the others its shared memory: for each
batch they are told which slots hold it. They follow the order that the first one takes, so their
states stay equal. They meet at a socket that only this user can reach.
"""

import hashlib
import json
import os
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from foldcore.data.examples import Prepared
from foldcore.data.pool import Casualty
from foldcore.data.slots import Slots
from foldcore.data.source import Taken, Workers

MEETING_SECONDS = 600.0  # for all to arrive: programs start at different speeds


class ShareError(RuntimeError):
    """The processes that share their examples cannot; the message says which one is missing."""


def meeting_place(name: str) -> Path:
    """Where the processes that agree on a name meet."""
    folder = Path(tempfile.gettempdir(), f"twinfold-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ShareError(f"{folder}: not a folder of this user alone")
    return folder / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.sock"


class Lender:
    """The first process: a source whose examples ``followers`` others get as well."""

    def __init__(self, source: Workers, place: Path, followers: int, step: int) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._readers: Counter[int] = Counter()  # of each slot that is lent out
        self._unread: dict[Connection, Counter[int]] = {}  # slots, by follower
        self._peers: list[socket.socket] = []
        place.unlink(missing_ok=True)  # of a process that was killed
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(place))
                listener.listen(followers)
                self._admit(listener, followers, step)
        except BaseException:
            self.close()
            raise
        finally:
            place.unlink(missing_ok=True)

    def has_room(self) -> bool:
        return self._source.has_room()

    def make_room(self) -> bool:
        """Wait for the slowest of the others, where all memory is lent to it, or for its end."""
        return self._source.make_room()

    def submit(self, position: int, attempt: int | None) -> None:
        self._source.submit(position, attempt)

    def take(self, wanted: int, patience: float) -> Taken:
        return self._source.take(wanted, patience)

    def can_take(self, wanted: int, count: int, patience: float) -> bool:
        return self._source.can_take(wanted, count, patience)

    def lend(self, batch: Sequence[Taken]) -> None:
        """Tell the others which examples are the next batch."""
        rows = [(t.prepared.position, t.prepared.attempt, t.slot) for t in batch]
        with self._lock:
            followers = list(self._unread)
            for *_, slot in rows:
                self._readers[slot] = len(followers) + 1
                for unread in self._unread.values():
                    unread[slot] += 1
        for connection in followers:
            try:
                connection.send_bytes(json.dumps(rows).encode())
            except OSError:
                pass  # it is gone, as ``_hear`` finds out

    def release(self, slot: int) -> None:
        self._read(slot)

    def depth(self) -> int:
        return self._source.depth()

    def casualties(self) -> Sequence[Casualty]:
        return self._source.casualties()

    def close(self) -> None:
        for peer in self._peers:
            try:
                peer.shutdown(socket.SHUT_RDWR)  # which ends its thread as well
            except OSError:
                pass  # it has left before
            peer.close()
        self._source.close()

    def _admit(self, listener: socket.socket, followers: int, step: int) -> None:
        deadline = time.monotonic() + MEETING_SECONDS
        slots = self._source.pool.slots
        while len(self._unread) < followers:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                count = f"{len(self._unread)} of {followers}"
                raise ShareError(f"{count} processes came to share this one's examples") from None
            peer.setblocking(True)
            hello = json.dumps({"sizes": slots.sizes, "count": slots.count, "step": step})
            socket.send_fds(peer, [hello.encode()], [slots.descriptor])
            connection = Connection(os.dup(peer.fileno()))
            self._peers.append(peer)
            self._unread[connection] = Counter()
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: Connection) -> None:
        try:
            while True:
                slot = int(connection.recv_bytes())
                with self._lock:
                    self._unread[connection][slot] -= 1
                self._read(slot)
        except (EOFError, OSError):  # it is gone: it reads nothing any more
            with self._lock:
                unread = self._unread.pop(connection)
            connection.close()
            for slot in unread.elements():
                self._read(slot)

    def _read(self, slot: int) -> None:
        with self._lock:
            self._readers[slot] -= 1
            if self._readers[slot] > 0:
                return
            del self._readers[slot]
        self._source.release(slot)


class Borrower:
    """Another process: a source of what the first one takes."""

    def __init__(self, place: Path, step: int) -> None:
        hello, descriptor, self._connection = _join(place, step)
        self._slots = Slots(descriptor, hello["sizes"], hello["count"])
        self._batch: deque[Taken] = deque()

    def has_room(self) -> bool:
        return False

    def make_room(self) -> bool:
        return False

    def submit(self, position: int, attempt: int | None) -> None:
        raise ShareError("another process prepares these examples")

    def take(self, wanted: int, patience: float) -> Taken:
        while not self._batch:
            try:
                rows = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                raise ShareError("the process that prepares these examples is gone") from None
            self._batch.extend(
                Taken(Prepared(p, a), self._slots[slot], slot) for p, a, slot in rows
            )
        return self._batch.popleft()

    def can_take(self, wanted: int, count: int, patience: float) -> bool:
        return bool(self._batch) or self._connection.poll()

    def lend(self, batch: Sequence[Taken]) -> None:
        pass

    def release(self, slot: int) -> None:
        try:
            self._connection.send_bytes(str(slot).encode())
        except OSError:
            pass  # the next ``take`` says so

    def depth(self) -> int:
        return len(self._batch)

    def casualties(self) -> Sequence[Casualty]:
        return ()

    def close(self) -> None:
        self._connection.close()
        self._slots.close()


def _join(place: Path, step: int) -> tuple[dict[str, Any], int, Connection]:
    """What the first process says, its shared memory, and the way to it."""
    deadline = time.monotonic() + MEETING_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as peer:
            try:
                peer.connect(str(place))
                message, descriptors, _, _ = socket.recv_fds(peer, 1 << 16, 1)
                if message and descriptors:
                    hello = json.loads(message)
                    if hello["step"] == step:  # else it is about to start again elsewhere
                        return hello, descriptors[0], Connection(peer.detach())
                    os.close(descriptors[0])
            except OSError:
                pass
        if time.monotonic() > deadline:
            raise ShareError("the process that prepares these examples never came")
        time.sleep(0.05)
