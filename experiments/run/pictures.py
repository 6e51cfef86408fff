"""The pictures of a run: images before and after the edit, attacked ones, the training's loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cad.files import atomic_path, write_atomically
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt

CELL = 128  # pixels of an image in the picture
GAP = 4  # pixels between images
LABEL = 26  # pixels of the line above each column
MARGIN = 56  # pixels left of each row
NAME_MARGIN = 130  # likewise, of rows with longer names: an edit's with its ratio, an attack's
TARGET_COLUMNS = 4
OTHER_COLUMNS = 6
ATTACK_COLUMNS = 8
FONT_SIZE = 13

Pixels = NDArray[np.uint8]
"""An image, (H, W, 3) RGB."""

Mask = Callable[[Pixels], Pixels]
"""Covers what must not be shown of an image, such as `evaluation.masking.Masker`."""


def before_after(
    states: Mapping[str, ImageSet], targets: Collection[str], path: Path, mask: Mask | None
) -> None:
    """Write a PNG: one column per prompt (the targets' first), a row for each state.

    `states` are sets of the same prompts in the same order, by what their rows are called. `mask`
    covers what it finds on each image.
    """
    prompts = next(iter(states.values())).prompts
    each = max(1, TARGET_COLUMNS // max(1, len(targets)))
    columns = choose_prompts(prompts, targets, each, OTHER_COLUMNS)
    rows = {title: [images.read(index) for index in columns] for title, images in states.items()}
    _write_grid(rows, [prompts[index].group for index in columns], MARGIN, path, mask)


def side_by_side(pictures: Mapping[str, Path], path: Path) -> None:
    """Write a PNG out of those that `before_after` wrote of the same prompts, by their runs' names.

    Before the edit once, then a row for each run after it; unedited runs have none.
    """
    read = {}
    for name, picture in pictures.items():
        with Image.open(picture) as image:
            read[name] = image.convert("RGB")
    first, head = next(iter(read.values())), LABEL + CELL + GAP
    rows = {"Original": first.crop((MARGIN, LABEL, first.width, head))}
    edited = {name: image for name, image in read.items() if image.height > head}
    rows |= {
        name: image.crop((MARGIN, head, image.width, image.height))
        for name, image in edited.items()
    }
    wider = NAME_MARGIN - MARGIN
    size = (first.width + wider, LABEL + len(rows) * (CELL + GAP))
    canvas = Image.new("RGB", size, "white")
    canvas.paste(first.crop((MARGIN, 0, first.width, LABEL)), (NAME_MARGIN, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE)
    for number, (name, images) in enumerate(rows.items()):
        top = LABEL + number * (CELL + GAP)
        draw.text((GAP, top + CELL // 2), name, fill="black", font=font, anchor="lm")
        canvas.paste(images, (NAME_MARGIN, top))
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")


def attack_picture(
    originals: ImageSet,
    attacked: Mapping[str, Mapping[int, Pixels]],
    path: Path,
    mask: Mask | None,
) -> None:
    """Write a PNG: a column for each of the first prompts, a row of its image, one per attack.

    `attacked` has the adversarial images by attack and the prompt's index; prompts that needed no
    attack have none. `mask` covers what it finds on each image.
    """
    columns = range(min(len(originals), ATTACK_COLUMNS))
    rows: dict[str, list[Pixels | None]] = {"no attack": [originals.read(i) for i in columns]}
    rows |= {name: [images.get(i) for i in columns] for name, images in attacked.items()}
    labels = [originals.prompts[index].group for index in columns]
    _write_grid(rows, labels, NAME_MARGIN, path, mask)


def loss_curve(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a PNG: the loss of each training step, pale, and its running mean over a twentieth."""
    from experiments.run.curves import new_canvas, save  # imports matplotlib

    frame = pd.DataFrame(history).set_index("step")
    canvas = new_canvas(6, 3.5)
    panel = canvas.subplots()
    for name in frame:
        window = max(1, len(frame) // 20)
        (line,) = panel.plot(frame[name].rolling(window, min_periods=1).mean(), label=name)
        panel.plot(frame[name], color=line.get_color(), alpha=0.25, linewidth=0.8)
    panel.set(xlabel="step", yscale="log")
    panel.legend()
    write_atomically(path, save(canvas)["png"])


def choose_prompts(
    prompts: Sequence[Prompt], targets: Collection[str], per_target: int, others: int
) -> list[int]:
    """Indices of the shown prompts: each target's first ones, then one of each other group."""
    chosen = []
    for target in targets:
        chosen += [i for i, prompt in enumerate(prompts) if prompt.group == target][:per_target]
    first: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        if prompt.group not in targets:
            first.setdefault(prompt.group, i)
    return chosen + list(first.values())[:others]


def _write_grid(
    rows: Mapping[str, Sequence[Pixels | None]],
    labels: Sequence[str],
    margin: int,
    path: Path,
    mask: Mask | None,
) -> None:
    """Write a PNG of images in rows with titles and columns with labels; None is "not needed"."""
    step = CELL + GAP
    canvas = Image.new("RGB", (margin + len(labels) * step, LABEL + len(rows) * step), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for column, label in enumerate(labels):
        middle = (margin + column * step + CELL // 2, LABEL // 2)
        draw.text(middle, label.replace("_", " "), fill="black", font=font, anchor="mm")
    for row, (title, images) in enumerate(rows.items()):
        top = LABEL + row * step
        left_middle = (GAP, top + CELL // 2)
        draw.text(left_middle, title.replace("_", " "), fill="black", font=font, anchor="lm")
        for column, pixels in enumerate(images):
            left = margin + column * step
            if pixels is not None:
                canvas.paste(_cell(pixels if mask is None else mask(pixels)), (left, top))
            else:
                middle = (left + CELL // 2, top + CELL // 2)
                draw.text(middle, "not needed", fill="grey", font=font, anchor="mm")
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")


def _cell(pixels: Pixels) -> Image.Image:
    """The image at the size of a cell, its longer side cut."""
    image = Image.fromarray(pixels)
    enlarged = image.width < CELL
    method = Image.Resampling.BICUBIC if enlarged else Image.Resampling.LANCZOS
    return ImageOps.fit(image, (CELL, CELL), method)
