"""Accuracy: the share of images that a classifier calls by the name of their group.

Of objects: a folder (`small_resnet`), or torchvision's ResNet-50 with IMAGENET1K_V2, its own
transforms, as the paper's Table 1 has it. Of styles: CLIP, zero-shot (Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", 2021, Sec. 3.1.4).
"""

from __future__ import annotations

import textwrap
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet50_Weights, resnet50

from cad.concepts import with_article
from cad.errors import UserError
from cad.identity import immaterial
from cad.models.base import resolve_device
from evaluation.evaluators.base import (
    Download,
    Evaluator,
    Instrument,
    Record,
    to_channels_first,
)
from evaluation.evaluators.clip_score import ClipFolder
from evaluation.evaluators.small_resnet import ClassifierFolder
from evaluation.pixels import Pixels, require_uint8
from evaluation.prompts import OBJECT_TEMPLATE, STYLE_TEMPLATE, Prompt, in_order

RESNET_WEIGHTS = ResNet50_Weights.IMAGENET1K_V2
RESNET_FILE = Download(
    what="torchvision's ResNet-50 IMAGENET1K_V2",
    metric="accuracy",
    url=RESNET_WEIGHTS.url,
    digest=Path(RESNET_WEIGHTS.url).stem.split("-")[-1],  # how torchvision names its files
    size_mb=98,
)
NO_STYLE = "no_style"


class Classifier(Instrument):
    """Names images."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The names, in the order of the probabilities' columns."""

    @abstractmethod
    def probabilities(self, images: Pixels) -> Tensor:
        """(N, classes) float32 on the CPU, rows summing to 1, of uint8 (N, H, W, 3) RGB images."""


@dataclass(frozen=True)
class Accuracy(Evaluator):
    """Top-1 accuracy in percent, with Wilson's interval.

    An image is correct when the most probable class and the prompt's group are the same name, case
    and underscores aside ("French horn" is french_horn). Records: predicted, probability, correct.
    """

    name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = True
    judges: ClassVar[str | None] = "correct"

    classifier: Classifier

    @cached_property
    def instrument(self) -> str:
        return self.classifier.label

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return tuple(canonical(name) for name in self.classifier.classes)

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.classifier.load()
        unknown = sorted({p.group for p in prompts if canonical(p.group) not in self._classes})
        if unknown:
            known = textwrap.shorten(", ".join(self._classes), 300)
            raise UserError(
                f"evaluator={self.name} cannot judge images of {', '.join(unknown)}: its "
                f"classifier knows {known}"
            )

    def score(
        self, images: Pixels, prompts: Sequence[Prompt], references: Pixels | None = None
    ) -> list[Record]:
        require_uint8(images)
        self.check(prompts)
        probability, best = self.classifier.probabilities(images).max(dim=1)  # (N,), (N,)
        return [
            {
                "predicted": self._classes[i],
                "probability": round(p, 6),
                "correct": self._classes[i] == canonical(prompt.group),
            }
            for prompt, i, p in zip(prompts, best.tolist(), probability.tolist(), strict=True)
        ]


class FolderClassifier(ClassifierFolder, Classifier):
    """The classifier of a folder as `small_resnet.save_classifier` writes it."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.network.classes

    @torch.no_grad()
    def probabilities(self, images: Pixels) -> Tensor:
        logits: Tensor = self.network(self.pixels(images))  # (N, classes)
        return logits.softmax(dim=1).cpu()


@dataclass(frozen=True)
class TorchvisionResNet50(Classifier):
    """ResNet-50 IMAGENET1K_V2 (80.9 % top-1), downloaded once to torch's own cache."""

    libraries = ("torchvision",)
    classes: ClassVar[tuple[str, ...]] = tuple(RESNET_WEIGHTS.meta["categories"])

    device: str = immaterial()

    @property
    def label(self) -> str:
        return f"torchvision-{torchvision.__version__}/{RESNET_FILE.path.stem}"

    @cached_property
    def network(self) -> nn.Module:
        network: nn.Module = resnet50()
        network.load_state_dict(torch.load(RESNET_FILE.fetch(), weights_only=True))
        return network.to(resolve_device(self.device)).eval().requires_grad_(False)

    @torch.no_grad()
    def probabilities(self, images: Pixels) -> Tensor:
        x = to_channels_first(images).to(resolve_device(self.device))
        logits: Tensor = self.network(RESNET_WEIGHTS.transforms()(x))  # (N, 3, 224, 224)
        return logits.softmax(dim=1).cpu()


class StyleAccuracy(Accuracy):
    """Accuracy in percent of a classifier of styles."""

    name: ClassVar[str] = "style_accuracy"
    version: ClassVar[int] = 1  # its own, not Accuracy's


@dataclass(frozen=True)
class ZeroShotStyles(Classifier):
    """The nearest style in the space of a CLIP: a style is the mean of its captions' embeddings.

    `styles` and `subjects` are {name: text}; the captions are "an image of a church in the style of
    pop art" for every pair, and "an image of a church" for no style, which is a class too, so an
    image whose style was erased has somewhere to go.
    """

    clip: ClipFolder
    styles: Mapping[str, str]
    subjects: Mapping[str, str]

    def settings(self) -> dict[str, Any]:
        styles, subjects = in_order(self.styles), in_order(self.subjects)
        return {"clip": self.clip.identity(), "styles": styles, "subjects": subjects}

    @property
    def label(self) -> str:
        return f"{self.clip.label}/{len(self.classes)}-way"

    @property
    def classes(self) -> tuple[str, ...]:
        return (*self.styles, NO_STYLE)

    @cached_property
    def network(self) -> Tensor:
        """The styles' unit vectors, (styles + 1, D)."""
        subjects = [with_article(text) for text in self.subjects.values()]
        captions = [
            [STYLE_TEMPLATE.format(subject=subject, style=style) for subject in subjects]
            for style in self.styles.values()
        ]
        captions.append([OBJECT_TEMPLATE.format(subject=subject) for subject in subjects])
        means = [self.clip.embed_texts(texts).mean(dim=0) for texts in captions]
        return F.normalize(torch.stack(means), dim=1)

    def probabilities(self, images: Pixels) -> Tensor:
        cosines = self.clip.embed_images(images) @ self.network.T  # (N, styles + 1)
        return (self.clip.logit_scale * cosines).softmax(dim=1)


def canonical(name: str) -> str:
    """A name as compared: "French horn" and "french_horn" are the same."""
    return name.strip().lower().replace(" ", "_")
