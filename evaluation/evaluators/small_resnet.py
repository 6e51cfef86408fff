"""A compact residual network for 64 x 64 photographs, and the folder it is kept in.

He et al., "Deep Residual Learning for Image Recognition" (2016), basic blocks, scaled down: the
miniature's stand-in for ResNet-50, and the feature extractor of its FID. Deviations: one 3x3
stride-2 convolution as stem (64 -> 32 pixels, no max pooling), three strided stages after it.

A classifier folder holds `config.json` (architecture, widths, blocks, classes, mean, std) and
`model.safetensors`. The network normalises its own input, so callers pass pixels in [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cad.errors import UserError
from cad.files import atomic_path

ARCHITECTURE = "small_resnet"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WIDTHS = (24, 48, 96, 128)
BLOCKS = 2
SIZE = 72  # pixels
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
        widths: Sequence[int] = WIDTHS,
        blocks: int = BLOCKS,
        size: int = SIZE,
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
        entries = (first, *self.widths[:-1])
        strides = (1, *(2 for _ in self.widths[1:]))
        self.stages = nn.Sequential(
            *(
                _stage(*shape, blocks=blocks)
                for shape in zip(entries, self.widths, strides, strict=True)
            )
        )
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
        self.shortcut: nn.Module = nn.Identity()
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
    """Write `network` as a classifier folder; floating-point weights are stored as `dtype`.

    Each file is written beside its place and renamed, so a killed call leaves no half file.
    """
    folder = Path(folder)
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
    with atomic_path(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path) -> SmallResNet:
    """The network of a classifier folder: float32, on the CPU, eval mode, no gradients.

    Raises UserError when a file is missing or damaged, a key is missing, or the architecture is
    another one.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"classifier folder {folder} has no {name}")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    wanted = {"architecture", "widths", "blocks", "size", "classes", "mean", "std"}
    if set(config) != wanted:
        raise UserError(
            f"{folder / CONFIG_FILE} has the keys {sorted(config)}; expected {sorted(wanted)}"
        )
    if config.pop("architecture") != ARCHITECTURE:
        raise UserError(f"{folder / CONFIG_FILE}: architecture must be {ARCHITECTURE!r}")
    network = SmallResNet(**config)
    try:
        network.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} is not this network's: {error}") from error
    return network.float().eval().requires_grad_(False)


def _stage(entry: int, width: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (BasicBlock(width, width, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(entry, width, stride), *rest)
