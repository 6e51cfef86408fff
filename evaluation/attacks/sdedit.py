"""SDEdit (Meng et al. 2022, arXiv 2108.01073) as a probe: a noised picture is completed.

x_0, the unedited model's picture, is noised up to the timestep s at which the last `strength` of
the trajectory begins, and the edited model denoises x_s under the prompt. Lu et al. take the x_s
that the unedited model passed instead, after 6 and 11 of 50 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cad.checks import check, ratio
from cad.selection import floor_share
from evaluation.attacks.completion import Completion


@dataclass(frozen=True, kw_only=True)
class SDEdit(Completion):
    """UserError for a strength outside (0, 1]."""

    name: ClassVar[str] = "sdedit"

    strength: float  # share of the steps that are made; the smaller, the more of the picture stays

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, f"attacks.{self.name}", strength=ratio)

    def skipped(self, steps: int) -> int:
        return steps - max(1, floor_share(self.strength, steps))
