"""Stage 4: the autoencoder between 64 x 64 pixels and the latents.

L1 on pixels and on their gradients, a perceptual term on the classifier's features (Johnson et
al., 2016; as LPIPS, unit-normalised over channels), and a light pull of the latents towards a
unit Gaussian.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from evaluation.evaluators.lpips import feature_distance
from evaluation.evaluators.small_resnet import SmallResNet, load_classifier, stage_maps
from experiments.miniature.classifier import typical
from experiments.miniature.clip import draw_styles, stylise
from experiments.miniature.data import Photographs
from experiments.miniature.stages import Workshop
from experiments.miniature.training import Schedule, train


def run(
    workshop: Workshop,
    schedule: Schedule,
    channels: tuple[int, ...],
    latent_channels: int,
    groups: int,
    styled: float,
    per_subject: int,
    weights: dict[str, float],
) -> dict[str, float]:
    """Train on the typical photographs, write workshop.folder/autoencoder/, return its scores.

    `weights` multiplies the terms gradient, perceptual and kl beside the pixels' L1.
    """
    folder = workshop.stage("autoencoder")
    judge = workshop.place(load_classifier(workshop.stage("classifier")))
    photographs = workshop.photographs("train")
    index = typical(judge, photographs, per_subject)
    network = workshop.place(build_autoencoder(channels, latent_channels, groups))

    def loss(generator: torch.Generator, step: int) -> Tensor:
        chosen = index[torch.randint(len(index), (schedule.batch_size,), generator=generator)]
        pixels = photographs.pixels(chosen)
        pixels = stylise(pixels, draw_styles(len(pixels), styled, generator))
        pixels = workshop.place(pixels).contiguous(memory_format=torch.channels_last)
        posterior = network.encode(pixels * 2 - 1).latent_dist
        latents = posterior.sample()  # (B, C, h, w)
        drawn = network.decode(latents).sample.float() / 2 + 0.5
        return (
            F.l1_loss(drawn, pixels)
            + weights["gradient"] * gradient_loss(drawn, pixels)
            + weights["perceptual"] * perceptual_loss(judge, drawn, pixels)
            + weights["kl"] * kl_per_element(posterior.mean, posterior.logvar)
        )

    average = train(network, loss, schedule, folder, workshop.seed)
    assert isinstance(average, AutoencoderKL)
    average.cpu().save_pretrained(folder)
    return measure(average, workshop, judge.cpu())


def build_autoencoder(
    channels: tuple[int, ...], latent_channels: int, groups: int
) -> AutoencoderKL:
    """An untrained AutoencoderKL that halves the picture once for each channel width but one."""
    network = AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=groups,
        sample_size=64,
        mid_block_add_attention=False,  # convolutions alone are cheaper
    )
    return network.to(memory_format=torch.channels_last)


def gradient_loss(drawn: Tensor, pixels: Tensor) -> Tensor:
    """L1 between the pictures' horizontal and vertical differences: keeps edges."""
    horizontal = F.l1_loss(drawn.diff(dim=3), pixels.diff(dim=3))
    return horizontal + F.l1_loss(drawn.diff(dim=2), pixels.diff(dim=2))


def perceptual_loss(judge: SmallResNet, drawn: Tensor, pixels: Tensor) -> Tensor:
    """Mean distance of the feature maps after the classifier's first three stages."""
    with torch.no_grad():
        wanted = stage_maps(judge, pixels)[:3]
    return feature_distance(stage_maps(judge, drawn)[:3], wanted).mean()


def kl_per_element(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)), mean over latent elements."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


@torch.inference_mode()
def reconstruct(network: nn.Module, pixels: Tensor) -> Tensor:
    """Pictures through the autoencoder (posterior mode), (N, 3, 64, 64) in [0, 1]."""
    assert isinstance(network, AutoencoderKL)
    latents = network.encode(pixels * 2 - 1).latent_dist.mode()
    drawn: Tensor = network.decode(latents).sample / 2 + 0.5
    return drawn.clamp(0, 1)


@torch.inference_mode()
def measure(network: AutoencoderKL, workshop: Workshop, judge: SmallResNet) -> dict[str, float]:
    """Held-out PSNR (dB), and the classifier's accuracy on reconstructions."""
    held_out: Photographs = workshop.photographs("val")
    some = torch.arange(0, len(held_out), 10)
    pixels = held_out.pixels(some)
    drawn = torch.cat([reconstruct(network, part) for part in pixels.split(64)])
    psnr = -10 * (drawn - pixels).pow(2).mean((1, 2, 3)).log10().mean()
    accuracy = (judge(drawn).argmax(1) == held_out.labels[some]).float().mean()
    return {"psnr": float(psnr), "accuracy_on_reconstructions": float(accuracy)}
