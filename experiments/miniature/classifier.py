"""Stages 1, 6 and 7: classifiers of real photographs.

The selector, quickly trained on the generator's half, only says how typical a photograph is. The
classifier, stand-in for ResNet-50 and for FID's features, learns from the judge's half: it has seen
nothing that the generator learned from, and never a generated or a stylised picture. It learns from
crops of 56 pixels, mixed in pairs, so from things larger than life and batch statistics of
mixtures. The judge, which ships, is that classifier after a short training on whole photographs at
the size that they are judged at: Touvron et al., "Fixing the train-test resolution discrepancy"
(2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.transforms import v2

from evaluation.evaluators import small_resnet
from evaluation.evaluators.small_resnet import SmallResNet, load_classifier, resize
from experiments.miniature.captions import SUBJECTS
from experiments.miniature.data import SIZE, Photographs
from experiments.miniature.training import Schedule, Workshop

PADDING = 8  # pixels of reflected border that random crops may reach into

crop_and_jitter = v2.Compose(
    [
        v2.RandomResizedCrop(56, scale=(0.35, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
        v2.ToDtype(torch.float32, scale=True),
    ]
)
"""One photograph (3, 64, 64) uint8 -> (3, 56, 56) float32 in [0, 1]."""

cut_mix = v2.CutMix(num_classes=len(SUBJECTS))
mix_up = v2.MixUp(alpha=0.2, num_classes=len(SUBJECTS))


def run(
    workshop: Workshop, stage: str, schedule: Schedule, label_smoothing: float
) -> dict[str, float]:
    """Train on balanced batches; the accuracy on held-out photographs, in [0, 1].

    `stage`: selector | classifier | judge. Writes its folder, as `small_resnet` has it.
    """
    network = SmallResNet(tuple(SUBJECTS))
    if stage == "judge":
        network = load_classifier(workshop.stage("classifier")).requires_grad_(True)
    photographs = workshop.photographs["generator" if stage == "selector" else "judge"]
    by_class = photographs.by_label()

    def loss(generator: Generator) -> Tensor:
        index, labels = balanced_batch(by_class, schedule.batch_size, generator)
        if stage == "classifier":
            crops = torch.stack([crop_and_jitter(each) for each in photographs.images[index]])
            pixels, labels = mix(crops, labels)
        else:
            pixels = augment(photographs.pixels(index), generator)
        if stage == "judge":
            pixels = resize(pixels, network.size)
        logits = network(pixels.to(workshop.device)).float()
        targets = labels.to(workshop.device)
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    average = workshop.train(stage, network.to(workshop.device), loss, schedule)
    small_resnet.save_classifier(workshop.stage(stage), average.cpu(), dtype=torch.float16)
    held_out, kept = workshop.photographs["val"], load_classifier(workshop.stage(stage))
    right = kept.head(features(kept, held_out)).argmax(1) == held_out.labels
    return {"validation_accuracy": float(right.float().mean())}


def balanced_batch(
    by_class: list[Tensor], batch_size: int, generator: Generator
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
    if draw >= 0.7:
        return pixels, F.one_hot(labels, len(SUBJECTS)).float()
    mixed: tuple[Tensor, Tensor] = (cut_mix if draw < 0.4 else mix_up)(pixels, labels)
    return mixed


def augment(pixels: Tensor, generator: Generator) -> Tensor:
    """Random shift, flip, brightness and contrast; one shift and contrast for each image."""
    n = len(pixels)
    flip = torch.rand(n, generator=generator) < 0.5
    pixels = torch.where(flip.view(n, 1, 1, 1), pixels.flip(3), pixels)
    padded = F.pad(pixels, (PADDING,) * 4, mode="reflect")
    corner = torch.randint(2 * PADDING + 1, (n, 2), generator=generator)
    places = zip(padded, corner.tolist(), strict=True)
    pixels = torch.stack([p[:, y : y + SIZE, x : x + SIZE] for p, (y, x) in places])
    gain = 1 + 0.4 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    bias = 0.3 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    tint = 1 + 0.2 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return (((pixels - mean) * gain + mean + bias) * tint).clamp(0, 1)


@torch.inference_mode()
def features(network: SmallResNet, photographs: Photographs) -> Tensor:
    """(N, feature_dim) float32, of a network on the CPU."""
    parts = torch.arange(len(photographs)).split(512)
    return torch.cat([network.features(photographs.pixels(part)) for part in parts])


def typical(network: SmallResNet, photographs: Photographs, per_subject: int) -> Tensor:
    """Indices of each subject's most typical photographs, by subject and most typical first.

    Typical = nearest by cosine to the mean feature of those that the classifier recognises; these
    first. A small model learns to draw these far sooner than all of them.
    """
    found = features(network, photographs)
    recognised = network.head(found).argmax(1) == photographs.labels
    found = F.normalize(found, dim=1)
    chosen = []
    for members in photographs.by_label():
        known = recognised[members]
        centre = F.normalize(found[members[known] if known.any() else members].mean(0), dim=0)
        closeness = found[members] @ centre + 2 * known  # cosines lie in [-1, 1]
        chosen.append(members[closeness.argsort(descending=True, stable=True)[:per_subject]])
    return torch.cat(chosen)
