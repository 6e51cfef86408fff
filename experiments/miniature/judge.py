"""Stage 2: the classifier that ships, settled on photographs as it will meet them.

Stage 1 learned from crops of 56 pixels, mixed in pairs, and so from things larger than life and
batch statistics of mixtures. A short training on whole photographs at the size they are judged at
mends that: Touvron et al., "Fixing the train-test resolution discrepancy" (2019). The later stages
keep to stage 1's classifier, which is only a measure of likeness to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.evaluators.small_resnet import load_classifier, resize
from experiments.miniature.classifier import augment, fit
from experiments.miniature.data import Photographs
from experiments.miniature.stages import Workshop
from experiments.miniature.training import Schedule


def run(workshop: Workshop, schedule: Schedule, label_smoothing: float) -> dict[str, float]:
    """Train, write workshop.folder/judge/, and return the held-out accuracy in [0, 1]."""
    network = workshop.place(load_classifier(workshop.stage("classifier")).requires_grad_(True))

    def prepare(
        photographs: Photographs, index: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return resize(augment(photographs.pixels(index), generator), network.size), labels

    return fit(workshop, "judge", network, prepare, schedule, label_smoothing)
