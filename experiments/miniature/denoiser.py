"""Stage 4: the denoising UNet, conditioned on the frozen text encoder of stage 2.

It predicts the clean latent on Stable Diffusion's noise schedule: where latents have many
channels, that is easier than the noise or v (Li and He, "Back to Basics: Let Denoising Generative
Models Denoise", 2025). Captions are dropped at random, so the empty prompt is the unconditional
model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Generator, Tensor
from transformers import CLIPModel, CLIPTokenizer

from cad.errors import UserError
from experiments.miniature.captions import PLAIN, SUBJECTS, Captions, tokenize
from experiments.miniature.clip import draw_styles
from experiments.miniature.training import Schedule, Workshop


def run(
    workshop: Workshop,
    schedule: Schedule,
    channels: tuple[int, ...],
    heads: int,
    groups: int,
    max_weight: float,
    styled: float,
    subjectless: float,
    dropped: float,
    frequency: dict[str, float],
) -> dict[str, int]:
    """Train, write workshop.folder/denoiser/, and return its size.

    `max_weight`: bound of the loss's weight; `styled`: share of pictures in a drawn style;
    `subjectless`: of these, the share whose caption names the style alone; `dropped`: share of
    captions replaced by the empty one; `frequency`: how often a subject is drawn, others 1.
    UserError for an unknown subject in it.
    """
    device = workshop.device
    data = load_file(workshop.stage("latents") / "latents.safetensors")
    latents, labels = data["latents"], data["labels"]
    captions = Captions()
    states = encode(workshop.stage("clip"), [*captions.texts, ""]).to(device)  # (.. + 1, L, D)
    by_class = [(labels == c).nonzero().squeeze(1) for c in range(len(SUBJECTS))]
    shares = subject_shares(frequency)
    sizes = *latents.shape[2:4], channels, heads, groups, states.shape[-1]
    network = build_denoiser(*sizes).to(device)
    alphas_cumprod = build_scheduler().alphas_cumprod.to(device)

    def loss(generator: Generator) -> Tensor:
        n = schedule.batch_size
        subjects = draw_subjects(shares, n, generator)  # (B,)
        index = draw_members(by_class, subjects, generator)
        styles = draw_styles(n, styled, generator)
        x_0 = latents[index, styles].float().to(device)  # (B, C, h, w)
        rows = draw_captions(captions, subjects, styles, subjectless, dropped, generator)
        c = states[rows].float()  # (B, L, D)
        noise = torch.randn(x_0.shape, generator=generator).to(device)
        t = stratified_timesteps(n, generator).to(device)
        signal = alphas_cumprod[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        x_t = signal.sqrt() * x_0 + (1 - signal).sqrt() * noise
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        error: Tensor = (network(x_t, t, c).sample.float() - x_0).square()
        return (loss_weight(signal, max_weight) * error).mean()

    average: UNet2DConditionModel = workshop.train("denoiser", network, loss, schedule).cpu()
    average.save_pretrained(workshop.stage("denoiser"))
    return {"parameters": sum(p.numel() for p in average.parameters())}


def build_denoiser(
    latent_channels: int,
    latent_size: int,
    channels: tuple[int, ...],
    heads: int,
    groups: int,
    text_width: int,
) -> UNet2DConditionModel:
    """An untrained UNet, one residual block a level and way, a transformer block after each."""
    network = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=heads,  # number of heads, as in Stable Diffusion 1's configuration
        norm_num_groups=groups,
    )
    return network.to(memory_format=torch.channels_last)


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule, for a network that predicts the clean latent.

    DPM-Solver++ of second order, which gives in ten steps what DDIM gives in twenty. Sampling
    starts at the last timestep ("trailing"), where training ended.
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type="sample",
        timestep_spacing="trailing",
    )


def loss_weight(signal: Tensor, max_weight: float) -> Tensor:
    """1 / sigma^2 = 1 / (1 - alphas_cumprod): the v-loss's weight of the clean latent, bounded."""
    return (1 / (1 - signal)).clamp(max=max_weight)


def subject_shares(frequency: dict[str, float]) -> Tensor:
    """How much of the pictures each of SUBJECTS has, (subjects,), adding up to one."""
    unknown = sorted(set(frequency) - set(SUBJECTS))
    if unknown:
        raise UserError(f"denoiser.frequency: {unknown} are none of the subjects {list(SUBJECTS)}")
    weights = torch.tensor([frequency.get(name, 1.0) for name in SUBJECTS], dtype=torch.float64)
    return weights / weights.sum()


def draw_subjects(shares: Tensor, n: int, generator: Generator) -> Tensor:
    """Labels (N,) int64, each as often as its share asks for, give or take less than one."""
    places = (torch.arange(n) + torch.rand(1, generator=generator)) / n
    return torch.searchsorted(shares.cumsum(0), places.double()).clamp_max(len(shares) - 1)


def draw_members(by_class: list[Tensor], subjects: Tensor, generator: Generator) -> Tensor:
    """The index of a random picture of each of `subjects`, (N,) int64."""
    draws = torch.rand(len(subjects), generator=generator).tolist()
    members = [by_class[s] for s in subjects.tolist()]
    return torch.stack([m[int(d * len(m))] for m, d in zip(members, draws, strict=True)])


def stratified_timesteps(n: int, generator: Generator) -> Tensor:
    """(N,) int64 in [0, 1000), one from each n-th of the range, in random order."""
    strata = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)
    return (strata * 1000 / n).long().clamp_max(999)


@torch.inference_mode()
def encode(folder: Path, captions: list[str]) -> Tensor:
    """Hidden states (N, L, D) float16 of captions by the text encoder of a CLIP's folder."""
    encoder = CLIPModel.from_pretrained(folder).text_model.eval()
    ids = tokenize(CLIPTokenizer.from_pretrained(folder), captions)
    parts = [encoder(input_ids=part).last_hidden_state.half() for part in ids.split(256)]
    return torch.cat(parts).clone()


def draw_captions(
    captions: Captions,
    subjects: Tensor,
    styles: Tensor,
    subjectless: float,
    dropped: float,
    generator: Generator,
) -> list[int]:
    """The place of a random caption for each picture; -1, the last place, for the empty one."""
    draws = torch.rand(len(subjects), 3, generator=generator).tolist()
    rows = []
    for subject, style, (a, b, d) in zip(subjects.tolist(), styles.tolist(), draws, strict=True):
        named = None if style != PLAIN and a < subjectless else subject
        rows.append(-1 if d < dropped else captions.draw((named, style), b))
    return rows
