"""Where published weights are, and what to tell a user who does not have them."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RevisionNotFoundError,
)

from cad.errors import UserError
from cad.files import content_digest, file_digest
from cad.identity import Identified, immaterial
from cad.models.base import Origin

log = logging.getLogger(__name__)

INDEX = "model_index.json"
CONFIGURATIONS = (INDEX, "*/*.json", "*/*.txt", "*/*.model")  # settings, vocabularies, merges
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
WEIGHTED = ("unet", "vae", "text_encoder", "transformer")  # how parts with weights begin
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
BESIDE = ("vae_1_0",)  # SD-XL's older autoencoder: a folder that its index does not name
REACHABILITY_TIMEOUT = 5.0  # seconds
# huggingface_hub 1 speaks httpx, 2 httpx2: what its errors derive from is the one in use.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_SHARD = re.compile(r"-\d+-of-(\d+)")


@dataclass(frozen=True)
class Located:
    """A pipeline's files on this machine, if its weights come from any."""

    path: Path  # folder in diffusers' layout, or one .safetensors checkpoint
    config: Path | None  # of a checkpoint: folder with its configurations and tokenizers
    origin: Origin | None  # None for a local path, which does not say where it came from
    weights: tuple[Path, ...] = ()  # the files with the weights that are used

    def file_digests(self) -> dict[str, str]:
        """SHA-256 of every file with weights: {"unet/diffusion_pytorch_model.safetensors": "..."}.

        In the hub's cache a file is a link to a blob that is named by the SHA-256 under which the
        hub lists and serves it. That name is taken without reading: the hub's client compares the
        size of what it downloaded, not always the hash. Any other file is read.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        return {file.relative_to(folder).as_posix(): _digest(file) for file in self.weights}


@dataclass(frozen=True)
class Source(Identified):
    """A pipeline: a hub repository (`repo`), or a local copy of one (`path`), which wins.

    The immaterial fields are what a user must know to get it. Raises UserError if neither is given.
    """

    repo: str | None  # hub id: "CompVis/stable-diffusion-v1-4"
    revision: str | None  # commit, branch or tag of the repository; None is its main branch
    path: str | None  # folder with model_index.json, or a checkpoint in one .safetensors file
    size_gb: float = immaterial()  # of the files to download
    licence: str = immaterial()
    gated: bool = immaterial()  # the licence must be accepted on the hub, and a token be set
    note: str = immaterial()  # anything else to know where the weights are missing; may be empty
    variant: str | None = None  # of the weight files: "fp16", or None for the plain ones

    def __post_init__(self) -> None:
        if self.repo is None and self.path is None:
            raise UserError(
                "model.source.repo and model.source.path are both null: give one, a repository of "
                "the hub, or a local folder or .safetensors checkpoint."
            )

    def settings(self) -> dict[str, Any]:
        """The repository and its revision, or the contents of a local copy, wherever it lies.

        Raises UserError for a path that is neither a pipeline's folder nor a checkpoint.
        """
        if self.path is None:
            return {"repo": self.repo, "revision": self.revision, "variant": self.variant}
        checkpoint = self._checkpoint()
        if checkpoint is not None:
            configurations = {"repo": self.repo, "revision": self.revision}
            return {"content": content_digest(checkpoint), **configurations}
        folder = Path(self.path).expanduser()
        parts = pipeline_parts(folder)
        if parts is None:
            raise self._incomplete([INDEX])
        used = [folder / name for name in (INDEX, *parts) if (folder / name).exists()]
        contents = {file.name: content_digest(file) for file in used}
        return {"content": contents, "variant": self.variant}

    def locate(self, without: Collection[str] = ()) -> Located:
        """The files of the weights; downloads them if they are not on this machine.

        `without` names parts that are left out and need not be there: "text_encoder_3". Of a
        checkpoint in one file (the layout of the models' authors) the configurations and
        tokenizers are those of `repo` at `revision`. Raises UserError, within seconds, with what is
        missing, where it comes from, how large it is and how to get it.
        """
        checkpoint = self._checkpoint()
        if checkpoint is not None:
            return Located(checkpoint, self._snapshot(without), None, (checkpoint,))
        if self.path is None:
            folder = self._snapshot(without)
            origin = Origin(self.repo or "", folder.name)
        else:
            folder, origin = Path(self.path).expanduser(), None
            missing = self.missing_parts(folder, without)
            if missing:
                raise self._incomplete(missing)
        parts = pipeline_parts(folder, without) or ()
        weights = [self._weights(folder / part) for part in parts if part.startswith(WEIGHTED)]
        return Located(folder, None, origin, tuple(file for files in weights for file in files))

    def missing_parts(self, folder: Path, without: Collection[str] = ()) -> list[str]:
        """The parts named by its own index that a pipeline's folder lacks; [] if it is whole.

        A part that bears weights is there with its safetensors of the variant, or beside a
        checkpoint with its configuration.
        """
        parts = pipeline_parts(folder, without)
        if parts is None:
            return [INDEX]
        return [part for part in parts if not self._is_whole(folder / part)]

    def _is_whole(self, part: Path) -> bool:
        if self._checkpoint() or not part.name.startswith(WEIGHTED):
            return any(part.glob("*.json"))
        files = self._weights(part)
        shards = [_SHARD.search(file.name) for file in files]  # None for a file that holds them all
        return len(files) >= min((int(shard[1]) if shard else 1 for shard in shards), default=1)

    def _weights(self, part: Path) -> list[Path]:
        suffix = f".{self.variant}" if self.variant else ""
        # "model.fp16.safetensors", or "model.fp16-00001-of-00002.safetensors" and its like
        name = re.compile(rf"[^.]+{re.escape(suffix)}({_SHARD.pattern})?\.safetensors")
        files = sorted(part.glob("*.safetensors"))
        return [file for file in files if name.fullmatch(file.name) and file.is_file()]

    def _checkpoint(self) -> Path | None:
        """The path if it is one file and no folder. UserError for a file that cannot be taken."""
        path = Path(self.path or "").expanduser()
        if path.is_dir() or path.suffix not in (".safetensors", *PICKLES):
            return None
        if path.suffix in PICKLES:
            raise UserError(
                f"model.source.path={self.path} is refused: loading a {path.suffix} file executes "
                "the code that it holds. Give the weights as .safetensors, or as a folder."
            )
        if not path.is_file():
            raise UserError(f"model.source.path={self.path} does not exist.")
        if self.repo is None:
            raise UserError(
                f"model.source.path={self.path} is a single file, so its configurations and "
                "tokenizers must come from the hub: set model.source.repo to the repository of "
                "the same architecture."
            )
        return path

    def _incomplete(self, missing: Sequence[str], where: str = "") -> UserError:
        return UserError(
            f"{where or f'model.source.path={self.path}'} does not hold a whole diffusers "
            f"pipeline: {', '.join(missing)} missing. Only safetensors of model.source.variant="
            f"{self.variant or 'null'} are read ('model.fp16.safetensors' is fp16, "
            "'model.safetensors' is null), not "
            f"{', '.join(PICKLES)}, which could execute code. {self.note}".strip()
        )

    def _snapshot(self, without: Collection[str]) -> Path:
        """The repository's folder in the hub's cache; all but the weights for a checkpoint."""
        try:
            index = try_to_load_from_cache(self.repo or "", INDEX, revision=self.revision)
        except HFValidationError as error:
            raise UserError(
                f"model.source.repo: {error} A local folder or file is model.source.path."
            ) from error
        if isinstance(index, str):
            folder = Path(index).parent
            missing = self.missing_parts(folder, without)
            if not missing:
                return folder
            log.warning("the cached %s is incomplete: %s missing", self.repo, ", ".join(missing))
        reason = why_nothing_comes(self.gated)
        if reason is not None:
            raise UserError(self._explain(reason, without))
        return self._download(without)

    def _download(self, without: Collection[str]) -> Path:
        if self.path is None:
            log.info("downloading %s, about %.1f GB", self.repo, self.size_gb)
        repo, (wanted, unwanted) = str(self.repo), self._patterns(without)
        try:
            folder = snapshot_download(
                repo, revision=self.revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
        except (OSError, RuntimeError, TRANSPORT_ERROR) as error:  # RuntimeError: from hf_xet
            raise UserError(self._explain(why_it_failed(error, self.revision), without)) from error
        missing = self.missing_parts(Path(folder), without)
        if missing:
            again = "run the same command again if the hub stopped answering"
            raise self._incomplete(missing, f"{repo}, as downloaded ({again}),")
        return Path(folder)

    def _patterns(self, without: Collection[str]) -> tuple[list[str], list[str]]:
        """The files to download, and among them those not to: as patterns, of which `*` takes /."""
        wanted = [*CONFIGURATIONS]
        if self.path is None:  # "model.safetensors", "diffusion_pytorch_model.fp16-00001-of-00002"
            suffix = f".{self.variant}" if self.variant else ""
            wanted += [f"*/*model{suffix}{shard}.safetensors" for shard in ("", "-?????-of-?????")]
        return wanted, [f"{part}/*" for part in (*UNUSED, *BESIDE, *without)]

    def _explain(self, reason: str, without: Collection[str]) -> str:
        """The one paragraph: what is missing, why, where from, how large, how, and what works."""
        what, size = "weights", f"{self.size_gb:g} GB"
        if self.path is not None:
            what, size = f"configurations and tokenizers that {self.path} is read with", "a few MB"
        words = ["hf", "download", str(self.repo)]
        words += ["--revision", self.revision] if self.revision else []
        for option, patterns in zip(("include", "exclude"), self._patterns(without), strict=True):
            words += [word for pattern in patterns for word in (f"--{option}", pattern)]
        page = f"{constants.ENDPOINT}/{self.repo}"
        gate = f" First accept the licence at {page} and run 'hf auth login'." if self.gated else ""
        return (
            f"The {what} are not on this machine and {reason}. They come from {page} at revision "
            f"{self.revision or 'main'} (model.source.repo and .revision; about {size}, licence "
            f"{self.licence}).{gate} On a machine with a network they are downloaded by the same "
            f"command, or beforehand by '{shlex.join(words)}'; copy its cache folder "
            f"({constants.HF_HUB_CACHE}), or set model.source.path to a local copy. "
            f"{self.note}{' ' if self.note else ''}model=mini needs no download and runs now."
        )


def pipeline_parts(folder: Path, without: Collection[str] = ()) -> list[str] | None:
    """The parts that a pipeline's own index names and that are used; None without an index."""
    try:
        entries = json.loads((folder / INDEX).read_text()).items()
    except (OSError, ValueError, AttributeError):
        return None
    return [
        name
        for name, entry in entries
        if isinstance(entry, list) and entry[0] is not None and name not in (*UNUSED, *without)
    ]


def why_nothing_comes(gated: bool) -> str | None:
    """Why the hub need not be asked for a file; None if it is there.

    Answers within seconds: the hub's own client would retry for minutes.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so nothing was downloaded"
    if gated and get_token() is None:
        return "no hub token is set on this machine"
    try:
        httpx.head(constants.ENDPOINT, timeout=REACHABILITY_TIMEOUT)
    except httpx.HTTPError:
        return f"{constants.ENDPOINT} cannot be reached from here"
    return None


def why_it_failed(error: Exception, revision: str | None) -> str:
    """Why a download failed, in the words of the hub's client unless they would be too many."""
    if isinstance(error, GatedRepoError):
        return "the hub refused the token: its account has not been granted access yet"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    return f"the download failed ({' '.join(str(error).split())})"


def _digest(file: Path) -> str:
    """SHA-256 of a file with weights, as `Located.file_digests` says."""
    if file.is_symlink():
        # One step only: a blob may itself be a link, into a store with names of another hash.
        blob = file.readlink()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            return blob.name
    return file_digest(file)
