"""Stage 3: a small CLIP of photographs, their drawn styles and captions.

Its text tower becomes the pipeline's text encoder; the whole is the miniature's CLIP-score model.
Radford et al. (2021), with one deviation: a batch holds many pictures of each of the 66 pairs of
subject and style, so each pair that occurs gets one random caption, and all its pictures are that
caption's positives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from experiments.miniature.captions import (
    MAX_TOKENS,
    PLAIN,
    SUBJECTS,
    Key,
    build_tokenizer,
    caption_table,
    tokenize,
)
from experiments.miniature.classifier import augment, balanced_batch
from experiments.miniature.data import SIZE
from experiments.miniature.stages import Workshop
from experiments.miniature.styles import STYLE_FUNCTIONS
from experiments.miniature.training import Schedule, train


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
    tokenizer = build_tokenizer()
    model = workshop.place(build_clip(tokenizer, text, vision, projection_dim))
    photographs = workshop.photographs("train")
    by_class = photographs.by_label()
    captions = CaptionTokens(tokenizer)

    def loss(generator: torch.Generator, step: int) -> Tensor:
        index, labels = balanced_batch(by_class, schedule.batch_size, generator)
        styles = draw_styles(len(labels), styled, generator)
        pixels = stylise(augment(photographs.pixels(index), generator), styles)
        pairs, which = (labels * (PLAIN + 1) + styles).unique(return_inverse=True)  # (K,), (B,)
        ids = captions.draw(pairs // (PLAIN + 1), pairs % (PLAIN + 1), generator)  # (K, L)
        images, texts = embed(model, workshop.place(pixels), workshop.place(ids))
        logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T  # (B, K)
        positives = F.one_hot(which).float()  # (B, K)
        of_image = F.cross_entropy(logits, workshop.place(which))
        of_text = F.cross_entropy(logits.T, workshop.place((positives / positives.sum(0)).T))
        return (of_image + of_text) / 2

    average = train(model, loss, schedule, folder, workshop.seed)
    assert isinstance(average, CLIPModel)
    average.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return zero_shot(average, tokenizer, workshop)


def build_clip(
    tokenizer: CLIPTokenizer, text: dict[str, int], vision: dict[str, int], projection_dim: int
) -> CLIPModel:
    """An untrained CLIPModel of the given tower sizes."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=text
        | special
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "projection_dim": projection_dim,
        },
        vision_config=vision | {"image_size": SIZE, "projection_dim": projection_dim},
        projection_dim=projection_dim,
    )
    return CLIPModel(config)


def embed(model: CLIPModel, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit image and text embeddings, (N, P) float32 each; pixels (N, 3, 64, 64) in [0, 1]."""
    output = model(input_ids=ids, pixel_values=pixels * 2 - 1)
    return (
        F.normalize(output.image_embeds.float(), dim=1),
        F.normalize(output.text_embeds.float(), dim=1),
    )


class CaptionTokens:
    """Random captions for (subject, style) pairs, tokenised once."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.table: dict[Key, Tensor] = {
            key: tokenize(tokenizer, captions) for key, captions in caption_table().items()
        }

    def draw(self, labels: Tensor, styles: Tensor, generator: torch.Generator) -> Tensor:
        """One caption for each pair, (N, MAX_TOKENS) int64."""
        draws = torch.rand(len(labels), generator=generator).tolist()
        keys = zip(labels.tolist(), styles.tolist(), strict=True)
        rows = [self.table[key] for key in keys]
        return torch.stack([row[int(d * len(row))] for row, d in zip(rows, draws, strict=True)])


def draw_styles(n: int, styled: float, generator: torch.Generator) -> Tensor:
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
    held_out = workshop.photographs("val")
    some = torch.arange(0, len(held_out), 5)
    table = caption_table()
    plain = tokenize(tokenizer, [table[i, PLAIN][0] for i in range(len(SUBJECTS))])
    pixels = held_out.pixels(some)
    images, texts = embed(model.cpu(), pixels, plain)
    subject = float(((images @ texts.T).argmax(1) == held_out.labels[some]).float().mean())
    words = tokenize(tokenizer, ["a photo"] + [table[None, j][0] for j in range(PLAIN)])
    right = []
    for style in range(PLAIN):
        styles = torch.full((len(pixels),), style)
        images, texts = embed(model, stylise(pixels, styles), words)
        right.append(float(((images @ texts.T).argmax(1) == style + 1).float().mean()))
    return {"subject_accuracy": subject, "style_accuracy": sum(right) / len(right)}
