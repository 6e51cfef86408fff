"""Eq. 3's scores against independent computations, and what they leave behind: nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import readings
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from scipy.stats import spearmanr

from cad.attribution import (
    GRADIENT_RMS,
    Attribution,
    backward_scale,
    summed_gradients,
    term_gradient,
)
from cad.components import component_weights
from cad.errors import UserError
from cad.models.stable_diffusion import PREDICTION_TYPES
from cad.objectives import AmplifyObjective, EraseObjective
from cad.references import LatentFile
from cad.sampling import make_generators
from cad.selection import Selection
from cad.trajectories import STAGES

SETTINGS = Attribution(steps=3, samples=2, batch_size=2, seed=5)


def trainable(model, component):
    weights = component_weights(model, component)
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def weights_times_gradients(weights, total):
    gradients = torch.autograd.grad(total, list(weights.values()))
    pairs = zip(weights.items(), gradients, strict=True)
    return {name: (weight * gradient).detach().flatten(1) for (name, weight), gradient in pairs}


def brute_force_erase(model, concept, settings, weighting="model"):
    """Eq. 4 along one DDIM walk, with diffusers' own modules and one autograd call at the end."""
    weights = trainable(model, settings.component)
    scheduler = DDIMScheduler.from_config(model._ddim.config)
    scheduler.set_timesteps(settings.steps)
    n = settings.samples
    states = {
        text: model.encode_prompts([text]).tensors["states"].expand(n, -1, -1)
        for text in ("", concept.prompt, concept.base_prompt)
    }
    generators = make_generators(range(n), f"attribution-{settings.seed}")
    x = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    total = torch.zeros(())
    for t in scheduler.timesteps:
        phi = {text: model.denoiser(x, t, s).sample for text, s in states.items()}
        a, s = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
        seen = phi  # what the norm is taken of: Phi, or the noise it stands for
        if weighting == "epsilon":
            clean = scheduler.config.prediction_type == "sample"
            seen = {k: (x - a * v) / s if clean else a * v + s * x for k, v in phi.items()}
        base = seen[concept.base_prompt].detach()
        total = total + (base - seen[concept.prompt]).pow(2).sum() / n
        guided = (1 - settings.guidance) * phi[""] + settings.guidance * phi[concept.prompt]
        x = scheduler.step(guided.detach(), t, x, eta=settings.eta, generator=generators)
        x = x.prev_sample
    return weights_times_gradients(weights, total)


def assert_scores_equal(scores, expected):
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        assert score.dtype == torch.float32
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("component", "weighting", "base_prompt"),
    [("ff", "model", ""), ("residual", "model", ""), ("ff", "epsilon", ""), ("ff", "model", "hut")],
)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_erase_scores_equal_brute_force(
    tiny_model, parachute, component, weighting, base_prompt, batch_size, prediction_type
):
    tiny_model._ddim.register_to_config(prediction_type=prediction_type)
    concept = replace(parachute, base_prompt=base_prompt)
    settings = replace(SETTINGS, component=component, batch_size=batch_size)
    scores = settings.scores(tiny_model, EraseObjective(concept, weighting))
    assert_scores_equal(scores, brute_force_erase(tiny_model, concept, settings, weighting))


@pytest.mark.parametrize("trajectory", ["restart", "released"])
def test_restarted_scores_and_masks_equal_brute_force(tiny_model, parachute, trajectory):
    """Eq. 4 from fresh noise for each timestep t; released: at the latents after t's own step.

    Of the weights that Algorithm 1 zeroes, each row's top ones above 0, at most 1 in 1,000 differs.
    """
    settings = replace(SETTINGS, samples=1, eta=0.0, trajectory=trajectory)
    scores = settings.scores(tiny_model, EraseObjective(parachute))
    timesteps = readings.ddim(tiny_model, settings.steps).timesteps
    states = [readings.embed(tiny_model, text)[0].float()[None] for text in ("", "parachute")]
    weights = trainable(tiny_model, "ff")
    total = torch.zeros(())
    for index, t in enumerate(timesteps):
        (generator,) = make_generators([0], f"attribution-5-{index}")
        noise = torch.randn(1, *tiny_model.latent_shape, generator=generator)
        stop = index + (trajectory == "released")
        x_t = readings.walked(tiny_model, noise, "parachute", 3.0, settings.steps, stop)
        base, phi = (tiny_model.denoiser(x_t, t, each).sample for each in states)
        total = total + (base.detach() - phi).pow(2).sum()
    expected = weights_times_gradients(weights, total)
    assert_scores_equal(scores, expected)
    chosen, size, wrong = Selection(0.05).indices(scores), 0, 0
    for name, score in expected.items():
        top = score.argsort(dim=1, descending=True)[:, : int(0.05 * score.shape[1])]
        mask = torch.zeros_like(score).scatter(1, top, 1) * (score > 0)
        wrong += len({*mask.flatten().nonzero()[:, 0].tolist()} ^ {*chosen[name].tolist()})
        size += int(mask.sum())
    assert wrong <= size / 1000


def brute_force_amplify(model, x_0, weighting):
    """As above, over noised reference images: of two noises for each, one autograd call."""
    weights = trainable(model, "ff")
    c = model.encode_prompts(["parachute"]).tensors["states"]
    scheduler = DDIMScheduler.from_config(model._ddim.config)
    scheduler.set_timesteps(SETTINGS.steps)
    total = torch.zeros(())
    for pair, generator in enumerate(make_generators(range(4), "amplify-5")):
        image = x_0[pair // 2]
        for t in scheduler.timesteps:
            noise = torch.randn(image.shape, generator=generator)
            a, s = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
            x_t = a * image + s * noise
            prediction, kind = model.denoiser(x_t[None], t, c).sample[0], model.prediction_type
            targets = {"epsilon": noise, "v_prediction": a * noise - s * image, "sample": image}
            target = targets[kind]
            if weighting == "epsilon":
                clean = kind == "sample"
                prediction = (x_t - a * prediction) / s if clean else a * prediction + s * x_t
                target = noise
            total = total - (target - prediction).pow(2).mean() / SETTINGS.samples
    return weights_times_gradients(weights, total)


@pytest.mark.parametrize(
    ("prediction_type", "weighting"),
    [
        *((kind, "model") for kind in PREDICTION_TYPES),
        ("v_prediction", "epsilon"),
        ("sample", "epsilon"),
    ],
)
def test_amplify_scores_equal_brute_force(
    tiny_model, parachute, tmp_path, prediction_type, weighting
):
    tiny_model._ddim.register_to_config(prediction_type=prediction_type)
    x_0 = torch.randn(2, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(1))
    save_file({"parachute": x_0}, tmp_path / "references.safetensors")
    references = LatentFile(tmp_path / "references.safetensors")
    scores = SETTINGS.scores(tiny_model, AmplifyObjective(parachute, references, weighting))
    assert_scores_equal(scores, brute_force_amplify(tiny_model, x_0, weighting))


def test_shared_and_restarted_trajectories_agree(tiny_model, parachute):
    flat = []
    for trajectory in ("shared", "restart"):
        settings = Attribution(steps=3, samples=2, trajectory=trajectory)
        scores = settings.scores(tiny_model, EraseObjective(parachute))
        flat.append(torch.cat([score.flatten() for score in scores.values()]))
    assert not torch.equal(flat[0], flat[1])
    assert spearmanr(*flat).statistic > 0.3


@pytest.mark.parametrize("trajectory", ["shared", "restart", "released", "amplify"])
def test_the_scores_of_all_timesteps_are_the_sum_of_the_stages(
    tiny_model, parachute, tmp_path, trajectory
):
    """The same states and noise: what a stage leaves out is all that it changes."""
    objective = EraseObjective(parachute)
    settings = replace(SETTINGS, steps=4, samples=3)
    if trajectory == "amplify":
        x_0 = torch.randn(2, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(1))
        save_file({"parachute": x_0}, tmp_path / "references.safetensors")
        objective = AmplifyObjective(parachute, LatentFile(tmp_path / "references.safetensors"))
    else:
        settings = replace(settings, trajectory=trajectory)
    parts = [replace(settings, stage=stage) for stage in STAGES]
    assert [len(part.counted()) for part in parts] == [1, 1, 2]
    scores = [part.scores(tiny_model, objective) for part in parts]
    whole = settings.scores(tiny_model, objective)
    total = {name: sum(each[name] for each in scores) for name in whole}
    assert_scores_equal(total, whole)
    name = next(iter(whole))
    assert not any(torch.allclose(each[name], whole[name], rtol=0.01) for each in scores)


def test_gradients_are_given_back_after_an_exception(tiny_model):
    weights = component_weights(tiny_model, "ff")
    with pytest.raises(ZeroDivisionError), summed_gradients(weights, torch.device("cpu")):
        raise ZeroDivisionError
    assert_untouched(tiny_model)


def assert_untouched(model):
    for parameter in model.denoiser.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    for module in model.denoiser.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"sums_on": "cpu"}])
def test_saving_memory_changes_no_score(tiny_model, parachute, setting):
    objective = EraseObjective(parachute)
    lean = replace(SETTINGS, **setting)
    assert lean.settings() == SETTINGS.settings()  # so both find the same stored scores
    found, expected = lean.scores(tiny_model, objective), SETTINGS.scores(tiny_model, objective)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)
    assert_untouched(tiny_model)
    assert not tiny_model.denoiser.is_gradient_checkpointing


def test_checkpointing_is_refused_where_there_is_none(tiny_model, parachute):
    tiny_model.denoiser._supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"gradient_checkpointing=true .* UNet2DConditionModel"):
        replace(SETTINGS, gradient_checkpointing=True).scores(tiny_model, EraseObjective(parachute))


def test_half_precision_sums_gradients_in_float32():
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float16), requires_grad=False)
    with summed_gradients({"w": weight}, torch.device("cpu")) as sums:
        for _ in range(3000):  # in float16, 2048 + 1 is 2048
            weight.sum().backward()
    assert sums["w"].dtype == torch.float32
    assert torch.equal(sums["w"], torch.full((2, 2), 3000.0))


def test_half_precision_scores_are_near_those_of_float32(tiny_model, parachute):
    full = SETTINGS.scores(tiny_model, EraseObjective(parachute))
    for module in (tiny_model.denoiser, tiny_model.text_encoder, tiny_model.vae):
        module.to(torch.bfloat16)
    half = SETTINGS.scores(tiny_model, EraseObjective(parachute))
    flat = [torch.cat([score.flatten() for score in each.values()]) for each in (full, half)]
    assert flat[1].dtype == torch.float32
    assert spearmanr(*flat).statistic > 0.9


def test_small_gradients_survive_half_precision(parachute, tmp_path):
    """A mean over 2^18 elements would push each gradient below float16's range."""
    objective = AmplifyObjective(parachute, LatentFile(tmp_path / "none"))
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    noise = torch.linspace(-1, 1, 2**18).reshape(1, 4, 256, 256)
    expected = 2 * 0.99 * 0.01 * noise.square().mean().item()
    gradients = []
    for scaled in (False, True):
        prediction = weight * noise.half() * 0.01
        _, gradient = term_gradient(objective, noise, prediction)
        scale = backward_scale(gradient, GRADIENT_RMS) if scaled else 1.0
        with summed_gradients({"w": weight}, torch.device("cpu")) as sums:
            sums.factor = 1 / scale
            prediction.backward((scale * gradient).half())
        gradients.append(sums["w"].item())
    assert gradients[1] == pytest.approx(expected, rel=1e-2)
    assert gradients[0] != pytest.approx(expected, rel=1e-2)


def test_a_backward_starts_from_gradients_of_one_size():
    gradient = torch.tensor([3e-9, -4e-9])
    scale = backward_scale(gradient, 0.25)
    assert scale == 2.0 ** round(math.log2(scale))
    assert 0.25 / 2**0.5 <= (scale * gradient).square().mean().sqrt() <= 0.25 * 2**0.5
    assert backward_scale(torch.zeros(2), 0.25) == 1.0


def test_gradients_that_are_all_zero_are_refused(tiny_model, parachute):
    tiny_model.denoiser.conv_out.weight.data.zero_()
    with pytest.raises(UserError, match=r"component=ff of model=tiny are exactly 0.*float32"):
        SETTINGS.scores(tiny_model, EraseObjective(parachute))


def test_gradients_that_overflow_are_refused(tiny_model, parachute, monkeypatch):
    monkeypatch.setattr("cad.attribution.backward_scale", lambda *_: float("inf"))
    with pytest.raises(UserError, match=r"weights of model=tiny are NaN or infinite"):
        SETTINGS.scores(tiny_model, EraseObjective(parachute))


def test_an_objective_that_is_not_finite_is_refused(tiny_model, parachute):
    next(tiny_model.denoiser.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"nan at timestep .*dtype=float32"):
        SETTINGS.scores(tiny_model, EraseObjective(parachute))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "edit.attribution.steps=0"),
        ({"samples": 0}, "edit.attribution.samples=0"),
        ({"batch_size": -1}, "edit.attribution.batch_size=-1"),
        ({"eta": 1.5}, "edit.attribution.eta=1.5"),
        ({"guidance": float("nan")}, "edit.attribution.guidance=nan"),
        ({"sums_on": "disk"}, "edit.attribution.sums_on='disk' is unknown; allowed: device, cpu"),
        ({"trajectory": "loop"}, "allowed: shared, restart, released"),
        ({"stage": "end"}, "edit.attribution.stage='end' is unknown; allowed: all, early, middle"),
        ({"stage": "middle", "steps": 1}, "attribution.steps=1 is not .* stages are thirds"),
        ({"samples": "abc"}, "edit.attribution.samples='abc' is not allowed: it is a whole number"),
        ({"gradient_checkpointing": 1}, "edit.attribution.gradient_checkpointing=1"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        Attribution(**setting)
