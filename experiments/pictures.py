"""The picture of a run: the same prompts and seeds before and after the edit."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
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

Mask = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Covers what must not be shown of an image, uint8 (H, W, 3) RGB, such as `masking.Masker`."""


def before_after(
    states: Mapping[str, ImageSet], targets: Collection[str], path: Path, mask: Mask | None
) -> None:
    """Write a PNG: one column per prompt (the targets' first), a row for each state.

    `states` are sets of the same prompts in the same order, by what their rows are called. `mask`
    covers what it finds on each image.
    """
    prompts = next(iter(states.values())).prompts
    each = max(1, TARGET_COLUMNS // max(1, len(targets)))
    columns, rows = choose_prompts(prompts, targets, each, OTHER_COLUMNS), list(states.items())
    width = MARGIN + len(columns) * (CELL + GAP)
    canvas = Image.new("RGB", (width, LABEL + len(rows) * (CELL + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for row, (title, images) in enumerate(rows):
        top = LABEL + row * (CELL + GAP)
        draw.text((GAP, top + CELL // 2), title, fill="black", font=font, anchor="lm")
        for column, index in enumerate(columns):
            left = MARGIN + column * (CELL + GAP)
            canvas.paste(_cell(images.read(index), mask), (left, top))
            if row == 0:
                label = prompts[index].group.replace("_", " ")
                middle = (left + CELL // 2, LABEL // 2)
                draw.text(middle, label, fill="black", font=font, anchor="mm")
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def loss_curve(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a PNG: the loss of each training step, pale, and its running mean over a twentieth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frame = pd.DataFrame(history).set_index("step")
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name in frame:
        window = max(1, len(frame) // 20)
        (line,) = axes.plot(frame[name].rolling(window, min_periods=1).mean(), label=name)
        axes.plot(frame[name], color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


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


def _cell(pixels: NDArray[np.uint8], mask: Mask | None) -> Image.Image:
    image = Image.fromarray(pixels if mask is None else mask(pixels))
    enlarged = image.width < CELL
    method = Image.Resampling.BICUBIC if enlarged else Image.Resampling.LANCZOS
    return image.resize((CELL, CELL), method)
