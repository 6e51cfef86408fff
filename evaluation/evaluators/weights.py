"""Published files that a metric is measured with: fetched once, verified at every use."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch

from cad.errors import UserError

REACHABILITY_TIMEOUT = 20  # seconds without an answer
SHORT = 12  # hexadecimal digits that name weights in a metric's version


@dataclass(frozen=True)
class Download:
    """A published file and the hash it must have."""

    what: str  # in words: "torchvision's ResNet-50 IMAGENET1K_V2"
    url: str
    digest: str  # the hash in hexadecimal, or its start where no more was published
    size_mb: int
    algorithm: str = "sha256"  # or md5, for what was published with nothing better

    @property
    def path(self) -> Path:
        """Its place in torch's cache, where torchvision too would look for it."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.url.rsplit("/", 1)[-1]

    @property
    def version(self) -> str:
        """File name and the start of its hash."""
        return f"{self.path.stem}-{self.digest[:SHORT]}"

    def fetch(self, needed_by: str, instead: str) -> Path:
        """The file's path, after a download if it is not there, its hash checked either way.

        `needed_by` is how the user asked for it ("evaluator=fid"), `instead` how to do without.
        Raises UserError if it cannot be downloaded or is not what it should be.
        """
        path = self.path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with urllib.request.urlopen(self.url, timeout=REACHABILITY_TIMEOUT):
                    pass  # torch.hub has no timeout of its own, so find out here
                torch.hub.download_url_to_file(self.url, str(path))
            except (
                urllib.error.URLError,
                TimeoutError,
                ConnectionError,
                http.client.HTTPException,
            ) as error:
                raise UserError(
                    f"{needed_by} needs {self.what} ({self.size_mb:,} MB) and could not download "
                    f"it ({error}). Get {self.url} on a machine with a network and put it at "
                    f"{path} (TORCH_HOME moves that folder), or {instead}"
                ) from error
        self.verify(path)
        return path

    def verify(self, path: Path) -> None:
        """Raise UserError, naming both hashes, unless `path` is the published file."""
        found = file_digest(path, self.algorithm)
        if not found.startswith(self.digest):
            more = "..." if len(self.digest) < len(found) else ""
            name = {"sha256": "SHA-256", "md5": "MD5"}[self.algorithm]
            raise UserError(
                f"{path} has the {name} {found}, expected {self.digest}{more}: delete it to "
                "download it again"
            )


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The file's hash in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def folder_digest(folder: Path, names: tuple[str, ...]) -> str:
    """The SHA-256 over the contents of some of a folder's files, in the order of `names`."""
    digest = hashlib.sha256()
    for name in names:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
