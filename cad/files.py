"""Files that processes share: whole or absent, locked while they are made, known by their hashes.

Locks are `flock`'s: the kernel lets one go with the process that holds it, however that ends, so a
killed holder leaves nothing to clean up; the empty file stays. Machines that share a folder see
each other's locks where its file system passes flock on: Lustre mounted with the option flock, NFS
with its default local_lock=none, GPFS. Elsewhere two machines may compute the same scores or edit
twice, which costs time alone; image sets and results must then be made by one machine at a time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from cad.errors import UserError

BAR_FROM = 2**30  # bytes of a file whose hashing shows a progress bar
PIECE = 2**22  # bytes read at once

log = logging.getLogger(__name__)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: written, flushed to disk and renamed when the block ends.

    After an exception `path` is as it was before and the temporary file is gone. Creates the
    folder; who may read the file is for the umask to say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    permissions = temporary.stat().st_mode
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(permissions)  # safetensors makes private files
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # a rename is on disk only once its folder is
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Makes `path` hold `data`, flushed to disk, or leaves it as it was. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def writing_results(folder: Path) -> Iterator[None]:
    """Turns a write that fails inside the block, such as on a full disk, into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"cannot write to {folder}: {reason}. Make room, or choose another folder with "
            "paths.results=DIR. What was finished is kept; the same command goes on from there."
        ) from error


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, a copy where the disk cannot link; atomically."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


@contextmanager
def locked(path: Path, held: str) -> Iterator[None]:
    """Holds the lock file `path` alone, waiting for its turn.

    Says once that it waits: `held` begins the message, "another process is running X". Look for
    what is locked inside the block: the other process may have made it. Creates folder and file.
    Raises UserError where they cannot be made, or the file system has no locks.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(path.open("a+"))  # NFS wants it writable to lock it
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s, waiting for it", held)
                fcntl.flock(handle, fcntl.LOCK_EX)
                # NFS remembers for seconds which files were not there; this asks again.
                os.close(os.open(path.parent, os.O_RDONLY))
        except OSError as error:
            raise UserError(
                f"cannot write to {path.parent} or lock a file in it ({error.strerror}): choose "
                "another folder with paths.results=DIR, or have its file system mounted with flock"
            ) from error
        yield


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The hash of a file's bytes, hexadecimal; read again only once size or time have changed."""
    status = path.stat()
    return _read_digest(path.resolve(), algorithm, status.st_size, status.st_mtime_ns)


def content_digest(path: Path) -> str:
    """SHA-256 over names and bytes of a file, or of a folder's. UserError if there is nothing."""
    if not path.exists():
        raise UserError(f"there is neither a file nor a folder at {path}.")
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.suffix
        digest.update(f"{name}\0{file_digest(file)}".encode())
    return digest.hexdigest()


@functools.cache
def _read_digest(path: Path, algorithm: str, size: int, _changed: int) -> str:
    digest = hashlib.new(algorithm)
    hide = None if size >= BAR_FROM else True  # None: hidden where there is no terminal
    bar = tqdm(desc=f"hash of {path.name}", total=size, unit="B", unit_scale=True, disable=hide)
    with bar, path.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
