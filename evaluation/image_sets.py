"""An image set: a folder of PNGs with one checked record each.

The folder `<root>/<key>/` holds `set.json` (everything the key is the hash of), `000000.png`,
`000001.png`, ... in the order of the prompts, and `records.jsonl` (index, prompt, seed, guidance
and size where the prompt has its own, the PNG's SHA-256, and whether all values were finite before
they became pixels). A file counts as present only if a record of the same prompt and seed names its
hash. Groups are not part of a set: they are how a caller sorts its prompts.

Shards of a set work side by side, on one machine or on several that share the folder or have their
folders copied together: each has its own records (`records-0-of-4.jsonl`), which become part of
`records.jsonl` once all images are there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cad import locks
from cad.errors import UserError
from evaluation.files import write_atomically
from evaluation.prompts import Prompt

RECORDS_FILE = "records.jsonl"
SHARD_RECORDS = "records-*.jsonl"
LOCK_FILE = ".lock"
SHARD_LOCKS = ".lock-*"
TEMPORARY_FILES = ".*.tmp"  # what `atomic_path` leaves behind in a killed process

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Part `index`, counted from 0, of `count` parts of a set's batches; by default all of it."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(
                f"shard {self.index} of {self.count} does not exist: shards are counted from 0, so "
                f"allowed are 0 to {self.count - 1} of {self.count}"
            )

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    @property
    def records_file(self) -> str:
        return RECORDS_FILE if self.is_whole else f"records-{self.index}-of-{self.count}.jsonl"

    def take(self, batches: Sequence[T]) -> list[T]:
        """Every `count`th batch, so that shards are of one size whatever the order of the set."""
        return list(batches[self.index :: self.count])


WHOLE = Shard()


@dataclass(frozen=True)
class Written:
    """What is recorded of an image on disk."""

    sha256: str  # of the PNG
    finite: bool  # whether all values were, before they became pixels


@dataclass(frozen=True)
class ImageSet:
    """The images of `prompts`, in their order, under `folder`. Made by `generation.generate`."""

    folder: Path
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[tuple[Prompt, NDArray[np.uint8]]]:
        """Each prompt with its image, uint8 (H, W, 3) RGB, read when asked for."""
        for index, prompt in enumerate(self.prompts):
            yield prompt, self.read(index)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def read(self, index: int) -> NDArray[np.uint8]:
        """Image `index`, uint8 (H, W, 3) RGB. Raises OSError for a missing or damaged file."""
        with Image.open(self.path(index)) as image:
            return np.asarray(image.convert("RGB"))

    def broken(self) -> int:
        """How many images had values that were not finite, by their records."""
        return sum(not written.finite for written in _read_records(self).values())

    def absent(self) -> set[int]:
        """The images that have no file: those of shards that were not run yet."""
        there = {path.name for path in self.folder.glob("*.png")}  # one request to a file server
        return {index for index in range(len(self)) if self.path(index).name not in there}

    def missing(self) -> int:
        """How many images have no file."""
        return len(self.absent())

    def batches(self, size: int) -> Iterator[tuple[Sequence[Prompt], NDArray[np.uint8]]]:
        """The set in order, in pieces: prompts and their images, uint8 (N, H, W, 3) RGB.

        A piece has up to `size` images, all of one height and width.
        """
        start, images = 0, list[NDArray[np.uint8]]()
        for index in range(len(self)):
            image = self.read(index)
            if images and (len(images) == size or image.shape != images[0].shape):
                yield self.prompts[start:index], np.stack(images)  # (N, H, W, 3)
                start, images = index, []
            images.append(image)
        if images:
            yield self.prompts[start:], np.stack(images)  # (N, H, W, 3)


@contextmanager
def locked(images: ImageSet, shard: Shard) -> Iterator[None]:
    """Hold a set alone, or a shard of it beside others; waits for whoever holds it.

    The locks go with the process, however that ends (`cad.locks`).
    """
    held = f"another process is making {images.folder}"
    with locks.locked(images.folder / LOCK_FILE, held, shared=not shard.is_whole):
        if shard.is_whole:
            yield
            return
        with locks.locked(images.folder / f".lock-{shard.index}-of-{shard.count}", held):
            yield


def join_shards(images: ImageSet) -> None:
    """Make one set of its shards' work: verify all, one `records.jsonl`, no shard's file left.

    Does nothing while an image is missing or anybody is at work on the set; as every shard calls
    this when it is done, the last one finds neither.
    """
    if images.missing():
        return
    with locks.locked_if_free(images.folder / LOCK_FILE) as alone:
        if alone:
            verify(images)


def record_line(index: int, prompt: Prompt, written: Written) -> str:
    """The line of `records.jsonl` for an image."""
    asked = {"prompt": prompt.text, "seed": prompt.seed, **prompt.own_settings()}
    return json.dumps({"index": index} | asked | asdict(written), ensure_ascii=False) + "\n"


def verify(
    images: ImageSet, indices: Collection[int] | None = None, shard: Shard = WHOLE
) -> dict[int, Written]:
    """Read the files of `indices` (None: all); returns, by index, the records that vouch for them.

    Damaged and unrecorded files and left-overs of a killed writer are deleted, and the shard's
    records are rewritten to what is left; for the whole set, what its shards recorded goes in. The
    log names what was deleted or is gone.
    """
    if indices is None:
        indices = range(len(images))
    recorded = _read_records(images)
    known = {index for index, _ in recorded}
    present: dict[int, Written] = {}
    lost: list[int] = []
    damaged: list[int] = []
    unrecorded: list[int] = []
    for index in indices:
        path = images.path(index)
        if not path.exists():
            lost += [index] if index in known else []
            continue
        written = recorded.get((index, hashlib.sha256(path.read_bytes()).hexdigest()))
        if written is not None:
            present[index] = written
        else:
            (damaged if index in known else unrecorded).append(index)
            path.unlink()
    write_records(images, present, shard)
    _clean(images, indices, shard)
    for found, reason in (
        (lost, "is recorded but gone"),
        (damaged, "differs from its recorded SHA-256"),
        (unrecorded, "was written but not recorded"),
    ):
        if found:
            names = ", ".join(images.path(index).name for index in found[:5])
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            logger.warning("%s: %s%s %s; to be made again", images.folder, names, more, reason)
    return present


def write_records(images: ImageSet, written: Mapping[int, Written], shard: Shard = WHOLE) -> None:
    """Make a shard's records those of `written` in order of index, unless they already are."""
    path = images.folder / shard.records_file
    text = "".join(
        record_line(index, images.prompts[index], written[index]) for index in sorted(written)
    )
    data = text.encode("utf-8")
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def _clean(images: ImageSet, indices: Collection[int], shard: Shard) -> None:
    """Delete half-written files of `indices`; of the whole set also what its shards left."""
    own = {images.path(index).name for index in indices} | {shard.records_file}
    for partial in images.folder.glob(TEMPORARY_FILES):
        if shard.is_whole or partial.name[1:].rsplit(".", 2)[0] in own:
            partial.unlink()
    if shard.is_whole:
        for pattern in (SHARD_RECORDS, SHARD_LOCKS):
            for path in images.folder.glob(pattern):
                path.unlink()


def _read_records(images: ImageSet) -> dict[tuple[int, str], Written]:
    """The records of all shards that fit the set, by index and SHA-256; a torn line does not."""
    recorded: dict[tuple[int, str], Written] = {}
    for path in (images.folder / RECORDS_FILE, *sorted(images.folder.glob(SHARD_RECORDS))):
        for line in _text(path).split("\n"):
            try:
                record = json.loads(line)
                index = int(record["index"])
                written = Written(str(record["sha256"]), bool(record["finite"]))
                fits = line + "\n" == record_line(index, images.prompts[index], written)
            except (json.JSONDecodeError, KeyError, TypeError, ValueError, IndexError):
                fits = False
            if fits:
                recorded[index, written.sha256] = written
    return recorded


def _text(path: Path) -> str:
    """A file's text; "" for none, which a shard's records become when the set is made one."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
