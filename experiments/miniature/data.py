"""The photographs that the miniature learns from.

By default torchvision downloads Imagenette and scikit-learn its LFW mirror; `data.parquet=PATH`
takes a local file instead: JPEG bytes in `image`, the subject's name in `label` ("French horn"),
"train" or "val" in `split`. The training split is halved: what the generator learns from is never
shown to the classifier that measures it.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from cad.errors import UserError
from experiments.miniature.captions import SUBJECTS

log = logging.getLogger(__name__)

SIZE = 64  # pixels, both sides
FACES_HELD_OUT = 1000  # of LFW, people sorted by name, the last ones


@dataclass(frozen=True)
class Photographs:
    """Images (N, 3, 64, 64) uint8 and labels (N,) int64, indices into `captions.SUBJECTS`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def by_label(self) -> list[Tensor]:
        """Indices of each subject's photographs."""
        return [(self.labels == c).nonzero().squeeze(1) for c in range(len(SUBJECTS))]

    def pixels(self, index: Tensor) -> Tensor:
        """(B, 3, 64, 64) float32 in [0, 1]."""
        return self.images[index].float() / 255


def halved(photographs: Photographs) -> dict[str, Photographs]:
    """The first, third, ... photograph of each subject as "generator", the others as "judge"."""
    even = torch.zeros(len(photographs), dtype=torch.bool)
    for members in photographs.by_label():
        even[members[::2]] = True
    return {
        half: Photographs(photographs.images[chosen], photographs.labels[chosen])
        for half, chosen in (("generator", even), ("judge", ~even))
    }


def load_photographs(parquet: str | None, cache: Path) -> dict[str, Photographs]:
    """The halves of the training split, "generator" and "judge", and "val"; `cache` for downloads.

    Raises UserError if the parquet is missing, lacks a column or a subject.
    """
    splits = _downloaded(cache) if parquet is None else _read(parquet)
    return halved(splits["train"]) | {"val": splits["val"]}


def _read(parquet: str) -> dict[str, Photographs]:
    path = Path(parquet).expanduser()
    if not path.is_file():
        raise UserError(f"data.parquet={parquet}: no such file.")
    table = pd.read_parquet(path)
    missing = {"image", "label", "split"} - set(table.columns)
    if missing:
        raise UserError(
            f"data.parquet={parquet}: column(s) {sorted(missing)} missing; "
            "needed are image (JPEG bytes), label, split (train or val)."
        )
    index = {text: i for i, text in enumerate(SUBJECTS.values())}
    absent = set(index) - set(table.label)
    if absent:
        raise UserError(f"data.parquet={parquet}: no picture of {sorted(absent)}.")
    splits = {}
    for split, rows in table[table.label.isin(index)].groupby("split"):
        bar = tqdm(rows.image, desc=f"decoding {split}", unit="photograph", disable=None)
        pictures = (Image.open(io.BytesIO(data)) for data in bar)
        splits[str(split)] = _photographs(pictures, [index[label] for label in rows.label])
    return splits


def _photographs(pictures: Iterable[Image.Image], labels: list[int]) -> Photographs:
    """The centre square of each picture at 64 x 64, RGB."""
    images = [
        np.asarray(ImageOps.fit(picture.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS))
        for picture in pictures
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Photographs(pixels, torch.tensor(labels))


def _downloaded(cache: Path) -> dict[str, Photographs]:
    from sklearn.datasets import fetch_lfw_people
    from torchvision.datasets import Imagenette

    log.info("Imagenette (99 MB) and LFW (233 MB) are fetched to %s on first use", cache)
    people = fetch_lfw_people(data_home=str(cache), color=True, resize=None, slice_=None)
    scale = 255 if people.images.max() <= 1 else 1  # by scikit-learn's version
    faces = [Image.fromarray((face * scale).round().astype(np.uint8)) for face in people.images]
    face = list(SUBJECTS).index("face")
    splits = {}
    for split in ("train", "val"):
        present = (cache / "imagenette2-160").is_dir()
        things = Imagenette(str(cache), split=split, size="160px", download=not present)
        chosen = faces[-FACES_HELD_OUT:] if split == "val" else faces[:-FACES_HELD_OUT]
        # LFW leaves wide margins: the middle half of the picture holds the head.
        pictures = [picture for picture, _ in things]
        pictures += [ImageOps.crop(each, each.width // 4) for each in chosen]
        labels = [label for _, label in things]  # torchvision's order is SUBJECTS' order
        splits[split] = _photographs(pictures, labels + [face] * len(chosen))
    return splits
