"""Accuracy: the share of images that a classifier calls by the name of their group.

The classifier is a folder's (`small_resnet`), or torchvision's ResNet-50 with IMAGENET1K_V2, its
own transforms, as the paper's Table 1 has it; `zero_shot` has those for styles and for any names.
"""

from __future__ import annotations

import textwrap
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50

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
from evaluation.evaluators.small_resnet import ClassifierFolder
from evaluation.pixels import Pixels, require_uint8
from evaluation.prompts import Prompt

RESNET_WEIGHTS = ResNet50_Weights.IMAGENET1K_V2
RESNET_FILE = Download(
    what="torchvision's ResNet-50 IMAGENET1K_V2",
    metric="accuracy",
    url=RESNET_WEIGHTS.url,
    digest=Path(RESNET_WEIGHTS.url).stem.split("-")[-1],  # how torchvision names its files
    size_mb=98,
)


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


def canonical(name: str) -> str:
    """A name as compared: "French horn" and "french_horn" are the same."""
    return name.strip().lower().replace(" ", "_")
