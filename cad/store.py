"""A store of what is expensive to make, addressed by a hash of everything that determines it.

A file has tensors and a header, and the same bytes whenever it is made from an equal key. Beside it
lies `<hash>.json` with the key in clear, and with what differs from one making to the next, such as
the cost. Of several processes that need the same, one makes it and the others wait (`cad.files`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cad.errors import UserError
from cad.files import atomic_path, locked, write_atomically, writing_results
from cad.identity import digest, tensors_digest

METADATA = "cad"  # the one entry: safetensors writes several in random order

T = TypeVar("T")
Notes = Mapping[str, Any]
"""The JSON beside a file: its key, and what is no function of the key."""

log = logging.getLogger(__name__)


class DamagedFileError(UserError):
    """A file does not hold what was written, or something else was written."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    format: str,
    *,
    hashed: bool = True,
) -> None:
    """Writes one safetensors file, atomically; equal content gives equal bytes.

    `header` is JSON-able, and `format` names what it means. `hashed` adds a hash of everything;
    without, the format has one of its own. Raises UserError where the disk does not take the file.
    """
    kept = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    entry = {**header, "format": format}
    entry |= {"sha256": _digest(entry, kept)} if hashed else {}
    with writing_results(path.parent), atomic_path(path) as temporary:
        save_file(kept, temporary, {METADATA: json.dumps(entry, sort_keys=True)})


def read_tensors(
    path: Path, format: str, *, hashed: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors, on the CPU, that `write_tensors` wrote.

    Raises DamagedFileError for a file of another format or, if `hashed`, with altered content.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    found = header.get("format") if isinstance(header, dict) else header
    if found != format:
        raise DamagedFileError(f"{path} is not a {format} file: its format is {found!r}")
    if hashed and header.pop("sha256", None) != _digest(header, tensors):
        raise DamagedFileError(f"{path} is damaged: its content does not match its hash")
    return header, tensors


class Store:
    """A folder of files, made once each; a damaged one is reported and made again."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the thing that `key` determines is, or will be."""
        return self.root / f"{digest(key)}.safetensors"

    def get_or_make(
        self,
        key: Mapping[str, Any],
        what: str,
        read: Callable[[Path, Notes], T],
        make: Callable[[], T],
        write: Callable[[Path, T], Notes],
    ) -> tuple[T, Path]:
        """Reads or makes the thing that `key` determines. Returns it and its file.

        `what` is its name in messages. `write` saves the file and returns its notes, which `read`
        is given with the path. `read` raises UserError, LookupError, TypeError or ValueError for a
        damaged file. Raises what `make` raises, and UserError for a folder that cannot be written
        to or locked.
        """
        path = self.path(key)
        found = _read(path, what, read)
        if found is None:
            with locked(path.with_suffix(".lock"), f"another process is making {what}"):
                found = _read(path, what, read)
                if found is None:
                    found = make()
                    notes = json.dumps({"key": key, **write(path, found)}) + "\n"
                    with writing_results(self.root):
                        write_atomically(path.with_suffix(".json"), notes.encode())
        return found, path


def _read(path: Path, what: str, read: Callable[[Path, Notes], T]) -> T | None:
    """None where there is nothing, or, with a warning, where it is damaged."""
    notes = path.with_suffix(".json")
    if not path.is_file() or not notes.is_file():
        return None
    try:
        found = read(path, json.loads(notes.read_text(encoding="utf-8")))
    except (UserError, LookupError, TypeError, ValueError) as error:
        log.warning("%s in %s is damaged (%s): making it again", what, path, error)
        return None
    log.info("%s taken from %s", what, path)
    return found


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return digest({"header": header, "tensors": tensors_digest(tensors.items())})
