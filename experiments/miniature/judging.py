"""What the miniature's pictures are judged by: metrics, an outside judge, the photographs.

Its own classifier has learned from photographs of the same collection; a published one that comes
from elsewhere says what a stranger would see. Whether the miniature repeats what it learned is told
by every picture's nearest photograph of its subject, by the cosine of the classifier's features;
held-out photographs, which nobody learned, say how near strangers are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image

from evaluation.evaluators.base import Evaluator, Metric, score_image_set
from evaluation.evaluators.outside import OutsideAccuracy, OutsideJudge
from evaluation.evaluators.small_resnet import SmallResNet
from evaluation.image_sets import ImageSet
from experiments.miniature.captions import SUBJECTS
from experiments.miniature.classifier import features
from experiments.miniature.data import Photographs

OBJECTS = {name: text for name, text in SUBJECTS.items() if name != "face"}  # ImageNet's


def outside(file: str) -> dict[str, OutsideAccuracy]:
    """Accuracy by an outside judge, which must choose among the ten objects, or may among all."""
    judges = {"among_ten": OutsideJudge(file, OBJECTS), "top1": OutsideJudge(file)}
    for judge in judges.values():
        judge.load()
    return {name: OutsideAccuracy(judge) for name, judge in judges.items()}


def by_group(evaluator: Evaluator, *sets: ImageSet) -> dict[str, dict[str, float]]:
    """Percentage with its 95 % interval for each group and, under "mean", over all images."""
    records = [record for images in sets for record in score_image_set(evaluator, images)]
    groups = dict.fromkeys(record["group"] for record in records)
    parts = {g: [r for r in records if r["group"] == g] for g in groups} | {"mean": records}
    return {name: cell(evaluator.aggregate(part)) for name, part in parts.items()}


def cell(metric: Metric) -> dict[str, float]:
    return {key: round(getattr(metric, key), 2) for key in ("value", "low", "high", "n")}


def read(groups: dict[str, str], *sets: ImageSet) -> Photographs:
    """The sets' pictures, labelled by their place among `groups`."""
    pixels = np.stack([images.read(i) for images in sets for i in range(len(images))])
    labels = [list(groups).index(prompt.group) for images in sets for prompt in images.prompts]
    return Photographs(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels))


def nearest(
    network: SmallResNet, pictures: Photographs, learned: Photographs
) -> tuple[Tensor, Tensor]:
    """Cosine of each picture to the nearest learned one of its subject, and that one's index."""
    found, known = (F.normalize(features(network, part), dim=1) for part in (pictures, learned))
    other = pictures.labels[:, None] != learned.labels  # (N, M)
    best = (found @ known.T).masked_fill(other, -1).max(dim=1)
    return best.values, best.indices


def first(pictures: Photographs, count: int = 12) -> list[Tensor]:
    """The first `count` pictures of each label that there is."""
    return [pictures.images[m[:count]] for m in pictures.by_label() if len(m)]


def write_sheet(path: Path, rows: list[Tensor]) -> None:
    """Rows of pictures (n, 3, H, W) uint8, one below the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.cat(rows) / 255, path, nrow=len(rows[0]), padding=0)
