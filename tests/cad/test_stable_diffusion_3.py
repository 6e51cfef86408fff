"""Stable Diffusion 3: its flow, its text encoders, and what else only it has (`test_families`)."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import RESOLUTION, pretrained
from diffusers import StableDiffusion3Pipeline

from cad.components import component_weights, text_projections
from cad.errors import UserError
from cad.models.random_weights import random_pipeline
from cad.models.stable_diffusion_3 import T5_PARTS, T5_TOKENS, StableDiffusion3Model

ARCHITECTURE = "sd35_medium"
PROMPTS = ["a photo of a church", "parachute"]
STEPS = 3


@pytest.fixture(scope="module")
def without_t5() -> StableDiffusion3Model:
    random = {"weights": "random-small", "architecture": ARCHITECTURE}
    return pretrained(StableDiffusion3Model, t5=False, **random).load()


def encoded(pipeline):
    """States, unconditional states, pooled, unconditional pooled: the pipeline's own."""
    return pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, device=torch.device("cpu"))


def test_text_is_encoded_as_by_the_pipeline(flow):
    states, empty_states, pooled, empty_pooled = encoded(flow.pipeline)
    tensors = flow.encode_prompts(["", *PROMPTS]).tensors
    assert states.shape == (2, 77 + T5_TOKENS, 96)
    torch.testing.assert_close(tensors["states"], torch.cat([empty_states[:1], states]))
    torch.testing.assert_close(tensors["pooled"], torch.cat([empty_pooled[:1], pooled]))


def test_without_t5_its_states_are_zeros(flow, without_t5, tmp_path):
    plain = random_pipeline(
        StableDiffusion3Pipeline, ARCHITECTURE, torch.float32, small=True, without=T5_PARTS
    )
    states, _, pooled, _ = encoded(plain)
    tensors = without_t5.encode_prompts(PROMPTS).tensors
    torch.testing.assert_close(tensors["states"], states)
    torch.testing.assert_close(tensors["pooled"], pooled)
    assert not tensors["states"][:, 77:].any()
    whole = flow.encode_prompts(PROMPTS).tensors["states"]
    torch.testing.assert_close(tensors["states"][:, :77], whole[:, :77])
    assert without_t5.surroundings_digest() != flow.surroundings_digest()
    flow.pipeline.save_pretrained(tmp_path)
    loaded = pretrained(StableDiffusion3Model, tmp_path, t5=False).load()
    assert loaded.surroundings_digest() == without_t5.surroundings_digest()


def test_the_forward_process_is_the_schedulers(flow):
    """At the very timesteps of Eq. 5, which are not whole numbers."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 2, *flow.latent_shape, generator=generator)
    own = flow.pipeline.scheduler
    scheduler = type(own).from_config(own.config)
    scheduler.set_timesteps(STEPS)
    timesteps = flow.sampler(STEPS, "ddim").timesteps
    assert torch.equal(timesteps, scheduler.timesteps)
    for t in timesteps:
        expected = scheduler.scale_noise(x_0, t.expand(2), noise)
        torch.testing.assert_close(flow.add_noise(x_0, noise, t), expected)
        torch.testing.assert_close(flow.add_noise(x_0, noise, t.expand(2)), expected)


def test_the_samplers_are_eulers(flow):
    for kind in ("default", "ddim"):
        sampler = flow.sampler(STEPS, kind, None)
        assert sampler.timesteps[0] == 1000
        assert sampler.init_sigma == 1.0
    with pytest.raises(UserError, match=r"eta=1.0 .*FlowMatchEuler.* has no eta"):
        flow.sampler(STEPS, "ddim", 1.0)


def test_a_schedule_that_depends_on_the_size_is_refused(flow, monkeypatch):
    own = flow.pipeline.scheduler
    shifting = type(own).from_config(own.config, use_dynamic_shifting=True)
    monkeypatch.setattr(flow.pipeline, "scheduler", shifting)
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        StableDiffusion3Model("flow", flow.pipeline, RESOLUTION)


def test_components_by_what_reads_image_and_text(flow):
    names = {name: list(component_weights(flow, name)) for name in flow.components}
    assert list(names) == ["ff", "attn1", "attn2"]
    linear = {
        name.removesuffix(".weight")
        for name, weight in flow.denoiser.named_parameters()
        if weight.dim() == 2 and re.search(r"transformer_blocks\.\d+\.(attn|ff)", name)
    }
    found = [name.removesuffix(".weight") for group in names.values() for name in group]
    assert sorted(found) == sorted(linear)  # every one is in a group, and in one only


def test_what_the_family_does_not_have_is_refused_with_the_reason(flow):
    with pytest.raises(UserError, match=r"residual is not allowed .*no residual blocks.*attn1"):
        component_weights(flow, "residual")
    with pytest.raises(UserError, match=r"model=sd35.* \(SD3Tran.*\) has no cross-attention"):
        text_projections(flow)  # though some of its weights are called attn2
    with pytest.raises(UserError, match=r"model=sd35.* reads .* different tokens"):
        flow.last_tokens(["church"])


@pytest.mark.parametrize(
    ("resolution", "message"), [(72, "multiples of 16"), (400, "positions up to 384")]
)
def test_resolutions_that_the_transformer_does_not_know(flow, resolution, message):
    with pytest.raises(UserError, match=message):
        StableDiffusion3Model("flow", flow.pipeline, resolution)
