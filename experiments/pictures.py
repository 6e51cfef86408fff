"""The picture of a run: the same prompts and seeds before and after the edit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from evaluation.files import write_atomically
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt

CELL = 128  # pixels of an image in the picture
GAP = 4  # pixels between images
LABEL = 26  # pixels of the line above each column
MARGIN = 56  # pixels left of each row
TARGET_COLUMNS = 4
OTHER_COLUMNS = 6
FONT_SIZE = 13


def before_after(before: ImageSet, after: ImageSet | None, target: str, path: Path) -> None:
    """Write a PNG: one column per prompt (the target's first), a row before and a row after.

    `before` and `after` hold the same prompts in the same order; without `after` there is one row.
    """
    columns = choose_columns(before.prompts, target)
    rows = [("before", before)] if after is None else [("before", before), ("after", after)]
    width = MARGIN + len(columns) * (CELL + GAP)
    canvas = Image.new("RGB", (width, LABEL + len(rows) * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for row, (title, images) in enumerate(rows):
        top = LABEL + row * (CELL + GAP)
        draw.text((GAP, top + CELL // 2), title, fill="black", font=font, anchor="lm")
        for column, index in enumerate(columns):
            left = MARGIN + column * (CELL + GAP)
            canvas.paste(_cell(images, index), (left, top))
            if row == 0:
                label = before.prompts[index].group.replace("_", " ")
                middle = (left + CELL // 2, LABEL // 2)
                draw.text(middle, label, fill="black", font=font, anchor="mm")
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def choose_columns(prompts: Sequence[Prompt], target: str) -> list[int]:
    """Indices of the shown prompts: the target's first ones, then one of each other group."""
    chosen = [i for i, prompt in enumerate(prompts) if prompt.group == target][:TARGET_COLUMNS]
    others: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        if prompt.group != target:
            others.setdefault(prompt.group, i)
    return chosen + list(others.values())[:OTHER_COLUMNS]


def _cell(images: ImageSet, index: int) -> Image.Image:
    image = Image.fromarray(images.read(index))
    enlarged = image.width < CELL
    method = Image.Resampling.BICUBIC if enlarged else Image.Resampling.LANCZOS
    return image.resize((CELL, CELL), method)
