"""Stage 7: everything that ships, as package data under experiments/miniature/weights/.

pipeline/               StableDiffusionPipeline, half precision, safetensors
clip/                   CLIPModel and its tokenizer
classifier/             stage 2, a classifier folder of `evaluation.evaluators.small_resnet`
references.safetensors  {subject: (5, C, h, w) float16}, scaled latents of held-out photographs
features.safetensors    mean and covariance of the classifier's features on held-out photographs
training.json           how each stage was trained and what it scored
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from evaluation.evaluators.features import ClassifierFeatures, FeatureStatistics
from evaluation.evaluators.small_resnet import load_classifier, save_classifier
from experiments.miniature.captions import SUBJECTS
from experiments.miniature.classifier import typical
from experiments.miniature.denoiser import build_scheduler, scaling_factor
from experiments.miniature.stages import Workshop

log = logging.getLogger(__name__)

REFERENCES_PER_SUBJECT = 5  # paper Sec. 6.3
PREPROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # as clip.embed


@torch.inference_mode()
def run(workshop: Workshop, output: str) -> dict[str, float]:
    """Write the shipped folder, return its size; OSError where a stage's result is missing."""
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    pipeline = assemble(workshop)
    pipeline.save_pretrained(target / "pipeline", safe_serialization=True)
    clip = workshop.stage("clip")
    CLIPModel.from_pretrained(clip).half().save_pretrained(target / "clip")
    CLIPTokenizer.from_pretrained(clip).save_pretrained(target / "clip")
    (target / "clip" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR) + "\n")
    classifier = load_classifier(workshop.stage("judge"))
    save_classifier(target / "classifier", classifier, dtype=torch.float16)
    save_file(references(workshop, pipeline), target / "references.safetensors")
    write_feature_statistics(workshop, target)
    stages = {name: entry for name, entry in workshop.reported().items() if name != "export"}
    training = json.dumps(stages, indent=2) + "\n"
    (target / "training.json").write_text(training)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    log.info("exported to %s: %.1f MB", target, size / 1e6)
    return {"megabytes": size / 1e6}


def assemble(workshop: Workshop) -> StableDiffusionPipeline:
    """The pipeline of the trained parts, half precision, without a safety checker."""
    clip = workshop.stage("clip")
    latents = load_file(workshop.stage("latents") / "latents.safetensors")["latents"]
    vae = AutoencoderKL.from_pretrained(workshop.stage("autoencoder"))
    unet = UNet2DConditionModel.from_pretrained(workshop.stage("denoiser"))
    vae.register_to_config(scaling_factor=scaling_factor(latents), _name_or_path="miniature")
    unet.register_to_config(_name_or_path="miniature")  # not the folder it was trained in
    return StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=CLIPTextModel.from_pretrained(clip).half(),
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def references(workshop: Workshop, pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Scaled latents of each subject's most typical held-out photographs that are recognised."""
    held_out = workshop.photographs("val")
    classifier = load_classifier(workshop.stage("judge"))
    index = typical(classifier, held_out, REFERENCES_PER_SUBJECT)
    vae = pipeline.vae.float()
    latents = vae.encode(held_out.pixels(index) * 2 - 1).latent_dist.mode()
    scaled = (latents * vae.config.scaling_factor).half()  # (11 * 5, C, h, w)
    vae.half()
    parts = scaled.unflatten(0, (len(SUBJECTS), REFERENCES_PER_SUBJECT))
    return {name: part.contiguous() for name, part in zip(SUBJECTS, parts, strict=True)}


def write_feature_statistics(workshop: Workshop, target: Path) -> None:
    """FID's reference: the held-out photographs' features, as the shipped classifier sees them."""
    extractor = ClassifierFeatures(str(target / "classifier"), "cpu")
    images = workshop.photographs("val").images.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    parts = [extractor.features(part) for part in np.array_split(images, len(images) // 512 + 1)]
    FeatureStatistics.of(np.concatenate(parts)).save(target / "features.safetensors", extractor)
