"""Stage 2: a small CLIP of photographs, their drawn styles and captions.

Its text tower becomes the pipeline's text encoder; the whole is the miniature's CLIP-score model.
Radford et al. (2021), with one deviation: a batch holds many pictures of each of the 66 pairs of
subject and style, so each pair that occurs gets one random caption, and all its pictures are that
caption's positives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from experiments.miniature.captions import (
    MAX_TOKENS,
    PLAIN,
    SUBJECTS,
    Captions,
    build_tokenizer,
    caption_table,
    tokenize,
)
from experiments.miniature.classifier import augment, balanced_batch
from experiments.miniature.data import SIZE
from experiments.miniature.styles import STYLE_FUNCTIONS
from experiments.miniature.training import Schedule, Workshop

SPECIAL = ("bos", "eos", "pad")


def run(
    workshop: Workshop,
    schedule: Schedule,
    text: dict[str, int],
    vision: dict[str, int],
    projection_dim: int,
    styled: float,
) -> dict[str, float]:
    """Train, write workshop.folder/clip/ (CLIPModel and tokenizer), and return its accuracies.

    `styled` is the share of pictures in one of the drawn styles.
    """
    folder = workshop.stage("clip")
    tokenizer, device = build_tokenizer(), workshop.device
    model = build_clip(tokenizer, text, vision, projection_dim).to(device)
    photographs = workshop.photographs["generator"]
    by_class = photographs.by_label()
    captions = Captions()
    ids = tokenize(tokenizer, captions.texts)

    def loss(generator: Generator) -> Tensor:
        index, labels = balanced_batch(by_class, schedule.batch_size, generator)
        styles = draw_styles(len(labels), styled, generator)
        pixels = stylise(augment(photographs.pixels(index), generator), styles)
        return contrastive_loss(model, pixels.to(device), labels, styles, captions, ids, generator)

    average: CLIPModel = workshop.train("clip", model, loss, schedule).cpu()
    average.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return zero_shot(average, tokenizer, workshop)


def build_clip(
    tokenizer: CLIPTokenizer, text: dict[str, int], vision: dict[str, int], projection_dim: int
) -> CLIPModel:
    """An untrained CLIPModel of the given tower sizes."""
    text = text | {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    return CLIPModel(
        CLIPConfig(
            text_config=text | {"projection_dim": projection_dim},
            vision_config=vision | {"image_size": SIZE, "projection_dim": projection_dim},
            projection_dim=projection_dim,
        )
    )


def contrastive_loss(
    model: CLIPModel,
    pixels: Tensor,
    labels: Tensor,
    styles: Tensor,
    captions: Captions,
    ids: Tensor,
    generator: Generator,
) -> Tensor:
    """Of pictures (B, 3, 64, 64) of subjects `labels` in `styles`, with one caption for each pair.

    `ids` (captions, MAX_TOKENS) are those of `captions.texts`.
    """
    device = pixels.device
    pairs, which = (labels * (PLAIN + 1) + styles).unique(return_inverse=True)  # (K,), (B,)
    draws = torch.rand(len(pairs), generator=generator)
    drawn = zip(pairs.tolist(), draws.tolist(), strict=True)
    rows = [captions.draw(divmod(pair, PLAIN + 1), draw) for pair, draw in drawn]
    images, texts = embed(model, pixels, ids[rows].to(device))
    logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T  # (B, K)
    positives = F.one_hot(which).float()  # (B, K)
    of_image = F.cross_entropy(logits, which.to(device))
    of_text = F.cross_entropy(logits.T, (positives / positives.sum(0)).T.to(device))
    return (of_image + of_text) / 2


def embed(model: CLIPModel, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit image and text embeddings, (N, P) float32 each; pixels (N, 3, 64, 64) in [0, 1]."""
    output = model(input_ids=ids, pixel_values=pixels * 2 - 1)
    images, texts = output.image_embeds.float(), output.text_embeds.float()
    return F.normalize(images, dim=1), F.normalize(texts, dim=1)


def draw_styles(n: int, styled: float, generator: Generator) -> Tensor:
    """(N,) int64: PLAIN, or with probability `styled` one of the styles."""
    style = torch.randint(PLAIN, (n,), generator=generator)
    keep = torch.rand(n, generator=generator) < styled
    return torch.where(keep, style, PLAIN)


def stylise(pixels: Tensor, styles: Tensor) -> Tensor:
    """Each picture in its own style, (N, 3, 64, 64) float32, also within an autocast region."""
    result = pixels.clone()
    with torch.autocast("cpu", enabled=False):
        for index, draw in enumerate(STYLE_FUNCTIONS.values()):
            chosen = styles == index
            if chosen.any():
                result[chosen] = draw(pixels[chosen])
    return result


@torch.inference_mode()
def zero_shot(model: CLIPModel, tokenizer: CLIPTokenizer, workshop: Workshop) -> dict[str, float]:
    """Held-out zero-shot accuracy: subject of photographs; style of pictures in each style."""
    held_out, table = workshop.photographs["val"], caption_table()
    some = torch.arange(0, len(held_out), 5)
    pixels = held_out.pixels(some)
    subjects = [next(iter(table[i, PLAIN])) for i in range(len(SUBJECTS))]
    right = (seen(model, tokenizer, pixels, subjects) == held_out.labels[some]).float().mean()
    drawn = (stylise(pixels, torch.full((len(pixels),), j)) for j in range(PLAIN))
    styles = [
        (seen_style(model, tokenizer, shown) == j + 1).float().mean()
        for j, shown in enumerate(drawn)
    ]
    return {"subject_accuracy": float(right), "style_accuracy": float(sum(styles)) / PLAIN}


def seen_style(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor) -> Tensor:
    """(N,) int64: 0 for "a photo", 1 and more for a style."""
    table = caption_table()
    words = ["a photo", *(next(iter(table[None, j])) for j in range(PLAIN))]
    return seen(model, tokenizer, pixels, words)


def seen(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, captions: list[str]) -> Tensor:
    """The place (N,) of the caption that is nearest to each picture."""
    images, texts = embed(model, pixels, tokenize(tokenizer, captions))
    return (images @ texts.T).argmax(1)
