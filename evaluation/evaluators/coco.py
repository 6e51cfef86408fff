"""FID's real images for the paper's models: COCO's val2014.

Lin et al., "Microsoft COCO: Common Objects in Context" (2014). The paper compares 30,000 generated
images with the photographs whose captions they were generated from; both are named by COCO's image
id. The statistics are made once for a list of files and an extractor, and kept on disk.
"""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.digests import settings_digest
from cad.errors import UserError
from evaluation.evaluators.feature_statistics import FeatureStatistics, Reference
from evaluation.evaluators.features import FeatureExtractor
from evaluation.evaluators.weights import SHORT, Download
from evaluation.prompts import PromptSet

ARCHIVE = Download(
    what="COCO's val2014 photographs",
    url="http://images.cocodataset.org/zips/val2014.zip",
    digest="a3d79f5ed8d289b7a7554ce06a5782b3",  # COCO publishes no SHA-256
    size_mb=6337,
    algorithm="md5",
)
ARCHIVE_FOLDER = "val2014/"
FILE_NAME = "COCO_val2014_{:012d}.jpg"
SUFFIXES = (".jpg", ".jpeg", ".png")

logger = logging.getLogger(__name__)


class CocoImages(Reference):
    """The photographs of `images`, a folder, or of COCO's archive (6.3 GB) where that is None.

    `captions` are the prompts that the images are generated from: only the photographs that these
    are captions of are compared with (the paper's 30,000), as `Prompt.id` has their numbers. None,
    or captions without ids, take every file of the folder (COCO: 40,504). `square` cuts the central
    square out of each photograph, as generated images are square; otherwise the extractor squeezes
    it into one. The paper says neither. Statistics are kept below `cache`, by the hash of the
    extractor, `square` and the files: names and sizes of a folder's, the archive's own hash.

    The archive is read without unpacking, and downloaded only where no statistics are kept. Raises
    UserError on creation for a folder that lacks something, or ids that are no numbers.
    """

    def __init__(
        self,
        images: str | Path | None,
        captions: PromptSet | None,
        cache: str | Path,
        square: bool,
    ) -> None:
        self._folder = None if images is None else Path(images).expanduser()
        self._names = None if captions is None else image_names(captions)
        self._cache = Path(cache)
        self._square = square
        if self._folder is None:
            files = [ARCHIVE.digest, *(self._names or [])]
        else:
            self._names = present(self._folder, self._names)
            files = [f"{name} {(self._folder / name).stat().st_size}" for name in self._names]
        self._identity = {"files": files, "square": square}
        self.version = f"coco-{settings_digest(self._identity)[:SHORT]}"

    def statistics(self, extractor: FeatureExtractor) -> FeatureStatistics:
        key = settings_digest({"extractor": extractor.version, **self._identity})
        path = self._cache / f"{key}.safetensors"
        if not path.exists():
            logger.info("measuring the real images of FID, to be kept in %s", path)
            self._measure(extractor).save(path, extractor)
        return FeatureStatistics.load(path, extractor)

    def _measure(self, extractor: FeatureExtractor) -> FeatureStatistics:
        folder: Path | zipfile.Path
        if self._folder is not None:
            folder, names = self._folder, self._names or []
        else:
            archive = ARCHIVE.fetch("evaluator=fid", "set coco.images to a folder of real images")
            folder = zipfile.Path(archive, ARCHIVE_FOLDER)
            names = self._names or sorted(file.name for file in folder.iterdir())
        features = []
        with logging_redirect_tqdm():
            for name in tqdm(names, desc="real images", disable=None):
                image = read_image(folder / name, self._square)  # (H, W, 3), each of its own size
                features.append(extractor.features(image[None])[0])  # (D,)
        return FeatureStatistics.of(np.stack(features))


def image_names(captions: PromptSet) -> list[str] | None:
    """The file names of the photographs that `captions` are of, sorted; None without any id."""
    ids = {prompt.id for prompt in captions.build()} - {None}
    try:
        numbers = sorted({int(str(number)) for number in ids})
    except ValueError as error:
        raise UserError(
            f"the captions {captions.name} have ids that are not COCO's numbers ({error}); "
            "model.real_images.captions=null compares with all photographs of coco.images"
        ) from error
    return [FILE_NAME.format(number) for number in numbers] or None


def present(folder: Path, names: list[str] | None) -> list[str]:
    """`names`, or all pictures of `folder`, sorted. UserError if one is missing, or all but one."""
    if not folder.is_dir():
        raise UserError(f"coco.images={folder} is not a folder")
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    missing = sorted(set(names or []) - set(found))
    if missing:
        raise UserError(
            f"coco.images={folder} lacks {len(missing):,} of {len(names or []):,} photographs, "
            f"such as {missing[0]}; model.real_images.captions=null compares with whatever is there"
        )
    chosen = found if names is None else names
    if len(chosen) < 2:
        raise UserError(
            f"coco.images={folder} holds {len(chosen)} pictures ({', '.join(SUFFIXES)}); FID needs "
            "2, and thousands to mean anything"
        )
    return chosen


def read_image(path: Path | zipfile.Path, square: bool) -> NDArray[np.uint8]:
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
