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
from experiments.run.curves import PAGE, new_canvas
from experiments.run.pictures import Mask, Pixels
from experiments.run.rendering import DASH, display
from experiments.run.results import RECORDS, read_json, read_lines
from experiments.tables.exhibit import EDIT, ListedRun
from experiments.tables.figures.drawing import Drawing

CELL = 1.15  # inches, at most
MARGIN = 0.9  # inches, of the rows' names
EXPLICIT = "explicit"  # a kind of concept
BEFORE, AFTER = "before", "after"
UNEDITED = "none"
JUDGEMENTS = ("correct", "count")  # keys of records that say whether an image shows the concept

Key = tuple[str, int]
"""An image of a run: what its set measures, and its index there."""


@dataclass(frozen=True)
class RunImages:
    """A run's images, as its result knows them."""

    targets: Sequence[str]  # groups of the edited concepts
    prompts: Mapping[Key, Prompt]  # that may be shown
    folders: Mapping[tuple[str, str], Path]  # by what is measured, and "before" or "after" the edit
    mask: Mask | None

    @property
    def is_edited(self) -> bool:
        return (CONCEPT, AFTER) in self.folders

    def read(self, state: str, key: Key) -> Pixels:
        """An image as it may be shown."""
        measured, index = key
        pixels = ImageSet(self.folders[measured, state], ()).read(index)
        return pixels if self.mask is None else self.mask(pixels)

    def choose(self, targets: int, others: Mapping[str, int]) -> list[Key]:
        """The images that are shown, as `draw_grid` says."""
        own = dict.fromkeys(self.targets, targets)
        chosen = []
        for group, count in (own | dict(others) | own).items():
            chosen += [key for key, each in self.prompts.items() if each.group == group][:count]
        return chosen


def draw_grid(
    runs: Sequence[ListedRun],
    targets: int = 2,
    others: Mapping[str, int] | None = None,
    recognised: bool | None = None,
) -> Drawing:
    """A block of rows for each concept, a column for each edit, unedited first.

    A block shows the first `targets` prompts of the concept, or of those in whose image before the
    edit it was recognised (explicit content) or was not (an amplified concept); then as many of
    each other group of prompts, general ones too, as `others` says. Pictures of an explicit concept
    are masked. Raises UserError where no prompt is left to show.
    """
    blocks: dict[str, dict[str, RunImages]] = {}
    for run in runs:
        images = read_images(run.folder, recognised)
        blocks.setdefault(run.place["concept"], {})[run.place[EDIT]] = images
    rows, shown = [], []
    for name, found in blocks.items():
        first = next(iter(found.values()))
        edited = {edit: images for edit, images in found.items() if images.is_edited}
        for key in first.choose(targets, others or {}):
            prompt, pictures = first.prompts[key], {UNEDITED: first.read(BEFORE, key)}
            pictures |= {edit: images.read(AFTER, key) for edit, images in edited.items()}
            rows.append((f"{display(name)} edited:\n{display(prompt.group)}", pictures))
            facts = {"group": prompt.group, "prompt": prompt.text, "seed": prompt.seed}
            shown.append({"concept": name, **facts, "index": key[1]})
    if not rows:
        raise UserError("no prompt is left to show: the concept is in all images before the edit")
    says = ["A row has one prompt and seed; columns are edits."]
    return Drawing(_canvas(rows), pd.DataFrame(shown), says)


def read_images(result: Path, recognised: bool | None) -> RunImages:
    """The images of a run; of the targets' those alone that were so judged before the edit.

    Raises UserError for a run that judged none of its concept.
    """
    metrics, config = read_json(result / "metrics.json"), OmegaConf.load(result / "config.yaml")
    made, targets = metrics["images"], metrics["concepts"]
    uses = {each["folder"]: use for use, sets in made.items() for each in sets.values()}
    records = [r | {"key": (uses[r["images"]], r["index"])} for r in read_lines(result / RECORDS)]
    if CONCEPT not in uses.values() or not records:
        raise UserError(f"{result} has no images of its concept to be shown")
    if recognised is not None:
        before = [each for each in records if each["state"] == BEFORE]
        judged = {r["key"]: bool(r[name]) for r in before for name in JUDGEMENTS if name in r}
        kept = {key for key, value in judged.items() if value == recognised}
        records = [r for r in records if r["group"] not in targets or r["key"] in kept]
    images = result.parent / os.path.relpath(config.paths.images, config.paths.runs)
    masked = config.safety.mask and config.concept.kind == EXPLICIT
    return RunImages(
        targets=targets,
        prompts={r["key"]: Prompt(r["prompt"], r["seed"], r["group"]) for r in records},
        folders={
            (use, state): images / each["folder"]
            for use, sets in made.items()
            for state, each in sets.items()
        },
        mask=Masker() if masked else None,
    )


def _canvas(rows: Sequence[tuple[str, Mapping[str, Pixels]]]) -> Figure:
    """Pictures by column, each row with its label."""
    columns = list(dict.fromkeys(column for _, pictures in rows for column in pictures))
    cell = min(CELL, (PAGE - MARGIN) / len(columns))
    canvas = new_canvas(cell * len(columns) + MARGIN, cell * len(rows) + 0.3)
    panels = canvas.subplots(len(rows), len(columns), squeeze=False)
    for panel_row, (label, pictures) in zip(panels, rows, strict=True):
        for panel, name in zip(panel_row, columns, strict=True):
            _show(panel, pictures.get(name))
        panel_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")
    for panel, name in zip(panels[0], columns, strict=True):
        panel.set_title(display(name))
    return canvas


def _show(panel: Axes, picture: Pixels | None) -> None:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    if picture is None:
        panel.text(0.5, 0.5, DASH, ha="center", va="center", transform=panel.transAxes)
    else:
        panel.imshow(picture, interpolation="bilinear")
