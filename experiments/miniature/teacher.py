"""Stage 3: latents of typical photographs by a teacher, which the autoencoder learns from too.

The teacher is the published tiny autoencoder of FLUX.2's latents:
`taef2_encoder.pth` and `taef2_decoder.pth` of github.com/madebyollin/taesd (MIT), in the form of
that repository's `Encoder` and `Decoder`: pictures (N, 3, 8h, 8w) in [0, 1], latents (N, 32, h, w)
of about unit variance. It is read while the miniature is trained and is no part of what ships. Its
latents are normalised for each channel, and the miniature's own autoencoder learns the normalised
ones, so that the pipeline needs no scaling factor.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from cad.errors import UserError
from evaluation.evaluators.small_resnet import load_classifier
from experiments.miniature.captions import PLAIN
from experiments.miniature.classifier import typical
from experiments.miniature.clip import stylise
from experiments.miniature.training import Workshop

WIDTH = 64
LATENT_CHANNELS = 32
BATCH = 32  # photographs, each of them in 2 x 6 versions
BLOCKS = 3  # at each resolution but the highest, which has one


@torch.inference_mode()
def run_latents(workshop: Workshop, per_subject: int, teacher: str) -> dict[str, float]:
    """Write workshop.folder/latents/latents.safetensors.

    `latents` (2 M, styles + 1, C, h, w) float16, normalised, the plain photograph last, mirror
    images behind the M photographs; `labels` (2 M,) int64; `index` (2 M,) int64, of the generator's
    half; `mean` and `std` (C,) of the plain ones, float32. UserError without the teacher's files.
    """
    encoder = load_teacher(teacher)[0].to(workshop.device)
    photographs = workshop.photographs["generator"]
    selector = load_classifier(workshop.stage("selector"))
    index = typical(selector, photographs, per_subject)
    parts = []
    for mirrored in (False, True):
        for chosen in tqdm(index.split(BATCH), desc="latents", unit="batch", disable=None):
            pixels = photographs.pixels(chosen)
            stack = in_every_style(pixels.flip(3) if mirrored else pixels)
            stack = stack.to(workshop.device, memory_format=torch.channels_last)
            encoded = encoder(stack)
            parts.append(encoded.unflatten(0, (-1, PLAIN + 1)).half().cpu())
    latents = torch.cat(parts)  # (2 M, S + 1, C, h, w)
    plain = latents[:, PLAIN].float()
    mean, std = plain.mean((0, 2, 3)), plain.std((0, 2, 3))  # (C,)
    for part in latents.split(256):
        part.copy_((part.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    save_file(
        {
            "latents": latents,
            "labels": photographs.labels[index].repeat(2),
            "index": index.repeat(2),
            "mean": mean,
            "std": std,
        },
        workshop.stage("latents") / "latents.safetensors",
    )
    return {"count": len(latents), "std_before": float(plain.std())}


def in_every_style(pixels: Tensor) -> Tensor:
    """Each picture in every style, the plain one last, (N (styles + 1), 3, H, W)."""
    versions = [stylise(pixels, torch.full((len(pixels),), s)) for s in range(PLAIN + 1)]
    return torch.stack(versions, dim=1).flatten(0, 1)


def load_teacher(folder: str) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder: float32, on the CPU, evaluation mode, without gradients.

    Raises UserError if a file is missing or holds another network.
    """
    parts = (("taef2_encoder.pth", build_encoder()), ("taef2_decoder.pth", build_decoder()))
    for name, network in parts:
        path = Path(folder).expanduser() / name
        if not path.is_file():
            raise UserError(f"teacher={folder}: no file {name}")
        try:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except RuntimeError as error:
            raise UserError(f"teacher={folder}: {name} is another network's ({error})") from error
        network.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return parts[0][1], parts[1][1]


def build_encoder() -> nn.Sequential:
    """Pictures to latents, (N, 3, 8h, 8w) -> (N, 32, h, w)."""
    layers: list[nn.Module] = [_convolution(3, WIDTH), Block()]
    for level in range(3):
        layers.append(_convolution(WIDTH, WIDTH, stride=2, bias=False))
        layers += [Block(pooled=level == 2) for _ in range(BLOCKS)]
    return nn.Sequential(*layers, _convolution(WIDTH, LATENT_CHANNELS))


def build_decoder() -> nn.Sequential:
    """Latents to pictures, (N, 32, h, w) -> (N, 3, 8h, 8w)."""
    layers: list[nn.Module] = [SoftClamp(), _convolution(LATENT_CHANNELS, WIDTH), nn.ReLU()]
    for level in range(3):
        layers += [Block(pooled=level == 0) for _ in range(BLOCKS)]
        layers += [nn.Upsample(scale_factor=2), _convolution(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*layers, Block(), _convolution(WIDTH, 3))


class SoftClamp(nn.Module):
    """Bounds latents smoothly by 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(AutoencoderTinyBlock):  # type: ignore[misc]
    """A residual block; `pooled` ones first mix channels with statistics over the whole picture."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__(WIDTH, WIDTH, "relu")
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = super().forward(x + self.pool(x) if self.pooled else x)
        return mixed


def _convolution(entry: int, width: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(entry, width, 3, stride=stride, padding=1, bias=bias)
