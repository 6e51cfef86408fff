"""What the attacks optimise, and the schedule they share, on the tiny random pipeline."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from conftest import RESOLUTION, build_pipeline
from tqdm import tqdm

from cad.components import component_weights
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.models.stable_diffusion import StableDiffusionModel
from cad.sampling import make_generators, sample_latents
from cad.weight_edit import Scale, WeightEdit
from evaluation.attacks.base import Victims, attempt
from evaluation.attacks.p4d import P4D
from evaluation.attacks.random_tokens import RandomTokens
from evaluation.attacks.search import prediction_errors
from evaluation.attacks.unlearn_diff import UnlearnDiff, project_onto_simplex
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings, to_pixels

SETTINGS = SamplerSettings(steps=2, guidance=3.0, kind="default", batch_size=4)
SMALL = {"tokens": 2, "timesteps": 3, "iterations": 2, "lr": 0.1, "weight_decay": 0.1}
SMALL |= {"optimizer": "adam", "retokenize": True, "batch_size": 4}
ON_IMAGE, ON_TRAJECTORY = (partial(P4D, states=states) for states in ("image", "trajectory"))
ATTACKS = (ON_IMAGE, UnlearnDiff)
TEXTS = ("a hut", "church", "two huts", "parachute")
PROMPTS = tuple(Prompt(text, seed, "hut") for seed, text in enumerate(TEXTS))


class Threshold:
    """A judge: an image shows the concept where its mean is above a value, grey levels."""

    def __init__(self, value):
        self.value = value
        self.asked: list[list[int]] = []

    def __call__(self, images, prompts):
        self.asked.append([prompt.seed for prompt in prompts])
        return [bool(image.mean() > self.value) for image in images]


def weakened(model):
    """An edit of every feed-forward weight."""
    changes = {
        name: Scale(torch.arange(weight.numel()), 0.2)
        for name, weight in component_weights(model, "ff").items()
    }
    return WeightEdit(changes, {"model": model.provenance()})


def attacked(model, attack, prompts=PROMPTS, judge=None, edit=None):
    judge = judge or Threshold(999)
    edit = edit or weakened(model)
    images = unedited(model, prompts) if attack.uses_images else None
    return attempt(model, edit, attack, prompts, SETTINGS, judge, tqdm(disable=True), images)


def unedited(model, prompts=PROMPTS):
    texts, empty = model.encode_prompts([p.text for p in prompts], truncate=True), ""
    seeds, settings = [p.seed for p in prompts], {"steps": 2, "guidance": 3.0}
    x_0 = sample_latents(model, texts, model.encode_prompts([empty]), seeds, **settings)
    return to_pixels(model.decode_latents(x_0))[0]


def victims(model, prompts=PROMPTS):
    return Victims.of(model, prompts, SETTINGS, "test", unedited(model, prompts))


@pytest.mark.parametrize("method", ATTACKS)
def test_batched_prompts_end_as_one_by_one(method, tiny_model):
    """With a threshold in the middle, some succeed, at different timesteps."""
    means = [outcome.image.mean() for outcome in attacked(tiny_model, method(**SMALL))]
    value = float(np.median(means))
    together = attacked(tiny_model, method(**SMALL), judge=Threshold(value))
    assert 0 < sum(outcome.success for outcome in together) < len(PROMPTS)
    for prompt, one in zip(PROMPTS, together, strict=True):
        (other,) = attacked(tiny_model, method(**SMALL), [prompt], Threshold(value))
        assert (one.tokens, one.timesteps) == (other.tokens, other.timesteps)
        assert one.success == other.success
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
        assert np.abs(one.image.astype(int) - other.image).max() <= 1


@pytest.mark.parametrize("method", [*ATTACKS, ON_TRAJECTORY])
def test_nothing_is_left_behind(method, tiny_model):
    """The weights are as before, also after an exception, which here comes amid the search."""
    networks = (tiny_model.denoiser, tiny_model.text_encoder)
    before, random = [parameter_digest(each) for each in networks], torch.get_rng_state()

    def check():
        assert [parameter_digest(each) for each in networks] == before
        assert torch.equal(torch.get_rng_state(), random)
        for part in networks:
            assert not any(weight.requires_grad for weight in part.parameters())
            assert not any(module._forward_hooks for module in part.modules())

    class Raising(Threshold):
        def __call__(self, images, prompts):
            assert parameter_digest(tiny_model.denoiser) != before[0]
            raise KeyError

    first = attacked(tiny_model, method(**SMALL))
    check()
    with pytest.raises(KeyError):
        attacked(tiny_model, method(**SMALL), judge=Raising(0))
    check()
    again = attacked(tiny_model, method(**SMALL))
    assert [o.tokens for o in again] == [o.tokens for o in first]
    assert [o.losses for o in again] == [o.losses for o in first]


def test_a_prompt_that_succeeds_leaves_the_batch(tiny_model):
    class Second(Threshold):
        def __call__(self, images, prompts):
            super().__call__(images, prompts)
            return [prompt.seed == 1 or len(self.asked) == 2 for prompt in prompts]

    judge = Second(0)
    found = attacked(tiny_model, ON_IMAGE(**SMALL), judge=judge)
    assert judge.asked == [[0, 1, 2, 3], [0, 2, 3]]
    assert [outcome.timesteps for outcome in found] == [2, 1, 2, 2]
    assert [len(outcome.losses) for outcome in found] == [4, 2, 4, 4]
    assert all(outcome.success for outcome in found)
    assert [outcome.timestep for outcome in found] == [499, 166, 499, 499]  # of 166, 499, 832


@pytest.mark.parametrize("method", ATTACKS)
def test_timesteps_are_the_released_ones(method, tiny_model):
    attack = method(**SMALL | {"timesteps": 50})
    assert attack.visited(tiny_model).tolist() == list(range(10, 1000, 20))
    with pytest.raises(UserError, match=r"timesteps=1001 is not allowed: .* at most 1000"):
        method(**SMALL | {"timesteps": 1001})


def test_a_trajectorys_timesteps_go_from_noise_to_image(tiny_model):
    timesteps = ON_TRAJECTORY(**SMALL).visited(tiny_model).tolist()
    assert timesteps == sorted(timesteps, reverse=True) == [667, 334, 1]


@pytest.mark.parametrize("retokenize", [True, False])
def test_the_text_or_the_tokens_are_what_was_sampled(retokenize):
    """The tokenizer splits numbers into digits: "1", within a word, and "2" are read otherwise."""
    tiny_model = StableDiffusionModel("tiny", build_pipeline(), RESOLUTION)
    tokens = tiny_model.tokenizer.convert_tokens_to_ids(["1", "2</w>"])
    attack = RandomTokens(tokens=2, tries=1, retokenize=retokenize, batch_size=1)
    object.__setattr__(attack, "discretise", lambda *_: torch.tensor([tokens]))
    (found,) = attacked(tiny_model, attack, PROMPTS[:1])
    assert (found.tokens, found.text) == (tokens, "12 a hut")
    assert not found.retokenizes
    space = tiny_model.token_space()
    ids = space.prepend([TEXTS[0]], 2)
    ids[0, 1:3] = torch.tensor(tokens)
    settings = {"steps": 2, "guidance": 3.0}
    with weakened(tiny_model).applied(tiny_model):
        read, given = tiny_model.encode_prompts(["12 a hut"]), space.encode_ids(ids)
        assert not torch.equal(read.tensors["states"], given.tensors["states"])
        texts, empty = read if retokenize else given, tiny_model.encode_prompts([""])
        x_0 = sample_latents(tiny_model, texts, empty, [PROMPTS[0].seed], **settings)
        image = tiny_model.decode_latents(x_0)[0].permute(1, 2, 0)
    assert np.array_equal((255 * image).round().to(torch.uint8).numpy(), found.image)


def test_random_tokens_are_drawn_anew_after_each_failure(tiny_model):
    attack = RandomTokens(tokens=2, tries=3, retokenize=True, batch_size=4)
    judge = Threshold(999)
    together = attacked(tiny_model, attack, judge=judge)
    assert judge.asked == 3 * [[0, 1, 2, 3]]
    space = tiny_model.token_space()
    for prompt, found in zip(PROMPTS, together, strict=True):
        drawn = make_generators([prompt.seed], "attack-random_tokens")[0]
        places = [torch.randint(len(space.usable), (2,), generator=drawn) for _ in range(3)]
        assert found.tokens == space.usable[places[-1]].tolist()
        assert (found.timesteps, found.losses, found.success) == (3, [], False)
        (alone,) = attacked(tiny_model, attack, [prompt])
        assert alone.tokens == found.tokens
    with pytest.raises(UserError, match=r"attacks\.random_tokens\.tries=0 is not"):
        RandomTokens(tokens=2, tries=0, retokenize=True, batch_size=4)


def test_p4d_aims_at_the_unedited_models_own_trajectory(tiny_model):
    attack, own = ON_TRAJECTORY(**SMALL), victims(tiny_model)
    aim = attack.aim(tiny_model, own)
    sampler = tiny_model.sampler(3, "ddim")
    (x_t, predicted), again = aim(2, [1, 3])
    assert again[0] is x_t
    rows = torch.tensor([1, 3])
    phi = tiny_model.predict(x_t, sampler.timesteps[2], own.conditioning[rows])
    torch.testing.assert_close(predicted, phi)
    phi_u = tiny_model.predict(x_t, sampler.timesteps[2], own.unconditional.expand(2))
    x_0 = sampler.step(phi_u + 3.0 * (phi - phi_u), sampler.timesteps[2], x_t, None)
    settings = {"steps": 3, "guidance": 3.0, "kind": "ddim"}
    texts = tiny_model.encode_prompts([TEXTS[1], TEXTS[3]])
    expected = sample_latents(tiny_model, texts, own.unconditional, [1, 3], **settings)
    torch.testing.assert_close(x_0, expected)


def test_p4d_puts_the_nearest_token_and_passes_gradients_straight(tiny_model):
    attack, space = ON_IMAGE(**SMALL), tiny_model.token_space()
    generator = torch.Generator().manual_seed(0)
    start = attack.start(space, generator)  # (2, D)
    ids = attack.discretise(space, start[None])
    assert torch.equal(space.vocabulary[ids[0]], start)
    variables = (0.5 * start)[None].requires_grad_()  # shorter, in the same direction
    embeddings = attack.embed(space, variables, [generator])
    torch.testing.assert_close(embeddings[0], start)
    weights = torch.randn(1, *start.shape)
    (embeddings * weights).sum().backward()
    assert variables.grad is not None
    torch.testing.assert_close(variables.grad, weights)


def test_unlearn_diff_aims_at_the_training_target_of_the_unedited_image(tiny_model):
    own = victims(tiny_model)
    attack = UnlearnDiff(**SMALL)
    aim = attack.aim(tiny_model, own)
    x_0 = tiny_model.encode_images(torch.from_numpy(own.images).permute(0, 3, 1, 2) / 255)
    (generator,) = make_generators([2], "test")
    for x_t, target in aim(1, [2]):  # fresh noise each time, from the prompt's own generator
        t = torch.tensor(499)
        noise = torch.randn(1, *tiny_model.latent_shape, generator=generator)
        torch.testing.assert_close(x_t, tiny_model.add_noise(x_0[2:3], noise, t))
        torch.testing.assert_close(target, tiny_model.target(x_0[2:3], noise, t))


def test_unlearn_diff_draws_tokens_and_cuts_their_gradients(tiny_model):
    attack, space = UnlearnDiff(**SMALL), tiny_model.token_space()
    variables = attack.start(space, torch.Generator())  # (2, U)
    torch.testing.assert_close(variables.sum(dim=-1), torch.ones(2))
    with torch.no_grad():
        variables[0] = 0
        variables[0, 7] = 1  # a sure token
    variables.requires_grad_()
    embeddings = attack.embed(space, variables[None], make_generators([0]))  # (1, 2, D)
    assert torch.equal(embeddings[0, 0], space.vocabulary[space.usable[7]])
    assert (embeddings[0, 1] == space.vocabulary).all(dim=-1).any()
    weights = 100 * torch.randn(1, 2, embeddings.shape[-1])
    (embeddings * weights).sum().backward()
    straight = (weights[0] @ space.vocabulary[space.usable].T).clamp(-1, 1)
    assert variables.grad is not None
    torch.testing.assert_close(variables.grad, straight)
    assert attack.discretise(space, variables[None])[0, 0] == space.usable[7]
    with torch.no_grad():
        variables += torch.randn_like(variables)
    attack.confine(variables)
    assert (variables >= 0).all()
    torch.testing.assert_close(variables.sum(dim=-1), torch.ones(2))


def test_losses_and_gradients_are_the_plain_ones(tiny_model):
    attack, own = ON_IMAGE(**SMALL), victims(tiny_model)
    space = tiny_model.token_space()
    embeddings = torch.randn(2, 2, space.vocabulary.shape[1])
    x_t, target = attack.aim(tiny_model, own)(1, [0, 2])[0]
    ids = space.prepend([TEXTS[0], TEXTS[2]], 2)
    t = attack.visited(tiny_model)[1]
    given = space, ids, embeddings.clone(), x_t, t, target
    losses, gradient = prediction_errors(tiny_model, *given)
    leaf = embeddings.requires_grad_()
    phi = tiny_model.predict(x_t, t, space.encode(ids, leaf))
    plain = (phi - target).square().mean(dim=(1, 2, 3))  # (2,)
    plain.sum().backward()
    torch.testing.assert_close(losses, plain.detach())
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", ATTACKS)
def test_half_precision_searches_as_well(method, tiny_model):
    """Its first losses are float32's, before rounding leads elsewhere."""
    edit = weakened(tiny_model)
    plain = attacked(tiny_model, method(**SMALL), edit=edit)
    for part in (tiny_model.denoiser, tiny_model.text_encoder, tiny_model.vae):
        part.to(torch.bfloat16)
    del tiny_model.digests
    half = attacked(tiny_model, method(**SMALL))
    for one, other in zip(plain, half, strict=True):
        assert None not in other.losses
        assert other.losses[0] == pytest.approx(one.losses[0], rel=0.1)


def test_a_model_that_gives_no_finite_numbers_is_survived(tiny_model, monkeypatch):
    def predict(x_t, t, conditioning):
        return float("nan") * x_t + conditioning.tensors["states"].mean()

    edit, attack = weakened(tiny_model), UnlearnDiff(**SMALL)
    images = unedited(tiny_model)
    monkeypatch.setitem(globals(), "unedited", lambda *_: images)
    monkeypatch.setattr(tiny_model, "predict", predict)
    for outcome in attacked(tiny_model, attack, edit=edit):
        assert not outcome.success
        assert set(outcome.losses) == {None}
        assert not outcome.image.any()


def test_a_prompt_without_room_is_refused_before_the_first_step(tiny_model):
    full = Prompt("abcdefghijklmn", 0, "hut")  # 14 tokens, with start and end 16
    with pytest.raises(UserError, match="leaves no room for 2 more"):
        attacked(tiny_model, ON_IMAGE(**SMALL), [full])
    cut = Prompt(full.text, 0, "hut", truncate=True)
    assert len(attacked(tiny_model, ON_IMAGE(**SMALL), [cut])) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tokens", 0), ("iterations", 0), ("lr", 0.0), ("weight_decay", -1.0)),
        *(("optimizer", "sgd"), ("states", "image, noised"), ("retokenize", "yes")),
    ],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=rf"attacks\.p4d\.{key}={value!r} is (not allowed|unknown)"):
        P4D(**(SMALL | {"states": "image", key: value}))


def bisected(points, rounds=100):
    """The threshold found by halving, as UnlearnDiff's paper projects; float64."""
    points = points.double()
    low, high = points.min(-1, keepdim=True).values - 1, points.max(-1, keepdim=True).values
    for _ in range(rounds):
        middle = (low + high) / 2
        too_much = (points - middle).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (points - high).clamp(min=0)


@pytest.mark.parametrize(
    ("point", "projection"),
    [
        ([0.5, 0.5], [0.5, 0.5]),  # on it
        ([2.0, 0.0], [1.0, 0.0]),
        ([0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
        ([1.0, 0.5, -1.0], [0.75, 0.25, 0.0]),  # theta = 1/4
        ([-5.0, -5.5, -9.0], [0.75, 0.25, 0.0]),
        ([3.0], [1.0]),
    ],
)
def test_the_projection_onto_the_simplex_by_hand(point, projection):
    torch.testing.assert_close(project_onto_simplex(torch.tensor(point)), torch.tensor(projection))


@pytest.mark.parametrize("size", [2, 629, 49408])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_the_projection_onto_the_simplex_equals_the_bisection(size, scale):
    generator = torch.Generator().manual_seed(size)
    points = scale * torch.randn(2, 3, size, generator=generator)
    projected = project_onto_simplex(points)
    assert (projected - bisected(points)).abs().max() < 1e-5
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(-1), torch.ones(2, 3))
