"""Stage 10: everything that ships, as package data under experiments/miniature/weights/.

pipeline/               StableDiffusionPipeline, safetensors; loads in float32 without arguments
clip/                   CLIPModel and its tokenizer
classifier/             stage 7, a classifier folder of `evaluation.evaluators.small_resnet`
references.safetensors  {subject: (5, C, h, w) float16}, latents of held-out photographs
features.safetensors    mean and covariance of the classifier's features on held-out photographs
training.json           how each stage was trained and what it scored
progress.csv            what an outside judge saw in between (`progress`), where it was asked

The model card beside it (README.md) is written from what was measured (`evaluate`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from cad.files import write_atomically
from evaluation.evaluators.features import ClassifierFeatures, FeatureStatistics
from evaluation.evaluators.small_resnet import load_classifier, save_classifier
from experiments.miniature.captions import STYLES, SUBJECTS
from experiments.miniature.classifier import typical
from experiments.miniature.denoiser import build_scheduler
from experiments.miniature.training import Workshop

PROGRESS = "progress.csv"
REFERENCES_PER_SUBJECT = 5  # paper Sec. 6.3
CONTENTS = {
    "pipeline": "the diffusion model",
    "clip": "CLIP score, zero-shot style accuracy",
    "classifier": "accuracy (ResNet-50's part), features for FID",
    "references.safetensors": "latents of five held-out photographs a subject (Eq. 5)",
    "features.safetensors": "feature statistics of the held-out photographs (FID)",
}
PREPROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # as clip.embed


@torch.inference_mode()
def run(workshop: Workshop, output: str) -> dict[str, float]:
    """Write the shipped folder, return its size; OSError where a stage's result is missing."""
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    pipeline = assemble(workshop)
    pipeline.save_pretrained(target / "pipeline", safe_serialization=True)
    clip = workshop.stage("clip")
    CLIPModel.from_pretrained(workshop.stage("vision")).half().save_pretrained(target / "clip")
    CLIPTokenizer.from_pretrained(clip).save_pretrained(target / "clip")
    (target / "clip" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR) + "\n")
    classifier = load_classifier(workshop.stage("judge"))
    save_classifier(target / "classifier", classifier, dtype=torch.float16)
    save_file(references(workshop, pipeline), target / "references.safetensors")
    write_feature_statistics(workshop, target)
    stages = {name: _told(entry) for name, entry in workshop.reported().items() if name != "export"}
    (target / "training.json").write_text(json.dumps(stages, indent=2) + "\n")
    if (workshop.folder / PROGRESS).exists():
        shutil.copyfile(workshop.folder / PROGRESS, target / PROGRESS)
    return {"megabytes": sum(_megabytes(target / name) for name in CONTENTS)}


def assemble(
    workshop: Workshop, unet: UNet2DConditionModel | None = None, vae: str = "decoder"
) -> StableDiffusionPipeline:
    """The pipeline of the trained parts, by default with the finished denoiser.

    `vae` is the stage whose autoencoder it has.

    Autoencoder and denoiser are in half precision, from which diffusers makes float32 by itself;
    transformers would keep it, so the text encoder is in float32.
    """
    clip = workshop.stage("clip")
    autoencoder = AutoencoderKL.from_pretrained(workshop.stage(vae))
    unet = unet or UNet2DConditionModel.from_pretrained(workshop.stage("denoiser"))
    autoencoder.register_to_config(_name_or_path="miniature")
    unet.register_to_config(_name_or_path="miniature")  # not the folder it was trained in
    return StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=CLIPTextModel.from_pretrained(clip).float(),
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def references(workshop: Workshop, pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Latents of each subject's most typical held-out photographs that are recognised."""
    held_out = workshop.photographs["val"]
    classifier = load_classifier(workshop.stage("judge"))
    index = typical(classifier, held_out, REFERENCES_PER_SUBJECT)
    vae = pipeline.vae.float()
    latents = vae.encode(held_out.pixels(index) * 2 - 1).latent_dist.mode()
    vae.half()
    parts = latents.half().unflatten(0, (len(SUBJECTS), REFERENCES_PER_SUBJECT))
    return {name: part.contiguous() for name, part in zip(SUBJECTS, parts, strict=True)}


def write_feature_statistics(workshop: Workshop, target: Path) -> None:
    """FID's reference: the held-out photographs' features, as the shipped classifier sees them."""
    extractor = ClassifierFeatures(str(target / "classifier"), "cpu")
    images = workshop.photographs["val"].images.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    parts = [extractor.features(part) for part in np.array_split(images, len(images) // 512 + 1)]
    FeatureStatistics.of(np.concatenate(parts)).save(target / "features.safetensors", extractor)


def write_card(weights: Path) -> None:
    """Write weights/README.md from evaluation.json, training.json and the files' sizes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template("card.md.j2").render(
        measured=_read(weights / "evaluation.json"),
        training=_read(weights / "training.json"),
        progress=_rows(weights / PROGRESS),
        unet=_read(weights / "pipeline" / "unet" / "config.json"),
        vae=_read(weights / "pipeline" / "vae" / "config.json"),
        subjects=SUBJECTS,
        styles=STYLES,
        contents=CONTENTS,
        megabytes={name: _megabytes(weights / name) for name in CONTENTS},
    )
    write_atomically(weights / "README.md", card.encode())


def _told(stage: dict[str, Any]) -> dict[str, Any]:
    """What is reported of a stage, but for where its teacher lay."""
    settings = {key: value for key, value in stage["settings"].items() if key != "teacher"}
    return stage | {"settings": settings}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _rows(path: Path) -> Sequence[Mapping[Hashable, Any]]:
    return pd.read_csv(path).to_dict("records") if path.exists() else []


def _megabytes(path: Path) -> float:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6
