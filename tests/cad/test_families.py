"""The adapters over the larger pipelines, against the pipelines themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import RESOLUTION, build_pipeline, pretrained

from cad.attribution import Attribution
from cad.components import component_weights
from cad.models.stable_diffusion import StableDiffusionModel
from cad.objectives import AmplifyObjective, EraseObjective
from cad.sampling import draw_noise, make_generators, sample_latents

PROMPTS = ["a photo of a church", "parachute"]
STEPS, GUIDANCE = 3, 5.0
SEEDS = (3, 4)
# Of latents, and their shift.
SCALES = {"tiny": (0.5, 0.0), "sdxl": (0.13025, 0.0), "sd35_medium": (1.5305, 0.0609)}


@pytest.fixture
def clean():
    return StableDiffusionModel("tiny", build_pipeline("sample"), RESOLUTION)


@pytest.fixture(params=["xl", "flow"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["tiny_model", "xl", "flow", "clean"])
def any_model(request):
    """Of v, the noise, a flow, and the clean latent."""
    return request.getfixturevalue(request.param)


def latents(model):
    """x_0, noise and another x_0, (3, 1, C, h, w)."""
    return torch.randn(3, 1, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def test_prompts_encoded_apart_have_the_bits_of_prompts_encoded_alone(model):
    texts = ["", *PROMPTS]
    apart = model.encode_prompts(texts, apart=True)
    for text, one in zip(texts, apart.split(), strict=True):
        alone = model.encode_prompts([text]).tensors
        assert all(torch.equal(tensor, alone[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_guided_sampling_equals_the_pipelines(model, size):
    """Their own schedulers, and XL conditioned on the image's size."""
    sampled = sample_latents(
        model,
        model.encode_prompts(PROMPTS),
        model.encode_prompts([""]),
        SEEDS,
        steps=STEPS,
        guidance=GUIDANCE,
        size=size,
    )
    expected = model.pipeline(
        PROMPTS,
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=draw_noise(model, make_generators(SEEDS), size),
        output_type="latent",
    ).images
    assert sampled.shape == (2, model.latent_shape[0], size[0] // 8, size[1] // 8)
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [3, 990])
def test_the_forward_process_is_computed_in_float32(any_model, dtype, t):
    x_0, noise, _ = latents(any_model).to(dtype)
    for method in (any_model.add_noise, any_model.target):
        exact = method(x_0.float(), noise.float(), torch.tensor(t))
        assert torch.equal(method(x_0, noise, torch.tensor(t)), exact.to(dtype))


@pytest.mark.parametrize("t", [9, 500, 999])
def test_epsilon_weight_turns_differences_of_predictions_into_differences_of_noise(any_model, t):
    """At one x_t, eps_c - eps_b = +- sqrt(weight) (v_c - v_b): the docstrings' claim."""
    model, t = any_model, torch.tensor(t)
    x_0, noise, other = latents(model)
    zeros, ones = torch.zeros_like(x_0), torch.ones_like(x_0)
    rest = model.add_noise(x_0, noise, t) - model.add_noise(other, zeros, t)
    noise_of_other = rest / model.add_noise(zeros, ones, t)
    v_c, v_b = model.target(x_0, noise, t), model.target(other, noise_of_other, t)
    sign = -1 if model.prediction_type == "sample" else 1
    turned = sign * model.epsilon_weight(t) ** 0.5 * (v_c - v_b)
    torch.testing.assert_close(turned, noise - noise_of_other, rtol=1e-3, atol=2e-3)


def test_images_to_latents_and_back(any_model):
    model, (scale, shift) = any_model, SCALES[any_model.name]
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    x_0 = model.encode_images(images)
    expected = (model.vae.encode(2 * images - 1).latent_dist.mode() - shift) * scale
    torch.testing.assert_close(x_0, expected)
    assert torch.equal(x_0, model.encode_images(images))
    decoded = model.vae.decode(x_0 / scale + shift).sample
    torch.testing.assert_close(model.decode_latents(x_0), (decoded / 2 + 0.5).clamp(0, 1))


def test_attribution_finds_scores(model, church):
    class References:
        @staticmethod
        def latents(_model, _concept):
            return torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    eta = 0.0 if model.prediction_type == "flow" else 1.0
    settings = Attribution(steps=2, samples=1, batch_size=1, eta=eta)
    for objective in (
        EraseObjective(church),
        EraseObjective(church, "epsilon"),
        AmplifyObjective(church, References()),
    ):
        scores = settings.scores(model, objective)
        assert set(scores) == set(component_weights(model, "ff"))
        assert all(score.any() for score in scores.values())


def test_a_saved_pipeline_is_loaded_again(model, tmp_path):
    model.pipeline.save_pretrained(tmp_path)
    loaded = pretrained(type(model), tmp_path, name=model.name).load()
    assert loaded.provenance() == model.provenance()


def test_half_precision(model):
    """XL's image autoencoder overflows in float16, so it is float32."""
    random = {"weights": "random-small", "architecture": model.name}
    half = pretrained(type(model), dtype="float16", **random).load()
    tensors = half.encode_prompts(PROMPTS).tensors
    assert {each.dtype for each in (half, half.text_encoder, *tensors.values())} == {torch.float16}
    assert half.vae.dtype == (torch.float32 if model.name == "sdxl" else torch.float16)
    x_t = torch.randn(2, *half.latent_shape, dtype=torch.float16)
    with torch.no_grad():
        prediction = half.predict(x_t, torch.tensor(500), half.encode_prompts(PROMPTS))
    assert all(each.isfinite().all() for each in (prediction, *tensors.values()))
    x_0 = half.encode_images(torch.rand(1, 3, RESOLUTION, RESOLUTION).to(half.vae.dtype))
    assert x_0.dtype == torch.float16
    assert half.decode_latents(x_0).isfinite().all()
    assert half.provenance()["dtype"] == "float16"
    assert half.provenance()["fingerprint"] != model.provenance()["fingerprint"]
