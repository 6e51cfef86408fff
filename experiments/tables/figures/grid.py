"""Qualitative results: the same prompts and seeds under several edits (Figures 3 to 6, 8 to 12)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from cad.errors import UserError
from evaluation.evaluators.base import CONCEPT
from evaluation.image_sets import ImageSet
from evaluation.masking import Masker
from evaluation.prompts import Prompt
from experiments.run.curves import new_canvas
from experiments.run.pictures import Mask, Pixels, choose_prompts
from experiments.run.rendering import DASH
from experiments.run.results import RECORDS, read_json, read_lines
from experiments.tables.exhibit import EDIT, ListedRun
from experiments.tables.figures.drawing import Drawing

CELL = 1.15  # inches
EXPLICIT = "explicit"  # a kind of concept
BEFORE, AFTER = "before", "after"
UNEDITED = "unedited"


@dataclass(frozen=True)
class ConceptImages:
    """A run's images of its concept's prompts, as its result knows them."""

    targets: Sequence[str]  # groups of the edited concepts
    prompts: Mapping[int, Prompt]  # that may be shown, by index
    folders: Mapping[str, Path]  # by state: "before" the edit, and "after" if any
    mask: Mask | None

    def read(self, state: str, index: int) -> Pixels:
        """An image as it may be shown."""
        pixels = ImageSet(self.folders[state], ()).read(index)
        return pixels if self.mask is None else self.mask(pixels)

    def choose(self, targets: int, others: int) -> list[int]:
        """Indices of the prompts that are shown, as `draw_grid` says."""
        indices, prompts = list(self.prompts), list(self.prompts.values())
        return [indices[each] for each in choose_prompts(prompts, self.targets, targets, others)]


def draw_grid(
    runs: Sequence[ListedRun], targets: int = 2, others: int = 2, failures: bool = False
) -> Drawing:
    """A block of rows for each concept, a column for each edit, unedited first.

    A block shows the first `targets` prompts of the concept, or of those whose image fails before
    the edit (`failures`: an amplified concept), and one of each of the first `others` groups.
    Pictures of an explicit concept are masked. Raises UserError where no prompt is left to show.
    """
    blocks: dict[str, dict[str, ConceptImages]] = {}
    for run in runs:
        images = concept_images(run.folder, failures)
        blocks.setdefault(run.place["concept"], {})[run.place[EDIT]] = images
    rows, shown = [], []
    for name, found in blocks.items():
        first = next(iter(found.values()))
        edited = {edit: images for edit, images in found.items() if AFTER in images.folders}
        for index in first.choose(targets, others):
            prompt, pictures = first.prompts[index], {UNEDITED: first.read(BEFORE, index)}
            pictures |= {edit: images.read(AFTER, index) for edit, images in edited.items()}
            rows.append((f"{name} edited:\n{prompt.group}", pictures))
            facts = {"group": prompt.group, "prompt": prompt.text, "seed": prompt.seed}
            shown.append({"concept": name, **facts, "index": index})
    if not rows:
        raise UserError("no prompt is left to show: all images are right before the edit")
    says = ["A row has one prompt and seed; columns are edits."]
    return Drawing(_canvas(rows), pd.DataFrame(shown), says)


def concept_images(result: Path, failures: bool) -> ConceptImages:
    """The images of a run's concept; with `failures`, of the targets' those alone that failed.

    Raises UserError for a run that judged none.
    """
    metrics, config = read_json(result / "metrics.json"), OmegaConf.load(result / "config.yaml")
    made = metrics["images"].get(CONCEPT, {})
    names = {each["folder"] for each in made.values()}
    records = [each for each in read_lines(result / RECORDS) if each["images"] in names]
    if not records:
        raise UserError(f"{result} has no images of its concept to be shown")
    images = result.parent / os.path.relpath(config.paths.images, config.paths.runs)
    if failures:
        wrong = {r["index"] for r in records if r["state"] == BEFORE and r.get("correct") is False}
        targets = metrics["concepts"]
        records = [r for r in records if r["group"] not in targets or r["index"] in wrong]
    masked = config.safety.mask and config.concept.kind == EXPLICIT
    return ConceptImages(
        targets=metrics["concepts"],
        prompts={r["index"]: Prompt(r["prompt"], r["seed"], r["group"]) for r in records},
        folders={state: images / each["folder"] for state, each in made.items()},
        mask=Masker() if masked else None,
    )


def _canvas(rows: Sequence[tuple[str, Mapping[str, Pixels]]]) -> Figure:
    """Pictures by column, each row with its label."""
    columns = list(dict.fromkeys(column for _, pictures in rows for column in pictures))
    canvas = new_canvas(CELL * len(columns) + 1.3, CELL * len(rows) + 0.3)
    panels = canvas.subplots(len(rows), len(columns), squeeze=False)
    for panel_row, (label, pictures) in zip(panels, rows, strict=True):
        for panel, name in zip(panel_row, columns, strict=True):
            _show(panel, pictures.get(name))
        label = label.replace("_", " ")
        panel_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for panel, name in zip(panels[0], columns, strict=True):
        panel.set_title(name.replace("_", " "), fontsize=9)
    return canvas


def _show(panel: Axes, picture: Pixels | None) -> None:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    if picture is None:
        panel.text(0.5, 0.5, DASH, ha="center", va="center", transform=panel.transAxes)
    else:
        panel.imshow(picture, interpolation="bilinear")
