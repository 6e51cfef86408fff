"""FID: how far the generated images, all together, are from real ones.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium"
(2017), Eq. 6, as in the paper's Tables 2 and 9, computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from evaluation.evaluators.base import GENERAL, Evaluator, Metric, Record, bootstrap_standard
from evaluation.evaluators.features import FeatureExtractor, FeatureStatistics, Reference
from evaluation.pixels import Pixels, require_uint8
from evaluation.prompts import Prompt

RESAMPLES = 25
SMALLEST = 2  # images: one has no covariance


@dataclass(frozen=True)
class FID(Evaluator):
    """Frechet distance between Gaussians fitted to generated and to real features; at least 0.

    Records: features, the image's float32 vector (D,), from which every aggregate is recomputed.
    Few images make it large whatever they show, since their covariance is short of directions:
    draws from the miniature's real Gaussian itself (D = 128) score 5.6 at n = 50, 0.24 at 1,000 and
    0.01 at 30,000. So compare only equal n; the bias is not removed. The interval is +- 1.96
    standard deviations over RESAMPLES resamples of the images, the real ones held fixed.
    """

    name: ClassVar[str] = "fid"
    unit: ClassVar[str] = "squared distance"
    higher_is_better: ClassVar[bool] = False
    decimals: ClassVar[int] = 2
    measures: ClassVar[str] = GENERAL

    extractor: FeatureExtractor
    reference: Reference

    @property
    def instrument(self) -> str:
        return f"{self.extractor.label}/{self.reference.label}"

    @cached_property
    def _distance(self) -> FrechetDistance:
        return FrechetDistance(self.reference.statistics(self.extractor))

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Measures the real images too, where their statistics are not kept yet."""
        self.require(prompts, SMALLEST)
        self.extractor.load()
        _ = self._distance

    def score(
        self, images: Pixels, prompts: Sequence[Prompt], references: Pixels | None = None
    ) -> list[Record]:
        require_uint8(images)
        return [{"features": row} for row in self.extractor.features(images)]

    def aggregate(self, records: Sequence[Record]) -> Metric:
        self.require(records, SMALLEST)
        features = np.stack([record["features"] for record in records]).astype(np.float64)  # (N, D)
        with tqdm(desc="FID and its interval", total=1 + RESAMPLES, disable=None) as bar:

            def distance(chosen: NDArray[np.intp]) -> float:
                bar.update()
                return self._distance(features[chosen])

            interval = bootstrap_standard(distance, len(features), RESAMPLES)
        return self.metric(interval._replace(low=max(interval.low, 0.0)), len(records))


class FrechetDistance:
    """|m - m_r|^2 + tr(S + S_r - 2 (S_r^1/2 S S_r^1/2)^1/2) between features and real ones.

    The root's trace is that of (S S_r)^1/2, but S S_r is not symmetric: its eigenvalues take longer
    and come out complex. S_r^1/2 is found once.
    """

    def __init__(self, real: FeatureStatistics) -> None:
        values, vectors = np.linalg.eigh(real.covariance)  # (D,), (D, D)
        self._real = real
        self._root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # S_r^1/2

    def __call__(self, features: NDArray[np.float64]) -> float:
        """The distance of features (N >= 2, D); rounding below 0 is taken for 0."""
        found = FeatureStatistics.of(features)
        product = self._root @ found.covariance @ self._root  # (D, D)
        root = np.sqrt(np.linalg.eigvalsh(product).clip(min=0)).sum()
        shift = found.mean - self._real.mean
        traces = np.trace(found.covariance) + np.trace(self._real.covariance)
        return max(float(shift @ shift + traces - 2 * root), 0.0)
