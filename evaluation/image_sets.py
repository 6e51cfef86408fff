"""An image set: a folder of PNGs with one checked record each.

The folder `<root>/<key>/` holds `set.json` (everything the key is the hash of), `000000.png`,
`000001.png`, ... in the order of the prompts, and `records.jsonl` (index, prompt, seed, the PNG's
SHA-256, and whether all values were finite before they became pixels). A file counts as present
only if a record of the same prompt and seed names its hash. Groups are not part of a set: they are
how a caller sorts its prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.files import write_atomically
from evaluation.prompts import Prompt

RECORDS_FILE = "records.jsonl"
TEMPORARY_FILES = ".*.tmp"  # what `atomic_path` leaves behind in a killed process

logger = logging.getLogger(__name__)


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

    def batches(self, size: int) -> Iterator[tuple[Sequence[Prompt], NDArray[np.uint8]]]:
        """The set in pieces of up to `size`: prompts and their images, uint8 (N, H, W, 3) RGB."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            images = np.stack([self.read(index) for index in range(start, stop)])  # (N, H, W, 3)
            yield self.prompts[start:stop], images


def record_line(index: int, prompt: Prompt, written: Written) -> str:
    """The line of `records.jsonl` for an image."""
    record = {"index": index, "prompt": prompt.text, "seed": prompt.seed, **asdict(written)}
    return json.dumps(record, ensure_ascii=False) + "\n"


def verify(images: ImageSet) -> dict[int, Written]:
    """Read every file of the set; returns, by index, what the records say of those they vouch for.

    Damaged and unrecorded files, left-overs of a killed writer and broken records are deleted,
    and `records.jsonl` is rewritten to what is left; the log says how many of each.
    """
    recorded = _read_records(images)
    present: dict[int, Written] = {}
    lost, damaged, unrecorded = [], [], []
    for index in range(len(images)):
        path = images.path(index)
        if not path.exists():
            lost += [index] if index in recorded else []
        elif index not in recorded:
            unrecorded.append(index)
            path.unlink()
        elif hashlib.sha256(path.read_bytes()).hexdigest() != recorded[index].sha256:
            damaged.append(index)
            path.unlink()
        else:
            present[index] = recorded[index]
    for partial in images.folder.glob(TEMPORARY_FILES):
        partial.unlink()
    write_records(images, present)
    for indices, reason in (
        (lost, "is recorded but gone"),
        (damaged, "differs from its recorded SHA-256"),
        (unrecorded, "was written but not recorded"),
    ):
        if indices:
            names = ", ".join(images.path(index).name for index in indices[:5])
            more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
            logger.warning("%s: %s%s %s; to be made again", images.folder, names, more, reason)
    return present


def write_records(images: ImageSet, written: Mapping[int, Written]) -> None:
    """Make `records.jsonl` the records of `written` in order of index, unless it already is."""
    path = images.folder / RECORDS_FILE
    text = "".join(
        record_line(index, images.prompts[index], written[index]) for index in sorted(written)
    )
    data = text.encode("utf-8")
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def _read_records(images: ImageSet) -> dict[int, Written]:
    """The records that fit the set, by index; a torn last line does not."""
    path = images.folder / RECORDS_FILE
    if not path.exists():
        return {}
    recorded: dict[int, Written] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            index = int(record["index"])
            written = Written(str(record["sha256"]), bool(record["finite"]))
            fits = line + "\n" == record_line(index, images.prompts[index], written)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, IndexError):
            fits = False
        if fits:
            recorded[index] = written
    return recorded
