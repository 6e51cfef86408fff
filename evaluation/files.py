"""Small files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

from cad.files import atomic_path


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, flushed to disk, or leave it as it was. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
