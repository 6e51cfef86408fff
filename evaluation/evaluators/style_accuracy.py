"""Style accuracy: the share of images whose style CLIP recognises among several, zero-shot.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021),
Sec. 3.1.4: a style's embedding is the mean of its captions' over all subjects. "No style" is a
class too, so an image whose style was erased has somewhere to go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from cad.concepts import with_article
from cad.errors import UserError
from evaluation.evaluators.base import Evaluator, Metric, Record, require_uint8
from evaluation.evaluators.clip_folder import ClipFolder
from evaluation.prompts import OBJECT_TEMPLATE, STYLE_TEMPLATE, Prompt

NO_STYLE = "no_style"


class StyleAccuracy(Evaluator):
    """Zero-shot style accuracy in percent, with Wilson's interval.

    `styles` and `subjects` are {name: text}; the captions are "an image of a church in the style of
    pop art" for every pair, and "an image of a church" for no style. An image is correct when the
    nearest style's name is its prompt's group. Records: predicted, probability, correct.
    """

    name: ClassVar[str] = "style_accuracy"
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = True
    judges: ClassVar[str | None] = "correct"

    def __init__(
        self,
        folder: str | Path,
        styles: Mapping[str, str],
        subjects: Mapping[str, str],
        device: str,
    ) -> None:
        if not styles or not subjects:
            raise UserError("evaluator.styles and evaluator.subjects must not be empty")
        self._clip = ClipFolder(folder, device)
        captions = style_captions(styles, subjects)
        self._names = tuple(captions)
        means = [self._clip.embed_texts(texts).mean(dim=0) for texts in captions.values()]
        self._styles = F.normalize(torch.stack(means), dim=1)  # (styles + 1, D)
        self.version = f"{self._clip.version}/{len(captions)}-way"

    def check(self, prompts: Sequence[Prompt]) -> None:
        unknown = sorted({prompt.group for prompt in prompts} - set(self._names))
        if unknown:
            raise UserError(
                f"evaluator=style_accuracy cannot judge images of {', '.join(unknown)}: it knows "
                f"the styles {', '.join(self._names)}"
            )

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        references: NDArray[np.uint8] | None = None,
    ) -> list[Record]:
        require_uint8(images)
        self.check(prompts)
        cosines = self._clip.embed_images(images) @ self._styles.T  # (N, styles + 1)
        probability, best = (self._clip.logit_scale * cosines).softmax(dim=1).max(dim=1)
        return [
            {
                "predicted": self._names[i],
                "probability": round(p, 6),
                "correct": self._names[i] == prompt.group,
            }
            for prompt, i, p in zip(prompts, best.tolist(), probability.tolist(), strict=True)
        ]

    def aggregate(self, records: Sequence[Record]) -> Metric:
        return self.percent(records, "correct")


def style_captions(styles: Mapping[str, str], subjects: Mapping[str, str]) -> dict[str, list[str]]:
    """{style: its captions over all subjects}, and NO_STYLE last."""
    with_articles = [with_article(text) for text in subjects.values()]
    captions = {
        name: [STYLE_TEMPLATE.format(subject=subject, style=text) for subject in with_articles]
        for name, text in styles.items()
    }
    captions[NO_STYLE] = [OBJECT_TEMPLATE.format(subject=subject) for subject in with_articles]
    return captions
