"""Stage 6: the denoising UNet, conditioned on the frozen text encoder of stage 3.

v-prediction on Stable Diffusion's noise schedule; captions are dropped at random, so the empty
prompt is the unconditional model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from cad.errors import UserError
from experiments.miniature.captions import PLAIN, SUBJECTS, Key, caption_table, tokenize
from experiments.miniature.clip import draw_styles
from experiments.miniature.stages import Workshop
from experiments.miniature.training import Schedule, train


def run(
    workshop: Workshop,
    schedule: Schedule,
    channels: tuple[int, ...],
    plain_levels: int,
    heads: int,
    groups: int,
    styled: float,
    subjectless: float,
    dropped: float,
    emphasis: dict[str, int],
) -> dict[str, int]:
    """Train, write workshop.folder/denoiser/, and return its size.

    `styled`: share of pictures in a drawn style; `subjectless`: of these, the share whose caption
    names the style alone; `dropped`: share of captions replaced by the empty one; `emphasis`: how
    many times as often as others a subject is drawn. UserError for an unknown subject in it.
    """
    folder = workshop.stage("denoiser")
    data = load_file(workshop.stage("latents") / "latents.safetensors")
    latents, labels = data["latents"], data["labels"]
    scale = scaling_factor(latents)
    states = CaptionStates(workshop)
    by_class = [(labels == c).nonzero().squeeze(1) for c in turns(emphasis)]
    network = workshop.place(
        build_denoiser(
            latents.shape[2],
            latents.shape[3],
            channels,
            plain_levels=plain_levels,
            heads=heads,
            groups=groups,
            text_width=states.width,
        )
    )
    noise_schedule = build_scheduler()

    def loss(generator: torch.Generator, step: int) -> Tensor:
        n = schedule.batch_size
        index, styles = draw_pictures(by_class, n, styled, generator)
        x_0 = workshop.place(latents[index, styles].float() * scale)  # (B, C, h, w)
        c = states.draw(labels[index], styles, subjectless, dropped, generator)  # (B, L, D)
        noise = workshop.place(torch.randn(x_0.shape, generator=generator))
        t = workshop.place(stratified_timesteps(n, generator))
        x_t = noise_schedule.add_noise(x_0, noise, t)
        v = noise_schedule.get_velocity(x_0, noise, t)
        return F.mse_loss(network(x_t, t, c).sample.float(), v)

    average = train(network, loss, schedule, folder, workshop.seed)
    assert isinstance(average, UNet2DConditionModel)
    average.cpu().save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in average.parameters())}


def build_denoiser(
    latent_channels: int,
    latent_size: int,
    channels: tuple[int, ...],
    plain_levels: int,
    heads: int,
    groups: int,
    text_width: int,
) -> UNet2DConditionModel:
    """An untrained UNet, one residual block a level and way, a transformer block after each.

    The first `plain_levels` levels, of the highest resolution, have no transformers, which would
    cost the most there.
    """
    inner = len(channels) - plain_levels
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D",) * plain_levels + ("CrossAttnDownBlock2D",) * inner,
        up_block_types=("CrossAttnUpBlock2D",) * inner + ("UpBlock2D",) * plain_levels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=heads,  # number of heads, as in Stable Diffusion 1's configuration
        norm_num_groups=groups,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, for v-prediction.

    Sampling starts at the last timestep ("trailing"), where training ended.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def scaling_factor(latents: Tensor) -> float:
    """1 / standard deviation: what makes the scaled latents' variance one."""
    return round(1 / float(latents.float().std()), 5)


def turns(emphasis: dict[str, int]) -> list[int]:
    """The subjects' labels, in the order in which a batch draws them; emphasised ones repeated."""
    unknown = sorted(set(emphasis) - set(SUBJECTS))
    if unknown:
        raise UserError(f"denoiser.emphasis: {unknown} are none of the subjects {list(SUBJECTS)}")
    return [label for label, name in enumerate(SUBJECTS) for _ in range(emphasis.get(name, 1))]


def draw_pictures(
    by_class: list[Tensor], n: int, styled: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices (N,) of pictures, one after another of each of `by_class`, and their styles (N,)."""
    subjects = torch.arange(n) % len(by_class)
    draws = torch.rand(n, generator=generator).tolist()
    members = [by_class[s] for s in subjects.tolist()]
    index = torch.stack([m[int(d * len(m))] for m, d in zip(members, draws, strict=True)])
    return index, draw_styles(n, styled, generator)


def stratified_timesteps(n: int, generator: torch.Generator) -> Tensor:
    """(N,) int64 in [0, 1000), one from each n-th of the range, in random order."""
    strata = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)
    return (strata * 1000 / n).long().clamp_max(999)


class CaptionStates:
    """Hidden states of every training caption, computed once by the frozen text encoder."""

    def __init__(self, workshop: Workshop) -> None:
        folder = workshop.stage("clip")
        encoder = CLIPModel.from_pretrained(folder).text_model.eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.first: dict[Key, int] = {}
        self.count: dict[Key, int] = {}
        captions = [""]
        for key, texts in caption_table().items():
            self.first[key], self.count[key] = len(captions), len(texts)
            captions += texts
        with torch.inference_mode():
            ids = tokenize(tokenizer, captions)
            states = encoder(input_ids=ids).last_hidden_state  # (captions, L, D)
        self.states: Tensor = workshop.place(states.clone())
        self.width = states.shape[-1]

    def draw(
        self,
        labels: Tensor,
        styles: Tensor,
        subjectless: float,
        dropped: float,
        generator: torch.Generator,
    ) -> Tensor:
        """A random caption's states for each picture, (N, L, D); index 0 is the empty prompt."""
        draws = torch.rand(len(labels), 3, generator=generator).tolist()
        rows = []
        for label, style, (a, b, d) in zip(labels.tolist(), styles.tolist(), draws, strict=True):
            key: Key = (None if style != PLAIN and a < subjectless else label, style)
            row = self.first[key] + int(b * self.count[key])
            rows.append(0 if d < dropped else row)
        return self.states[rows]
