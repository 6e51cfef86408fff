"""A probe: an attack of one try, whose control is given another concept in place of its own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from cad.checks import check, optional, text
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit
from evaluation.attacks.base import Attack, Judge, Outcome, Victims
from evaluation.pixels import Pixels


@dataclass(frozen=True, kw_only=True)
class Probe(Attack):
    """What the edited model draws for each victim, once. UserError for values out of range."""

    other: str | None = None  # a prompt: the control, called NAME_control, pictures of that

    def __post_init__(self) -> None:
        if self.other is not None:
            object.__setattr__(self, "name", f"{self.name}_control")
        super().__post_init__()
        check(self, f"attacks.{self.name}", other=optional(text))

    def outcomes(
        self,
        model: DiffusionModel,
        edit: WeightEdit,
        victims: Victims,
        judge: Judge,
        progress: tqdm[Any],
    ) -> list[Outcome]:
        images = self.drawn(model, edit, victims)
        shown = judge(self.judged(images), victims.prompts)
        progress.update(len(images))
        tried = zip(victims.prompts, shown, images, strict=True)
        return [Outcome(seen, 1, None, [], p.text, None, [], image) for p, seen, image in tried]

    @abstractmethod
    def drawn(self, model: DiffusionModel, edit: WeightEdit, victims: Victims) -> Pixels:
        """The edited model's images, (N, H, W, 3). Leaves the unedited model as found."""

    def judged(self, images: Pixels) -> Pixels:
        """What the judge sees of the images (N, H, W, 3)."""
        return images
