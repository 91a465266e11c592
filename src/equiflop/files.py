"""Files that are written whole or not at all, and folders that one process has for itself."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

_in_use: set[Path] = set()  # folders of this process: its own locks do not keep it out


def cache_folder() -> Path:
    """The folder for downloads and for what is worth keeping: ``equiflop`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equiflop"


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file such that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Raises:
        OSError: if it cannot be written; the old content is then intact.
    """
    temporary = hidden(path)
    try:
        with failures_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 by :func:`write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def check_writable(path: Path) -> None:
    """See, before the work, that a file can be written; its folder is made if it is not there.

    Raises:
        OSError: if not.
    """
    with failures_named(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden(path).touch()
        hidden(path).unlink()


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder such that after a crash at any moment the old one or the new one is there, never a part.

    Args:
        path: the folder.
        fill: makes it under the name that it is given.

    Raises:
        OSError: if it cannot be written; the old one is then intact.
    """
    temporary = hidden(path)
    try:
        with failures_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fill(temporary)
            put_in_place(path)
    finally:
        _delete(temporary)


def put_in_place(path: Path) -> None:
    """Let the folder that was prepared as ``hidden(path)`` take the place of ``path``.

    Between two renames there is none; :func:`remove_leftovers` then puts the old one back.
    """
    old = hidden(path, "old")
    if path.exists():
        os.replace(path, old)
    os.replace(hidden(path), path)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder; a crash at any moment leaves it whole or out of sight."""
    if path.is_dir():
        doomed = hidden(path, "gone")
        os.replace(path, doomed)
        path = doomed
    _delete(path)


def hidden(path: Path, state: str = "new") -> Path:
    """The name under which this process prepares a file or a folder, or keeps it out of sight."""
    return path.with_name(f".{path.name.lstrip('.')}.{state}.{os.getpid()}")


@contextlib.contextmanager
def workshop(path: Path) -> Iterator[Path]:
    """A hidden folder beside a file, in which it and what belongs to it are made; gone at the end.

    What killed processes left of their own for the same file goes as well.

    Raises:
        OSError: if there can be none; it names the file meant.
    """
    with failures_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.parent.glob(f"{hidden(path).stem}.*"):
            process = folder.suffix[1:]
            if process.isdecimal() and not _alive(int(process)):
                _delete(folder)
        folder = hidden(path)
        try:
            folder.mkdir(exist_ok=True)
            yield folder
        finally:
            _delete(folder)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what the functions above left half-written or half-deleted in a folder when their process was killed.

    To be called before this process writes anything there: it may have the number of the process that was killed.
    """
    for path in folder.glob(".*.*.*"):
        name, state, process = path.name[1:].rsplit(".", 2)
        if not process.isdecimal() or (_alive(int(process)) and int(process) != os.getpid()):
            continue
        if state == "old" and not path.with_name(name).exists():
            os.replace(path, path.with_name(name))
        elif state in ("new", "old", "gone"):
            _delete(path)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keep a second training out of a run's folder; a killed one lets go by itself.

    Raises:
        ValueError: if another process trains there.
        OSError: if the folder cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    refusal = f"out={str(folder)!r}: another process is training there; take another folder"
    if place in _in_use:
        raise ValueError(refusal)
    with open(place / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which lives on in loader workers
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(refusal) from error
        except OSError:  # a file system without locks
            pass
        _in_use.add(place)
        try:
            yield
        finally:
            _in_use.discard(place)


@contextlib.contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Let a failed write raise an OSError that names the file meant, not the one under way."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        failure = _failure_of_the_disk(error)
        if failure is None:
            raise
        reason = f"cannot write ({failure.strerror or failure}); what was there before is intact"
        raise OSError(failure.errno, reason, str(path)) from error


def _failure_of_the_disk(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch.save lets a RuntimeError of its own take the place of a failed write."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
