"""Stage 5: the latents of the typical photographs in every style, encoded once."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tqdm import tqdm

from evaluation.evaluators.small_resnet import load_classifier
from experiments.miniature.captions import PLAIN
from experiments.miniature.classifier import typical
from experiments.miniature.clip import stylise
from experiments.miniature.stages import Workshop


@torch.inference_mode()
def run(workshop: Workshop, per_subject: int) -> dict[str, float]:
    """Write workshop.folder/latents/latents.safetensors.

    `latents` (M, styles + 1, C, h, w) float16, unscaled, the plain photograph last;
    `labels` (M,) int64; M = subjects x per_subject, fewer where a subject has fewer.
    """
    network = workshop.place(AutoencoderKL.from_pretrained(workshop.stage("autoencoder")))
    judge = load_classifier(workshop.stage("classifier"))
    photographs = workshop.photographs("train")
    index = typical(judge, photographs, per_subject)
    parts = []
    for chosen in tqdm(index.split(64), desc="latents", unit="batch", disable=None):
        pixels = photographs.pixels(chosen)
        versions = [stylise(pixels, torch.full((len(pixels),), s)) for s in range(PLAIN + 1)]
        stack = workshop.place(torch.cat(versions))
        moments = network.encode(stack * 2 - 1).latent_dist.mode()  # ((S+1) * B, C, h, w)
        parts.append(moments.unflatten(0, (PLAIN + 1, -1)).transpose(0, 1).half().cpu())
    latents = torch.cat(parts)
    save_file(
        {"latents": latents.contiguous(), "labels": photographs.labels[index]},
        workshop.stage("latents") / "latents.safetensors",
    )
    return {"count": len(index), "std": float(latents.float().std())}
