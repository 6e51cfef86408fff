"""Probes beyond text: completed pictures and a learned token, against diffusers' own pipelines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from tqdm import tqdm

from cad.components import component_weights
from cad.concepts import of_prompt
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.references import GeneratedImages
from cad.sampling import make_generators
from cad.weight_edit import Scale, WeightEdit
from evaluation.attacks.base import attempt
from evaluation.attacks.inpainting import Inpainting
from evaluation.attacks.learned_token import LearnedToken
from evaluation.attacks.sdedit import SDEdit
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings

STEPS = 5
SETTINGS = SamplerSettings(steps=STEPS, guidance=3.0, kind="default", batch_size=4)
PROMPTS = tuple(Prompt(text, seed, "hut") for seed, text in enumerate(("a hut", "church")))
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
PICTURES = GeneratedImages(3, 2, encoding=None)


class Judge:
    """Sees the concept in the second image, and remembers what it saw."""

    def __call__(self, images, prompts):
        self.images = images
        return [prompt.seed == 1 for prompt in prompts]


def weakened(model):
    weights = component_weights(model, "ff")
    changes = {n: Scale(torch.arange(w.numel()), 0.2) for n, w in weights.items()}
    return WeightEdit(changes, {"model": model.provenance()})


def inpainting(**changed):
    return Inpainting(**{"region": "right", "judge_sees": "hidden", "batch_size": 4} | changed)


def token(folder, **changed):
    settings = {"prompt": "church", "pictures": PICTURES, "initial": "day", "iterations": 2}
    settings |= {"lr": 1e-3, "steps": 4, "states": 2, "batch_size": 4, "store": str(folder)}
    return LearnedToken(**settings | changed)


def attacked(model, attack, judge=None, prompts=PROMPTS):
    images = IMAGES[: len(prompts)] if attack.uses_images else None
    given = weakened(model), attack, prompts, SETTINGS, judge or Judge(), tqdm(disable=True)
    return attempt(model, *given, images)


def latents(model):
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        return model.vae.encode(pixels).latent_dist.mode() * model.vae.config.scaling_factor


def drawn_by(pipeline_class, model, name, seed, **given):
    """What diffusers' pipeline makes of a picture's latents with the edited UNet."""
    names = ("vae", "text_encoder", "tokenizer")
    parts = {each: getattr(model, each) for each in names} | dict.fromkeys(
        ("safety_checker", "feature_extractor")
    )
    own = {"unet": model.denoiser, "scheduler": model.sampler(STEPS, "ddim")._scheduler}
    pipeline = pipeline_class(**parts, **own, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    (generator,) = make_generators([seed], f"attack-{name}")
    asked = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    with weakened(model).applied(model):
        image = pipeline(PROMPTS[seed].text, generator=generator, **asked, **given).images[0]
    return (255 * image).round().astype(np.uint8)


def test_sdedit_completes_a_noised_picture_as_diffusers_does(tiny_model):
    found = attacked(tiny_model, SDEdit(strength=0.61, batch_size=4))
    assert [outcome.success for outcome in found] == [False, True]
    assert [outcome.text for outcome in found] == ["a hut", "church"]
    for seed, outcome in enumerate(found):
        given = {"image": latents(tiny_model)[seed : seed + 1], "strength": 0.61}
        expected = drawn_by(StableDiffusionImg2ImgPipeline, tiny_model, "sdedit", seed, **given)
        assert np.abs(expected.astype(int) - outcome.image).max() <= 1


def test_nothing_of_a_picture_shows_through_pure_noise(tiny_model, monkeypatch):
    attack = SDEdit(strength=1.0, batch_size=4)
    (first,) = attacked(tiny_model, attack, prompts=PROMPTS[:1])
    monkeypatch.setitem(globals(), "IMAGES", 255 - IMAGES)
    (other,) = attacked(tiny_model, replace(attack, other="fish"), prompts=PROMPTS[:1])
    assert np.array_equal(first.image, other.image)


@pytest.mark.parametrize("region", ["right", "centre"])
def test_inpainting_puts_the_given_part_in_as_diffusers_does(tiny_model, region):
    judge, attack = Judge(), inpainting(region=region)
    found = attacked(tiny_model, attack, judge)
    hidden = attack.hidden(64, 64)
    assert hidden.sum() == (2048 if region == "right" else 1024)
    assert torch.equal(hidden[::8, ::8], attack.hidden(8, 8))
    for seed, outcome in enumerate(found):
        x_0 = latents(tiny_model)[seed : seed + 1]
        given = {"image": x_0, "mask_image": hidden.float()[None], "masked_image_latents": x_0}
        given |= {"strength": 1.0, "height": 64, "width": 64}
        expected = drawn_by(StableDiffusionInpaintPipeline, tiny_model, "inpainting", seed, **given)
        assert np.abs(expected.astype(int) - outcome.image).max() <= 1
        assert (judge.images[seed][~hidden.numpy()] == 128).all()
        assert np.array_equal(judge.images[seed][hidden.numpy()], outcome.image[hidden.numpy()])
    attacked(tiny_model, inpainting(region=region, judge_sees="whole"), judge)
    assert np.array_equal(judge.images, [outcome.image for outcome in found])


@pytest.mark.parametrize("family", ["xl", "flow"])
def test_pictures_are_completed_by_every_family_and_tokens_by_one_encoder(
    family, request, tmp_path
):
    model = request.getfixturevalue(family)
    for attack in (SDEdit(strength=0.5, batch_size=4), inpainting()):
        attack.check(model, PROMPTS)
        assert all(outcome.image.std() > 0 for outcome in attacked(model, attack))
    with pytest.raises(UserError, match=rf"model={model.name} reads a prompt through \d text enc"):
        token(tmp_path).check(model, PROMPTS)


def test_a_control_is_given_pictures_of_its_own(tiny_model, tmp_path):
    for attack in (SDEdit(strength=0.5, batch_size=4), inpainting()):
        control = replace(attack, other="tench")
        assert control.name == f"{attack.name}_control"
        assert control.settings() != attack.settings()
        assert attack.pictured(PROMPTS) == list(PROMPTS)
        assert control.pictured(PROMPTS) == [replace(each, text="tench") for each in PROMPTS]
        with pytest.raises(UserError, match="the prompt 'abcdefghijklmnop' has"):
            replace(attack, other="abcdefghijklmnop").check(tiny_model, PROMPTS)
    own, control = token(tmp_path), token(tmp_path, other="tench")
    assert (own.subject, control.subject) == ("church", "tench")
    assert control.settings()["pictures"]["prompt"] == "tench"


def test_a_token_is_learned_from_the_networks_own_loss(tiny_model, tmp_path):
    """Adam's first step is lr g / (|g| + 1e-8)."""
    attack, edit = token(tmp_path, iterations=1), weakened(tiny_model)
    space = tiny_model.token_space()
    ids = space.prepend([""], 1)
    v, losses = attack.learn(tiny_model, edit, space, ids)
    pictures = PICTURES.latents(tiny_model, of_prompt("church"))
    generators = make_generators(range(2), "learned-token-0-0")
    number = [[int(torch.randint(n, (1,), generator=g)) for g in generators] for n in (1, 3, 4)][1:]
    t = tiny_model.sampler(4, "ddim").timesteps[number[1]]
    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    x_t = tiny_model.add_noise(pictures[number[0]], noise, t)
    words = tiny_model.tokenizer("day", add_special_tokens=False).input_ids
    start = space.vocabulary[words].mean(dim=0).requires_grad_()
    with edit.applied(tiny_model):
        c = space.encode(ids.expand(2, -1), start.expand(2, 1, -1))
        error = tiny_model.predict(x_t, t, c) - tiny_model.target(pictures[number[0]], noise, t)
        loss = error.square().mean()
        (gradient,) = torch.autograd.grad(loss, start)
    expected = start.detach() - 1e-3 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(v[0, 0], expected, rtol=0, atol=2e-5)
    assert losses == [pytest.approx(loss.item(), rel=1e-4)]


def test_a_learned_token_is_kept_and_put_in_place_of_the_prompt(tiny_model, tmp_path, monkeypatch):
    first = attacked(tiny_model, token(tmp_path))
    monkeypatch.setattr(LearnedToken, "learn", lambda *_: pytest.fail("learned again"))
    texts = [replace(each, text="x") for each in PROMPTS]
    again = attacked(tiny_model, token(tmp_path), prompts=texts)  # whatever was asked for
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    with pytest.raises(pytest.fail.Exception):
        attacked(tiny_model, token(tmp_path, other="tench"))


def test_several_concepts_have_no_one_token(tiny_model, tmp_path):
    prompts = [PROMPTS[0], replace(PROMPTS[1], group="church")]
    with pytest.raises(UserError, match=r"token of one concept, .* of hut, church: name one"):
        token(tmp_path).check(tiny_model, prompts)


@pytest.mark.parametrize("name", ["sdedit", "inpainting", "learned_token"])
def test_nothing_is_left_behind(tiny_model, tmp_path, name):
    attacks = [SDEdit(strength=0.5, batch_size=4), inpainting(), token(tmp_path)]
    (attack,) = [each for each in attacks if each.name == name]
    networks = (tiny_model.denoiser, tiny_model.text_encoder)
    before, random = [parameter_digest(each) for each in networks], torch.get_rng_state()
    attacked(tiny_model, attack)
    assert [parameter_digest(each) for each in networks] == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not tiny_model.edits


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: SDEdit(strength=0.0, batch_size=4), r"sdedit\.strength=0\.0"),
        (lambda: SDEdit(strength=2, batch_size=4, other="x"), r"sdedit_control\.strength=2"),
        (lambda: inpainting(region="left"), r"inpainting\.region='left'"),
        (lambda: inpainting(judge_sees="all"), r"inpainting\.judge_sees='all'"),
        (lambda: token(".", lr=0), r"learned_token\.lr=0"),
        (lambda: token(".", iterations=0, other="x"), r"learned_token_control\.iterations=0"),
    ],
)
def test_settings_out_of_range_are_refused(make, key):
    with pytest.raises(UserError, match=rf"attacks\.{key}"):
        make()
