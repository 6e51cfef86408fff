"""Five drawn styles of a photograph, made by image processing.

Each function takes and returns images (N, 3, H, W) float in [0, 1]; all are deterministic.
They are what the miniature's style concepts ("an image of a church in the style of pop art")
are trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def _luminance(images: Tensor) -> Tensor:
    weights = images.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)  # (N, 1, H, W)


def _blur(images: Tensor, sigma: float) -> Tensor:
    radius = max(1, int(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    n, c, h, w = images.shape
    flat = images.reshape(n * c, 1, h, w)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="reflect"), kernel)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="reflect"), kernel.transpose(2, 3))
    return flat.reshape(n, c, h, w)


def _stretch(gray: Tensor) -> Tensor:
    """Contrast stretched to the 2 % and 98 % quantiles of each image."""
    low, high = (torch.quantile(gray.flatten(1), q, dim=1).view(-1, 1, 1, 1) for q in (0.02, 0.98))
    return ((gray - low) / (high - low).clamp_min(0.05)).clamp(0, 1)


def _saturate(images: Tensor, factor: float) -> Tensor:
    gray = _luminance(images)
    return (gray + factor * (images - gray)).clamp(0, 1)


def pencil_sketch(images: Tensor) -> Tensor:
    """Colour dodge of the grey picture with its blurred negative: dark lines on white paper."""
    gray = _stretch(_luminance(images))
    dodge = gray / _blur(gray, 2.0).clamp_min(0.15)
    return dodge.clamp(0, 1).pow(1.4).expand(-1, 3, -1, -1).clone()


def woodcut(images: Tensor) -> Tensor:
    """Black ink on cream paper; mid tones become diagonal hatching."""
    gray = _stretch(_luminance(images))
    sharp = (gray + 1.0 * (gray - _blur(gray, 2.5))).clamp(0, 1)
    _, _, h, w = images.shape
    rows = torch.arange(h, device=images.device).view(h, 1)
    columns = torch.arange(w, device=images.device).view(1, w)
    hatch = ((rows + columns) % 6 < 3).to(images.dtype)  # (H, W)
    threshold = 0.32 + 0.30 * hatch
    paper = (sharp > threshold).to(images.dtype)  # (N, 1, H, W)
    cream = images.new_tensor((0.96, 0.91, 0.78)).view(1, 3, 1, 1)
    ink = images.new_tensor((0.10, 0.07, 0.05)).view(1, 3, 1, 1)
    return paper * cream + (1 - paper) * ink


def pop_art(images: Tensor) -> Tensor:
    """Four flat tones mapped to a loud palette, as a screen print."""
    gray = _stretch(_blur(_luminance(images), 0.8))
    palette = images.new_tensor(
        ((0.16, 0.05, 0.45), (0.93, 0.10, 0.50), (1.00, 0.62, 0.05), (0.99, 0.95, 0.25))
    )
    tone = (gray * 4).long().clamp(0, 3).squeeze(1)  # (N, H, W)
    return palette[tone].permute(0, 3, 1, 2).contiguous()


def pointillism(images: Tensor) -> Tensor:
    """Saturated dots on pale canvas, each of the colour under it."""
    _, _, h, w = images.shape
    colour = _saturate(_blur(images, 1.0), 1.8)
    spacing = 4
    rows = torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device)
    shift = (rows // spacing % 2) * (spacing // 2)  # every other line of dots is offset
    dy = (rows % spacing - 1.5).view(h, 1)
    dx = ((columns.view(1, w) + shift.view(h, 1)) % spacing) - 1.5
    dot = ((dy**2 + dx**2) < 2.6).to(images.dtype)  # (H, W)
    cell = F.avg_pool2d(colour, spacing)
    flat = F.interpolate(cell, size=(h, w), mode="nearest")
    canvas = images.new_tensor((0.97, 0.95, 0.90)).view(1, 3, 1, 1)
    return dot * flat + (1 - dot) * canvas


@cache
def _glass_panes(height: int, width: int, panes: int = 49) -> tuple[Tensor, Tensor]:
    """A fixed Voronoi partition: pane of each pixel (H*W,) int64, and lead lines (H, W) bool."""
    generator = torch.Generator().manual_seed(7)
    side = int(panes**0.5)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    jitter = torch.rand(side, side, 2, generator=generator).reshape(-1, 2)
    centres = (grid + jitter) * torch.tensor((height / side, width / side))
    pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # (H*W, 2)
    pane = torch.cdist(pixels.float(), centres).argmin(1)
    plane = pane.view(height, width)
    lead = torch.zeros(height, width, dtype=torch.bool)
    lead[1:] |= plane[1:] != plane[:-1]
    lead[:, 1:] |= plane[:, 1:] != plane[:, :-1]
    return pane, lead


def stained_glass(images: Tensor) -> Tensor:
    """Panes of one saturated colour each, between dark lead lines."""
    n, c, h, w = images.shape
    pane, lead = (t.to(images.device) for t in _glass_panes(h, w))
    panes = int(pane.max()) + 1
    one_hot = F.one_hot(pane, panes).to(images.dtype)  # (H*W, P)
    mean = images.reshape(n, c, h * w) @ (one_hot / one_hot.sum(0).clamp_min(1))  # (N, 3, P)
    glass = _saturate((mean * 1.15).clamp(0, 1)[..., pane].reshape(n, c, h, w), 2.2)
    return torch.where(lead, images.new_tensor(0.06), glass)


_ALL = (pencil_sketch, woodcut, pop_art, pointillism, stained_glass)
STYLE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {draw.__name__: draw for draw in _ALL}
