"""Where published prompt files come from: fetched once and kept.

Files from the web are kept below `$XDG_CACHE_HOME` (else `~/.cache`) in `concept-attribution/
prompts`, files of the Hugging Face hub in the hub's own cache, which `$HF_HOME` moves.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from cad.errors import UserError
from cad.files import write_atomically
from cad.identity import Identified, immaterial
from cad.models.hub import TRANSPORT_ERROR, why_it_failed, why_nothing_comes
from cad.places import REPOSITORY

TIMEOUT = 20.0  # seconds that a server may be silent
LOCAL_COPY = "a local copy of the file: prompts.path=FILE"

logger = logging.getLogger(__name__)


class PromptSource(Identified, ABC):
    """Where a published file comes from. `address` names it in messages."""

    licence: str

    @property
    @abstractmethod
    def address(self) -> str: ...

    @abstractmethod
    def read(self, sha256: str | None) -> bytes:
        """The file's bytes, of any SHA-256, but kept only if of that. UserError without any."""


@dataclass(frozen=True)
class WebFile(PromptSource):
    """A file at an address that anybody may read, such as GitHub's raw one of a pinned commit."""

    url: str
    licence: str = immaterial()

    @property
    def address(self) -> str:
        return self.url

    def read(self, sha256: str | None) -> bytes:
        kept = self.cached_path()
        if kept.exists():
            data = kept.read_bytes()
            if sha256 in (None, digest(data)):
                return data
            logger.warning("%s has not the SHA-256 of prompts.sha256; downloading it again", kept)
        logger.info("downloading %s (licence: %s)", self.url, self.licence)
        try:
            response = httpx.get(self.url, timeout=TIMEOUT, follow_redirects=True)
            data = response.raise_for_status().content
            if sha256 in (None, digest(data)):
                write_atomically(kept, data)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise UserError(
                f"the prompts at {self.url} are not on this machine, and the download to {kept} "
                f"failed ({error}). Run the same command with a network, set XDG_CACHE_HOME to a "
                f"folder that can be written, or give {LOCAL_COPY}"
            ) from error
        return data

    def cached_path(self) -> Path:
        """One place for each address: another commit is another file."""
        home = os.environ.get("XDG_CACHE_HOME", "")
        # The standard has relative paths ignored.
        root = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
        name = f"{digest(self.url.encode())[:12]}-{self.url.rsplit('/', 1)[-1]}"
        return root / "concept-attribution" / "prompts" / name


@dataclass(frozen=True)
class ShippedFile(PromptSource):
    """A file that is part of the repository; `file` is its path in there."""

    file: str
    licence: str = immaterial()

    def settings(self) -> dict[str, Any]:
        return {"file": digest(self.read(None))}

    @property
    def address(self) -> str:
        return f"this repository, {self.file}"

    def read(self, sha256: str | None) -> bytes:
        remedy = f"Restore it from git, or give {LOCAL_COPY}"
        return read_file(REPOSITORY / self.file, f"{self.file} of this repository", remedy)


@dataclass(frozen=True)
class HubFile(PromptSource):
    """A file of a data set on the Hugging Face hub; `gated` ones want a licence accepted."""

    repo: str  # "ORG/NAME"
    file: str
    revision: str  # commit, branch or tag
    gated: bool = immaterial()
    licence: str = immaterial()

    @property
    def address(self) -> str:
        return f"{constants.ENDPOINT}/datasets/{self.repo}, {self.file}"

    def read(self, sha256: str | None) -> bytes:
        wanted: dict[str, Any] = {"revision": self.revision, "repo_type": "dataset"}
        cached = try_to_load_from_cache(self.repo, self.file, **wanted)
        if isinstance(cached, str):
            return Path(cached).read_bytes()
        reason = why_nothing_comes(self.gated)
        if reason is not None:
            raise UserError(self._missing(reason))
        try:
            return Path(hf_hub_download(self.repo, self.file, **wanted)).read_bytes()
        except (OSError, RuntimeError, TRANSPORT_ERROR) as error:
            raise UserError(self._missing(why_it_failed(error, self.revision))) from error

    def _missing(self, reason: str) -> str:
        gate = " Accept its licence there, then run 'hf auth login' or set HF_TOKEN."
        return (
            f"the prompts of {self.address} (licence: {self.licence}) are not on this machine and "
            f"{reason}.{gate if self.gated else ''} The same command downloads them, or beforehand "
            f"'hf download {self.repo} {self.file} --repo-type dataset --revision {self.revision}' "
            f"into {constants.HF_HUB_CACHE}; or give {LOCAL_COPY}"
        )


def read_file(path: Path, origin: str, remedy: str) -> bytes:
    """A file's bytes. UserError, which calls it `origin`, for what cannot be read or is no file."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a device would never end
            raise OSError(errno.EINVAL, "it is no file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{origin} cannot be read: {error.strerror}. {remedy}") from error


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
