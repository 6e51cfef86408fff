"""Images as networks take them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_channels_first(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, 3) to uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
