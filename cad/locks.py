"""Locks between processes: a file beside what is made, so that two never make the same at once.

`flock`: the kernel lets the lock go with the process that holds it, however that ends, so a killed
holder leaves nothing to clean up; the empty file stays. Machines that share a folder see each
other's locks where its file system passes flock on: Lustre mounted with the option flock, NFS with
its default local_lock=none, GPFS. Elsewhere two machines may compute the same scores or edit twice,
which costs time alone; image sets and results must then be made by one machine at a time.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cad.errors import UserError

log = logging.getLogger(__name__)


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
