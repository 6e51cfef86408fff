"""Stage 8: the autoencoder's decoder learns on what the denoiser draws, too.

Drawn latents are not quite those of photographs, and a regression towards photographs blurs. The
teacher's decoder says what any latents show, so here the decoder learns that alone: L1 on pixels,
on their gradients, and the perceptual term of the autoencoder's stage. The encoder stays as it is.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from tqdm import tqdm

from cad.identity import short_digest
from cad.models.stable_diffusion import StableDiffusionModel
from cad.sampling import sample_latents
from evaluation.evaluators.small_resnet import load_classifier
from experiments.miniature.autoencoder import measure, picture_loss, shaken
from experiments.miniature.captions import SUBJECTS, Captions
from experiments.miniature.clip import draw_styles
from experiments.miniature.data import SIZE
from experiments.miniature.export import assemble
from experiments.miniature.teacher import load_teacher
from experiments.miniature.training import Schedule, Workshop

BATCH = 22  # latents sampled at once


def run(
    workshop: Workshop,
    schedule: Schedule,
    teacher: str,
    count: int,
    steps: int,
    guidance: float,
    styled: float,
    noise: float,
    weights: dict[str, float],
) -> dict[str, float]:
    """Train, write workshop.folder/decoder/, the whole autoencoder, and return its scores.

    `count` latents are drawn with so many `steps` and so much `guidance`, half of every batch are
    of them, the others photographs'. `styled` is the share of both in a drawn style; `noise` and
    `weights` are as in the autoencoder's stage.
    """
    device = workshop.device
    made_by = short_digest([workshop.seed, count, steps, guidance, styled])
    path = workshop.stage("decoder") / f"drawn-{made_by}.safetensors"
    if not path.exists():
        save_file({"latents": draw(workshop, count, steps, guidance, styled)}, path)
    drawn = load_file(path)["latents"]  # (count, C, h, w)
    data = load_file(workshop.stage("latents") / "latents.safetensors")
    mean, std = (data[key].view(-1, 1, 1) for key in ("mean", "std"))
    selector = load_classifier(workshop.stage("selector")).to(device)
    teacher_decoder = load_teacher(teacher)[1].to(device)
    network = AutoencoderKL.from_pretrained(workshop.stage("autoencoder")).to(device)
    network.to(memory_format=torch.channels_last)
    for part in (network.encoder, network.quant_conv):
        part.requires_grad_(False)

    def loss(generator: Generator) -> Tensor:
        n = schedule.batch_size // 2
        chosen = torch.randint(len(data["latents"]), (n,), generator=generator)
        photographed = data["latents"][chosen, draw_styles(n, styled, generator)].float()
        others = drawn[torch.randint(len(drawn), (n,), generator=generator)].float()
        z = torch.cat([photographed, others]).to(device)  # (2 n, C, h, w)
        z = shaken(z, noise, generator)
        with torch.no_grad():
            wanted = teacher_decoder(z * std.to(device) + mean.to(device)).float().clamp(0, 1)
        pixels = network.decode(z).sample.float() / 2 + 0.5
        return picture_loss(selector, pixels, wanted, weights)

    average: AutoencoderKL = workshop.train("decoder", network, loss, schedule).cpu()
    average.save_pretrained(workshop.stage("decoder"))
    return measure(average, workshop, mean, std, teacher)


@torch.inference_mode()
def draw(workshop: Workshop, count: int, steps: int, guidance: float, styled: float) -> Tensor:
    """Latents (count, C, h, w) float16 that the denoiser draws, of all subjects in turn."""
    pipeline = assemble(workshop, vae="autoencoder").to(workshop.device, torch.float32)
    model = StableDiffusionModel("miniature", pipeline, SIZE)
    captions, generator = Captions(), Generator().manual_seed(workshop.seed)
    styles = draw_styles(count, styled, generator).tolist()
    quantiles = torch.rand(count, generator=generator).tolist()
    subjects = [index % len(SUBJECTS) for index in range(count)]
    rows = map(captions.draw, zip(subjects, styles, strict=True), quantiles)
    texts = [captions.texts[row] for row in rows]
    parts = []
    for first in tqdm(range(0, count, BATCH), desc="drawn", unit="batch", disable=None):
        c = model.encode_prompts(texts[first : first + BATCH])
        seeds = range(first, min(first + BATCH, count))
        empty = model.encode_prompts([""])
        x_0 = sample_latents(model, c, empty, seeds, steps=steps, guidance=guidance)
        parts.append(x_0.half().cpu())
    return torch.cat(parts)
