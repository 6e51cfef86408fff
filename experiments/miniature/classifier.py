"""Stage 1: the classifier of real photographs, the miniature's stand-in for ResNet-50.

It never sees a generated or a stylised picture. Its features serve FID, the autoencoder's
perceptual loss, and the choice of typical photographs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from evaluation.evaluators.small_resnet import SmallResNet, load_classifier, save_classifier
from experiments.miniature.captions import SUBJECTS
from experiments.miniature.data import SIZE, Photographs
from experiments.miniature.stages import Workshop
from experiments.miniature.training import Schedule, train

log = logging.getLogger(__name__)

PADDING = 8  # pixels of reflected border that random crops may reach into
TRAINING_SIZE = 56  # pixels; smaller than photographs are judged at: crops enlarge what they show


crop_and_jitter = v2.Compose(
    [
        v2.RandomResizedCrop(TRAINING_SIZE, scale=(0.35, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
        v2.ToDtype(torch.float32, scale=True),
    ]
)
"""One photograph (3, 64, 64) uint8 -> (3, 56, 56) float32 in [0, 1].

Training crops show things larger than life, which a larger size at test time makes up for:
Touvron et al., "Fixing the train-test resolution discrepancy" (2019).
"""

cut_mix = v2.CutMix(num_classes=len(SUBJECTS))
mix_up = v2.MixUp(alpha=0.2, num_classes=len(SUBJECTS))


def run(workshop: Workshop, schedule: Schedule, label_smoothing: float) -> dict[str, float]:
    """Train, write workshop.folder/classifier/, and return the held-out accuracy in [0, 1]."""
    network = workshop.place(SmallResNet(tuple(SUBJECTS)))

    def prepare(
        photographs: Photographs, index: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        crops = [crop_and_jitter(image) for image in photographs.images[index]]
        return mix(torch.stack(crops), labels)

    return fit(workshop, "classifier", network, prepare, schedule, label_smoothing)


Prepare = Callable[[Photographs, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(photographs, indices (B,), labels (B,), random numbers) -> pixels (B, 3, h, w) and targets."""


def fit(
    workshop: Workshop,
    stage: str,
    network: SmallResNet,
    prepare: Prepare,
    schedule: Schedule,
    label_smoothing: float,
) -> dict[str, float]:
    """Train `network` on balanced batches as prepared, write the stage's folder, and judge it."""
    folder = workshop.stage(stage)
    photographs = workshop.photographs("train")
    by_class = photographs.by_label()

    def loss(generator: torch.Generator, step: int) -> Tensor:
        index, labels = balanced_batch(by_class, schedule.batch_size, generator)
        pixels, targets = prepare(photographs, index, labels, generator)
        logits = network(workshop.place(pixels))
        return F.cross_entropy(
            logits.float(), workshop.place(targets), label_smoothing=label_smoothing
        )

    average = train(network, loss, schedule, folder, workshop.seed)
    assert isinstance(average, SmallResNet)
    save_classifier(folder, average.cpu(), dtype=torch.float16)
    held_out = workshop.photographs("val")
    right = predict(load_classifier(folder), held_out).argmax(1) == held_out.labels
    return {"validation_accuracy": float(right.float().mean())}


def balanced_batch(
    by_class: list[Tensor], batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices and labels (B,) int64; every class equally likely, however many pictures it has."""
    labels = torch.randint(len(by_class), (batch_size,), generator=generator)
    draws = torch.rand(batch_size, generator=generator)
    index = torch.stack(
        [by_class[c][int(d * len(by_class[c]))] for c, d in zip(labels, draws, strict=True)]
    )
    return index, labels


def mix(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A batch as it is, or its pictures mixed in pairs, with soft labels (B, classes)."""
    draw = torch.rand(()).item()
    if draw < 0.4:
        mixed: tuple[Tensor, Tensor] = cut_mix(pixels, labels)
        return mixed
    if draw < 0.7:
        mixed = mix_up(pixels, labels)
        return mixed
    return pixels, F.one_hot(labels, len(SUBJECTS)).float()


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift, flip, brightness and contrast; one shift and contrast for each image."""
    n = len(pixels)
    flip = torch.rand(n, generator=generator) < 0.5
    pixels = torch.where(flip.view(n, 1, 1, 1), pixels.flip(3), pixels)
    padded = F.pad(pixels, (PADDING,) * 4, mode="reflect")
    corner = torch.randint(2 * PADDING + 1, (n, 2), generator=generator)
    pixels = torch.stack(
        [
            p[:, y : y + SIZE, x : x + SIZE]
            for p, (y, x) in zip(padded, corner.tolist(), strict=True)
        ]
    )
    gain = 1 + 0.4 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    bias = 0.3 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    tint = 1 + 0.2 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return (((pixels - mean) * gain + mean + bias) * tint).clamp(0, 1)


@torch.inference_mode()
def predict(network: SmallResNet, photographs: Photographs, batch_size: int = 512) -> Tensor:
    """Logits (N, classes) float32 on the CPU."""
    device = network.mean.device
    parts = torch.arange(len(photographs)).split(batch_size)
    return torch.cat([network(photographs.pixels(i).to(device)).float().cpu() for i in parts])


@torch.inference_mode()
def typical(
    network: SmallResNet, photographs: Photographs, per_subject: int, batch_size: int = 512
) -> Tensor:
    """Indices of each subject's most typical photographs, by subject and most typical first.

    Typical = nearest by cosine to the mean feature of those that the classifier recognises; these
    first. A small model learns to draw these far sooner than all of them.
    """
    device = network.mean.device
    parts = torch.arange(len(photographs)).split(batch_size)
    features = torch.cat(
        [network.features(photographs.pixels(i).to(device)).float().cpu() for i in parts]
    )
    recognised = network.head.cpu()(features).argmax(1) == photographs.labels
    network.head.to(device)
    features = F.normalize(features, dim=1)
    chosen = []
    for label in range(len(SUBJECTS)):
        members = (photographs.labels == label).nonzero().squeeze(1)
        known = recognised[members]
        centre = F.normalize(features[members[known] if known.any() else members].mean(0), dim=0)
        closeness = features[members] @ centre + 2 * known  # cosines lie in [-1, 1]
        chosen.append(members[closeness.argsort(descending=True, stable=True)[:per_subject]])
    return torch.cat(chosen)
