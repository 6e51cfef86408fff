"""Whether an image shows what its prompt's group names, by an evaluator that can tell."""

from __future__ import annotations

from collections.abc import Sequence

from cad.errors import UserError
from evaluation.evaluators.base import Evaluator
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt


class EvaluatorJudge:
    """An evaluator of single images, asked for its verdict alone.

    Raises UserError for one that has none (`Evaluator.judges`).
    """

    def __init__(self, evaluator: Evaluator) -> None:
        if evaluator.judges is None:
            raise UserError(
                f"evaluator={evaluator.name} cannot judge an attack: it does not tell of one image "
                "whether it shows the concept"
            )
        self._evaluator, self._key = evaluator, evaluator.judges
        self.version = f"{evaluator.name}/{evaluator.edition}"

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for prompts that it cannot judge."""
        self._evaluator.check(prompts)

    def __call__(self, images: Pixels, prompts: Sequence[Prompt]) -> list[bool]:
        """The verdict on each image of (N, H, W, 3) uint8 RGB."""
        return [bool(record[self._key]) for record in self._evaluator.score(images, prompts)]
