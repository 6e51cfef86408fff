"""What FID keeps of the real images: the Gaussian of their features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cad.errors import UserError
from cad.files import atomic_path
from evaluation.evaluators.features import FeatureExtractor
from evaluation.evaluators.weights import SHORT, file_digest

EXTRACTOR = "extractor"  # key of the file's metadata


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,), unbiased covariance (D, D), both float64, and number of the images."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> FeatureStatistics:
        """The statistics of features (N, D). ValueError for fewer than two images."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"statistics need features (N >= 2, D), got {features.shape}")
        data = features.astype(np.float64)  # (N, D)
        return cls(data.mean(axis=0), np.atleast_2d(np.cov(data, rowvar=False)), len(data))

    def save(self, path: Path, extractor: FeatureExtractor) -> None:
        """Write one safetensors file that names its extractor, whole or not at all."""
        tensors = {
            "mean": self.mean,
            "covariance": self.covariance,
            "count": np.array(self.count, dtype=np.int64),
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={EXTRACTOR: extractor.version})

    @classmethod
    def load(cls, path: Path, extractor: FeatureExtractor) -> FeatureStatistics:
        """Read `save`'s file. UserError if it is missing, damaged, or of another extractor.

        A file that names no extractor is taken to be of this one if its size fits.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                maker = (file.metadata() or {}).get(EXTRACTOR, extractor.version)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError) as error:
            raise UserError(f"FID's reference {path} cannot be read: {error}") from error
        dim = extractor.dim
        shapes = {key: value.shape for key, value in tensors.items()}
        if shapes != {"mean": (dim,), "covariance": (dim, dim), "count": ()}:
            raise UserError(
                f"FID's reference {path} holds {shapes}; {extractor.version} needs mean ({dim},), "
                f"covariance ({dim}, {dim}) and count ()"
            )
        if maker != extractor.version:
            raise UserError(
                f"FID's reference {path} was made with {maker}, the images are judged with "
                f"{extractor.version}: make the reference anew"
            )
        mean, covariance = (tensors[key].astype(np.float64) for key in ("mean", "covariance"))
        return cls(mean, covariance, int(tensors["count"]))


class Reference(ABC):
    """Where the statistics of the real images come from. `version` says which images."""

    version: str

    @abstractmethod
    def statistics(self, extractor: FeatureExtractor) -> FeatureStatistics:
        """Read or make them. Raises UserError for what is missing; sets nothing random."""


class SavedStatistics(Reference):
    """A file of `FeatureStatistics.save`: the miniature's, of its held-out photographs."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise UserError(f"evaluator=fid needs the statistics of real images at {self._path}")
        self.version = f"{self._path.stem}-{file_digest(self._path)[:SHORT]}"

    def statistics(self, extractor: FeatureExtractor) -> FeatureStatistics:
        return FeatureStatistics.load(self._path, extractor)
