"""Random weights in the miniature's layout: what a run needs, small enough to build in a second."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from evaluation.evaluators.small_resnet import SmallResNet, save_classifier

MINIATURE = OmegaConf.load(Path(__file__).parents[1] / "conf" / "model" / "mini.yaml")
SUBJECTS = tuple(MINIATURE.concepts[:11])
MAX_TOKENS = 77  # one per letter, for the longest caption
WIDTH = 16
WIDTHS = (4, 8)  # of the classifier


def write_weights(folder: Path) -> Path:
    """Write what experiments/miniature/weights holds that a run reads, below `folder`."""
    torch.manual_seed(0)
    _pipeline().save_pretrained(folder / "pipeline")
    write_metrics(folder)
    latents = {name: torch.randn(5, 4, 8, 8) for name in SUBJECTS}
    save_file(latents, folder / "references.safetensors")
    return folder


def write_metrics(folder: Path) -> None:
    """Write what the miniature's metrics read: `clip`, `classifier`, `features.safetensors`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    _write_clip(folder / "clip")
    save_classifier(folder / "classifier", SmallResNet(SUBJECTS, widths=WIDTHS, blocks=1))
    dim = WIDTHS[-1]
    statistics = {"mean": torch.zeros(dim).double(), "covariance": torch.eye(dim).double()}
    save_file(statistics | {"count": torch.tensor(99)}, folder / "features.safetensors")


def build_tokenizer(characters: str, max_tokens: int) -> CLIPTokenizer:
    """Every character is a token, alone or at a word's end."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_tokens)


def text_settings(tokenizer: CLIPTokenizer, width: int) -> dict[str, int]:
    """The configuration of a text encoder with one layer."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_size": width,
        "intermediate_size": width,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


def build_vae(**options: float) -> AutoencoderKL:
    """An image autoencoder that divides sides by eight."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        **options,
    )


def _pipeline() -> StableDiffusionPipeline:
    tokenizer = build_tokenizer(ascii_lowercase, MAX_TOKENS)
    return StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer, WIDTH))),
        vae=build_vae(),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _write_clip(folder: Path) -> None:
    tokenizer = build_tokenizer(ascii_lowercase, MAX_TOKENS)
    text = text_settings(tokenizer, WIDTH)
    vision = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    vision |= {"num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
