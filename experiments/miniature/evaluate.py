"""Measure the shipped miniature: `python -m experiments.miniature.evaluate`.

    python -m experiments.miniature.evaluate images_per_class=200
    python -m experiments.miniature.evaluate parquet=PATH       adds what needs the photographs
    python -m experiments.miniature.evaluate judge=FILE         adds an outside judge's verdict

Draws every subject and every style at the model's default sampler and writes
weights/evaluation.json, the model card's tables and a contact sheet. With the photographs it also
validates the classifier, compares pictures with the nearest photographs that the generator learned,
and shows a few of these pairs in the results' folder.
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
import torch
from omegaconf import DictConfig

from cad.errors import UserError
from cad.files import write_atomically
from cad.models.base import DiffusionModel
from evaluation.evaluators.accuracy import Accuracy
from evaluation.evaluators.small_resnet import load_classifier
from evaluation.evaluators.zero_shot import NO_STYLE
from evaluation.generation import generate
from evaluation.image_sets import ImageSet
from evaluation.prompts import ObjectPrompts, PromptSet, StylePrompts
from evaluation.sampler import SamplerSettings
from experiments.miniature import judging
from experiments.miniature.captions import STYLES, SUBJECTS
from experiments.miniature.classifier import features
from experiments.miniature.data import Photographs, load_photographs
from experiments.miniature.export import write_card
from experiments.miniature.judging import OBJECTS, by_group, first, nearest
from experiments.run.arguments import build
from experiments.run.command_line import exit_status

log = logging.getLogger(__name__)

SPEED_BATCHES = 3
FACE = {"face": "face"}


@hydra.main(
    version_base="1.3", config_path="../../conf", config_name="programs/miniature_evaluation"
)
def main(config: DictConfig) -> None:
    if config.parquet is not None and not Path(config.parquet).is_file():
        raise UserError(f"parquet={config.parquet}: no such file")
    judges = judging.outside(config.judge) if config.judge else {}
    model: DiffusionModel = build(config.model.adapter).load()
    settings = build(config.model.sampler, SamplerSettings)
    weights, results = Path(config.paths.miniature), Path(config.paths.results)
    n, seed = config.images_per_class, config.seed

    def draw(prompts: PromptSet) -> ImageSet:
        return generate(model, prompts.build(), settings, Path(config.paths.images))

    objects, faces = (draw(ObjectPrompts(names, n, seed)) for names in (OBJECTS, FACE))
    styles = draw(StylePrompts(STYLES, SUBJECTS, n, seed))
    photos = draw(ObjectPrompts(FACE, n, seed, template="a photo of {subject}"))
    accuracy: Accuracy = build(config.model.evaluators.object.accuracy)
    style_accuracy: Accuracy = build(config.model.evaluators.style.style_accuracy)
    result: dict[str, Any] = {
        "images_per_class": n,
        "seed": seed,
        "sampler": asdict(settings),
        "images_per_second": throughput(model, settings),
        "threads": torch.get_num_threads(),
        "accuracy": by_group(accuracy, objects, faces),
        "style_accuracy": by_group(style_accuracy, styles),
        "no_style": by_group(style_accuracy, *map(as_photographs, (objects, faces)))[NO_STYLE],
        "nudenet_face": by_group(build(config.face), photos)["mean"],
        "outside": {name: by_group(judge, objects) for name, judge in judges.items()},
    }
    drawn = judging.read(SUBJECTS, objects, faces)
    if config.parquet is not None:
        photographs = load_photographs(config.parquet, results)
        result |= with_photographs(photographs, drawn, weights / "classifier", accuracy, results)
    write_atomically(weights / "evaluation.json", (json.dumps(result, indent=2) + "\n").encode())
    judging.write_sheet(weights / "samples.png", first(drawn) + first(judging.read(STYLES, styles)))
    write_card(weights)
    log.info("written: %s", weights / "README.md")


def throughput(model: DiffusionModel, settings: SamplerSettings) -> float:
    """Images per second over a few batches made anew, files included."""
    per_subject = -(-SPEED_BATCHES * settings.batch_size // len(SUBJECTS))
    prompts = ObjectPrompts(SUBJECTS, per_subject, seed=0).build()
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        generate(model, prompts, settings, Path(folder))
        return round(len(prompts) / (time.perf_counter() - before), 2)


def as_photographs(images: ImageSet) -> ImageSet:
    """The same pictures, regrouped: each should be seen as being in no drawn style."""
    return ImageSet(images.folder, tuple(replace(p, group=NO_STYLE) for p in images.prompts))


def with_photographs(
    parts: dict[str, Photographs],
    drawn: Photographs,
    classifier: Path,
    accuracy: Accuracy,
    results: Path,
) -> dict[str, Any]:
    """The classifier's accuracy on held-out photographs, and how near pictures are to learned ones.

    Writes a sheet of each subject's first pictures, and below each its nearest learned photograph.
    """
    network, held_out, learned = load_classifier(classifier), parts["val"], parts["generator"]
    right = network.head(features(network, held_out)).argmax(1) == held_out.labels
    of_drawn, index = nearest(network, drawn, learned)
    of_held_out, _ = nearest(network, held_out, learned)
    neighbours = Photographs(learned.images[index], drawn.labels)
    pairs = zip(first(drawn, 6), first(neighbours, 6), strict=True)
    rows = [row for pair in pairs for row in pair]
    judging.write_sheet(results / "miniature_neighbours.png", rows)
    known = accuracy.aggregate([{"correct": each} for each in right.tolist()])
    near = {"drawn": of_drawn, "held_out": of_held_out}
    return {
        "classifier_validation": judging.cell(known),
        "nearest": {
            k: {"median": float(c.median()), "max": float(c.max())} for k, c in near.items()
        },
    }


if __name__ == "__main__":
    sys.exit(exit_status(main))
