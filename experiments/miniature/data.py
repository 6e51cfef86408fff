"""The photographs that the miniature learns from.

By default torchvision downloads Imagenette and scikit-learn its LFW mirror; `data.parquet=PATH`
takes a local file instead: JPEG bytes in `image`, the subject's name in `label` ("French horn"),
"train" or "val" in `split`.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
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


def load_photographs(parquet: str | None, cache: Path) -> dict[str, Photographs]:
    """The two splits, {"train": ..., "val": ...}; downloads go to `cache`.

    Raises UserError if the parquet is missing, lacks a column or a subject.
    """
    if parquet is None:
        return _downloaded(cache)
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
    table = table[table.label.isin(index)]
    return {split: _decode(table[table.split == split], index) for split in ("train", "val")}


def _decode(rows: pd.DataFrame, index: dict[str, int]) -> Photographs:
    pictures = [
        np.asarray(_square(Image.open(io.BytesIO(data))))
        for data in tqdm(rows.image, desc="decoding photographs", unit="image", disable=None)
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return Photographs(images, torch.tensor([index[label] for label in rows.label]))


def _square(picture: Image.Image) -> Image.Image:
    """The centre square at 64 x 64, RGB."""
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side == SIZE:
        return picture
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _downloaded(cache: Path) -> dict[str, Photographs]:
    from sklearn.datasets import fetch_lfw_people
    from torchvision.datasets import Imagenette

    log.info("Imagenette (99 MB) and LFW (233 MB) are fetched to %s on first use", cache)
    faces = fetch_lfw_people(data_home=str(cache), color=True, resize=None, slice_=None)
    heads = [_square(Image.fromarray(_as_uint8(face))) for face in faces.images]
    face = list(SUBJECTS).index("face")
    splits = {}
    for split in ("train", "val"):
        things = Imagenette(str(cache), split=split, size="160px", download=not _present(cache))
        pictures = [np.asarray(_square(picture)) for picture, _ in things]
        labels = [label for _, label in things]  # torchvision's order is SUBJECTS' order
        chosen = heads[-FACES_HELD_OUT:] if split == "val" else heads[:-FACES_HELD_OUT]
        pictures += [np.asarray(_crop_head(head)) for head in chosen]
        labels += [face] * len(chosen)
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        splits[split] = Photographs(images, torch.tensor(labels))
    return splits


def _present(cache: Path) -> bool:
    return (cache / "imagenette2-160").is_dir()


def _as_uint8(image: np.ndarray) -> np.ndarray:
    """LFW comes as floats, in [0, 1] or [0, 255] by scikit-learn's version."""
    scale = 255 if image.max() <= 1 else 1
    return (image * scale).round().clip(0, 255).astype(np.uint8)


def _crop_head(picture: Image.Image) -> Image.Image:
    """LFW leaves wide margins: the middle half of the picture holds the head."""
    quarter = SIZE // 4
    head = picture.crop((quarter, quarter, SIZE - quarter, SIZE - quarter))
    return head.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
