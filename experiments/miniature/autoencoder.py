"""Stage 5: the miniature's own autoencoder between 64 x 64 pixels and the teacher's latents.

Both halves learn by regression alone. The encoder gives the teacher's latents, normalised; the
decoder draws, from these with a little noise, the teacher's picture and the photograph: L1 on
pixels and on their gradients, and a perceptual term on the selector's features (Johnson et al.,
2016; as LPIPS, unit-normalised over channels). The teacher is not needed afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Generator, Tensor

from evaluation.evaluators.lpips import feature_distance
from evaluation.evaluators.small_resnet import SmallResNet, load_classifier, stage_maps
from experiments.miniature.clip import draw_styles, stylise
from experiments.miniature.data import SIZE
from experiments.miniature.teacher import load_teacher
from experiments.miniature.training import Schedule, Workshop

CERTAIN = -10.0  # log-variance of the latents' distribution: who samples it gets its mean


def run(
    workshop: Workshop,
    schedule: Schedule,
    teacher: str,
    channels: tuple[int, ...],
    groups: int,
    styled: float,
    encoded: float,
    noise: float,
    weights: dict[str, float],
) -> dict[str, float]:
    """Train, write workshop.folder/autoencoder/, and return its scores.

    `styled`: share of pictures in a drawn style; `encoded`: share of a batch that the encoder
    learns from; `noise`: largest standard deviation of what is added to the decoder's latents;
    `weights` multiplies the terms photograph, gradient and perceptual beside the L1 to the
    teacher's picture.
    """
    device = workshop.device
    data = load_file(workshop.stage("latents") / "latents.safetensors")
    latents, index = data["latents"], data["index"]
    mean, std = (data[key].view(-1, 1, 1).to(device) for key in ("mean", "std"))
    photographs = workshop.photographs["generator"]
    selector = load_classifier(workshop.stage("selector")).to(device)
    teacher_decoder = load_teacher(teacher)[1].to(device)
    network = build_autoencoder(channels, latents.shape[2], groups).to(device)
    n = schedule.batch_size
    k = max(1, round(encoded * n))

    def loss(generator: Generator) -> Tensor:
        chosen = torch.randint(len(latents), (n,), generator=generator)
        styles = draw_styles(n, styled, generator)
        z = latents[chosen, styles].float().to(device)  # (B, C, h, w)
        pixels = photographs.pixels(index[chosen])
        mirrored = (chosen >= len(latents) // 2).view(-1, 1, 1, 1)
        pixels = stylise(torch.where(mirrored, pixels.flip(3), pixels), styles)
        pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            shown = teacher_decoder(z * std + mean).float().clamp(0, 1)
        drawn = network.decode(shaken(z, noise, generator)).sample.float() / 2 + 0.5
        return (
            picture_loss(selector, drawn, shown, weights)
            + weights["photograph"] * F.l1_loss(drawn, pixels)
            + encoder_loss(network, pixels[:k], z[:k])
        )

    average: AutoencoderKL = workshop.train("autoencoder", network, loss, schedule).cpu()
    average.save_pretrained(workshop.stage("autoencoder"))
    return measure(average, workshop, mean.cpu(), std.cpu(), teacher)


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
        sample_size=SIZE,
        scaling_factor=1.0,  # the latents are normalised
        mid_block_add_attention=False,  # convolutions alone are cheaper
        force_upcast=False,
    )
    return network.to(memory_format=torch.channels_last)


def shaken(z: Tensor, noise: float, generator: Generator) -> Tensor:
    """Latents (N, C, h, w) with noise of a standard deviation between 0 and `noise`."""
    amount = noise * torch.rand(len(z), 1, 1, 1, generator=generator)
    return z + (amount * torch.randn(z.shape, generator=generator)).to(z.device)


def picture_loss(
    selector: SmallResNet, drawn: Tensor, wanted: Tensor, weights: dict[str, float]
) -> Tensor:
    """Between pictures (N, 3, H, W): L1, and `weights` times the terms gradient and perceptual."""
    gradient = weights["gradient"] * gradient_loss(drawn, wanted)
    perceptual = weights["perceptual"] * perceptual_loss(selector, drawn, wanted)
    return F.l1_loss(drawn, wanted) + gradient + perceptual


def encoder_loss(network: AutoencoderKL, pixels: Tensor, z: Tensor) -> Tensor:
    """Mean squared error to the teacher's latents; the log-variance is pulled to CERTAIN."""
    posterior = network.encode(pixels * 2 - 1).latent_dist
    uncertainty: Tensor = (posterior.logvar.float() - CERTAIN).square().mean()
    return F.mse_loss(posterior.mean.float(), z) + 1e-3 * uncertainty


def gradient_loss(drawn: Tensor, pixels: Tensor) -> Tensor:
    """L1 between the pictures' horizontal and vertical differences: keeps edges."""
    horizontal = F.l1_loss(drawn.diff(dim=3), pixels.diff(dim=3))
    return horizontal + F.l1_loss(drawn.diff(dim=2), pixels.diff(dim=2))


def perceptual_loss(classifier: SmallResNet, drawn: Tensor, pixels: Tensor) -> Tensor:
    """Mean distance of the feature maps after the classifier's first three stages."""
    with torch.no_grad():
        wanted = stage_maps(classifier, pixels)[:3]
    return feature_distance(stage_maps(classifier, drawn)[:3], wanted).mean()


@torch.inference_mode()
def measure(
    network: AutoencoderKL, workshop: Workshop, mean: Tensor, std: Tensor, teacher: str
) -> dict[str, float]:
    """PSNR (dB) on held-out photographs of our way there and back, beside the teacher's.

    `psnr_to_teacher`: of our decoder's pictures to the teacher's, from the same latents;
    `latent_error`: mean squared error of our latents, whose variance is one.
    """
    held_out = workshop.photographs["val"]
    pixels = held_out.pixels(torch.arange(0, len(held_out), 10))
    encoder, decoder = load_teacher(teacher)
    measured = []
    for part in pixels.split(64):
        raw = encoder(part)
        z = (raw - mean) / std
        encoded = network.encode(part * 2 - 1).latent_dist.mode()
        theirs = decoder(raw).clamp(0, 1)
        ours, from_z = (network.decode(each).sample / 2 + 0.5 for each in (encoded, z))
        pairs = (ours.clamp(0, 1), part), (theirs, part), (from_z.clamp(0, 1), theirs), (encoded, z)
        measured.append(torch.stack([(a - b).square().mean((1, 2, 3)) for a, b in pairs]))  # (4, B)
    errors = torch.cat(measured, dim=1)
    ratios = (-10 * errors[:3].log10()).mean(dim=1).tolist()
    names = ("psnr", "psnr_of_teacher", "psnr_to_teacher")
    return dict(zip(names, ratios, strict=True)) | {"latent_error": float(errors[3].mean())}
