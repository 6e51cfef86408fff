"""Stage 9: CLIP's vision tower learns pictures as the decoder shows them.

Latents of 8 x 8 cannot hold every texture: the dots of pointillism come out as something else, by
which it can be told all the same. Half of the pictures are photographs and their styles, as in
stage 2, half the decoder's, of the same photographs' latents. The text tower, which conditions the
denoiser, stays as it is; the pair measures CLIP scores and styles.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Generator, Tensor
from transformers import CLIPModel, CLIPTokenizer

from experiments.miniature.captions import PLAIN, STYLES, Captions, tokenize
from experiments.miniature.classifier import augment, balanced_batch
from experiments.miniature.clip import (
    contrastive_loss,
    draw_styles,
    seen_style,
    stylise,
    zero_shot,
)
from experiments.miniature.training import Schedule, Workshop


def run(workshop: Workshop, schedule: Schedule, styled: float) -> dict[str, float]:
    """Train, write workshop.folder/vision/, the whole CLIP, and return its accuracies.

    `styled` is the share of pictures in one of the drawn styles.
    """
    device, folder = workshop.device, workshop.stage("clip")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    model = CLIPModel.from_pretrained(folder).requires_grad_(False).to(device)
    for part in (model.vision_model, model.visual_projection):
        part.requires_grad_(True)
    decoder = AutoencoderKL.from_pretrained(workshop.stage("decoder")).to(device)
    decoder.to(memory_format=torch.channels_last)
    photographs = workshop.photographs["generator"]
    by_class = photographs.by_label()
    data = load_file(workshop.stage("latents") / "latents.safetensors")
    latents_by_class = [(data["labels"] == c).nonzero().squeeze(1) for c in range(len(by_class))]
    captions = Captions()
    ids = tokenize(tokenizer, captions.texts)

    def loss(generator: Generator) -> Tensor:
        n = schedule.batch_size // 2
        index, labels = balanced_batch(by_class, n, generator)
        chosen, others = balanced_batch(latents_by_class, n, generator)
        styles = draw_styles(2 * n, styled, generator)
        drawn = stylise(augment(photographs.pixels(index), generator), styles[:n])
        with torch.no_grad():
            shown = decoded(decoder, data["latents"][chosen, styles[n:]].float().to(device))
        pixels = torch.cat([drawn.to(device), shown])
        pairs = torch.cat([labels, others]), styles
        return contrastive_loss(model, pixels, *pairs, captions, ids, generator)

    average: CLIPModel = workshop.train("vision", model, loss, schedule).cpu()
    average.save_pretrained(workshop.stage("vision"))
    return zero_shot(average, tokenizer, workshop) | {
        "decoded_style_accuracy": of_decoded(average, tokenizer, decoder.cpu(), data["latents"])
    }


def decoded(decoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures (N, 3, 64, 64), float32 in [0, 1]."""
    pictures: Tensor = decoder.decode(latents).sample.float() / 2 + 0.5
    return pictures.clamp(0, 1)


@torch.inference_mode()
def of_decoded(
    model: CLIPModel, tokenizer: CLIPTokenizer, decoder: AutoencoderKL, latents: Tensor
) -> float:
    """The share of decoded pictures, of learned photographs in each style, whose style is seen."""
    some = latents[:: max(1, len(latents) // 200)].float()  # (N, styles + 1, C, h, w)
    right = [
        (seen_style(model, tokenizer, decoded(decoder, some[:, j])) == j + 1).float().mean()
        for j in range(PLAIN)
    ]
    return float(sum(right)) / len(STYLES)
