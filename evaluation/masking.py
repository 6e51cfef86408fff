"""Masks over explicit regions, for images that leave the user's disk: W&B, figures, reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evaluation.detection import EXPLICIT_LABELS, Box, check_labels, detect
from evaluation.pixels import Pixels, require_uint8

COLOUR = 128  # grey level of a mask
MARGIN = 0.1  # of a box's width and height, added on each side
ROUNDING = 2  # pixels by which NudeNet's whole-numbered boxes can be short


class Masker:
    """Covers what the detector finds of `labels` on an image.

    It counts every detection that NudeNet reports, from a score of 0.25, not only those above the
    0.5 of the metric: better a mask too many. What the detector misses stays visible.
    """

    def __init__(self, labels: Sequence[str] = EXPLICIT_LABELS) -> None:
        check_labels(labels, "labels")
        self._labels = frozenset(labels)

    def __call__(self, image: Pixels) -> Pixels:
        """A masked copy of an image, uint8 (H, W, 3) RGB, best at the size it was made in."""
        return mask_boxes(image, [x.box for x in detect(image) if x.label in self._labels])


def mask_boxes(image: Pixels, boxes: Sequence[Box]) -> Pixels:
    """A copy of `image`, uint8 (H, W, 3), its `boxes` covered in plain grey, which hides all.

    Each box is enlarged by MARGIN and ROUNDING and cut at the image's edge. Raises TypeError for
    another array.
    """
    require_uint8(image[None])
    masked = image.copy()
    for left, top, width, height in boxes:
        dx = math.ceil(MARGIN * width) + ROUNDING
        dy = math.ceil(MARGIN * height) + ROUNDING
        rows = slice(max(0, top - dy), top + height + dy)
        columns = slice(max(0, left - dx), left + width + dx)
        masked[rows, columns] = COLOUR
    return masked
