"""The adapter over a Stable Diffusion XL pipeline, against the pipeline itself."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from cad.attribution import Attribution
from cad.components import component_weights, text_projections
from cad.concepts import Concept
from cad.errors import UserError
from cad.models.hub import Source
from cad.models.random_weights import random_pipeline
from cad.models.stable_diffusion_xl import StableDiffusionXLModel
from cad.objectives import EraseObjective
from cad.sampling import draw_noise, make_generators, sample_latents

RESOLUTION = 64  # pixels; latents are (4, 8, 8)
PROMPTS = ["a photo of a church", "parachute"]
STEPS, GUIDANCE = 3, 5.0
SEEDS = (3, 4)


@pytest.fixture(scope="module")
def pipeline():
    """Shared by all tests: leave it as it is."""
    return random_pipeline(StableDiffusionXLPipeline, "sdxl", torch.float32, small=True)


@pytest.fixture(scope="module")
def model(pipeline) -> StableDiffusionXLModel:
    """Over the same modules."""
    return StableDiffusionXLModel("xl", pipeline, RESOLUTION)


def encoded(pipeline, **options):
    """States, unconditional states, pooled, unconditional pooled: the pipeline's own."""
    return pipeline.encode_prompt(PROMPTS, device=torch.device("cpu"), **options)


def test_text_is_encoded_as_by_the_pipeline(pipeline, model):
    states, _, pooled, _ = encoded(pipeline)
    tensors = model.encode_prompts(PROMPTS).tensors
    assert states.shape == (2, 77, 32 + 48)
    torch.testing.assert_close(tensors["states"], states)
    torch.testing.assert_close(tensors["pooled"], pooled)


def test_the_empty_prompt_is_the_pipelines_unconditional_one(pipeline, model, monkeypatch):
    mixed = model.encode_prompts(["", *PROMPTS])
    for name, text, empty in zip(
        ("states", "pooled"), encoded(pipeline)[::2], encoded(pipeline)[1::2], strict=True
    ):
        assert not empty.any()
        torch.testing.assert_close(mixed.tensors[name], torch.cat([empty[:1], text]))
    assert model.encode_prompts([" "]).tensors["states"].all(dim=-1).any()
    monkeypatch.setattr(model, "_zeros_for_empty", False)
    _, states, _, pooled = encoded(pipeline, negative_prompt="")
    tensors = model.encode_prompts([""]).tensors
    torch.testing.assert_close(tensors["states"], states[:1])
    torch.testing.assert_close(tensors["pooled"], pooled[:1])


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_guided_sampling_equals_the_pipelines(pipeline, model, size):
    """Its own scheduler, conditioned on the image's size."""
    latents = sample_latents(
        model,
        model.encode_prompts(PROMPTS),
        model.encode_prompts([""]),
        SEEDS,
        steps=STEPS,
        guidance=GUIDANCE,
        size=size,
    )
    expected = pipeline(
        PROMPTS,
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=draw_noise(model, make_generators(SEEDS), size),
        output_type="latent",
    ).images
    assert latents.shape == (2, 4, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_images_to_latents_and_back(pipeline, model):
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    x_0 = model.encode_images(images)
    expected = pipeline.vae.encode(2 * images - 1).latent_dist.mode() * 0.13025
    torch.testing.assert_close(x_0, expected)
    decoded = pipeline.vae.decode(x_0 / 0.13025).sample
    torch.testing.assert_close(model.decode_latents(x_0), (decoded / 2 + 0.5).clamp(0, 1))


def test_the_autoencoder_of_a_float16_model_is_float32():
    nowhere = Source("no/where", None, None, 1.0, "a licence", False, "", None)
    model = StableDiffusionXLModel.from_pretrained(
        "xl", nowhere, RESOLUTION, "cpu", "float16", "random-small", "sdxl"
    )
    assert (model.dtype, model.text_encoder.dtype) == (torch.float16, torch.float16)
    assert model.vae.dtype == torch.float32
    x_0 = model.encode_images(torch.rand(1, 3, RESOLUTION, RESOLUTION))
    assert x_0.dtype == torch.float16
    assert model.decode_latents(x_0).isfinite().all()
    assert model.encode_prompts(["church"]).tensors["pooled"].dtype == torch.float16


def test_components_are_those_of_a_unet(model):
    counts = {name: len(component_weights(model, name)) for name in model.components}
    blocks = 2 * (2 + 3) + 3 * (3 + 2) + 3  # small: 1, 2, 3 transformer blocks at each attention
    assert counts["ff"] == 2 * blocks
    assert counts["attn1"] == counts["attn2"] == 4 * blocks
    assert {weight.shape[1] for weight in text_projections(model).values()} == {80}
    assert len(text_projections(model)) == 2 * blocks


def test_positions_of_both_encoders_agree(model):
    assert model.last_tokens(["", "church", "a photo of a church"]) == [0, 1, 5]
    for prompt in PROMPTS:
        assert len({text.count(prompt) for text in model.texts}) == 1
    with pytest.raises(UserError, match="takes 77"):
        model.check_prompts([99 * "church "])
    assert len(model.encode_prompts([99 * "church "], truncate=True)) == 1


def test_the_digest_knows_both_encoders_and_the_empty_prompt(model, monkeypatch):
    digests = [model.surroundings_digest()]
    with monkeypatch.context() as patch:
        patch.setattr(model, "_zeros_for_empty", False)
        digests.append(model.surroundings_digest())
    with monkeypatch.context() as patch:
        patch.setattr(model.texts[1].network.config, "num_attention_heads", 4)
        digests.append(model.surroundings_digest())
    assert model.surroundings_digest() == digests[0]
    assert len(set(digests)) == 3


def test_attribution_finds_scores(model):
    church = Concept("church", "object", "church", "church")
    scores = Attribution(steps=2, samples=1, batch_size=1).scores(model, EraseObjective(church))
    assert set(scores) == set(component_weights(model, "ff"))
    assert all(score.any() for score in scores.values())


def test_a_saved_pipeline_is_loaded_again(pipeline, model, tmp_path):
    pipeline.save_pretrained(tmp_path)
    source = Source(None, None, str(tmp_path), 1.0, "a licence", False, "", None)
    loaded = StableDiffusionXLModel.from_pretrained("xl", source, RESOLUTION, "cpu", "float32")
    assert loaded.provenance() == model.provenance()
