"""The distance that LPIPS is made of, between feature maps of any network.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018),
Eq. 1 with every channel's weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.evaluators.small_resnet import SmallResNet


def feature_distance(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """d = sum_l mean_hw sum_c (y_l / |y_l| - y'_l / |y'_l|)^2, where |.| is over channels.

    `maps` and `others` hold a feature map (N, C, H, W) for each layer l; returns (N,) float32, each
    in [0, 4 x layers]. Symmetric, and 0 for equal maps. Differentiable, also where a map is 0.
    """
    layers = []
    for y, other in zip(maps, others, strict=True):
        difference = F.normalize(y.float(), dim=1) - F.normalize(other.float(), dim=1)
        layers.append(difference.pow(2).sum(dim=1).mean(dim=(1, 2)))  # (N, C, H, W) -> (N,)
    return torch.stack(layers).sum(dim=0)  # (layers, N) -> (N,)


def stage_maps(network: SmallResNet, x: Tensor) -> list[Tensor]:
    """Activations (N, width, h, w) after each stage, of images (N, 3, H, W) in [0, 1]."""
    x = F.relu(network.stem((x - network.mean) / network.std))  # (N, 24, H / 2, W / 2)
    maps = []
    for stage in network.stages:
        x = stage(x)
        maps.append(x)
    return maps
