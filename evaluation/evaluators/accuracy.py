"""Accuracy: the share of images that a classifier calls by the name of their group.

Two classifiers: a folder (`small_resnet`), and torchvision's ResNet-50 with IMAGENET1K_V2, its own
transforms, as the paper's Table 1 has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import ResNet50_Weights, resnet50

from cad.errors import UserError
from cad.models.base import resolve_device
from evaluation.evaluators.base import Evaluator, Metric, Record, require_uint8
from evaluation.evaluators.pixels import to_channels_first
from evaluation.evaluators.small_resnet import CONFIG_FILE, WEIGHTS_FILE, load_classifier
from evaluation.evaluators.weights import SHORT, Download, folder_digest
from evaluation.prompts import Prompt

RESNET_WEIGHTS = ResNet50_Weights.IMAGENET1K_V2
RESNET_FILE = Download(
    what="torchvision's ResNet-50 IMAGENET1K_V2",
    url=RESNET_WEIGHTS.url,
    digest=Path(RESNET_WEIGHTS.url).stem.split("-")[-1],  # how torchvision names its files
    size_mb=98,
)


class Classifier(ABC):
    """Names images. `classes` are in the order of the probabilities' columns."""

    classes: tuple[str, ...]
    version: str

    @abstractmethod
    def probabilities(self, images: NDArray[np.uint8]) -> Tensor:
        """(N, classes) float32 on the CPU, rows summing to 1, of uint8 (N, H, W, 3) RGB images."""


class Accuracy(Evaluator):
    """Top-1 accuracy in percent, with Wilson's interval.

    An image is correct when the most probable class and the prompt's group are the same name, case
    and underscores aside ("French horn" is french_horn). Records: predicted, probability, correct.
    """

    name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = True
    judges: ClassVar[str | None] = "correct"

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._classes = tuple(canonical(name) for name in classifier.classes)
        self.version = classifier.version

    def check(self, prompts: Sequence[Prompt]) -> None:
        unknown = sorted({p.group for p in prompts if canonical(p.group) not in self._classes})
        if unknown:
            raise UserError(
                f"evaluator=accuracy cannot judge images of {', '.join(unknown)}: its classifier "
                f"knows {_shortened(self._classes)}"
            )

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        references: NDArray[np.uint8] | None = None,
    ) -> list[Record]:
        require_uint8(images)
        self.check(prompts)
        probability, best = self._classifier.probabilities(images).max(dim=1)  # (N,), (N,)
        return [
            {
                "predicted": self._classes[i],
                "probability": round(p, 6),
                "correct": self._classes[i] == canonical(prompt.group),
            }
            for prompt, i, p in zip(prompts, best.tolist(), probability.tolist(), strict=True)
        ]

    def aggregate(self, records: Sequence[Record]) -> Metric:
        return self.percent(records, "correct")


class FolderClassifier(Classifier):
    """The classifier of a folder as `small_resnet.save_classifier` writes it."""

    def __init__(self, folder: str | Path, device: str) -> None:
        folder = Path(folder)
        self._device = resolve_device(device)
        self._network = load_classifier(folder).to(self._device)
        self.classes = self._network.classes
        digest = folder_digest(folder, (CONFIG_FILE, WEIGHTS_FILE))
        self.version = f"small_resnet-{digest[:SHORT]}"

    @torch.no_grad()
    def probabilities(self, images: NDArray[np.uint8]) -> Tensor:
        x = to_channels_first(images).to(self._device).float() / 255  # (N, 3, H, W)
        logits: Tensor = self._network(x)  # (N, classes)
        return logits.softmax(dim=1).cpu()


class TorchvisionResNet50(Classifier):
    """ResNet-50 IMAGENET1K_V2 (80.9 % top-1), downloaded once to torch's own cache."""

    def __init__(self, device: str) -> None:
        self._device = resolve_device(device)
        network = resnet50()
        network.load_state_dict(torch.load(resnet_weights_file(), weights_only=True))
        self._network = network.to(self._device).eval().requires_grad_(False)
        self._transform = RESNET_WEIGHTS.transforms()
        self.classes = tuple(RESNET_WEIGHTS.meta["categories"])
        self.version = f"torchvision-{torchvision.__version__}/{Path(RESNET_WEIGHTS.url).stem}"

    @torch.no_grad()
    def probabilities(self, images: NDArray[np.uint8]) -> Tensor:
        x = self._transform(to_channels_first(images).to(self._device))  # (N, 3, 224, 224)
        logits: Tensor = self._network(x)  # (N, 1000)
        return logits.softmax(dim=1).cpu()


def resnet_weights_file() -> Path:
    """The weights in torch's cache, downloaded if need be; UserError as `Download.fetch` has it."""
    return RESNET_FILE.fetch("evaluator=accuracy", "use model=mini, which has its own classifier")


def canonical(name: str) -> str:
    """A name as compared: "French horn" and "french_horn" are the same."""
    return name.strip().lower().replace(" ", "_")


def _shortened(names: Sequence[str], most: int = 15) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
