"""The feature vectors that FID compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.image.fid import NoTrainInceptionV3

from cad.models.base import resolve_device
from evaluation.evaluators.pixels import to_channels_first
from evaluation.evaluators.small_resnet import CONFIG_FILE, WEIGHTS_FILE, load_classifier
from evaluation.evaluators.weights import SHORT, Download, folder_digest

INCEPTION = Download(
    what="FID's Inception-v3",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    digest="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size_mb=91,
)


class FeatureExtractor(ABC):
    """Describes an image by a vector. `version` names the network and how images enter it."""

    dim: int
    version: str

    @abstractmethod
    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, dim) of uint8 (N, H, W, 3) RGB images."""


class ClassifierFeatures(FeatureExtractor):
    """The pooled last stage of a classifier folder (`small_resnet`): the miniature's extractor."""

    def __init__(self, folder: str | Path, device: str) -> None:
        folder = Path(folder)
        self._device = resolve_device(device)
        self._network = load_classifier(folder).to(self._device)
        self.dim = self._network.feature_dim
        digest = folder_digest(folder, (CONFIG_FILE, WEIGHTS_FILE))
        self.version = f"small_resnet-{digest[:SHORT]}"

    @torch.no_grad()
    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        x = to_channels_first(images).to(self._device).float() / 255  # (N, 3, H, W)
        features: NDArray[np.float32] = self._network.features(x).cpu().numpy()  # (N, dim)
        return features


class InceptionFeatures(FeatureExtractor):
    """Inception-v3's pool3, 2048-d, as torchmetrics and torch-fidelity have it.

    The network of the TensorFlow release of 2015-12-05, converted; downloaded once to torch's
    cache. It resizes images to 299 pixels itself, bilinear: `antialias` is torchmetrics' default,
    false is the original TensorFlow resampling, which gives other values.
    """

    def __init__(self, antialias: bool, device: str) -> None:
        path = INCEPTION.fetch(
            "evaluator=fid", "use model=mini, which has its own features and needs no download"
        )
        self.dim = 2048
        self._device = resolve_device(device)
        network = NoTrainInceptionV3(
            "inception-v3-compat", [str(self.dim)], str(path), antialias=antialias
        )
        self._network = network.requires_grad_(False).to(self._device)
        resampling = "antialiased" if antialias else "tensorflow1"
        fidelity = installed("torch-fidelity")
        self.version = f"torch-fidelity-{fidelity}/{INCEPTION.version}/{resampling}"

    @torch.no_grad()
    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        x = to_channels_first(images).to(self._device)  # uint8 (N, 3, H, W)
        features: NDArray[np.float32] = self._network(x).float().cpu().numpy()  # (N, 2048)
        return features
