"""Accuracy by an outside judge: a published ImageNet classifier, a second opinion on the miniature.

It has seen neither this project's data nor its pictures. ResNet-50 chooses among all of ImageNet;
a .tflite file, for who has no ResNet-50, among the prompts' own subjects or all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cad.errors import UserError
from evaluation.evaluators.accuracy import Accuracy, Classifier, TorchvisionResNet50, canonical
from evaluation.evaluators.base import label_of
from evaluation.pixels import Pixels

IMAGENET = tuple(canonical(name) for name in TorchvisionResNet50.classes)


@dataclass(frozen=True)
class OutsideJudge(Classifier):
    """An 8-bit ImageNet classifier of 1,001 outputs: a background, then IMAGENET.

    `among`: the names that it chooses from, in whatever order; None for all of IMAGENET. Needs
    `pip install ai-edge-litert`. UserError for no such file, and for a name that it does not know.
    """

    file: str
    among: Iterable[str] | None = None

    @cached_property
    def classes(self) -> tuple[str, ...]:
        among = IMAGENET if self.among is None else tuple(map(canonical, self.among))
        if unknown := sorted(set(among) - set(IMAGENET)):
            raise UserError(
                f"the outside judge knows no {', '.join(unknown)}, only the thousand classes of "
                "ImageNet: choose prompts of these, or among=null"
            )
        return tuple(name for name in IMAGENET if name in among)

    def settings(self) -> dict[str, Any]:
        return {"label": self.label, "among": self.among and self.classes}

    @property
    def label(self) -> str:
        return label_of(f"{self._path.stem}-{len(self.classes)}", self._path)

    @cached_property
    def network(self) -> Any:
        from ai_edge_litert.interpreter import Interpreter

        network = Interpreter(str(self._path), num_threads=1)
        network.allocate_tensors()
        return network

    def probabilities(self, images: Pixels) -> Tensor:
        (entry,), (exit_,) = self.network.get_input_details(), self.network.get_output_details()
        side = int(entry["shape"][1])
        outputs = [1 + IMAGENET.index(name) for name in self.classes]
        rows = []
        for image in images:
            pixels = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            self.network.set_tensor(entry["index"], np.asarray(pixels)[None])
            self.network.invoke()
            rows.append(self.network.get_tensor(exit_["index"])[0][outputs])
        return F.normalize(torch.from_numpy(np.stack(rows)).float(), p=1, dim=1)

    @property
    def _path(self) -> Path:
        path = Path(str(self.file))
        if not path.is_file():
            raise UserError(
                f"outside judge {path}: no such file; it takes a published ImageNet classifier of "
                "8 bits and 1,001 outputs, a .tflite"
            )
        return path


def outside_classifier(file: str | None, among: Iterable[str] | None, device: str) -> Classifier:
    """An `OutsideJudge`, or where no file is named ResNet-50, free to choose among all."""
    return TorchvisionResNet50(device) if file is None else OutsideJudge(file, among)


class OutsideAccuracy(Accuracy):
    """Accuracy in percent by an outside judge."""

    name: ClassVar[str] = "outside_accuracy"
    version: ClassVar[int] = 1  # its own, not Accuracy's
