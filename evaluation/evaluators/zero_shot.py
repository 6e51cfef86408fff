"""CLIP as a classifier of whatever has a name: the nearest class in the space of its embeddings.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), Sec.
3.1.4: a class is the mean of its captions' embeddings.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cad.concepts import with_article
from cad.errors import UserError
from evaluation.evaluators.accuracy import Accuracy, Classifier
from evaluation.evaluators.clip_score import Embedder
from evaluation.pixels import Pixels
from evaluation.prompts import OBJECT_TEMPLATE, STYLE_TEMPLATE, in_order

NO_STYLE = "no_style"


class ZeroShot(Classifier):
    """Classes made of captions. `clip` embeds these and the images."""

    clip: Embedder

    @abstractmethod
    def captions(self) -> dict[str, list[str]]:
        """The captions of each class, in the classes' order."""

    @property
    def label(self) -> str:
        return f"{self.clip.label}/{len(self.classes)}-way"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.captions())

    @cached_property
    def network(self) -> Tensor:
        """The classes' unit vectors, (classes, D)."""
        texts = self.captions().values()
        means = [self.clip.embed_texts(each).mean(dim=0) for each in texts]
        return F.normalize(torch.stack(means), dim=1)

    def probabilities(self, images: Pixels) -> Tensor:
        cosines = self.clip.embed_images(images) @ self.network.T  # (N, classes)
        return (self.clip.logit_scale * cosines).softmax(dim=1)


@dataclass(frozen=True)
class ZeroShotStyles(ZeroShot):
    """The styles of images; no style is a class too, so an erased one has somewhere to go.

    `styles` and `subjects` are {name: text}; the captions are "an image of a church in the style of
    pop art" for every pair, and "an image of a church" for no style.
    """

    clip: Embedder
    styles: Mapping[str, str]
    subjects: Mapping[str, str]

    def settings(self) -> dict[str, Any]:
        styles, subjects = in_order(self.styles), in_order(self.subjects)
        return {"clip": self.clip.identity(), "styles": styles, "subjects": subjects}

    def captions(self) -> dict[str, list[str]]:
        subjects = [with_article(text) for text in self.subjects.values()]
        found = {
            name: [STYLE_TEMPLATE.format(subject=subject, style=style) for subject in subjects]
            for name, style in self.styles.items()
        }
        return found | {NO_STYLE: [OBJECT_TEMPLATE.format(subject=each) for each in subjects]}


@dataclass(frozen=True)
class ZeroShotObjects(ZeroShot):
    """Any objects by their names: `subjects` are {name: text}, the classes. UserError for none."""

    clip: Embedder
    subjects: Mapping[str, str] | None

    def __post_init__(self) -> None:
        if not self.subjects:
            raise UserError(
                "evaluator=open_accuracy has no classes: the chosen prompts name no subjects. Use "
                "prompts=objects, or set evaluator.open_accuracy.classifier.subjects={name: text}"
            )

    def settings(self) -> dict[str, Any]:
        return {"clip": self.clip.identity(), "subjects": in_order(self.subjects or {})}

    def captions(self) -> dict[str, list[str]]:
        texts = {name: with_article(text) for name, text in (self.subjects or {}).items()}
        return {name: [OBJECT_TEMPLATE.format(subject=text)] for name, text in texts.items()}


class StyleAccuracy(Accuracy):
    """Accuracy in percent of a classifier of styles."""

    name: ClassVar[str] = "style_accuracy"
    version: ClassVar[int] = 1  # its own, not Accuracy's


class OpenAccuracy(Accuracy):
    """Accuracy in percent of a classifier of open vocabulary, among the prompts' own subjects."""

    name: ClassVar[str] = "open_accuracy"
    version: ClassVar[int] = 1  # its own, not Accuracy's
