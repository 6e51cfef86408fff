"""The picture of attacks: what the edited model draws without and with each of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from evaluation.files import write_atomically
from evaluation.image_sets import ImageSet
from experiments.pictures import CELL, FONT_SIZE, GAP, LABEL, Mask

MARGIN = 90  # pixels left of each row
MOST_COLUMNS = 8


def attack_picture(
    originals: ImageSet,
    attacked: Mapping[str, Mapping[int, NDArray[np.uint8]]],
    path: Path,
    mask: Mask | None,
) -> None:
    """Write a PNG: a column for each of the first prompts, a row of its image, one per attack.

    `attacked` has the adversarial images, uint8 (H, W, 3) RGB, by attack and the prompt's index;
    prompts that needed no attack have none. `mask` covers what it finds on each image.
    """
    columns = range(min(len(originals), MOST_COLUMNS))
    rows = {"no attack": {index: originals.read(index) for index in columns}}
    rows |= {name.replace("_", " "): dict(images) for name, images in attacked.items()}
    size = (MARGIN + len(columns) * (CELL + GAP), LABEL + len(rows) * (CELL + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for column in columns:
        label = originals.prompts[column].group.replace("_", " ")
        middle = (MARGIN + column * (CELL + GAP) + CELL // 2, LABEL // 2)
        draw.text(middle, label, fill="black", font=font, anchor="mm")
    for row, (title, images) in enumerate(rows.items()):
        top = LABEL + row * (CELL + GAP)
        draw.text((GAP, top + CELL // 2), title, fill="black", font=font, anchor="lm")
        for column in columns:
            left = MARGIN + column * (CELL + GAP)
            if column in images:
                pixels = images[column] if mask is None else mask(images[column])
                canvas.paste(ImageOps.fit(Image.fromarray(pixels), (CELL, CELL)), (left, top))
            else:
                middle = (left + CELL // 2, top + CELL // 2)
                draw.text(middle, "not needed", fill="grey", font=font, anchor="mm")
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
