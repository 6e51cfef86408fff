"""Where published weights are, and what to tell a user who does not have them.

Looks into a local folder, a local checkpoint or the hub's cache, and downloads only what is
needed. Whether the hub can be reached is asked once and quickly: its own client would retry for
minutes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import (
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import enable_progress_bars
from tqdm import tqdm

from cad.errors import UserError
from cad.models.base import Origin

log = logging.getLogger(__name__)

INDEX = "model_index.json"
CONFIGURATIONS = ("*.json", "*.txt", "*.model")  # settings, vocabularies, merges
CHECKPOINT = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
VARIANTS = (None, "fp16", "bf16")  # as they are called on the hub
WEIGHTED = ("unet", "vae", "text_encoder", "transformer")  # how parts with weights begin
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
BESIDE = ("vae_1_0",)  # SD-XL's older autoencoder: a folder that its index does not name
REACHABILITY_TIMEOUT = 5.0  # seconds
# huggingface_hub 1 speaks httpx, 2 httpx2: what its errors derive from is the one in use.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
BAR_FROM = 2**30  # bytes of a file whose hashing shows a progress bar
PIECE = 2**22  # bytes read at once
_SHARD = re.compile(r"-\d+-of-(\d+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Located:
    """A pipeline's files on this machine."""

    path: Path  # folder in diffusers' layout, or one .safetensors checkpoint
    config: Path | None  # of a checkpoint: folder with its configurations and tokenizers
    origin: Origin | None  # None for a local path, which does not say where it came from
    weights: tuple[Path, ...] = ()  # the files with the weights that are used

    def file_digests(self) -> dict[str, str]:
        """SHA-256 of every file with weights: {"unet/diffusion_pytorch_model.safetensors": "..."}.

        In the hub's cache a file is a link to a blob that is named by the SHA-256 under which the
        hub lists and serves it. That name is taken without reading: the hub's client compares the
        size of what it downloaded, not always the hash. Any other file is read, once a process
        for as long as its size and time of change stay the same.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        return {file.relative_to(folder).as_posix(): file_digest(file) for file in self.weights}


@dataclass(frozen=True)
class Source:
    """A pipeline: a hub repository (`repo`), or a local copy of one (`path`), which wins.

    The other fields are what a user must know to get it. Raises UserError if neither is given.
    """

    repo: str | None  # hub id: "CompVis/stable-diffusion-v1-4"
    revision: str | None  # commit, branch or tag of the repository; None is its main branch
    path: str | None  # folder with model_index.json, or a checkpoint in one .safetensors file
    size_gb: float  # of the files to download
    licence: str
    gated: bool  # the licence must be accepted on the hub, and a token be set
    note: str  # anything else a user should know where the weights are missing; may be empty
    variant: str | None  # of the weight files: "fp16", or None for the plain ones

    def __post_init__(self) -> None:
        if self.repo is None and self.path is None:
            raise UserError(
                "model.source.repo and model.source.path are both null: give one, a repository of "
                "the hub, or a local folder or .safetensors checkpoint."
            )

    def locate(self, without: Collection[str] = ()) -> Located:
        """The files of the weights; downloads them if they are not on this machine.

        `without` names parts that are left out and need not be there: "text_encoder_3". Of a
        checkpoint in one file (the layout of the models' authors) the configurations and
        tokenizers are those of `repo` at `revision`. A download that was cut off goes on with the
        files that are not there yet. Raises UserError, within seconds, with what is missing, where
        it comes from, how large it is and how to get it; and for a file that is no safetensors.
        """
        if self.path is not None:
            return self._local(Path(self.path).expanduser(), without)
        folder = self._snapshot(without)
        weights = weight_files(folder, self.variant, without)
        return Located(folder, None, Origin(self.repo or "", folder.name), weights)

    def _local(self, path: Path, without: Collection[str]) -> Located:
        if not path.is_dir() and path.suffix in (CHECKPOINT, *PICKLES):
            return self._checkpoint(path, without)
        missing = missing_parts(path, self.variant, without)
        if missing:
            raise UserError(
                f"model.source.path={self.path} does not hold a whole diffusers pipeline: "
                f"{', '.join(missing)} missing. {self._hint(path, without)}{self.note}".strip()
            )
        return Located(path, None, None, weight_files(path, self.variant, without))

    def _checkpoint(self, path: Path, without: Collection[str]) -> Located:
        if path.suffix in PICKLES:
            raise UserError(
                f"model.source.path={self.path} is refused: loading a {path.suffix} file executes "
                "whatever code it holds. Give the same weights as .safetensors, or as a folder in "
                "diffusers' layout."
            )
        if not path.is_file():
            raise UserError(f"model.source.path={self.path} does not exist.")
        if self.repo is None:
            raise UserError(
                f"model.source.path={self.path} is a single file, so its configurations and "
                "tokenizers must come from the hub: set model.source.repo to the repository of "
                "the same architecture."
            )
        return Located(path, self._snapshot(without, weights=False), None, (path,))

    def _hint(self, folder: Path, without: Collection[str]) -> str:
        """What would make sense of an incomplete folder, if it holds other weights."""
        for variant in VARIANTS:
            if not missing_parts(folder, variant, without):
                return (
                    f"The weights that it holds are taken with "
                    f"model.source.variant={variant or 'null'}. "
                )
        if any(file for ending in PICKLES for file in folder.glob(f"*/*{ending}")):
            return f"Only safetensors are read: {', '.join(PICKLES)} files could execute code. "
        return ""

    def _snapshot(self, without: Collection[str], *, weights: bool = True) -> Path:
        """The repository's folder in the hub's cache: whole, or all of it but the weights."""
        cached = self._cached_snapshot(without, weights)
        if cached is not None:
            return cached
        reason = None
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, so nothing was downloaded"
        elif self.gated and get_token() is None:
            reason = "no hub token is set on this machine"
        elif not _hub_is_reachable():
            reason = f"{constants.ENDPOINT} cannot be reached from here"
        if reason is not None:
            raise UserError(self._missing(reason, without, weights))
        return self._download(without, weights)

    def _cached_snapshot(self, without: Collection[str], weights: bool) -> Path | None:
        try:
            index = try_to_load_from_cache(self.repo or "", INDEX, revision=self.revision)
        except HFValidationError as error:
            raise UserError(
                f"model.source.repo={self.repo!r} is no repository of the hub: those are written "
                "ORG/NAME. A local folder or file goes into model.source.path."
            ) from error
        if not isinstance(index, str):
            return None
        folder = Path(index).parent
        missing = missing_parts(folder, self.variant, without, weights=weights)
        if missing:
            log.warning("the cached %s is incomplete: %s missing", self.repo, ", ".join(missing))
            return None
        return folder

    def _download(self, without: Collection[str], weights: bool) -> Path:
        """Fetches the index, then of the parts that it names what is needed, and nothing else."""
        repo = self.repo or ""
        if weights:
            log.info("downloading %s, about %.1f GB", repo, self.size_gb)
        if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
            enable_progress_bars()  # silencing transformers switches these off too
        try:
            folder = Path(hf_hub_download(repo, INDEX, revision=self.revision)).parent
            files = self._files(pipeline_parts(folder, without) or (), weights)
            # By its commit, so that both steps see one state of the repository.
            snapshot_download(repo, revision=folder.name, allow_patterns=files)
        except (OSError, RuntimeError, TRANSPORT_ERROR) as error:  # RuntimeError: from hf_xet
            raise UserError(self._missing(self._reason(error), without, weights)) from error
        missing = missing_parts(folder, self.variant, without, weights=weights)
        if missing:
            names = ", ".join(Path(part).name for part in missing)
            raise UserError(
                f"{repo} was downloaded, but without {names}: the hub stopped "
                "answering (run the same command again), or the repository has no such weights as "
                f"safetensors of model.source.variant={self.variant or 'null'}. The names of its "
                "files tell: 'model.fp16.safetensors' is fp16, 'model.safetensors' is null."
            )
        return folder

    def _files(self, parts: Iterable[str], weights: bool) -> list[str]:
        """Patterns of the needed files: configurations, tokenizers, safetensors of the variant."""
        suffix = f".{self.variant}" if self.variant else ""
        kinds = [*CONFIGURATIONS]
        if weights:  # "model.safetensors", "diffusion_pytorch_model.fp16-00001-of-00002..."
            kinds += [f"*model{suffix}.safetensors", f"*model{suffix}-?????-of-?????.safetensors"]
        return [INDEX, *(f"{part}/{kind}" for part in parts for kind in kinds)]

    def _reason(self, error: Exception) -> str:
        """Why a download failed, and which setting helps."""
        if isinstance(error, GatedRepoError):
            return "the hub refused the token: its account has not been granted access yet"
        if isinstance(error, RevisionNotFoundError):
            return (
                f"the repository has no revision {self.revision!r} (model.source.revision names "
                "it; null is the main branch)"
            )
        if isinstance(error, RepositoryNotFoundError):
            return (
                "the hub knows no such repository, or not for you: it was withdrawn, renamed or "
                "is private (model.source.repo names it)"
            )
        if isinstance(error, DisabledRepoError):
            return "the hub has disabled the repository (model.source.repo names it)"
        if isinstance(error, RemoteEntryNotFoundError):
            return f"the repository is not in diffusers' layout: it has no {INDEX}"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            return f"the hub refused the token (status {error.response.status_code})"
        return f"the download failed ({' '.join(str(error).split())})"

    def _missing(self, reason: str, without: Collection[str], weights: bool) -> str:
        """The one paragraph: what is missing, why, where from, how large, how, and what works."""
        revision = f" at revision {self.revision}" if self.revision else ""
        page = f"{constants.ENDPOINT}/{self.repo}"
        what, size, instead = f"The weights {self.repo}{revision}", f"{self.size_gb:g} GB", ""
        if weights:
            instead = ", or set model.source.path to a local copy"
        else:
            what = (
                f"The configurations and tokenizers that {self.path} is read with, those of "
                f"{self.repo}{revision} (model.source.repo),"
            )
            size = "a few MB"
        gate = f" First accept the licence at {page} and run 'hf auth login'." if self.gated else ""
        return (
            f"{what} are not on this machine and {reason}. They come "
            f"from {page} (about {size}, licence "
            f"{self.licence}).{gate} On a machine with a network they are downloaded by the same "
            f"command, or beforehand by '{self._command(without, weights)}'; copy its cache folder "
            f"({constants.HF_HUB_CACHE}){instead}. {self.note}{' ' if self.note else ''}"
            "model=mini needs no download and runs now."
        )

    def _command(self, without: Collection[str], weights: bool) -> str:
        """What fetches the needed files by hand, not knowing yet which parts there are."""
        words = ["hf", "download", self.repo or ""]
        words += ["--revision", self.revision] if self.revision else []
        folders = [f"{part}/*" for part in (*UNUSED, *BESIDE, *without)]
        for option, patterns in (
            ("--include", self._files(["*"], weights)),
            ("--exclude", folders),
        ):
            words += [word for pattern in patterns for word in (option, pattern)]
        return shlex.join(words)


def pipeline_parts(folder: Path, without: Collection[str] = ()) -> list[str] | None:
    """The parts that a pipeline's own index names and that are used; None without an index."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return None
    return [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] is not None and name not in (*UNUSED, *without)
    ]


def missing_parts(
    folder: Path,
    variant: str | None = None,
    without: Collection[str] = (),
    *,
    weights: bool = True,
) -> list[str]:
    """What a pipeline's folder lacks of the parts that its own index names; [] if it is whole.

    A part that bears weights is there with its configuration and its safetensors, of the variant
    if one is given; without `weights`, its configuration is enough.
    """
    parts = pipeline_parts(folder, without)
    if parts is None:
        return [str(folder / INDEX)]
    return [str(folder / part) for part in parts if not _is_whole(folder / part, variant, weights)]


def weight_files(
    folder: Path, variant: str | None = None, without: Collection[str] = ()
) -> tuple[Path, ...]:
    """The files with weights, of the variant if one is given, that a pipeline's folder holds."""
    parts = pipeline_parts(folder, without) or ()
    return tuple(
        file
        for part in parts
        if part.startswith(WEIGHTED)
        for file in sorted(_fitting(folder / part, variant))
    )


def file_digest(file: Path) -> str:
    """SHA-256 of a file with weights, as `Located.file_digests` says."""
    if file.is_symlink():
        # One step only: a blob may itself be a link, into a store with names of another hash.
        blob = file.readlink()
        if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
            return blob.name
    status = file.stat()
    return _read_digest(file.resolve(), status.st_size, status.st_mtime_ns)


@functools.cache
def _read_digest(file: Path, size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    hide = None if size >= BAR_FROM else True  # None: hidden where there is no terminal
    bar = tqdm(desc=f"SHA-256 {file.name}", total=size, unit="B", unit_scale=True, disable=hide)
    with bar, file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _is_whole(part: Path, variant: str | None, weights: bool) -> bool:
    if not part.name.startswith(WEIGHTED):
        return any(part.glob("*"))
    if not weights:
        return (part / "config.json").is_file()
    names = [file.name for file in _fitting(part, variant)]
    shards = [int(shard[1]) for name in names if (shard := _SHARD.search(name))]
    return len(names) > len(shards) or (bool(shards) and len(shards) == shards[0])


def _fitting(part: Path, variant: str | None) -> list[Path]:
    suffix = f".{variant}" if variant else ""
    # "model.fp16.safetensors", or "model.fp16-00001-of-00002.safetensors" and its like
    fitting = re.compile(rf"[^.]+{re.escape(suffix)}({_SHARD.pattern})?(\.safetensors)")
    files = part.glob("*.safetensors")
    return [file for file in files if fitting.fullmatch(file.name) and file.is_file()]


def _hub_is_reachable() -> bool:
    try:
        httpx.head(constants.ENDPOINT, timeout=REACHABILITY_TIMEOUT)
    except httpx.HTTPError:
        return False
    return True
