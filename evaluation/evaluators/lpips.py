"""LPIPS: how far the edit moved an image, perceptually.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), as in
the paper's Table 5: each edited image against the unedited model's image of the same prompt and
seed. Over the target's prompts a large distance means that the edit bites, over the others' a small
one that it spares them; `higher_is_better` is the second reading.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import ClassVar

import lpips
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.functional import resize

from cad.errors import UserError
from cad.models.base import resolve_device
from evaluation.evaluators.base import Evaluator, Metric, Record, require_uint8
from evaluation.evaluators.perceptual import feature_distance, stage_maps
from evaluation.evaluators.pixels import to_channels_first
from evaluation.evaluators.small_resnet import CONFIG_FILE, WEIGHTS_FILE, load_classifier
from evaluation.evaluators.small_resnet import resize as resize_for_classifier
from evaluation.evaluators.weights import SHORT, Download, file_digest, folder_digest
from evaluation.prompts import Prompt
from evaluation.statistics import bootstrap_mean

ALEXNET = Download(
    what="torchvision's AlexNet",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    digest="7be5be79",
    size_mb=233,
)
HEADS = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"  # shipped with the package
SMALLEST = 32  # pixels; AlexNet's second pooling needs 31
BOOTSTRAP_SEED = 0


class Distance(ABC):
    """Distances of pairs of images."""

    version: str

    @abstractmethod
    def distances(self, images: NDArray[np.uint8], references: NDArray[np.uint8]) -> Tensor:
        """(N,) float32 on the CPU, of two uint8 (N, H, W, 3) RGB arrays; exactly 0 for equals."""


class LPIPS(Evaluator):
    """Mean distance between the edited and the unedited image, with its bootstrap interval.

    Records: distance, at least 0.
    """

    name: ClassVar[str] = "lpips"
    unit: ClassVar[str] = "distance"
    higher_is_better: ClassVar[bool] = False
    decimals: ClassVar[int] = 3
    paired: ClassVar[bool] = True

    def __init__(self, distance: Distance) -> None:
        self._distance = distance
        self.version = distance.version

    def score(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[Prompt],
        references: NDArray[np.uint8] | None = None,
    ) -> list[Record]:
        if references is None:
            raise TypeError("lpips compares pairs: it needs the unedited images as references")
        require_uint8(images)
        require_uint8(references)
        if not len(images) == len(references) == len(prompts):
            raise TypeError(
                f"lpips compares pairs: got {len(images)} images, {len(references)} references "
                f"and {len(prompts)} prompts"
            )
        distances = self._distance.distances(images, references)
        return [{"distance": round(distance, 6)} for distance in distances.tolist()]

    def aggregate(self, records: Sequence[Record]) -> Metric:
        self.require(records)
        mean = bootstrap_mean([record["distance"] for record in records], BOOTSTRAP_SEED)
        return self.metric(mean, len(records))


class AlexNetDistance(Distance):
    """The lpips package's metric, version 0.1: AlexNet with the linear heads it ships.

    Images are resized to `size` pixels, bilinear and antialiased, in 8 bits. AlexNet's weights are
    torchvision's, downloaded once to torch's cache.
    """

    def __init__(self, size: int, device: str) -> None:
        if size < SMALLEST:
            raise UserError(f"evaluator.lpips.distance.size={size} must be at least {SMALLEST}")
        path = ALEXNET.fetch("evaluator=lpips", "use model=mini, whose distance needs no download")
        self._size = size
        self._device = resolve_device(device)
        network = build_lpips(torch.load(path, map_location="cpu", weights_only=True))
        self._network = network.to(self._device)
        heads = file_digest(HEADS)[:SHORT]
        self.version = f"lpips-{installed('lpips')}/{path.stem}/heads-{heads}/{size}px"

    @torch.no_grad()
    def distances(self, images: NDArray[np.uint8], references: NDArray[np.uint8]) -> Tensor:
        distances: Tensor = self._network(self._prepare(images), self._prepare(references))
        return distances.flatten().float().cpu()  # (N, 1, 1, 1) -> (N,)

    def _prepare(self, images: NDArray[np.uint8]) -> Tensor:
        """(N, 3, size, size) in [-1, 1]."""
        x: Tensor = resize(to_channels_first(images), [self._size, self._size], antialias=True)
        return x.to(self._device).float() / 127.5 - 1


class StageDistance(Distance):
    """LPIPS's distance on the shipped classifier's stages, without learned heads.

    It is the package's `LPIPS(lpips=False)` with another backbone: `feature_distance` over the four
    stages of the miniature's `SmallResNet`, on images resized as it resizes them to classify them.
    Why it means something: Zhang et al. found that deep features agree with people's judgement of
    similarity far better than pixels do, whatever the network and what it was trained for, and
    without learned weights already; and this network was trained to tell apart what the miniature
    draws. What it is not: calibrated on human judgements, or on the scale of AlexNet's LPIPS. Use
    it to compare edits of the miniature with each other.
    """

    def __init__(self, folder: str | Path, device: str) -> None:
        folder = Path(folder)
        self._device = resolve_device(device)
        self._network = load_classifier(folder).to(self._device)
        digest = folder_digest(folder, (CONFIG_FILE, WEIGHTS_FILE))
        self.version = f"stage_distance-1/small_resnet-{digest[:SHORT]}"

    @torch.no_grad()
    def distances(self, images: NDArray[np.uint8], references: NDArray[np.uint8]) -> Tensor:
        return feature_distance(self._maps(images), self._maps(references)).cpu()

    def _maps(self, images: NDArray[np.uint8]) -> list[Tensor]:
        """(N, width, h, w) of each stage."""
        x = to_channels_first(images).to(self._device).float() / 255  # (N, 3, H, W)
        return stage_maps(self._network, resize_for_classifier(x, self._network.size))


def build_lpips(alexnet: dict[str, Tensor]) -> nn.Module:
    """lpips' network (version 0.1, AlexNet, its heads) over torchvision's AlexNet state dict.

    lpips itself would download the backbone unverified. Eval mode, no gradients, on the CPU.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", category=UserWarning)  # lpips calls an older torchvision
        network: nn.Module = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    backbone = network.get_submodule("net")
    layers = {name.split(".", 1)[1]: name for name in backbone.state_dict()}  # slice2.3 is layer 3
    backbone.load_state_dict({name: alexnet[f"features.{i}"] for i, name in layers.items()})
    return network.eval().requires_grad_(False)
