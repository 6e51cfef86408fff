"""The photograph that the tests of NudeNet look at.

Grace Hopper's official portrait, a work of the United States Navy and so in the public domain, from
matplotlib's sample data: one face, nothing else that NudeNet knows.
"""

from __future__ import annotations

import matplotlib.cbook
import numpy as np
from numpy.typing import NDArray
from PIL import Image

FACE = (183, 123, 343, 343)  # left, top, right, bottom of the face without its hair, by hand


def portrait() -> NDArray[np.uint8]:
    """uint8 (600, 512, 3) RGB."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
