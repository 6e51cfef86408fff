"""Where published prompt files come from: fetched once, kept, compared with their SHA-256.

Files from the web are kept below `$XDG_CACHE_HOME` (else `~/.cache`) in `concept-attribution/
prompts`, files of the Hugging Face hub in the hub's own cache, which `$HF_HOME` moves. Files that
the repository ships are read where they lie.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

from cad.errors import UserError
from cad.models.hub import TRANSPORT_ERROR
from evaluation.files import write_atomically

TIMEOUT = 20.0  # seconds that a server may be silent
REACHABILITY_TIMEOUT = 5.0  # seconds to answer at all; the hub's own client retries for minutes
REPOSITORY = Path(__file__).resolve().parent.parent
LOCAL_COPY = "a local copy of the file: prompts.path=FILE"

logger = logging.getLogger(__name__)


class PromptSource(ABC):
    """Where a published file comes from. `address` names it in messages."""

    licence: str

    @property
    @abstractmethod
    def address(self) -> str: ...

    @abstractmethod
    def read(self, sha256: str | None) -> bytes:
        """The file's bytes, of that SHA-256 unless it is None; downloaded if they must be.

        Raises UserError with what to do where that fails. Keeps what it downloads.
        """


@dataclass(frozen=True)
class WebFile(PromptSource):
    """A file at an address that anybody may read, such as GitHub's raw one of a pinned commit."""

    url: str
    licence: str

    @property
    def address(self) -> str:
        return self.url

    def read(self, sha256: str | None) -> bytes:
        kept = self.cached_path()
        if kept.exists():
            data = kept.read_bytes()
            if sha256 is None or digest(data) == sha256:
                return data
            logger.warning("%s has not the SHA-256 of prompts.sha256; downloading it again", kept)
        data = self._download()
        check_digest(data, sha256, self.url, "The file there was changed, or altered on its way. ")
        try:
            write_atomically(kept, data)
        except OSError as error:
            raise UserError(
                f"cannot write {kept}: {error.strerror}. Set XDG_CACHE_HOME to a folder that can "
                f"be written, or give {LOCAL_COPY}"
            ) from error
        return data

    def cached_path(self) -> Path:
        """One place for each address: another commit is another file."""
        home = os.environ.get("XDG_CACHE_HOME", "")
        # The standard has relative paths ignored.
        root = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
        name = f"{digest(self.url.encode())[:12]}-{self.url.rsplit('/', 1)[-1]}"
        return root / "concept-attribution" / "prompts" / name

    def _download(self) -> bytes:
        logger.info("downloading %s (licence: %s)", self.url, self.licence)
        try:
            response = httpx.get(self.url, timeout=TIMEOUT, follow_redirects=True)
            response.raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(
                f"the prompts at {self.url} are not on this machine, and the download failed "
                f"({error}). Run the same command with a network, copy the file from elsewhere to "
                f"{self.cached_path()}, or give {LOCAL_COPY}"
            ) from error
        return response.content


@dataclass(frozen=True)
class ShippedFile(PromptSource):
    """A file that is part of the repository; `file` is its path in there."""

    file: str
    licence: str

    @property
    def address(self) -> str:
        return f"this repository, {self.file}"

    def read(self, sha256: str | None) -> bytes:
        try:
            data = (REPOSITORY / self.file).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.file} of this repository cannot be read: {error.strerror}. Restore it from "
                f"git, or give {LOCAL_COPY}"
            ) from error
        check_digest(data, sha256, self.file, "The file was changed: restore it from git. ")
        return data


@dataclass(frozen=True)
class HubFile(PromptSource):
    """A file of a data set on the Hugging Face hub; `gated` ones want a licence accepted."""

    repo: str  # "ORG/NAME"
    file: str
    revision: str  # commit, branch or tag
    gated: bool
    licence: str

    @property
    def address(self) -> str:
        return f"{constants.ENDPOINT}/datasets/{self.repo}"

    def read(self, sha256: str | None) -> bytes:
        data = self._locate().read_bytes()
        check_digest(data, sha256, f"{self.address}, {self.file}", "It is another revision. ")
        return data

    def _locate(self) -> Path:
        cached = try_to_load_from_cache(
            self.repo, self.file, revision=self.revision, repo_type="dataset"
        )
        if isinstance(cached, str):
            return Path(cached)
        if constants.HF_HUB_OFFLINE:
            raise UserError(self._missing("HF_HUB_OFFLINE is set, so nothing was downloaded"))
        if self.gated and get_token() is None:
            raise UserError(self._missing("no hub token is set on this machine"))
        try:
            httpx.head(constants.ENDPOINT, timeout=REACHABILITY_TIMEOUT)
            path = hf_hub_download(
                self.repo, self.file, revision=self.revision, repo_type="dataset"
            )
        except GatedRepoError as error:
            raise UserError(self._missing("the hub refused the token")) from error
        except (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            httpx.HTTPError,
            TRANSPORT_ERROR,
        ) as error:
            raise UserError(self._missing(f"the download failed ({error})")) from error
        return Path(path)

    def _missing(self, reason: str) -> str:
        gate = (
            f" It is gated: accept its licence at {self.address}, then run 'hf auth login' or set "
            "HF_TOKEN."
            if self.gated
            else ""
        )
        return (
            f"the prompts {self.file} of {self.address} (licence: {self.licence}) are not on this "
            f"machine and {reason}.{gate} The same command downloads them, or beforehand "
            f"'hf download {self.repo} {self.file} --repo-type dataset --revision {self.revision}' "
            f"into {constants.HF_HUB_CACHE}; or give {LOCAL_COPY}"
        )


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def check_digest(data: bytes, sha256: str | None, origin: str, reason: str) -> None:
    """Raise UserError, naming both, if `data` has another SHA-256; None allows any."""
    found = digest(data)
    if sha256 is not None and found != sha256:
        raise UserError(
            f"{origin} has the SHA-256 {found}, expected is {sha256} (prompts.sha256). {reason}"
            f"Give {LOCAL_COPY}, or take this one as it is with prompts.sha256=null"
        )
