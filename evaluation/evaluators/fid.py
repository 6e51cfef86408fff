"""FID: how far the generated images, all together, are from real ones.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium"
(2017), Eq. 6, as in the paper's Tables 2 and 9, computed by torchmetrics in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torchmetrics
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from cad.errors import UserError
from evaluation.evaluators.base import GENERAL, Evaluator, Metric, Record, require_uint8
from evaluation.evaluators.feature_statistics import FeatureStatistics, Reference
from evaluation.evaluators.features import FeatureExtractor
from evaluation.prompts import Prompt
from evaluation.statistics import Interval, bootstrap_standard

SMALLEST = 2  # images: one has no covariance
RESAMPLES = 25
BOOTSTRAP_SEED = 0


class FID(Evaluator):
    """Frechet distance between Gaussians fitted to generated and to real features; at least 0.

    Records: features, the image's float32 vector (D,), from which every aggregate is recomputed.
    Needs two images. Few images make it large whatever they show, since their covariance is short
    of directions: draws from the miniature's real Gaussian itself (D = 128) score 5.6 at n = 50,
    1.2 at 220, 0.24 at 1,000 and 0.01 at 30,000. So compare only equal n; the bias is not removed.
    The interval is +- 1.96 standard deviations over RESAMPLES resamples of the images, without the
    bias that resampling itself adds (there, 1.6 for 1.0 at n = 500): it says how far other images
    of the same model would move the value, with the real ones held fixed.
    """

    name: ClassVar[str] = "fid"
    unit: ClassVar[str] = "squared distance"
    higher_is_better: ClassVar[bool] = False
    decimals: ClassVar[int] = 2
    measures: ClassVar[str] = GENERAL

    def __init__(self, extractor: FeatureExtractor, reference: Reference) -> None:
        self._extractor = extractor
        self._distance = FrechetDistance(reference.statistics(extractor))
        self.version = f"torchmetrics-{torchmetrics.__version__}/{extractor.version}"
        self.version += f"/{reference.version}"

    def check(self, prompts: Sequence[Prompt]) -> None:
        _require_two(len(prompts))

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        references: NDArray[np.uint8] | None = None,
    ) -> list[Record]:
        require_uint8(images)
        return [{"features": row} for row in self._extractor.features(images)]

    def aggregate(self, records: Sequence[Record]) -> Metric:
        self.require(records)
        _require_two(len(records))
        features = np.stack([record["features"] for record in records]).astype(np.float64)  # (N, D)

        def resampled(chosen: NDArray[np.intp]) -> float:
            return self._distance(features[chosen])

        interval = bootstrap_standard(resampled, len(features), RESAMPLES, BOOTSTRAP_SEED)
        interval = Interval(interval.value, max(interval.low, 0.0), interval.high)
        return self.metric(interval, len(records))


class FrechetDistance:
    """|m - m_r|^2 + tr(S + S_r - 2 (S S_r)^1/2) between features and the real images' statistics.

    torchmetrics' metric, given features in place of images, and the real side as the sums that it
    would have added up over the real images.
    """

    def __init__(self, real: FeatureStatistics) -> None:
        mean = torch.from_numpy(real.mean)  # (D,)
        covariance = torch.from_numpy(real.covariance)  # (D, D)
        outer = mean.unsqueeze(1) * mean  # (D, D)
        metric = FrechetInceptionDistance(_Identity(len(mean)), reset_real_features=False)
        metric.real_features_sum = real.count * mean
        metric.real_features_cov_sum = (real.count - 1) * covariance + real.count * outer
        metric.real_features_num_samples = torch.tensor(real.count)
        self._metric = metric

    def __call__(self, features: NDArray[np.float64]) -> float:
        """The distance of features (N >= 2, D); rounding below 0 is taken for 0."""
        self._metric.reset()
        self._metric.update(torch.from_numpy(features), real=False)
        return max(float(self._metric.compute()), 0.0)


class _Identity(nn.Module):
    """Hands features through, and tells torchmetrics how many there are."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _require_two(count: int) -> None:
    if count < SMALLEST:
        raise UserError(
            f"evaluator=fid compares distributions: it needs at least {SMALLEST} images, got "
            f"{count}; raise limit or images_per_class"
        )
