"""A pipeline of Stable Diffusion's real classes, tiny and random, for every test that needs one."""

from __future__ import annotations

import atexit
import copy
import gc
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import pytest
import torch
import weights
import yaml
from diffusers import (
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cad.concepts import Concept
from cad.models.hub import Source
from cad.models.pretrained import Pretrained
from cad.models.random_weights import random_pipeline
from cad.models.stable_diffusion import StableDiffusionModel
from cad.models.stable_diffusion_3 import StableDiffusion3Model
from cad.models.stable_diffusion_xl import StableDiffusionXLModel

torch.set_num_threads(1)
atexit.register(gc.unfreeze)  # libraries look for leaks when the process ends
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # OmegaConf's, for many composes

RESOLUTION = 64  # pixels; latents are (4, 8, 8)
MAX_TOKENS = 16
WIDTH = 32  # of the text encoder


def source(path: Path | None = None, **changes: Any) -> Source:
    """Weights at a local path, or those of a repository that nobody has."""
    fields = {"repo": None if path else "no/where", "path": None if path is None else str(path)}
    fields |= {"revision": None, "size_gb": 5.5, "licence": "OpenRAIL", "gated": False, "note": ""}
    return Source(**fields | changes)


def pretrained(family: type, path: Path | None = None, **changes: Any) -> Pretrained:
    """A model at a local path, in float32 on the CPU; for random weights no path is needed."""
    name = f"{family.__module__}.{family.__name__}"
    fields = {"family": name, "name": "tiny", "source": source(path), "resolution": RESOLUTION}
    return Pretrained(**fields | {"device": "cpu", "dtype": "float32"} | changes)


def build_tokenizer() -> CLIPTokenizer:
    return weights.build_tokenizer(ascii_lowercase + digits, MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**weights.text_settings(tokenizer, WIDTH)))


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


def build_pipeline(prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    """The same weights at every call; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        return StableDiffusionPipeline(
            vae=weights.build_vae(scaling_factor=0.5),
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


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """What measures memory collects garbage: half a second among all that the tests import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_pipeline() -> StableDiffusionPipeline:
    """Shared by all tests: leave it as it is."""
    return build_pipeline()


@pytest.fixture
def folder(tiny_pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """The tiny pipeline, saved: a test may damage it."""
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


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


@pytest.fixture(scope="session")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the miniature's metrics read, tiny; shared by all tests: leave it as it is."""
    folder = tmp_path_factory.mktemp("metrics")
    weights.write_metrics(folder)
    return folder


@pytest.fixture(scope="session")
def xl() -> StableDiffusionXLModel:
    """Shared by all tests, as `xl.pipeline`, whose modules it has: leave it as it is."""
    return _small(StableDiffusionXLModel, StableDiffusionXLPipeline, "sdxl")


@pytest.fixture(scope="session")
def flow() -> StableDiffusion3Model:
    """Shared by all tests, as `flow.pipeline`, whose modules it has: leave it as it is."""
    return _small(StableDiffusion3Model, StableDiffusion3Pipeline, "sd35_medium")


def _small(family: Any, pipeline_class: Any, architecture: str) -> Any:
    pipeline = random_pipeline(pipeline_class, architecture, torch.float32, small=True)
    model = family(architecture, pipeline, RESOLUTION)
    model.pipeline = pipeline
    return model


@pytest.fixture
def parachute() -> Concept:
    return Concept("parachute", "object", "parachute", "parachute")


@pytest.fixture
def church() -> Concept:
    return Concept("church", "object", "church", "church")
