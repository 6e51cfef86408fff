"""Inpainting as a probe: a part of a picture is given, the edited model draws the rest.

After every step the given part is put in at its noise level, with m = 1 where it is given,

    x_t <- m noised(x_0, t) + (1 - m) x_t,    x_0 itself in the end,

as in RePaint (Lugmayr et al. 2022, arXiv 2201.09865) without its way back, and with one noise for
all steps. Lu et al. hide the centre. The judge sees what was hidden alone, the rest grey: what is
given would often do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cad.checks import check, one_of
from evaluation.attacks.completion import Completion
from evaluation.pixels import Pixels

REGIONS = ("right", "centre")
JUDGED = ("hidden", "whole")
GREY = np.uint8(128)


@dataclass(frozen=True, kw_only=True)
class Inpainting(Completion):
    """UserError for a name that is unknown."""

    name: ClassVar[str] = "inpainting"

    region: str  # what is hidden: "right": a half | "centre": half as high and as wide
    judge_sees: str  # one of JUDGED

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, f"attacks.{self.name}", region=one_of(REGIONS), judge_sees=one_of(JUDGED))

    def skipped(self, steps: int) -> int:
        return 0

    def hidden(self, height: int, width: int) -> Tensor:
        found = torch.zeros(height, width, dtype=torch.bool)
        right = slice(None), slice(width // 2, None)
        centre = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
        found[right if self.region == "right" else centre] = True
        return found

    def judged(self, images: Pixels) -> Pixels:
        if self.judge_sees == "whole":
            return images
        return np.where(self.hidden(*images.shape[1:3]).numpy()[..., None], images, GREY)
