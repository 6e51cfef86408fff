"""The adapter over a Stable Diffusion 3 pipeline, against the pipeline itself."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from cad.attribution import Attribution
from cad.components import component_weights, text_projections
from cad.concepts import Concept
from cad.errors import UserError
from cad.models.hub import Source
from cad.models.random_weights import random_pipeline
from cad.models.stable_diffusion_3 import T5_PARTS, T5_TOKENS, StableDiffusion3Model
from cad.objectives import AmplifyObjective, EraseObjective
from cad.sampling import draw_noise, make_generators, sample_latents

RESOLUTION = 64  # pixels; latents are (16, 8, 8)
ARCHITECTURE = "sd35_medium"
PROMPTS = ["a photo of a church", "parachute"]
STEPS, GUIDANCE = 3, 5.0
SEEDS = (3, 4)
NOWHERE = Source("no/where", None, None, 1.0, "a licence", False, "", None)


@pytest.fixture(scope="module")
def pipeline():
    """Shared by all tests: leave it as it is."""
    return random_pipeline(StableDiffusion3Pipeline, ARCHITECTURE, torch.float32, small=True)


@pytest.fixture(scope="module")
def model(pipeline) -> StableDiffusion3Model:
    """Over the same modules."""
    return StableDiffusion3Model("flow", pipeline, RESOLUTION)


@pytest.fixture(scope="module")
def without_t5() -> StableDiffusion3Model:
    settings = ("flow", NOWHERE, RESOLUTION, "cpu", "float32", "random-small", ARCHITECTURE)
    return StableDiffusion3Model.from_pretrained(*settings, t5=False)


def encoded(pipeline):
    """States, unconditional states, pooled, unconditional pooled: the pipeline's own."""
    return pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, device=torch.device("cpu"))


def noisy(model: StableDiffusion3Model, t: float):
    """x_0, another x_0, noise, t."""
    generator = torch.Generator().manual_seed(0)
    return *torch.randn(3, 2, *model.latent_shape, generator=generator), torch.tensor(t)


def test_text_is_encoded_as_by_the_pipeline(pipeline, model):
    states, empty_states, pooled, empty_pooled = encoded(pipeline)
    tensors = model.encode_prompts(["", *PROMPTS]).tensors
    assert states.shape == (2, 77 + T5_TOKENS, 96)
    torch.testing.assert_close(tensors["states"], torch.cat([empty_states[:1], states]))
    torch.testing.assert_close(tensors["pooled"], torch.cat([empty_pooled[:1], pooled]))


def test_without_t5_its_states_are_zeros(pipeline, model, without_t5):
    plain = random_pipeline(
        StableDiffusion3Pipeline, ARCHITECTURE, torch.float32, small=True, without=T5_PARTS
    )
    states, _, pooled, _ = encoded(plain)
    tensors = without_t5.encode_prompts(PROMPTS).tensors
    torch.testing.assert_close(tensors["states"], states)
    torch.testing.assert_close(tensors["pooled"], pooled)
    assert not tensors["states"][:, 77:].any()
    whole = model.encode_prompts(PROMPTS).tensors["states"]
    torch.testing.assert_close(tensors["states"][:, :77], whole[:, :77])
    assert without_t5.surroundings_digest() != model.surroundings_digest()


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_guided_sampling_equals_the_pipelines(pipeline, model, size):
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
    assert latents.shape == (2, 16, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_images_to_latents_and_back(pipeline, model):
    scale, shift = 1.5305, 0.0609
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    x_0 = model.encode_images(images)
    expected = (pipeline.vae.encode(2 * images - 1).latent_dist.mode() - shift) * scale
    torch.testing.assert_close(x_0, expected)
    decoded = pipeline.vae.decode(x_0 / scale + shift).sample
    torch.testing.assert_close(model.decode_latents(x_0), (decoded / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("t", [0.0, 8.9, 500.0, 1000.0])
def test_the_flow_is_straight(model, t):
    x_0, _, noise, t = noisy(model, t)
    x_t, velocity = model.add_noise(x_0, noise, t), model.target(x_0, noise, t)
    torch.testing.assert_close(x_t, x_0 + t / 1000 * velocity)
    torch.testing.assert_close(x_t + (1 - t / 1000) * velocity, noise)
    assert torch.equal(model.add_noise(x_0, noise, torch.stack([t, t])), x_t)


def test_the_forward_process_is_the_schedulers(pipeline, model):
    """At the very timesteps of Eq. 5, which are not whole numbers."""
    x_0, _, noise, _ = noisy(model, 0.0)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    timesteps = model.sampler(STEPS, "ddim").timesteps
    assert torch.equal(timesteps, scheduler.timesteps)
    for t in timesteps:
        expected = scheduler.scale_noise(x_0, t.expand(2), noise)
        torch.testing.assert_close(model.add_noise(x_0, noise, t), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_forward_process_is_computed_in_float32(model, dtype):
    x_0, _, noise, t = noisy(model, 990.0)
    x_0, noise = x_0.to(dtype), noise.to(dtype)
    for method in (model.add_noise, model.target):
        exact = method(x_0.float(), noise.float(), t)
        assert torch.equal(method(x_0, noise, t), exact.to(dtype))


@pytest.mark.parametrize("t", [8.9, 500.0, 999.0])
def test_epsilon_weight_turns_differences_of_velocities_into_differences_of_noise(model, t):
    """At one x_t, eps_c - eps_b = (1 - sigma) (v_c - v_b): the docstring's claim."""
    x_0, other, noise, t = noisy(model, t)
    sigma = t / 1000
    x_t = model.add_noise(x_0, noise, t)
    noise_of_other = (x_t - (1 - sigma) * other) / sigma
    v_c, v_b = model.target(x_0, noise, t), model.target(other, noise_of_other, t)
    torch.testing.assert_close(
        model.epsilon_weight(t) ** 0.5 * (v_c - v_b),
        noise - noise_of_other,
        rtol=1e-3,
        atol=1e-3,
    )
    assert model.epsilon_weight(torch.tensor(1000.0)) == 0.0


def test_the_samplers_are_eulers(model):
    for kind in ("default", "ddim"):
        sampler = model.sampler(STEPS, kind, None)
        assert sampler.timesteps[0] == 1000
        assert sampler.init_sigma == 1.0
    with pytest.raises(UserError, match=r"eta=1.0 .*FlowMatchEuler.* has no eta"):
        model.sampler(STEPS, "ddim", 1.0)
    with pytest.raises(UserError, match="kind='heun' is unknown"):
        model.sampler(STEPS, "heun")


def test_a_schedule_that_depends_on_the_size_is_refused(pipeline, monkeypatch):
    scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, use_dynamic_shifting=True
    )
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        StableDiffusion3Model("flow", pipeline, RESOLUTION)


def test_components_by_what_reads_image_and_text(model):
    """Small: four blocks; two have image self-attention besides, and the last writes no text."""
    names = {name: list(component_weights(model, name)) for name in model.components}
    assert list(names) == ["ff", "attn1", "attn2"]
    text = [name for name in names["ff"] if ".ff_context." in name]
    assert (len(names["ff"]), len(text)) == (4 * 2 + 3 * 2, 3 * 2)
    assert sum(".attn2." in name for name in names["attn1"]) == 2 * 4
    assert len(names["attn1"]) == 4 * 4 + 2 * 4
    assert len(names["attn2"]) == 4 * 3 + 3
    linear = {
        name.removesuffix(".weight")
        for name, weight in model.denoiser.named_parameters()
        if weight.dim() == 2 and re.search(r"transformer_blocks\.\d+\.(attn|ff)", name)
    }
    found = [name.removesuffix(".weight") for group in names.values() for name in group]
    assert sorted(found) == sorted(linear)  # every one is in a group, and in one only


def test_what_the_family_does_not_have_is_refused_with_the_reason(model):
    with pytest.raises(UserError, match=r"residual is not allowed .*no residual blocks.*attn1"):
        component_weights(model, "residual")
    with pytest.raises(UserError, match=r"model=flow \(SD3Tran.*\) has no cross-attention"):
        text_projections(model)  # though some of its weights are called attn2
    with pytest.raises(UserError, match=r"model=flow reads .* different tokens"):
        model.last_tokens(["church"])


def test_prompts_that_do_not_fit_are_refused_or_truncated(model):
    too_long = 99 * "church "
    with pytest.raises(UserError, match="takes 77"):
        model.encode_prompts([too_long])
    assert len(model.encode_prompts([too_long], truncate=True)) == 1


@pytest.mark.parametrize(
    ("resolution", "message"), [(72, "multiple of 16"), (400, "positions up to 384")]
)
def test_resolutions_that_the_transformer_does_not_know(pipeline, resolution, message):
    with pytest.raises(UserError, match=message):
        StableDiffusion3Model("flow", pipeline, resolution)


def test_attribution_finds_scores(model):
    class References:
        @staticmethod
        def latents(_model, _concept):
            return noisy(model, 0.0)[0][:1]

    church = Concept("church", "object", "church", "church")
    settings = Attribution(steps=2, samples=1, batch_size=1, eta=0.0)
    for objective in (
        EraseObjective(church),
        EraseObjective(church, "epsilon"),
        AmplifyObjective(church, References()),
    ):
        scores = settings.scores(model, objective)
        assert set(scores) == set(component_weights(model, "ff"))
        assert all(score.any() for score in scores.values())


@pytest.mark.parametrize("t5", [True, False])
def test_a_saved_pipeline_is_loaded_again(pipeline, model, without_t5, tmp_path, t5):
    pipeline.save_pretrained(tmp_path)
    source = Source(None, None, str(tmp_path), 1.0, "a licence", False, "", None)
    loaded = StableDiffusion3Model.from_pretrained(
        "flow", source, RESOLUTION, "cpu", "float32", t5=t5
    )
    expected = model if t5 else without_t5
    assert loaded.surroundings_digest() == expected.surroundings_digest()


def test_half_precision(without_t5):
    half = StableDiffusion3Model.from_pretrained(
        "flow", NOWHERE, RESOLUTION, "cpu", "float16", "random-small", ARCHITECTURE
    )
    tensors = half.encode_prompts(PROMPTS).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert half.vae.dtype == torch.float16
    assert half.provenance()["dtype"] == "float16"
    assert half.provenance()["fingerprint"] != without_t5.provenance()["fingerprint"]
