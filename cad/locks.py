"""Locks between processes: a file beside what is made, so that two never make the same at once.

`flock`: the kernel lets the lock go with the process that holds it, however that ends, so a killed
holder leaves nothing to clean up; the empty file stays. Processes on one machine always see each
other's locks. Machines that share a folder do where its file system passes flock on: Lustre mounted
with the option flock (not localflock), NFS on Linux with its default local_lock=none, GPFS. There a
crashed machine's locks go when the server gives it up, for NFSv4 after its lease, about 90 s. Where
locks stay on each machine, two machines may compute the same scores or edit twice, which costs time
alone; image sets and results must then be made by one machine at a time.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cad.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, held: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path` alone, or `shared` with others that share it; waits its turn.

    Says once that it waits: `held` begins the message, "another process is running X". Look for
    what is locked inside the block: the other process may have made it. Creates folder and file.
    Raises UserError where they cannot be made, or the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with _opened(path) as handle:
        if not _take(handle, path, kind | fcntl.LOCK_NB):
            log.info("%s, waiting for it", held)
            _take(handle, path, kind)
            _look_anew(path.parent)
        yield


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Whether nobody else holds the lock file `path`; held alone until the block ends if so.

    Raises UserError as `locked`.
    """
    with _opened(path) as handle:
        yield _take(handle, path, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+")  # NFS wants it readable to share a lock, writable to hold it alone
    except OSError as error:
        raise _unusable(path, error) from error


def _take(handle: IO[str], path: Path, kind: int) -> bool:
    """Whether the lock was taken; only a try that does not wait may find it held."""
    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _unusable(path, error) from error
    return True


def _look_anew(folder: Path) -> None:
    """NFS remembers for seconds which files were not there; opening their folder asks again."""
    os.close(os.open(folder, os.O_RDONLY))


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {path.parent} or lock a file in it ({error.strerror}): results are made "
        "where both can be done; choose another folder with paths.results=DIR, or have its file "
        "system mounted with flock"
    )
