"""Stores that training packs for itself: raw sources of many chains are packed once, then found.

They lie in ``$TWINFOLD_CACHE/stores`` (by default ``~/.cache/twinfold/stores``), each under the
fingerprint of its source's files: names, sizes and times of change. A changed source is packed
anew; a store that nobody uses any more may be deleted at any time.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from foldcore.config import DataConfig
from foldcore.data.inventory import Inventory, resolve, take_inventory
from foldcore.data.layout import find_layout, path_option
from foldcore.data.prepare import Settings, fingerprint
from foldcore.data.store import MANIFEST, is_store
from foldcore.data.worker import child_environment
from foldcore.errors import DataError

PACK_ABOVE = 200  # alignments; fewer are read as they are in less time than a run notices
Say = Callable[[str], None]


def find_store(path: str, config: DataConfig, say: Say) -> str:
    """What to train from: ``path`` itself, or its store, packed now where it is missing.

    Of several processes the first one packs, and the others of its host, or of all hosts that share
    the cache, wait for it. ``say`` is told where the store is, and how far its packing.
    """
    is_url = "://" in path
    if config.pack == "never" or (not is_url and is_store(path)):
        return path
    is_readable = not is_url and _is_readable(path, path_option(path, config))
    inventory = take_inventory([path])
    few = len(inventory.alignments) <= (PACK_ABOVE if is_readable else 0)
    if config.pack == "auto" and few:
        return path
    rows = max(config.max_msa_rows, DataConfig().max_msa_rows)
    store = cache_folder() / "stores" / fingerprint(inventory, Settings(max_msa_rows=rows))
    if not (store / MANIFEST).is_file():
        with _lock(store.with_suffix(".lock"), say) as lock:
            if not (store / MANIFEST).is_file():
                _pack(inventory, path, store, rows, lock, say)
    say(f"{path}: training from its packed store {store}")
    return str(store)


def cache_folder() -> Path:
    """Where what can be made again is kept."""
    return Path(os.environ.get("TWINFOLD_CACHE") or Path.home() / ".cache" / "twinfold")


def _is_readable(path: str, option: str) -> bool:
    """Whether it has a form that can be trained from as it is."""
    layout = find_layout(path, option)
    return bool(layout.structures and layout.alignments)


def _pack(inventory: Inventory, path: str, store: Path, rows: int, lock: int, say: Say) -> None:
    """Run the command that prepares a store, in a process of its own.

    Its processes would import this one's main program otherwise. It holds the lock as well, so that
    another run waits for it even where this process is killed.
    """
    say(f"{path}: packing {len(inventory.alignments)} alignments into {store}, once")
    command = [sys.executable, "-P", "-m", "foldcore.data.prepare", resolve(path)]
    command += ["--out", str(store), "--max-msa-rows", str(rows)]
    process = subprocess.Popen(
        command,
        pass_fds=(lock,),
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    line = ""
    with process:
        for line in map(str.rstrip, process.stdout):
            say(line)
    if process.returncode:
        stopped = process.returncode in (130, -2, -15)
        reason = "packing was stopped" if stopped else f"it could not be packed: {line}"
        raise DataError(path, None, f"{reason}; the same command continues it (see data.pack)")


@contextlib.contextmanager
def _lock(path: Path, say: Say) -> Iterator[int]:
    """Within this context no other process packs; yields the lock's descriptor."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "w"))
            _wait_for(file.fileno(), lambda: say(f"waiting: another process packs {path.stem}"))
        except OSError as error:
            hint = "set TWINFOLD_CACHE to another folder, or data.pack=never"
            reason = f"cannot be made or locked: {error.strerror}; {hint}"
            raise DataError(path, None, reason) from None
        yield file.fileno()


def _wait_for(descriptor: int, say: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
