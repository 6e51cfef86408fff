"""LPIPS: how far the edit moved an image, perceptually.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), as in
the paper's Table 5. Over the target's prompts a large distance means that the edit bites, over the
others' a small one that it spares them; `higher_is_better` is the second reading.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version as installed
from pathlib import Path
from typing import ClassVar

import lpips
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import resize

from cad.checks import whole
from cad.identity import immaterial
from cad.models.base import resolve_device
from evaluation.evaluators import small_resnet
from evaluation.evaluators.base import (
    Download,
    Evaluator,
    Instrument,
    Metric,
    Record,
    label_of,
    to_channels_first,
)
from evaluation.pixels import Pixels, require_uint8
from evaluation.prompts import Prompt

ALEXNET = Download(
    what="torchvision's AlexNet",
    metric="lpips",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    digest="7be5be79",
    size_mb=233,
)
HEADS = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"  # shipped with the package
SMALLEST = 32  # pixels; AlexNet's second pooling needs 31


class Distance(Instrument):
    """Distances of pairs of images."""

    @abstractmethod
    def distances(self, images: Pixels, references: Pixels) -> Tensor:
        """(N,) float32 on the CPU, of two uint8 (N, H, W, 3) RGB arrays; exactly 0 for equals."""


@dataclass(frozen=True)
class LPIPS(Evaluator):
    """Mean distance between the edited and the unedited image. Records: distance, at least 0."""

    name: ClassVar[str] = "lpips"
    unit: ClassVar[str] = "distance"
    higher_is_better: ClassVar[bool] = False
    decimals: ClassVar[int] = 3
    paired: ClassVar[bool] = True

    distance: Distance

    @property
    def instrument(self) -> str:
        return self.distance.label

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.distance.load()

    def score(
        self, images: Pixels, prompts: Sequence[Prompt], references: Pixels | None = None
    ) -> list[Record]:
        require_uint8(images)
        if references is None or len(images) != len(references):
            raise TypeError("lpips compares pairs: every image needs its unedited reference")
        require_uint8(references)
        distances = self.distance.distances(images, references)
        return [{"distance": round(distance, 6)} for distance in distances.tolist()]

    def aggregate(self, records: Sequence[Record]) -> Metric:
        return self.mean(records, "distance")


@dataclass(frozen=True)
class AlexNetDistance(Distance):
    """The lpips package's metric, version 0.1: torchvision's AlexNet with the heads it ships.

    Images are resized to `size` pixels, bilinear and antialiased, in 8 bits.
    """

    libraries = ("lpips", "torchvision")

    size: int
    device: str = immaterial()

    def __post_init__(self) -> None:
        whole(SMALLEST)("model.perceptual_distance.size", self.size)

    @property
    def label(self) -> str:
        networks = f"{ALEXNET.path.stem}/{label_of('heads', HEADS)}"
        return f"lpips-{installed('lpips')}/{networks}/{self.size}px"

    @cached_property
    def network(self) -> nn.Module:
        """The package's, which itself would download AlexNet unverified."""
        alexnet = torch.load(ALEXNET.fetch(), map_location="cpu", weights_only=True)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", category=UserWarning)  # it calls an older torchvision
            network: nn.Module = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        backbone = network.get_submodule("net")
        layers = {name.split(".", 1)[1]: name for name in backbone.state_dict()}  # slice2.3: 3
        backbone.load_state_dict({name: alexnet[f"features.{i}"] for i, name in layers.items()})
        return network.eval().requires_grad_(False).to(resolve_device(self.device))

    @torch.no_grad()
    def distances(self, images: Pixels, references: Pixels) -> Tensor:
        distances: Tensor = self.network(self._prepare(images), self._prepare(references))
        return distances.flatten().float().cpu()  # (N, 1, 1, 1) -> (N,)

    def _prepare(self, images: Pixels) -> Tensor:
        """(N, 3, size, size) in [-1, 1]."""
        x: Tensor = resize(to_channels_first(images), [self.size, self.size], antialias=True)
        return x.to(resolve_device(self.device)).float() / 127.5 - 1


class StageDistance(small_resnet.ClassifierFolder, Distance):
    """LPIPS's distance on the shipped classifier's stages, without learned heads.

    It is the package's `LPIPS(lpips=False)` with another backbone: `feature_distance` over the four
    stages of the miniature's `SmallResNet`, on images resized as it resizes them to classify them.
    Zhang et al. found that deep features agree with people far better than pixels do, whatever the
    network, and without learned weights already. It is not calibrated on human judgements, nor on
    the scale of AlexNet's LPIPS: compare edits of the miniature with it.
    """

    @property
    def label(self) -> str:
        return f"stage_distance-1/{super().label}"

    @torch.no_grad()
    def distances(self, images: Pixels, references: Pixels) -> Tensor:
        return feature_distance(self._maps(images), self._maps(references)).cpu()

    def _maps(self, images: Pixels) -> list[Tensor]:
        x = small_resnet.resize(self.pixels(images), self.network.size)
        return small_resnet.stage_maps(self.network, x)


def feature_distance(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """d = sum_l mean_hw sum_c (y_l / |y_l| - y'_l / |y'_l|)^2, where |.| is over channels.

    Zhang et al., Eq. 1 with every channel's weight 1. `maps` and `others` hold a feature map
    (N, C, H, W) for each layer l; returns (N,) float32. Differentiable, also where a map is 0.
    """
    layers = []
    for y, other in zip(maps, others, strict=True):
        difference = F.normalize(y.float(), dim=1) - F.normalize(other.float(), dim=1)
        layers.append(difference.pow(2).sum(dim=1).mean(dim=(1, 2)))  # (N, C, H, W) -> (N,)
    return torch.stack(layers).sum(dim=0)  # (layers, N) -> (N,)
