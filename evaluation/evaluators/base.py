"""The contract of a metric: score every image first, aggregate second."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cad.errors import UserError
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt
from evaluation.statistics import Interval, wilson

BATCH_SIZE = 64  # images read and scored at once; no score depends on it beyond rounding

CONCEPT = "concept"  # the prompts of the edited concept and its neighbours
GENERAL = "general"  # captions of everything: COCO's part in the paper

Record = dict[str, Any]
"""What is kept of an image: JSON-able values, or numpy arrays (float32), which are filed apart."""


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


class Evaluator(ABC):
    """One metric. `version` names what measured it (weights' hash, thresholds), set on creation.

    Weights are loaded on creation, so that what is missing is known before images are made.
    `measures` says which images, CONCEPT's or GENERAL's. `paired` evaluators compare an
    edited image with the unedited model's of the same prompt and seed. An `additive` metric is a
    total over images, so that groups add up; the others are means, or distances of whole sets. One
    that `foresees` can begin with images while others are still being made, in other processes.
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
    foresees: ClassVar[bool] = False
    judges: ClassVar[str | None] = None
    version: str

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError for prompts that cannot be judged; call it before making their images."""
        return None

    def foresee(self, images: NDArray[np.uint8]) -> None:
        """Begin with images (N, H, W, 3) uint8 RGB that `score` will be given; returns at once.

        A hint: no record depends on it.
        """
        return None

    @abstractmethod
    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        references: NDArray[np.uint8] | None = None,
    ) -> list[Record]:
        """One record for each image of (N, H, W, 3) uint8 RGB and its prompt.

        `references`, of the same shape, are the unedited model's images of the same prompts and
        seeds; only `paired` evaluators are given them.
        """

    @abstractmethod
    def aggregate(self, records: Sequence[Record]) -> Metric:
        """The metric over `records`, all or some of what `score` made. UserError if there are none.

        Uses nothing but the records, so every aggregate can be recomputed from their file.
        """

    def metric(self, interval: Interval, n: int) -> Metric:
        """`interval`, in this metric's unit, with this metric's conditions."""
        return Metric(
            name=self.name,
            value=interval.value,
            low=interval.low,
            high=interval.high,
            n=n,
            unit=self.unit,
            decimals=self.decimals,
            higher_is_better=self.higher_is_better,
            version=self.version,
        )

    def percent(self, records: Sequence[Record], key: str) -> Metric:
        """The percentage of `records` whose `key` is true, with Wilson's interval."""
        self.require(records)
        share = wilson(sum(bool(record[key]) for record in records), len(records))
        return self.metric(Interval(*(100 * bound for bound in share)), len(records))

    def require(self, records: Sequence[Record]) -> None:
        """Raise UserError if there is nothing to aggregate."""
        if not records:
            raise UserError(f"{self.name}: no images to aggregate; raise limit or images_per_class")


def score_image_set(
    evaluator: Evaluator, images: ImageSet, references: ImageSet | None = None
) -> Iterator[Record]:
    """The evaluator's record of each image, after its index, prompt, seed and group.

    A paired evaluator needs `references`, a set of the same prompts; the others take none. Raises
    UserError before the first image for prompts that the evaluator cannot judge.
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


def require_uint8(images: NDArray[np.uint8]) -> None:
    """Raise TypeError for anything but uint8 (N, H, W, 3): a float image scores silently wrong."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise TypeError(
            f"images must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}"
        )
