"""Writes an image set's PNGs and records on background threads while the next batch is sampled.

Several threads compress; one writes, in the order given: a PNG is flushed to disk and renamed into
place before its record is appended, so a process killed at any point leaves at most one unrecorded
PNG.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections import deque
from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cad.errors import UserError
from evaluation.files import write_atomically
from evaluation.image_sets import WHOLE, ImageSet, Shard, Written, record_line

ENCODERS = 4  # threads that compress; zlib lets Python's other threads run meanwhile
BATCHES_IN_FLIGHT = 2  # what bounds the memory when the disk is slower than the model


class ImageWriter:
    """Context manager; `put` batches of images, leave the block to wait for the last of them.

    `written` grows by what is recorded of each image, by index, as images are safe. A
    failed write raises UserError from the next `put` or from the end of the block.
    """

    def __init__(self, images: ImageSet, shard: Shard = WHOLE) -> None:
        self.written: dict[int, Written] = {}
        self._images = images
        self._shard = shard
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        # Unbuffered: after a failed write nothing is left that closing the file would write again.
        self._records = (self._images.folder / self._shard.records_file).open("ab", buffering=0)
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="image-encoder")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="image-writer")
        return self

    def put(self, pixels: Mapping[int, NDArray[np.uint8]], broken: Set[int] = frozenset()) -> None:
        """Queue images {index: uint8 (H, W, 3)}; waits while BATCHES_IN_FLIGHT are unwritten.

        `broken` are the indices of those whose values were not all finite.
        """
        while len(self._pending) >= BATCHES_IN_FLIGHT:
            self._pending.popleft().result()
        self._pending.append(self._writer.submit(self._write, pixels, broken))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.shutdown(wait=True)
        self._encoders.shutdown(wait=True)
        self._records.close()
        if kind is None:
            for future in self._pending:
                future.result()

    def _write(self, pixels: Mapping[int, NDArray[np.uint8]], broken: Set[int]) -> None:
        try:
            encoded = self._encoders.map(encode_png, pixels.values())
            for index, data in zip(pixels, encoded, strict=True):
                write_atomically(self._images.path(index), data)
                written = Written(hashlib.sha256(data).hexdigest(), finite=index not in broken)
                self._record(record_line(index, self._images.prompts[index], written))
                self.written[index] = written
            os.fsync(self._records.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write to {self._images.folder} (paths.results): {error.strerror}. What "
                "was finished is kept; the same command goes on from there"
            ) from error

    def _record(self, line: str) -> None:
        data = line.encode("utf-8")
        if self._records.write(data) < len(
            data
        ):  # a disk takes what fits before it says it is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """`image`, uint8 (H, W, 3) RGB, as PNG bytes; the same for the same pixels and Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
