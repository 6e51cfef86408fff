"""Stage 2: the classifier that ships, settled on photographs as it will meet them.

Stage 1 learned from crops of 56 pixels, mixed in pairs, and so from things larger than life and
batch statistics of mixtures. A short training on whole photographs at the size they are judged at
mends that: Touvron et al., "Fixing the train-test resolution discrepancy" (2019). The later stages
keep to stage 1's classifier, which is only a measure of likeness to them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.evaluators.small_resnet import (
    SmallResNet,
    load_classifier,
    resize,
    save_classifier,
)
from experiments.miniature.classifier import augment, balanced_batch, predict
from experiments.miniature.stages import Workshop
from experiments.miniature.training import Schedule, train


def run(workshop: Workshop, schedule: Schedule, label_smoothing: float) -> dict[str, float]:
    """Train, write workshop.folder/judge/, and return the held-out accuracy in [0, 1]."""
    folder = workshop.stage("judge")
    photographs = workshop.photographs("train")
    network = workshop.place(load_classifier(workshop.stage("classifier")).requires_grad_(True))
    by_class = photographs.by_label()

    def loss(generator: torch.Generator, step: int) -> Tensor:
        index, labels = balanced_batch(by_class, schedule.batch_size, generator)
        pixels = resize(augment(photographs.pixels(index), generator), network.size)
        logits = network(workshop.place(pixels))
        return F.cross_entropy(
            logits.float(), workshop.place(labels), label_smoothing=label_smoothing
        )

    average = train(network, loss, schedule, folder, workshop.seed)
    assert isinstance(average, SmallResNet)
    save_classifier(folder, average.cpu(), dtype=torch.float16)
    held_out = workshop.photographs("val")
    right = predict(load_classifier(folder), held_out).argmax(1) == held_out.labels
    return {"validation_accuracy": float(right.float().mean())}
