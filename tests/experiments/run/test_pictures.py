"""The picture shows the target first and every image twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt
from experiments.run.pictures import (
    CELL,
    GAP,
    LABEL,
    MARGIN,
    before_after,
    choose_prompts,
    loss_curve,
)

PROMPTS = tuple(
    Prompt(f"an image of a {group}", seed, group)
    for seed in range(5)
    for group in ("tench", "church", "face")
)


def image_set(folder: Path, value: int) -> ImageSet:
    folder.mkdir()
    images = ImageSet(folder, PROMPTS)
    for index in range(len(PROMPTS)):
        pixels = np.full((64, 64, 3), value, np.uint8)
        Image.fromarray(pixels).save(images.path(index))
    return images


def test_columns_are_four_of_the_target_and_one_of_each_other() -> None:
    columns = choose_prompts(PROMPTS, ["church"], 4, 6)
    assert [PROMPTS[i].group for i in columns] == ["church"] * 4 + ["tench", "face"]
    assert [PROMPTS[i].seed for i in columns] == [0, 1, 2, 3, 0, 0]


def test_several_targets_share_the_first_columns() -> None:
    columns = choose_prompts(PROMPTS, ["church", "face"], 2, 6)
    assert [PROMPTS[i].group for i in columns] == ["church"] * 2 + ["face"] * 2 + ["tench"]


def test_the_loss_is_drawn(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
    loss_curve(history, tmp_path / "training.png")
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.width > picture.height > 100


def test_rows_are_before_and_after(tmp_path: Path) -> None:
    before, after = image_set(tmp_path / "b", 10), image_set(tmp_path / "a", 200)
    path = tmp_path / "picture.png"
    before_after({"before": before, "after": after}, ["church"], path, mask=None)
    pixels = np.asarray(Image.open(path))
    middle = CELL // 2
    assert pixels.shape == (LABEL + 2 * (CELL + GAP), MARGIN + 6 * (CELL + GAP), 3)
    assert (pixels[LABEL + middle, MARGIN + middle] == 10).all()
    assert (pixels[LABEL + CELL + GAP + middle, MARGIN + middle] == 200).all()


def test_one_row_without_an_edit(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    before_after({"before": image_set(tmp_path / "b", 10)}, ["church"], path, mask=None)
    with Image.open(path) as picture:
        assert picture.height == LABEL + CELL + GAP


def test_masked_before_it_is_resized(tmp_path: Path) -> None:
    def cover(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        assert image.shape == (64, 64, 3)
        return np.full_like(image, 99)

    path = tmp_path / "picture.png"
    before_after({"before": image_set(tmp_path / "b", 10)}, ["church"], path, cover)
    with Image.open(path) as picture:
        assert picture.getpixel((MARGIN + 1, LABEL + 1)) == (99, 99, 99)
