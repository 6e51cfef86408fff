"""Measure the shipped miniature: `python -m experiments.miniature.evaluate`.

    python -m experiments.miniature.evaluate images_per_class=200
    python -m experiments.miniature.evaluate parquet=PATH       adds the classifier's validation

Draws every subject and every style at the model's default sampler and writes
weights/evaluation.json, the model card's tables and a contact sheet.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from cad.errors import UserError
from cad.files import write_atomically
from cad.models.base import DiffusionModel
from evaluation.evaluators.base import Evaluator, score_image_set, wilson
from evaluation.evaluators.small_resnet import load_classifier
from evaluation.evaluators.zero_shot import NO_STYLE
from evaluation.generation import generate
from evaluation.image_sets import ImageSet
from evaluation.prompts import ObjectPrompts, PromptSet, StylePrompts
from evaluation.sampler import SamplerSettings
from experiments.miniature.captions import STYLES, SUBJECTS
from experiments.miniature.card import write_card
from experiments.miniature.classifier import predict
from experiments.miniature.data import load_photographs
from experiments.run.arguments import build
from experiments.run.command_line import exit_status

log = logging.getLogger(__name__)

CONTACT_COLUMNS = 12
SPEED_BATCHES = 3


@hydra.main(
    version_base="1.3", config_path="../../conf", config_name="programs/miniature_evaluation"
)
def main(config: DictConfig) -> None:
    if config.parquet is not None and not Path(config.parquet).is_file():
        raise UserError(f"parquet={config.parquet}: no such file")
    model: DiffusionModel = build(config.model.adapter).load()
    settings = build(config.model.sampler, SamplerSettings)
    root, weights = Path(config.paths.images), Path(config.paths.miniature)
    n, seed = config.images_per_class, config.seed
    accuracy: Evaluator = build(config.model.evaluators.object.accuracy)
    style_accuracy: Evaluator = build(config.model.evaluators.style.style_accuracy)
    face: Evaluator = build(config.face)
    subjects = ObjectPrompts(SUBJECTS, n, seed)
    things = draw(model, subjects, settings, root)
    styles = draw(model, StylePrompts(STYLES, SUBJECTS, n, seed), settings, root)
    faces = ObjectPrompts({"face": "face"}, n, seed, template="a photo of {subject}")
    result: dict[str, Any] = {
        "images_per_class": n,
        "seed": seed,
        "sampler": asdict(settings),
        "images_per_second": throughput(model, settings),
        "threads": torch.get_num_threads(),
        "accuracy": by_group(accuracy, things),
        "style_accuracy": by_group(style_accuracy, styles),
        "no_style": by_group(style_accuracy, as_photographs(things))[NO_STYLE],
        "nudenet_face": by_group(face, draw(model, faces, settings, root))["mean"],
    }
    if config.parquet is not None:
        result["classifier_validation"] = validate(config.parquet, weights / "classifier")
    write_atomically(weights / "evaluation.json", (json.dumps(result, indent=2) + "\n").encode())
    contact_sheet(things, styles, weights / "samples.png")
    write_card(weights)
    log.info("written: %s", weights / "README.md")


def draw(
    model: DiffusionModel, prompts: PromptSet, settings: SamplerSettings, root: Path
) -> ImageSet:
    """The set's images by the unedited model."""
    return generate(model, prompts.build(), settings, root)


def throughput(model: DiffusionModel, settings: SamplerSettings) -> float:
    """Images per second over a few batches made anew, files included."""
    per_subject = -(-SPEED_BATCHES * settings.batch_size // len(SUBJECTS))
    prompts = ObjectPrompts(SUBJECTS, per_subject, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        images = draw(model, prompts, settings, Path(folder))
        return round(len(images) / (time.perf_counter() - before), 2)


def by_group(evaluator: Evaluator, images: ImageSet) -> dict[str, dict[str, float]]:
    """Percentage with its 95 % interval for each group and, under "mean", over all images."""
    records = list(score_image_set(evaluator, images))
    groups = dict.fromkeys(record["group"] for record in records)
    parts = {g: [r for r in records if r["group"] == g] for g in groups} | {"mean": records}
    table = {}
    for name, part in parts.items():
        metric = evaluator.aggregate(part)
        table[name] = {k: round(getattr(metric, k), 2) for k in ("value", "low", "high", "n")}
    return table


def as_photographs(images: ImageSet) -> ImageSet:
    """The same pictures, regrouped: each should be seen as being in no drawn style."""
    return ImageSet(images.folder, tuple(replace(p, group=NO_STYLE) for p in images.prompts))


def validate(parquet: str, folder: Path) -> dict[str, float]:
    """The classifier's top-1 accuracy on the held-out photographs, with its interval."""
    held_out = load_photographs(parquet, folder)["val"]
    best = predict(load_classifier(folder), held_out).argmax(1)
    return share((best == held_out.labels).tolist())


def share(hits: list[bool]) -> dict[str, float]:
    """Percentage of true values with Wilson's 95 % interval."""
    interval = wilson(sum(hits), len(hits))
    value, low, high = (round(100 * bound, 2) for bound in interval)
    return {"value": value, "low": low, "high": high, "n": len(hits)}


def contact_sheet(things: ImageSet, styles: ImageSet, path: Path) -> None:
    """One row of pictures for each subject, then one for each style; not chosen, the first."""
    rows = []
    for images, groups in ((things, SUBJECTS), (styles, STYLES)):
        for group in groups:
            index = [i for i, prompt in enumerate(images.prompts) if prompt.group == group]
            rows.append(np.concatenate([images.read(i) for i in index[:CONTACT_COLUMNS]], axis=1))
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
