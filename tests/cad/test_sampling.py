"""Sampling against diffusers' own pipeline, and that an image depends on its seed alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import PNDMScheduler

from cad.errors import UserError
from cad.models.conditioning import Conditioning
from cad.models.sampler import Sampler
from cad.sampling import draw_noise, make_generators, sample_latents

PROMPTS = ["church", "a parachute"]


def latents(model, prompts, seeds, **settings):
    c, unconditional = model.encode_prompts(prompts), model.encode_prompts([""])
    return sample_latents(
        model, c, unconditional, seeds, **{"steps": 2, "guidance": 4.0, **settings}
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_equals_the_pipeline(tiny_pipeline, tiny_model, guidance):
    expected = tiny_pipeline(
        PROMPTS,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 7)],
        height=64,
        width=64,
        output_type="latent",
    ).images
    sampled = latents(tiny_model, PROMPTS, [0, 7], guidance=guidance)
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)


def test_an_image_depends_on_its_own_seed_and_prompt(tiny_model):
    both = latents(tiny_model, PROMPTS, [3, 4], kind="ddim", eta=1.0)
    alone = latents(tiny_model, PROMPTS[1:], [4], kind="ddim", eta=1.0)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[1])


def test_noise_is_the_seed_s_whatever_the_salt_and_dtype(tiny_model):
    plain = draw_noise(tiny_model, make_generators([0, 1]))
    assert torch.equal(plain[1], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)))
    salted = draw_noise(tiny_model, make_generators([0, 1], salt="attribution"))
    assert not torch.equal(plain, salted)
    assert torch.equal(salted[1:], draw_noise(tiny_model, make_generators([1], salt="attribution")))
    tiny_model.denoiser.half()
    assert torch.equal(draw_noise(tiny_model, make_generators([0, 1])), plain.half())


def test_eta_noise_is_the_same_in_every_dtype(tiny_model):
    sampler = tiny_model.sampler(2, "ddim", eta=1.0)
    t, steps = sampler.timesteps[0], {}
    for dtype in (torch.float32, torch.bfloat16):
        generators = make_generators([0, 1])
        zeros = torch.zeros(2, 4, 8, 8, dtype=dtype)
        steps[dtype] = tiny_model.sampler(2, "ddim", eta=1.0).step(zeros, t, zeros, generators)
        assert steps[dtype].dtype == dtype
    torch.testing.assert_close(
        steps[torch.bfloat16].float(), steps[torch.float32], rtol=0.02, atol=1e-3
    )
    own = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    ratio = steps[torch.float32][1] / own  # all there is in a step from 0 is sigma times the noise
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_eta_none_is_what_the_sampler_can(tiny_model):
    zeros = torch.zeros(1, 4, 8, 8)
    ddim = [tiny_model.sampler(2, "ddim", eta) for eta in (None, 1.0)]
    steps = [each.step(zeros, each.timesteps[0], zeros, make_generators([0])) for each in ddim]
    assert torch.equal(steps[0], steps[1])
    assert steps[0].any()
    pndm = Sampler(PNDMScheduler(skip_prk_steps=True), 2, torch.device("cpu"), eta=None)
    x_t = torch.ones(1, 4, 8, 8)
    for t in pndm.timesteps:
        x_t = pndm.step(torch.zeros_like(pndm.scale(x_t, t)), t, x_t, None)
    assert torch.isfinite(x_t).all()


def test_settings_out_of_range_are_refused(tiny_model):
    with pytest.raises(UserError, match="steps=0 is not allowed; the model takes 1 to 1000"):
        tiny_model.sampler(0)
    with pytest.raises(UserError, match="steps=1001"):
        tiny_model.sampler(1001)
    with pytest.raises(UserError, match="eta=2"):
        tiny_model.sampler(2, eta=2.0)
    with pytest.raises(UserError, match="allowed: default, ddim"):
        tiny_model.sampler(2, kind="heun")
    with pytest.raises(UserError, match="PNDMScheduler has no eta"):
        Sampler(PNDMScheduler(), 2, torch.device("cpu"), eta=0.5)
    tiny_model.sampler(999)
    with pytest.raises(UserError, match=r"steps=1000 .* start at timestep 1000, .* 0 to 999"):
        tiny_model.sampler(1000)  # leading spacing, offset 1
    sampler = tiny_model.sampler(2, eta=1.0)
    with pytest.raises(ValueError, match="one generator per image"):
        sampler.step(torch.zeros(1), sampler.timesteps[0], torch.zeros(1), None)
    with pytest.raises(ValueError, match="2 prompts for 1 seeds"):
        latents(tiny_model, PROMPTS, [0])


def test_conditioning():
    c = Conditioning({"states": torch.arange(6.0).reshape(3, 2), "pooled": torch.arange(3)})
    assert len(c) == 3
    assert c[1:].tensors["pooled"].tolist() == [1, 2]
    assert c[torch.tensor([2, 0])].tensors["pooled"].tolist() == [2, 0]
    assert Conditioning.cat([c[:1].expand(2), c]).tensors["pooled"].tolist() == [0, 0, 0, 1, 2]
