"""Where published weights are, and what to tell a user who does not have them.

Looks into a local folder or the hub's cache, and downloads only what is needed. Whether the hub
can be reached is asked once and quickly: its own client would retry for minutes.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

import httpx
from huggingface_hub import constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

from cad.errors import UserError

log = logging.getLogger(__name__)

INDEX = "model_index.json"
WEIGHTED = ("unet", "vae", "text_encoder", "transformer")  # how parts with weights begin
_SHARD = re.compile(r"-\d+-of-(\d+)")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
REACHABILITY_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Source:
    """A pipeline in diffusers' layout: a local folder (`path`) or a hub repository (`repo`).

    The other fields are what a user must know to get it. Raises UserError unless exactly one of
    `path` and `repo` is given.
    """

    repo: str | None  # hub id: "CompVis/stable-diffusion-v1-4"
    revision: str | None  # commit, branch or tag of the repository; None is its main branch
    path: str | None  # folder with model_index.json
    size_gb: float  # of the files to download
    licence: str
    gated: bool  # the licence must be accepted on the hub, and a token be set
    note: str  # anything else a user should know where the weights are missing; may be empty
    variant: str | None  # of the weight files: "fp16", or None for the plain ones

    def __post_init__(self) -> None:
        if (self.repo is None) == (self.path is None):
            raise UserError(
                f"model.source.repo={self.repo!r} and model.source.path={self.path!r}: give one, "
                "a hub repository or a local folder, and null for the other."
            )

    def locate(self) -> Path:
        """The folder of the weights; downloads them if they are not on this machine.

        Raises UserError, within seconds, with what is missing, where it comes from, how large it is
        and how to get it.
        """
        if self.path is not None:
            return self._local_folder(Path(self.path).expanduser())
        cached = self._cached_snapshot()
        if cached is not None:
            return cached
        if constants.HF_HUB_OFFLINE:
            raise UserError(self._missing("HF_HUB_OFFLINE is set, so nothing was downloaded"))
        if self.gated and get_token() is None:
            raise UserError(self._missing("no hub token is set on this machine"))
        if not _hub_is_reachable():
            raise UserError(self._missing(f"{constants.ENDPOINT} cannot be reached from here"))
        return self._download()

    @property
    def files(self) -> list[str]:
        """Patterns of the files that are needed: configurations, tokenizers, safetensors."""
        weights = f"*/*.{self.variant}*.safetensors" if self.variant else "*/*.safetensors"
        return [INDEX, "*/*.json", "*/*.txt", "*/*.model", weights]

    @property
    def unneeded_files(self) -> list[str]:
        """Patterns among `files` that are not: unused parts, and other variants of the weights."""
        folders = [f"{part}/*" for part in UNUSED]
        return folders if self.variant else [*folders, "*.fp16*", "*.bf16*", "*.non_ema*"]

    def _local_folder(self, folder: Path) -> Path:
        missing = missing_parts(folder, self.variant)
        if missing:
            raise UserError(
                f"model.source.path={self.path} does not hold a whole diffusers pipeline: "
                f"{', '.join(missing)} missing. {self.note}".strip()
            )
        return folder

    def _cached_snapshot(self) -> Path | None:
        index = try_to_load_from_cache(self.repo or "", INDEX, revision=self.revision)
        if not isinstance(index, str):
            return None
        folder = Path(index).parent
        missing = missing_parts(folder, self.variant)
        if missing:
            log.warning("the cached %s is incomplete: %s missing", self.repo, ", ".join(missing))
            return None
        return folder

    def _download(self) -> Path:
        log.info("downloading %s, about %.1f GB", self.repo, self.size_gb)
        try:
            folder = snapshot_download(
                self.repo or "",
                revision=self.revision,
                allow_patterns=self.files,
                ignore_patterns=self.unneeded_files,
            )
        except GatedRepoError as error:
            raise UserError(self._missing("the hub refused the token")) from error
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError) as error:
            raise UserError(self._missing(f"the download failed ({error})")) from error
        return Path(folder)

    def _missing(self, reason: str) -> str:
        """The one paragraph: what is missing, why, where from, how large, how, and what works."""
        revision = f" at revision {self.revision}" if self.revision else ""
        page = f"{constants.ENDPOINT}/{self.repo}"
        gate = f" First accept the licence at {page} and run 'hf auth login'." if self.gated else ""
        return (
            f"The weights {self.repo}{revision} are not on this machine and {reason}. They come "
            f"from {page} (about {self.size_gb:g} GB, licence "
            f"{self.licence}).{gate} On a machine with a network they are downloaded by the same "
            f"command, or beforehand by '{self._command()}'; copy its cache folder "
            f"({constants.HF_HUB_CACHE}), or set model.source.path to a local copy and "
            f"model.source.repo=null. {self.note}{' ' if self.note else ''}"
            "model=mini needs no download and runs now."
        )

    def _command(self) -> str:
        """What fetches the same files by hand."""
        words = ["hf", "download", self.repo or ""]
        words += ["--revision", self.revision] if self.revision else []
        for option, patterns in (("--include", self.files), ("--exclude", self.unneeded_files)):
            words += [word for pattern in patterns for word in (option, pattern)]
        return shlex.join(words)


def missing_parts(folder: Path, variant: str | None = None) -> list[str]:
    """What a pipeline's folder lacks of the parts that its own index names; [] if it is whole.

    A part that bears weights is there with its safetensors, of the variant if one is given.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, JSONDecodeError):
        return [str(folder / INDEX)]
    parts = [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] is not None and name not in UNUSED
    ]
    return [str(folder / part) for part in parts if not _is_whole(folder / part, variant)]


def _is_whole(part: Path, variant: str | None) -> bool:
    if not part.name.startswith(WEIGHTED):
        return any(part.glob("*"))
    suffix = f".{variant}" if variant else ""
    # "model.fp16.safetensors", or "model.fp16-00001-of-00002.safetensors" and its like
    fitting = re.compile(rf"[^.]+{re.escape(suffix)}({_SHARD.pattern})?(\.safetensors)")
    names = [file.name for file in part.glob("*.safetensors") if file.is_file()]
    found = [name for name in names if fitting.fullmatch(name)]
    shards = [int(shard[1]) for name in found if (shard := _SHARD.search(name))]
    return len(found) > len(shards) or (bool(shards) and len(shards) == shards[0])


def _hub_is_reachable() -> bool:
    try:
        httpx.head(constants.ENDPOINT, timeout=REACHABILITY_TIMEOUT)
    except httpx.HTTPError:
        return False
    return True
