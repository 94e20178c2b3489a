"""Files that are complete or absent: written aside, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from snaketron.log import NO_SPACE, UserError, logger

import orjson


def partial(path: Path) -> Path:
    """Where `path` is written before it is complete. Always the same name: the next attempt replaces it."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def writing(*paths: Path) -> Iterator[list[Path]]:
    """Yield a temporary path for each of `paths`; rename them all, in order, when the block succeeds.

    When the block fails, the temporary files are removed and nothing appears at `paths`. Put the file
    that says the others are complete (a record) last. A job of a killed Snakemake may still be writing
    the same files: then this waits for it.
    """
    for path in paths:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is a directory, a device or a pipe; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = [partial(path) for path in paths]
    with contextlib.ExitStack() as locks:
        for path in temporary:
            locks.enter_context(owned(path)).truncate(0)
        try:
            yield temporary
            for path in temporary:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            for source, target in zip(temporary, paths, strict=True):
                source.replace(target)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE and not error.filename:
                error.filename = str(paths[0])  # a failed write does not say of which file
            for path in temporary:
                path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing_directory(path: Path, *, resuming: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path`, and give it that name when the block succeeds.

    When the block fails, it is removed and what was at `path` stays. What a killed process left is removed
    first; where another process is still writing it, this waits. With `resuming` it is given to the block,
    which must verify it, and a process that is told to stop leaves it.
    """
    aside, before = partial(path), path.with_name(f".{path.name}.before")
    path.parent.mkdir(parents=True, exist_ok=True)
    with owned(aside.with_suffix(".lock")):
        for left in (before,) if resuming else (aside, before):
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(exist_ok=resuming)
        try:
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            if path.exists():
                path.replace(before)  # in no time; it may take seconds to delete
            aside.replace(path)
            shutil.rmtree(before, ignore_errors=True)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE and not error.filename:
                error.filename = str(path)
            if not (resuming and isinstance(error, KeyboardInterrupt | SystemExit)):
                shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            aside.with_suffix(".lock").unlink(missing_ok=True)


@contextlib.contextmanager
def owned(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, to read and to append, that no other process is writing; what is in it stays."""
    while True:
        with path.open("a+b") as file:
            if not lock(file):
                logger.warning("waiting for another process that is writing %s", path)
                lock(file, wait=True)
            if _is_at(path, file):  # else the other process has renamed it, and this is the finished file
                yield file
                return


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file for this process and those that inherit it; False where others have locked it.

    The kernel's `flock`, which ends with the last process that has the file open, however that one ends. It
    is not filelock, which unlocks for all of them when one lets go, nor fasteners, whose locks no process
    inherits.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name}: this file system has no locks ({error.strerror}); ask for them (Lustre: the mount "
            "option flock), or move to one that has: results by `pathvars`, or the whole working directory"
        ) from None
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; no where there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            return not lock(file)
    except (OSError, UserError):
        return False


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def no_room(directory: Path, size: int) -> str | None:
    """Why a directory has no room for a file of so many bytes; None where that is not what is wrong."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return NO_SPACE.get(error.errno or 0)
    return None


def check_size(path: Path, size: int, source: str, fix: str) -> None:
    """`UserError` unless a file is there with as many bytes as `source` says."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, and {source} lists it; {fix}") from None
    if found != size:
        raise UserError(f"{path}: {found} bytes, and {source} says {size}; {fix}")


def shown(path: str | Path) -> str:
    """A path as a user in this directory would give it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def write_text(path: Path, text: str | bytes) -> None:
    """Write a small file, complete or not at all."""
    with writing(path) as (temporary,):
        temporary.write_bytes(text.encode() if isinstance(text, str) else text)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, complete or not at all."""
    write_text(path, to_json(value))


def to_json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_json(path: Path) -> Any:
    return orjson.loads(path.read_bytes())


def sha256(path: Path) -> str:
    """Content hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_sha256(path: Path) -> str:
    """Hash of the names and contents of all files of a directory, without the hidden ones."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def sha256_of(value: Any) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()
