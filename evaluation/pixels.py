"""The one form of images that everything here is measured on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""Images, (N, H, W, 3) RGB, or one, (H, W, 3)."""


def require_uint8(images: Pixels) -> None:
    """Raise TypeError for anything but uint8 (N, H, W, 3): a float image scores silently wrong."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise TypeError(
            f"images must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}"
        )
