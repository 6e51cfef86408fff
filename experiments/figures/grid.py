"""Qualitative results: the same prompts and seeds under several edits (Figures 3 to 6, 8 to 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cad.errors import UserError
from evaluation.evaluators.base import CONCEPT
from evaluation.image_sets import ImageSet
from evaluation.masking import Masker
from evaluation.prompts import build_prompts
from experiments.figures.figure import Drawing, Drawn
from experiments.figures.style import new_canvas
from experiments.items.item import Place
from experiments.items.plan import Run
from experiments.pictures import Mask, choose_prompts
from experiments.rendering import DASH
from experiments.results import RECORDS, read_json, read_lines

CELL = 1.15  # inches
EXPLICIT = "explicit"  # a kind of concept
BEFORE, AFTER = "before", "after"
UNEDITED = "unedited"

Picture = Callable[[], NDArray[np.uint8]]
"""Reads an image, uint8 (H, W, 3) RGB."""


class EditGrid(Drawing):
    """A block of rows for each value of `block`, a column for each of `column`, unedited first.

    A block shows the first `targets` prompts of the concept, or of those whose image fails before
    the edit (`failures`: an amplified concept), and one of each of the first `others` groups.
    Pictures of an explicit concept are masked. Other axes must have one value.
    Raises UserError where no prompt is left to show.
    """

    def __init__(
        self,
        block: str = "concept",
        column: str = "edit",
        targets: int = 2,
        others: int = 2,
        failures: bool = False,
    ) -> None:
        self.block, self.column = block, column
        self.targets, self.others, self.failures = targets, others, failures

    def draw(self, runs: Sequence[tuple[Place, Run]]) -> Drawn:
        blocks: dict[str, dict[str, Run]] = {}
        for place, run in runs:
            blocks.setdefault(place[self.block], {})[place[self.column]] = run
        rows = [row for name, found in blocks.items() for row in self._rows(name, found)]
        if not rows:
            raise UserError("no prompt is left to show: all images are right before the edit")
        columns = list(dict.fromkeys(column for _, pictures, _ in rows for column in pictures))
        canvas = new_canvas(CELL * len(columns) + 1.3, CELL * len(rows) + 0.3)
        panels = canvas.subplots(len(rows), len(columns), squeeze=False)
        for panel_row, (label, pictures, _) in zip(panels, rows, strict=True):
            for panel, column in zip(panel_row, columns, strict=True):
                _show(panel, pictures.get(column))
            panel_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        for panel, column in zip(panels[0], columns, strict=True):
            panel.set_title(column.replace("_", " "), fontsize=9)
        shown = pd.DataFrame([facts for *_, facts in rows])
        return Drawn(canvas, shown, ["A row has one prompt and seed; columns are edits."])

    def _rows(
        self, name: str, runs: dict[str, Run]
    ) -> list[tuple[str, dict[str, Picture], dict[str, Any]]]:
        """Of a block: each row's label, its pictures by column, and what it shows."""
        found = {column: concept_images(run) for column, run in runs.items()}
        first = next(iter(runs.values()))
        sets = {UNEDITED: next(iter(found.values()))[BEFORE]}
        sets |= {column: states[AFTER] for column, states in found.items() if AFTER in states}
        prompts = sets[UNEDITED].prompts
        targets = read_json(first.folder / "metrics.json")["concepts"]
        wanted = self._failed(first) if self.failures else range(len(prompts))
        kept = [i for i in range(len(prompts)) if prompts[i].group not in targets or i in wanted]
        chosen = choose_prompts([prompts[i] for i in kept], targets, self.targets, self.others)
        mask = _mask(first)
        rows = []
        for index in (kept[i] for i in chosen):
            prompt = prompts[index]
            group = prompt.group.replace("_", " ")
            label = f"{name.replace('_', ' ')} edited:\n{group}"
            pictures = {column: _reader(images, index, mask) for column, images in sets.items()}
            facts = {self.block: name, "group": prompt.group, "prompt": prompt.text}
            rows.append((label, pictures, facts | {"seed": prompt.seed, "index": index}))
        return rows

    def _failed(self, run: Run) -> set[int]:
        """Indices of the images that were not recognised before the edit."""
        return {
            record["index"]
            for record in read_lines(run.folder / RECORDS)
            if record["state"] == BEFORE and record.get("correct") is False
        }


def concept_images(run: Run) -> dict[str, ImageSet]:
    """A run's images of its concept's prompts by state: "before" the edit, and "after" if any.

    Raises UserError for a run that made none, or not all of its prompts' (`limit`).
    """
    if run.cfg is None:
        raise LookupError(f"no configuration: {run.reason}")
    images = read_json(run.folder / "metrics.json")["images"]
    prompts = tuple(build_prompts(instantiate(run.cfg.prompts, _convert_="all")))
    made = images.get(CONCEPT, {})
    if any(each["count"] != len(prompts) for each in made.values()) or not made:
        raise UserError(f"{run.folder} has no images of all its concept's prompts to be shown")
    root = Path(run.cfg.paths.images)
    return {state: ImageSet(root / each["folder"], prompts) for state, each in made.items()}


def _mask(run: Run) -> Mask | None:
    if run.cfg is None or not run.cfg.safety.mask or run.cfg.concept.kind != EXPLICIT:
        return None
    return Masker()


def _reader(images: ImageSet, index: int, mask: Mask | None) -> Picture:
    def read() -> NDArray[np.uint8]:
        pixels = images.read(index)
        return pixels if mask is None else mask(pixels)

    return read


def _show(panel: Axes, picture: Picture | None) -> None:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    if picture is None:
        panel.text(0.5, 0.5, DASH, ha="center", va="center", transform=panel.transAxes)
    else:
        panel.imshow(picture(), interpolation="bilinear")
