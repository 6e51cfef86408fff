"""An image set: a folder of PNGs with one checked record each.

The folder `<root>/<key>/` holds `set.json` (everything the key is the hash of), `000000.png`,
`000001.png`, ... in the order of the prompts, and `records.jsonl` (`ImageSet.record`). A file
counts as present only if a record of the same prompt and seed names its hash.

`ImageWriter` works on background threads while the next batch is sampled: a PNG is flushed to disk
and renamed into place before its record is appended, so a process killed at any point leaves at
most one unrecorded PNG.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from cad.files import write_atomically, writing_results
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt
from evaluation.sampler import Finite

RECORDS_FILE = "records.jsonl"
TEMPORARY_FILES = ".*.tmp"  # what `atomic_path` leaves behind in a killed process
ENCODERS = 4  # threads that compress
BATCHES_IN_FLIGHT = 2  # bounds the memory when the disk is slower than the model

ImageRecord = dict[str, Any]
"""A line of `records.jsonl`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """The images of `prompts`, in their order, under `folder`. Made by `generation.generate`."""

    folder: Path
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[tuple[Prompt, Pixels]]:
        """Each prompt with its image, uint8 (H, W, 3) RGB, read when asked for."""
        for index, prompt in enumerate(self.prompts):
            yield prompt, self.read(index)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def read(self, index: int) -> Pixels:
        """Image `index`, uint8 (H, W, 3) RGB. Raises OSError for a missing or damaged file."""
        with Image.open(self.path(index)) as image:
            return np.asarray(image.convert("RGB"))

    def batches(self, size: int) -> Iterator[tuple[Sequence[Prompt], Pixels]]:
        """The set in pieces of up to `size` prompts and images, (N, H, W, 3), of one H and W."""
        start, images = 0, list[Pixels]()
        for index in range(len(self)):
            image = self.read(index)
            if images and (len(images) == size or image.shape != images[0].shape):
                yield self.prompts[start:index], np.stack(images)  # (N, H, W, 3)
                start, images = index, []
            images.append(image)
        if images:
            yield self.prompts[start:], np.stack(images)  # (N, H, W, 3)

    def broken(self) -> int:
        """How many images had values that were not finite, by their records."""
        return sum(not record["finite"] for record in _read_records(self).values())

    def record(self, index: int, sha256: str, finite: bool) -> ImageRecord:
        """What is kept of an image: prompt, hash of its PNG, and whether its values were finite."""
        return self._asked[index] | {"sha256": sha256, "finite": finite}

    @cached_property
    def _asked(self) -> list[ImageRecord]:
        """How the images' records begin: with all that was asked for."""
        return [
            {"index": index, "prompt": prompt.text, "seed": prompt.seed} | prompt.own_settings()
            for index, prompt in enumerate(self.prompts)
        ]


def verify(images: ImageSet) -> dict[int, ImageRecord]:
    """Read every file; returns, by index, the records that vouch for one.

    Damaged and unrecorded files and the left-overs of a killed writer are deleted, and the records
    are rewritten to what is left.
    """
    recorded = _read_records(images)
    present: dict[int, ImageRecord] = {}
    found = defaultdict[str, list[str]](list)
    for index in range(len(images)):
        path, record = images.path(index), recorded.get(index)
        if not path.exists():
            if record is not None:
                found["is recorded but gone"].append(path.name)
        elif record is None:
            found["was written but not recorded"].append(path.name)
        elif record["sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
            found["differs from its recorded SHA-256"].append(path.name)
        else:
            present[index] = record
    _write_records(images, present)
    leftovers = [images.path(index) for index in range(len(images)) if index not in present]
    for path in (*leftovers, *images.folder.glob(TEMPORARY_FILES)):
        path.unlink(missing_ok=True)
    for reason, names in found.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
        logger.warning("%s: %s %s; to be made again", images.folder, shown, reason)
    return present


def _write_records(images: ImageSet, records: Mapping[int, ImageRecord]) -> None:
    """Make `records.jsonl` these, in order of index, unless it already is."""
    lines = (_line(records[index]) for index in sorted(records))
    replace_if_other(images.folder / RECORDS_FILE, "".join(lines))


def _line(record: ImageRecord) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def replace_if_other(path: Path, text: str) -> None:
    """Make the file hold `text`, atomically, unless it already does. UserError on a full disk."""
    data = text.encode("utf-8")
    if not path.exists() or path.read_bytes() != data:
        with writing_results(path.parent):
            write_atomically(path, data)


def _read_records(images: ImageSet) -> dict[int, ImageRecord]:
    """The records that fit the set, by index; a torn line does not."""
    path = images.folder / RECORDS_FILE
    recorded: dict[int, ImageRecord] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            told = json.loads(line)
            record = images.record(told["index"], told["sha256"], told["finite"])
            if line + "\n" == _line(record):
                recorded[told["index"]] = record
        except (ValueError, TypeError, LookupError):
            continue
    return recorded


class ImageWriter:
    """Context manager; `put` batches of images, leave the block to wait for the last of them.

    `records`, those that `verify` found, grows by each image's as it is safe. A failed write raises
    UserError from the next `put` or at the end of the block.
    """

    def __init__(self, images: ImageSet, records: Mapping[int, ImageRecord]) -> None:
        self.images = images
        self.records = dict(records)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        # Unbuffered: after a failed write nothing is left that closing would write again.
        self._file = (self.images.folder / RECORDS_FILE).open("ab", buffering=0)
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="image-encoder")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="image-writer")
        return self

    def put(self, indices: Sequence[int], pixels: Pixels, finite: Finite) -> None:
        """Queue images, uint8 (N, H, W, 3); waits while BATCHES_IN_FLIGHT are unwritten."""
        while len(self._pending) >= BATCHES_IN_FLIGHT:
            self._pending.popleft().result()
        self._pending.append(self._writer.submit(self._write, indices, pixels, finite))

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._writer.shutdown(wait=True)
        self._encoders.shutdown(wait=True)
        self._file.close()
        if kind is None:
            for future in self._pending:
                future.result()
            _write_records(self.images, self.records)

    def _write(self, indices: Sequence[int], pixels: Pixels, finite: Finite) -> None:
        with writing_results(self.images.folder):
            encoded = self._encoders.map(_png, pixels)
            for index, data, whole in zip(indices, encoded, finite.tolist(), strict=True):
                write_atomically(self.images.path(index), data)
                record = self.images.record(index, hashlib.sha256(data).hexdigest(), whole)
                self._append(_line(record).encode("utf-8"))
                self.records[index] = record
            os.fsync(self._file.fileno())

    def _append(self, line: bytes) -> None:
        if self._file.write(line) < len(line):  # a disk takes what fits before it says it is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _png(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
