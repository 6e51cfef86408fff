"""The contract of a metric, score every image first, aggregate second, and its weights' files.

95 % intervals are Wilson's for proportions, "Probable inference, the law of succession, and
statistical inference" (1927), without continuity correction, and the percentile bootstrap for other
means, Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), ch. 13.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import math
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cad.errors import UserError
from cad.files import file_digest
from cad.identity import Identified
from evaluation.image_sets import ImageSet
from evaluation.pixels import Pixels
from evaluation.prompts import Prompt

REACHABILITY_TIMEOUT = 20  # seconds without an answer
SHORT = 12  # hexadecimal digits that name weights where people read
Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile
RESAMPLES = 2000
BATCH_SIZE = 64  # images read and scored at once; no score depends on it beyond rounding

CONCEPT = "concept"  # the prompts of the edited concept and its neighbours
GENERAL = "general"  # captions of everything: COCO's part in the paper

Record = dict[str, Any]
"""All that is kept of an image: JSON-able values, or numpy arrays (float32), filed apart."""


class Interval(NamedTuple):
    """A point estimate with the ends of its 95 % interval, all in the unit of the data."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Metric:
    """A number with its conditions. [low, high] is a 95 % interval over the `n` images."""

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    decimals: int  # that tables show
    higher_is_better: bool
    version: str


class Instrument(Identified, ABC):
    """A network that evaluators measure with. Creating one loads nothing: the first use does."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The network's name, the start of its weights' hash, and its settings. Loads nothing."""

    def settings(self) -> dict[str, Any]:
        return {"label": self.label}

    @property
    def network(self) -> Any:
        """The network on its device; where there is one, a cached_property that loads it."""
        return None

    def load(self) -> None:
        """Load the network now. Raises UserError for weights that are missing or damaged."""
        _ = self.network


class Evaluator(Identified, ABC):
    """One metric. Creating one loads no weights.

    `measures` says which images, CONCEPT's or GENERAL's. `paired` evaluators compare an edited
    image with the unedited model's of the same prompt and seed. An `additive` metric is a total
    over images, so that groups add up; the others are means, or distances of whole sets.
    `judges` is the key of its records that is true, or above 0, where an image shows what its
    prompt's group names; None where no record tells.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool]
    decimals: ClassVar[int] = 1
    measures: ClassVar[str] = CONCEPT
    paired: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    judges: ClassVar[str | None] = None

    @property
    @abstractmethod
    def instrument(self) -> str:
        """The measuring instrument in words: the label of a network, a threshold. Loads nothing."""

    @property
    def edition(self) -> str:
        """The instrument and, from the second on, the version: what numbers are compared by."""
        return self.instrument + ("" if self.version == 1 else f"/v{self.version}")

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for prompts that cannot be judged, and weights that are not there.

        It loads the weights, and they stay: where memory counts, check a copy (`copy.deepcopy`).
        """
        return None

    @abstractmethod
    def score(
        self, images: Pixels, prompts: Sequence[Prompt], references: Pixels | None = None
    ) -> list[Record]:
        """One record for each image of (N, H, W, 3) uint8 RGB and its prompt.

        `references` are the unedited model's images; only `paired` evaluators are given them.
        """

    def aggregate(self, records: Sequence[Record]) -> Metric:
        """The metric over `records`, all or some of what `score` made. UserError if there are none.

        Uses nothing but the records, so every aggregate can be recomputed from their file. Unless
        it is overridden, the percentage of images that show what their groups name (`judges`).
        """
        if self.judges is None:
            raise NotImplementedError(f"{type(self).__name__} does not say how it aggregates")
        return self.percent(records, self.judges)

    def metric(self, interval: Interval, n: int) -> Metric:
        """`interval`, in this metric's unit, with this metric's conditions."""
        shown = self.unit, self.decimals, self.higher_is_better
        return Metric(self.name, *interval, n, *shown, self.edition)

    def percent(self, records: Sequence[Record], key: str) -> Metric:
        """The percentage of `records` whose `key` is true, with Wilson's interval."""
        self.require(records)
        share = wilson(sum(bool(record[key]) for record in records), len(records))
        return self.metric(Interval(*(100 * bound for bound in share)), len(records))

    def mean(self, records: Sequence[Record], key: str, scale: float = 1) -> Metric:
        """The mean over `records` of `scale` times their `key`, with its bootstrap interval."""
        self.require(records)
        mean = bootstrap_mean([record[key] for record in records])
        return self.metric(Interval(*(scale * bound for bound in mean)), len(records))

    def require(self, images: Sequence[object], least: int = 1) -> None:
        """Raise UserError if there are too few images to aggregate."""
        if len(images) < least:
            raise UserError(
                f"evaluator={self.name} needs at least {least} images, got {len(images)}; raise "
                "limit or images_per_class"
            )


def score_image_set(
    evaluator: Evaluator, images: ImageSet, references: ImageSet | None = None
) -> Iterator[Record]:
    """The evaluator's record of each image, after its index, prompt, seed and group.

    A paired evaluator needs `references`, a set of the same prompts; the others take none.
    """
    evaluator.check(images.prompts)
    pairs = itertools.repeat(None) if references is None else references.batches(BATCH_SIZE)
    index = 0
    for (prompts, pixels), pair in zip(images.batches(BATCH_SIZE), pairs, strict=False):
        records = evaluator.score(pixels, prompts, None if pair is None else pair[1])
        for prompt, record in zip(prompts, records, strict=True):
            origin = {"index": index, "prompt": prompt.text}
            yield origin | {"seed": prompt.seed, "group": prompt.group} | record
            index += 1


def wilson(k: int, n: int) -> Interval:
    """Proportion k / n and its Wilson score interval, all in [0, 1].

    Stays informative at the ends: 0 of n has low 0 and high z^2 / (n + z^2).
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"wilson needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    p = k / n
    shrink = 1 + Z_95**2 / n
    centre = (p + Z_95**2 / (2 * n)) / shrink
    half = Z_95 / shrink * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
    low = 0.0 if k == 0 else centre - half
    high = 1.0 if k == n else centre + half
    return Interval(p, low, high)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean of `values` and its percentile bootstrap interval over RESAMPLES resamples.

    Equal values, and so a single one, give an interval of no width: it says nothing of a population
    then. Raises ValueError for no values or any that is not finite.
    """
    data = np.asarray(values, dtype=np.float64)  # (n,)
    if data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"bootstrap_mean needs finite numbers, got {values}")
    random = np.random.default_rng(seed)
    means = [data[random.integers(0, data.size, data.size)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(data.mean()), float(low), float(high))


def bootstrap_standard(
    statistic: Callable[[NDArray[np.intp]], float], n: int, resamples: int, seed: int = 0
) -> Interval:
    """`statistic` of n items, +- 1.96 standard deviations of it over resamples of the items.

    The bootstrap's standard interval (Efron and Tibshirani, ch. 6 and 12), for what is too costly
    to resample thousands of times, or biased by resampling itself: 25 resamples give a usable
    standard error (ch. 6.4). `statistic` takes indices (n,) in [0, n), with repetitions.
    """
    random = np.random.default_rng(seed)
    value = statistic(np.arange(n))
    drawn = [statistic(random.integers(0, n, n)) for _ in range(resamples)]
    half = Z_95 * float(np.std(drawn, ddof=1))
    return Interval(value, value - half, value + half)


@dataclass(frozen=True)
class Download:
    """A published file and the hash it must have."""

    what: str  # in words: "torchvision's ResNet-50 IMAGENET1K_V2"
    metric: str  # that needs it
    url: str
    digest: str  # the hash in hexadecimal, or its start where no more was published
    size_mb: int
    algorithm: str = "sha256"  # or md5, for what was published with nothing better
    instead: str = "use model=mini, which needs no download"
    saved_as: str | None = None  # its name here, where the URL's says too little

    @property
    def path(self) -> Path:
        """Its place in torch's cache, where torchvision too would look for it."""
        name = self.saved_as or self.url.rsplit("/", 1)[-1]
        return Path(torch.hub.get_dir()) / "checkpoints" / name

    @property
    def label(self) -> str:
        """File name and the start of its hash."""
        return f"{self.path.stem}-{self.digest[:SHORT]}"

    def fetch(self) -> Path:
        """The file's path, after a download if it is not there, its hash checked either way.

        Raises UserError if it cannot be downloaded or is not what it should be.
        """
        path = self.path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # torch.hub has no timeout of its own, so find out here.
                urllib.request.urlopen(self.url, timeout=REACHABILITY_TIMEOUT).close()
                torch.hub.download_url_to_file(self.url, str(path))
            except (OSError, http.client.HTTPException) as error:
                raise UserError(
                    f"evaluator={self.metric} needs {self.what} ({self.size_mb:,} MB): downloading "
                    f"failed ({error}). Get {self.url} on a machine with a network and put it at "
                    f"{path} (TORCH_HOME moves that folder), or {self.instead}"
                ) from error
        found = file_digest(path, self.algorithm)
        if not found.startswith(self.digest):
            raise UserError(
                f"{path} has the {self.algorithm.upper()} {found}, expected {self.digest}: delete "
                "it to download it again"
            )
        return path


def label_of(name: str, *files: Path) -> str:
    """A name and the start of the SHA-256 over files, one after another. UserError without one."""
    try:
        content = b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): name the folder or file that has "
            "it, by model.classifier.folder, model.clip.folder or model.real_images.path"
        ) from error
    return f"{name}-{hashlib.sha256(content).hexdigest()[:SHORT]}"


def to_channels_first(images: Pixels) -> Tensor:
    """uint8 (N, H, W, 3) to uint8 (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
