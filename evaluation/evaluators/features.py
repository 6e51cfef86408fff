"""The feature vectors that FID compares, and the real images whose Gaussian is kept.

The paper compares 30,000 generated images with the photographs of COCO's val2014 (Lin et al.,
"Microsoft COCO: Common Objects in Context", 2014) whose captions they were generated from.
"""

from __future__ import annotations

import logging
import zipfile
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pytorch_fid.inception import FID_WEIGHTS_URL, InceptionV3
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.nn import functional as F
from tqdm import tqdm

from cad.checks import check, one_of
from cad.errors import UserError
from cad.files import atomic_path
from cad.identity import answer, digest, immaterial
from cad.models.base import resolve_device
from evaluation.evaluators.base import SHORT, Download, Instrument, label_of, to_channels_first
from evaluation.evaluators.small_resnet import ClassifierFolder
from evaluation.pixels import Pixels
from evaluation.prompts import PromptSet

INCEPTION = Download(
    what="FID's Inception-v3",
    metric="fid",
    url=FID_WEIGHTS_URL,
    digest="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size_mb=91,
)
ARCHIVE = Download(
    what="COCO's val2014 photographs",
    metric="fid",
    url="http://images.cocodataset.org/zips/val2014.zip",
    digest="a3d79f5ed8d289b7a7554ce06a5782b3",  # COCO publishes no SHA-256
    size_mb=6337,
    algorithm="md5",
    instead="set coco.images to a folder of real images",
)
FILE_NAME = "COCO_val2014_{:012d}.jpg"
SUFFIXES = (".jpg", ".jpeg", ".png")
RESAMPLINGS = ("pytorch_fid", "torchmetrics")
EXTRACTOR = "extractor"  # key of the metadata of a file of statistics

logger = logging.getLogger(__name__)


class FeatureExtractor(Instrument):
    """Describes an image by a vector. Its label also says how images enter the network."""

    @abstractmethod
    def features(self, images: Pixels) -> NDArray[np.float32]:
        """(N, D) of uint8 (N, H, W, 3) RGB images."""


class ClassifierFeatures(ClassifierFolder, FeatureExtractor):
    """The pooled last stage of a classifier folder (`small_resnet`): the miniature's extractor."""

    @torch.no_grad()
    def features(self, images: Pixels) -> NDArray[np.float32]:
        features: NDArray[np.float32] = self.network.features(self.pixels(images)).cpu().numpy()
        return features


@dataclass(frozen=True)
class InceptionFeatures(FeatureExtractor):
    """Inception-v3's pool3, 2048-d, of the TensorFlow release of 2015-12-05, by pytorch-fid.

    Images are made 299 x 299, bilinear. `resampling` "pytorch_fid" is that program's own:
    half-pixel centres, no antialiasing, 0 to 255 as [-1, 1]. "torchmetrics" antialiases and has
    them as [-1, 127 / 128], so that the features are those of torchmetrics. Compare one alone.
    """

    libraries = ("pytorch-fid",)

    resampling: str
    device: str = immaterial()

    def __post_init__(self) -> None:
        check(self, "model.feature_extractor", resampling=one_of(RESAMPLINGS))

    @property
    def label(self) -> str:
        return f"pytorch-fid-{installed('pytorch-fid')}/{INCEPTION.label}/{self.resampling}"

    @cached_property
    def network(self) -> Any:
        INCEPTION.fetch()  # where pytorch-fid looks for it, which verifies nothing
        return InceptionV3().eval().to(resolve_device(self.device))

    @torch.no_grad()
    def features(self, images: Pixels) -> NDArray[np.float32]:
        x = to_channels_first(images).to(resolve_device(self.device)).float()  # (N, 3, H, W)
        if self.resampling == "torchmetrics":
            x = F.interpolate(x, (299, 299), mode="bilinear", antialias=True) * (255 / 256)
        (pooled,) = self.network(x / 255)  # which resizes; (N, 2048, 1, 1)
        features: NDArray[np.float32] = pooled.flatten(1).cpu().numpy()
        return features


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,), unbiased covariance (D, D), both float64, and number of the images."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> FeatureStatistics:
        """The statistics of features (N >= 2, D)."""
        data = features.astype(np.float64)  # (N, D)
        return cls(data.mean(axis=0), np.atleast_2d(np.cov(data, rowvar=False)), len(data))

    def save(self, path: Path, extractor: FeatureExtractor) -> None:
        """Write one safetensors file that names its extractor, whole or not at all."""
        count = np.array(self.count, dtype=np.int64)
        tensors = {"mean": self.mean, "covariance": self.covariance, "count": count}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={EXTRACTOR: extractor.label})

    @classmethod
    def load(cls, path: Path, extractor: FeatureExtractor) -> FeatureStatistics:
        """Read `save`'s file. UserError if it is missing, damaged, or names another extractor."""
        names = ("mean", "covariance", "count")
        try:
            with safe_open(path, framework="numpy") as file:
                maker = (file.metadata() or {}).get(EXTRACTOR, extractor.label)
                mean, covariance, count = (file.get_tensor(name) for name in names)
        except (OSError, SafetensorError) as error:
            raise UserError(f"FID's reference {path} cannot be read: {error}") from error
        if maker != extractor.label:
            raise UserError(
                f"FID's reference {path} was made with {maker}, the images are judged with "
                f"{extractor.label}: make the reference anew"
            )
        return cls(mean.astype(np.float64), covariance.astype(np.float64), int(count))


class Reference(Instrument):
    """The real images that generated ones are compared with; its label names them."""

    @abstractmethod
    def statistics(self, extractor: FeatureExtractor) -> FeatureStatistics:
        """Read or make them. Raises UserError for what is missing; sets nothing random."""


@dataclass(frozen=True)
class SavedStatistics(Reference):
    """A file of `FeatureStatistics.save`: the miniature's, of its held-out photographs."""

    path: str

    @property
    def label(self) -> str:
        return label_of(Path(self.path).stem, Path(self.path))

    def statistics(self, extractor: FeatureExtractor) -> FeatureStatistics:
        return FeatureStatistics.load(Path(self.path), extractor)


@dataclass(frozen=True)
class CocoImages(Reference):
    """The photographs of `images`, a folder, or of COCO's archive (6.3 GB) where that is None.

    `captions` are the prompts that the images are generated from: only the photographs that these
    are captions of are compared with (the paper's 30,000), as `Prompt.id` has their numbers. None,
    or captions without ids, take every file of the folder (COCO: 40,504). `square` cuts the central
    square out of each photograph; otherwise the extractor squeezes it into one. The paper says
    neither. Statistics are kept below `cache`. The archive is read without unpacking, and
    downloaded only where no statistics are kept.
    """

    images: str | None
    captions: PromptSet | None
    cache: str = immaterial()
    square: bool = True

    def settings(self) -> dict[str, Any]:
        """The archive's hash, or names and sizes of all pictures: gigabytes are not read."""
        images = ARCHIVE.digest if self.images is None else digest(sizes(self.images, None))
        return {"images": images, "captions": answer(self.captions), "square": self.square}

    @property
    def label(self) -> str:
        return f"coco-{digest(self._compared)[:SHORT]}"

    def statistics(self, extractor: FeatureExtractor) -> FeatureStatistics:
        key = digest({"extractor": extractor.label, **self._compared})
        path = Path(self.cache) / f"{key}.safetensors"
        try:
            return FeatureStatistics.load(path, extractor)
        except UserError as error:
            told = f"{error}: made again" if path.exists() else "made, to be kept"
            logger.info("statistics of FID's real images in %s: %s", path, told)
        self._measure(extractor).save(path, extractor)
        return FeatureStatistics.load(path, extractor)

    @cached_property
    def _names(self) -> list[str] | None:
        """The files that the captions are of, sorted; None, without captions or their ids: all."""
        ids = {prompt.id for prompt in self.captions.build()} if self.captions is not None else {}
        try:
            numbers = sorted({int(each) for each in ids if each is not None})
        except ValueError as error:
            raise UserError(
                f"the captions have ids that are not COCO's numbers ({error}); "
                "model.real_images.captions=null compares with all photographs of coco.images"
            ) from error
        return [FILE_NAME.format(number) for number in numbers] or None

    @property
    def _compared(self) -> dict[str, Any]:
        """All that the statistics depend on beside the extractor."""
        if self.images is None:
            files = [ARCHIVE.digest, *(self._names or [])]
        else:
            files = sizes(self.images, self._names)
        return {"files": files, "square": self.square}

    def _measure(self, extractor: FeatureExtractor) -> FeatureStatistics:
        folder: Path | zipfile.Path
        if self.images is not None:
            folder, names = Path(self.images).expanduser(), present(self.images, self._names)
        else:
            folder = zipfile.Path(ARCHIVE.fetch(), "val2014/")
            names = self._names or sorted(file.name for file in folder.iterdir())
        features = []
        for name in tqdm(names, desc="real images", disable=None):
            image = read_image(folder / name, self.square)  # (H, W, 3), each of its own size
            features.append(extractor.features(image[None])[0])  # (D,)
        return FeatureStatistics.of(np.stack(features))


def sizes(images: str, names: list[str] | None) -> list[str]:
    """Names and bytes of the pictures that are `present`."""
    files = [Path(images).expanduser() / name for name in present(images, names)]
    return [f"{file.name} {file.stat().st_size}" for file in files]


def present(images: str, names: list[str] | None) -> list[str]:
    """`names`, or all pictures of a folder, sorted. UserError if one is missing, or all but one."""
    folder = Path(images).expanduser()
    files = folder.iterdir() if folder.is_dir() else []
    found = sorted(path.name for path in files if path.suffix.lower() in SUFFIXES)
    missing = sorted(set(names or []) - set(found))
    if missing or len(found) < 2:
        lacking = f", and lacks {len(missing):,}, such as {missing[0]}" if missing else ""
        raise UserError(
            f"coco.images={folder} holds {len(found):,} pictures ({', '.join(SUFFIXES)}){lacking}; "
            "FID needs 2, and thousands to mean anything. model.real_images.captions=null compares "
            "with whatever is there"
        )
    return found if names is None else names


def read_image(path: Path | zipfile.Path, square: bool) -> Pixels:
    """uint8 (H, W, 3) RGB, the central square of it if asked. UserError for a damaged file."""
    try:
        with path.open("rb") as file, Image.open(file) as picture:
            image = picture.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}, one of FID's real images, cannot be read: {error}") from error
    if square:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image)
