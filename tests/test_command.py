"""The command line: help, one-line errors, and the signals that end a run."""

import errno
import os
import signal
from pathlib import Path

import jax
import pytest
import torch

from foldcore.command import run_command
from foldcore.config import Config
from foldcore.errors import DataError
from foldcore.interrupt import Interrupt


def fail(config: Config, command: str) -> None:
    raise DataError("a.cif", 7, "cut short")


def status_of(error: BaseException, tmp_path: Path) -> int:
    """What a program that raises this error ends with."""
    path = tmp_path / "empty.toml"
    path.write_text("")

    def run(config: Config, command: str) -> None:
        raise error

    return run_command([str(path), f"train.out='{tmp_path}'", "train.name='it'"], "", run)


def test_help_names_every_key(capsys) -> None:
    assert run_command(["--help"], "usage of it", pytest.fail) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage of it") and "[train]" in out and "eval_recycling_iters" in out
    assert run_command([], "usage of it", pytest.fail) == 2


def test_the_run_gets_the_configuration_and_the_command(tmp_path: Path) -> None:
    path = tmp_path / "a b.toml"
    path.write_text("[train]\nsteps = 7\n")
    seen = []
    status = run_command([str(path), "train.seed=3"], "", lambda *given: seen.append(given))
    ((config, command),) = seen
    assert (status, config.train.steps, config.train.seed) == (0, 7, 3)
    assert command == f"'{path}' train.seed=3"


def test_what_a_user_can_mend_is_one_line(tmp_path: Path, capsys) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert run_command([str(path)], "", fail) == 2
    assert capsys.readouterr().err == "error: a.cif:7: cut short\n"
    assert run_command([str(tmp_path / "absent.toml")], "", pytest.fail) == 2
    assert "absent.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\nMore."),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nMore."),
        MemoryError("Unable to allocate 1.00 TiB for an array"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_memory_says_what_needs_less(error: Exception, tmp_path: Path, capsys) -> None:
    assert status_of(error, tmp_path) == 2
    out = capsys.readouterr().err
    assert "model.recompute=block" in out and "llocat" in out and "More" not in out


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, capsys) -> None:
    try:
        (tmp_path / "empty").write_text("")
        (tmp_path / "empty" / "ledger").mkdir()
    except OSError as error:
        assert status_of(error, tmp_path) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/empty/ledger: Not a directory\n"


def test_a_full_disk_names_the_run_folder(tmp_path: Path, capsys) -> None:
    # as a write into an open file fails: without the file's name
    assert status_of(OSError(errno.ENOSPC, "No space left on device"), tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/it: No space left on device; the same command")


def test_a_system_error_without_a_file_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        status_of(OSError(errno.EBADF, "Bad file descriptor"), tmp_path)
    with pytest.raises(BrokenPipeError):
        status_of(BrokenPipeError(), tmp_path)


def test_being_interrupted_is_one_line(tmp_path: Path, capsys) -> None:
    assert status_of(KeyboardInterrupt(), tmp_path) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "stopped; the same command continues from what is saved"


def test_any_other_error_keeps_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")

    def broken(config: Config, command: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command([str(path)], "", broken)
    with pytest.raises(ZeroDivisionError):
        run_command([str(path)], "", broken, (KeyError,))
    assert run_command([str(path)], "", broken, (ZeroDivisionError,)) == 2


def test_sigterm_asks_and_never_kills() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as stop:
        assert not stop.requested
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_sigint_interrupts() -> None:
    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
