"""A compact residual network for 64 x 64 photographs, and the folder it is kept in.

He et al., "Deep Residual Learning for Image Recognition" (2016), basic blocks, scaled down: the
miniature's stand-in for ResNet-50, and the feature extractor of its FID. Deviations: one 3x3
stride-2 convolution as stem (64 -> 32 pixels, no max pooling), three strided stages after it.

A classifier folder holds `config.json` (architecture, widths, blocks, classes, mean, std) and
`model.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cad.errors import UserError
from cad.files import atomic_path, write_atomically
from cad.identity import immaterial
from cad.models.base import resolve_device
from evaluation.evaluators.base import Instrument, label_of, to_channels_first
from evaluation.pixels import Pixels

ARCHITECTURE = "small_resnet"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SmallResNet(nn.Module):
    """Classifier of (N, 3, H, W) images with values in [0, 1]; H = W = 64 is what it is made for.

    `forward` returns logits (N, len(classes)), `features` the pooled last stage (N, feature_dim).
    `mean` and `std` (of each channel, on the [0, 1] scale) are applied inside and are part of the
    configuration, not of the state dict. In evaluation mode images are first resized to `size`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        widths: Sequence[int] = (24, 48, 96, 128),
        blocks: int = 2,
        size: int = 72,  # pixels
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.widths = tuple(widths)
        self.blocks = blocks
        self.size = size
        self.feature_dim = self.widths[-1]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        first = self.widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(first)
        )
        self.stages = nn.Sequential()
        for i, width in enumerate(self.widths):
            entry = BasicBlock(self.widths[max(i - 1, 0)], width, 1 if i == 0 else 2)
            rest = (BasicBlock(width, width, 1) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(entry, *rest))
        self.head = nn.Linear(self.feature_dim, len(self.classes))

    def features(self, x: Tensor) -> Tensor:
        """Pooled activations (N, feature_dim) of images (N, 3, H, W) in [0, 1]."""
        if not self.training:
            x = resize(x, self.size)  # (N, 3, 72, 72)
        x = (x - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.stem(x))  # (N, 24, 36, 36)
        x = self.stages(x)  # (N, 128, 5, 5)
        return x.mean(dim=(2, 3))  # (N, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W) in [0, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits


class BasicBlock(nn.Module):
    """relu(conv-bn-relu-conv-bn(x) + shortcut(x)); a 1x1 convolution where the shape changes."""

    def __init__(self, entry: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entry, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or entry != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(entry, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))  # (N, width, h / stride, w / stride)
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


def resize(x: Tensor, size: int) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] as (N, 3, size, size), bicubic, antialiased."""
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def save_classifier(folder: Path, network: SmallResNet, dtype: torch.dtype = torch.float32) -> None:
    """Write `network` as a classifier folder; floating-point weights are stored as `dtype`."""
    config = {
        "architecture": ARCHITECTURE,
        "widths": list(network.widths),
        "blocks": network.blocks,
        "size": network.size,
        "classes": list(network.classes),
        "mean": [round(value, 6) for value in network.mean.flatten().tolist()],
        "std": [round(value, 6) for value in network.std.flatten().tolist()],
    }
    weights = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in network.state_dict().items()
    }
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary)
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def load_classifier(folder: Path) -> SmallResNet:
    """The network of a classifier folder: float32, on the CPU, eval mode, no gradients.

    Raises UserError for a folder that lacks something, is damaged, or has another architecture.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config.pop("architecture") != ARCHITECTURE:
            raise ValueError(f"its architecture is not {ARCHITECTURE!r}")
        network = SmallResNet(**config)
        network.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the classifier folder {folder} cannot be read: {error}") from error
    return network.float().eval().requires_grad_(False)


@dataclass(frozen=True)
class ClassifierFolder(Instrument):
    """A network that is kept in a classifier folder, whatever is asked of it."""

    folder: str
    device: str = immaterial()

    @cached_property
    def label(self) -> str:
        folder = Path(self.folder)
        return label_of(ARCHITECTURE, folder / CONFIG_FILE, folder / WEIGHTS_FILE)

    @cached_property
    def network(self) -> SmallResNet:
        """On the device; UserError as `load_classifier`."""
        return load_classifier(Path(self.folder)).to(resolve_device(self.device))

    def pixels(self, images: Pixels) -> Tensor:
        """uint8 (N, H, W, 3) RGB as the network takes them: (N, 3, H, W) in [0, 1]."""
        return to_channels_first(images).to(resolve_device(self.device)).float() / 255


def stage_maps(network: SmallResNet, x: Tensor) -> list[Tensor]:
    """Activations (N, width, h, w) after each stage, of images (N, 3, H, W) in [0, 1]."""
    x = F.relu(network.stem((x - network.mean) / network.std))  # (N, 24, H / 2, W / 2)
    maps = []
    for stage in network.stages:
        x = stage(x)
        maps.append(x)
    return maps
