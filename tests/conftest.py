"""A pipeline of Stable Diffusion's real classes, tiny and random, for every test that needs one."""

from __future__ import annotations

import copy
import string

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cad.concepts import Concept
from cad.models.stable_diffusion import StableDiffusionModel

torch.set_num_threads(1)

RESOLUTION = 64  # pixels; latents are (4, 8, 8)
MAX_TOKENS = 16
WIDTH = 32  # of the text encoder


def build_tokenizer() -> CLIPTokenizer:
    """Every letter is a token, alone or at a word's end."""
    letters = string.ascii_lowercase + string.digits
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )


def build_pipeline(prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    """The same weights at every call; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        return StableDiffusionPipeline(
            vae=build_vae(),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=build_unet(),
            scheduler=DDIMScheduler(
                prediction_type=prediction_type, clip_sample=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture(scope="session")
def tiny_pipeline() -> StableDiffusionPipeline:
    """Shared by all tests: leave it as it is."""
    return build_pipeline()


@pytest.fixture
def tiny_model(tiny_pipeline: StableDiffusionPipeline) -> StableDiffusionModel:
    """An adapter over a copy of the tiny pipeline: a test may do with it what it likes."""
    pipeline = StableDiffusionPipeline(
        **{
            name: copy.deepcopy(part)
            for name, part in tiny_pipeline.components.items()
            if name != "image_encoder"
        },
        requires_safety_checker=False,
    )
    return StableDiffusionModel("tiny", pipeline, RESOLUTION)


@pytest.fixture
def parachute() -> Concept:
    return Concept("parachute", "object", "parachute", "parachute")


@pytest.fixture
def church() -> Concept:
    return Concept("church", "object", "church", "church")
