"""ESD: its target, its walks, what it trains, and that being killed changes nothing."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import readings
import torch

from baselines.checkpoint import Checkpoint
from baselines.esd import ESD, walk_apart
from baselines.training import Training, trained_weights, with_weights
from cad.concepts import Concept
from cad.edits import make_edit
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.instrument import Cost, measure
from cad.models.stable_diffusion import StableDiffusionModel
from cad.sampling import make_generators, walk
from cad.store import Store
from cad.weight_edit import NO_EDIT

SETTINGS: dict[str, Any] = {"parameters": "xattn", "iterations": 3, "lr": 1e-3, "steps": 3}


def esd(**settings):
    return ESD(**SETTINGS | settings)


@pytest.mark.parametrize("trained_on", ["text", "prompt"])
@pytest.mark.parametrize("seed", [0, 5])
def test_one_iteration_is_as_published(trained_on, seed, tiny_model):
    """On the word itself, or the prompt; Adam's first step is lr g / (|g| + 1e-8)."""
    nudity = Concept("nudity", "explicit", "nudity", "naked")
    chosen = {} if trained_on == "text" else {"trained_on": "prompt"}  # the text is the default
    method = esd(iterations=1, negative_guidance=2.0, seed=seed, **chosen)
    made = method.make(tiny_model, [nudity])
    (generator,) = make_generators([0], salt=f"esd-{seed}-0")
    stop = int(torch.randint(method.steps, (1,), generator=generator))
    torch.randint(1, (1,), generator=generator)  # the concept is drawn before the noise
    noise = torch.randn(1, *tiny_model.latent_shape, generator=generator)
    assert stop == {0: 2, 5: 1}[seed]
    word = {"text": "nudity", "prompt": "naked"}[trained_on]
    x_t = readings.walked(tiny_model, noise, word, 3.0, method.steps, stop)
    t = readings.ddim(tiny_model, method.steps).timesteps[stop]
    c, empty = (readings.embed(tiny_model, text)[0].float()[None] for text in (word, ""))
    with torch.no_grad():
        phi_c, phi_0 = (tiny_model.denoiser(x_t, t, each).sample for each in (c, empty))
    named = tiny_model.denoiser.named_parameters()
    weights = {name: weight.requires_grad_() for name, weight in named if ".attn2." in name}
    erased = phi_0 - 2.0 * (phi_c - phi_0)
    loss = (tiny_model.denoiser(x_t, t, c).sample - erased).square().mean()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    assert list(made.history) == [{"step": 1, "loss": pytest.approx(loss.item(), rel=1e-4)}]
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        expected = weight.detach() - method.lr * gradient / (gradient.abs() + 1e-8)
        found = made.changes[name].tensor
        sure = gradient.abs() > 1e-6  # below, the sign is a matter of rounding
        torch.testing.assert_close(found[sure], expected[sure], rtol=0, atol=1e-5)


def test_elements_that_leave_apart_are_separate_walks(tiny_model):
    stops = torch.tensor([2, 0, 3, 2])
    c = tiny_model.encode_prompts(["church", "tench", "golf ball", "church"])
    empty = tiny_model.encode_prompts([""])
    sampler = tiny_model.sampler(4, "ddim", 0.0)
    x_t, t = walk_apart(tiny_model, sampler, make_generators(range(4)), stops, c, empty, 3.0)
    assert torch.equal(t, sampler.timesteps[stops])
    for i, stop in enumerate(stops.tolist()):
        sampler, own = tiny_model.sampler(4, "ddim", 0.0), c[i : i + 1]
        alone = walk(tiny_model, sampler, make_generators([i]), own, empty, 3.0, steps=stop)
        torch.testing.assert_close(x_t[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameters", ["noxattn", "xattn", "selfattn", "full"])
def test_only_the_chosen_parameters_change(parameters, tiny_model, church):
    made = esd(parameters=parameters, iterations=1).make(tiny_model, [church])
    names = {name for name, _ in tiny_model.denoiser.named_parameters()}
    cross = {name for name in names if ".attn2." in name}
    chosen = {
        "noxattn": names - cross,
        "xattn": cross,
        "selfattn": {name for name in names if ".attn1." in name},
        "full": names,
    }[parameters]
    assert set(trained_weights(tiny_model, parameters)) == chosen
    # A key's bias under softmax and the like may have no gradient at all.
    assert chosen >= set(made.changes)
    assert len(made.changes) > 0.9 * len(chosen)
    weights = dict(tiny_model.denoiser.named_parameters())
    for name, change in made.changes.items():
        assert change.tensor.dtype == torch.float32
        assert not torch.equal(change.tensor, weights[name])


def test_several_concepts_are_drawn_at_random(tiny_model, church, parachute):
    method = esd(batch_size=16)
    weights = trained_weights(tiny_model, "xattn")
    c = method.course(tiny_model, [church, parachute], weights).lesson(0, weights).c
    both = tiny_model.encode_prompts([church.prompt, parachute.prompt]).tensors["states"]
    found = [[torch.equal(each, one) for one in both] for each in c.tensors["states"]]
    assert all(sum(row) == 1 for row in found)
    assert all(sum(column) >= 2 for column in zip(*found, strict=True))


def test_accumulation_is_a_larger_batch(tiny_model, church):
    """The first step's gradients, which Adam's normalisation would blow rounding up in."""
    gradients, losses = [], []
    for settings in ({"batch_size": 2}, {"accumulation": 2}):
        method = esd(**settings)
        training = Training(method, tiny_model, trained_weights(tiny_model, "xattn"), [church])
        training._adam.zero_grad = lambda: None  # type: ignore[method-assign]
        losses.append(training.step(0))
        gradients.append({name: weight.grad for name, weight in training.weights.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-7)


def test_gradient_checkpointing_gives_the_same_and_is_switched_back(tiny_model, church):
    """Its second forward, in the backward, must meet the trained weights, not the model's own."""
    plain = esd(iterations=2).make(tiny_model, [church])
    saving = esd(iterations=2, gradient_checkpointing=True).make(tiny_model, [church])
    assert saving.history == plain.history
    assert saving.fingerprint == plain.fingerprint
    assert not tiny_model.denoiser.is_gradient_checkpointing


class KilledError(Exception):
    pass


def kill_at(monkeypatch, iteration):
    step = Training.step

    def killed(training, i):
        if i == iteration:
            raise KilledError
        return step(training, i)

    monkeypatch.setattr(Training, "step", killed)


@pytest.fixture
def checkpoints(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def interrupted(tiny_model, church, checkpoints, monkeypatch):
    """A method whose training was killed in its fourth iteration, after two checkpoints."""
    method = esd(iterations=4, checkpoint_every=2, checkpoints=str(checkpoints), batch_size=2)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(KilledError):
            method.make(tiny_model, [church])
    assert [path.suffix for path in checkpoints.glob("*/*")] == [".safetensors"]
    return method


def test_killed_and_resumed_is_uninterrupted(
    interrupted, tiny_model, church, checkpoints, monkeypatch, tmp_path
):
    saved = Checkpoint(next(checkpoints.iterdir())).read()
    assert [record["step"] for record in saved.history] == [1, 2]
    assert saved.cost.seconds > 0
    done: list[int] = []
    step = Training.step
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", lambda self, i: done.append(i) or step(self, i))
        resumed = interrupted.make(tiny_model, [church])
    assert done == [2, 3]
    assert list(checkpoints.iterdir())  # until the edit is stored
    stored, _ = make_edit(interrupted, tiny_model, [church], Store(tmp_path / "edits"))
    assert not list(checkpoints.iterdir())
    whole = esd(iterations=4, batch_size=2).make(tiny_model, [church])
    assert resumed.fingerprint == stored.fingerprint == whole.fingerprint
    for edit in (resumed, stored):  # to the order of the keys, for equal files
        assert json.dumps(edit.history) == json.dumps(whole.history)
    assert resumed.cost.seconds > saved.cost.seconds
    assert not resumed.cost.cached


def test_another_training_does_not_take_its_checkpoint(
    interrupted, tiny_model, parachute, checkpoints
):
    (church_s,) = checkpoints.iterdir()
    interrupted.make(tiny_model, [parachute])
    assert len(list(checkpoints.iterdir())) == 2
    interrupted.clean_up(tiny_model, [parachute])
    assert list(checkpoints.iterdir()) == [church_s]


def test_a_damaged_checkpoint_starts_anew(interrupted, tiny_model, church, checkpoints, caplog):
    (path,) = checkpoints.glob("*/*")
    path.write_bytes(path.read_bytes().replace(b"training/2", b"training/0"))
    with caplog.at_level(logging.WARNING):
        made = interrupted.make(tiny_model, [church])
    assert "damaged" in caplog.text
    assert [record["step"] for record in made.history] == [1, 2, 3, 4]


def test_the_meter_leaves_pauses_out_and_adds_sittings(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cad.instrument.time.perf_counter", lambda: now[0])
    with measure(torch.device("cpu")) as meter:
        meter.cost = Cost(100.0, 1e9, memory_kind="resident growth")
        now[0] += 1.0
        with meter.paused():
            now[0] += 10.0
        now[0] += 2.0
    assert meter.cost == Cost(103.0, 1e9, memory_kind="resident growth")


@pytest.mark.parametrize("saving", [False, True])
def test_the_model_is_left_as_found_amid_a_step(saving, tiny_model, church, monkeypatch):
    denoiser, predict = tiny_model.denoiser, StableDiffusionModel.predict
    before, random = parameter_digest(denoiser), torch.get_rng_state()
    parameters = dict(denoiser.named_parameters())

    def fail(self, *args):
        if torch.is_grad_enabled():
            raise KilledError
        return predict(self, *args)

    monkeypatch.setattr(StableDiffusionModel, "predict", fail)
    with pytest.raises(KilledError):
        esd(parameters="noxattn", gradient_checkpointing=saving).make(tiny_model, [church])
    assert parameter_digest(denoiser) == before
    assert all(each is parameters[name] for name, each in denoiser.named_parameters())
    assert not any(each.requires_grad for each in denoiser.parameters())
    assert all(each.grad is None for each in denoiser.parameters())
    assert not any(module.training for module in denoiser.modules())
    assert not denoiser.is_gradient_checkpointing
    assert torch.equal(torch.get_rng_state(), random)


def test_weights_are_swapped_only_for_the_work():
    layer = torch.nn.Linear(1, 1)
    weight, other = layer.weight, torch.zeros(1, 1)
    assert with_weights(layer, {"weight": other}, lambda: layer.weight is other)
    with pytest.raises(ZeroDivisionError):
        with_weights(layer, {"weight": other}, lambda: 1 / 0)
    assert layer.weight is weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["noxattn", "xattn"])
def test_half_precision_trains_float32_masters(parameters, dtype, tiny_model, church):
    tiny_model.denoiser.to(dtype)
    tiny_model.text_encoder.to(dtype)
    before = parameter_digest(tiny_model.denoiser)
    method = esd(parameters=parameters, iterations=2)
    chosen = trained_weights(tiny_model, parameters)
    training = Training(method, tiny_model, chosen, [church])
    assert {weight.dtype for weight in training.weights.values()} == {torch.float32}
    made = method(tiny_model, church)
    assert {change.tensor.dtype for change in made.changes.values()} == {dtype}
    assert made.fingerprint != NO_EDIT
    assert all(record["loss"] > 0 for record in made.history)
    assert parameter_digest(tiny_model.denoiser) == before
    with made.applied(tiny_model):
        assert parameter_digest(tiny_model.denoiser) != before


def test_float16_resumes_with_its_gradient_scale(tiny_model, church, tmp_path, monkeypatch):
    tiny_model.denoiser.half()
    tiny_model.text_encoder.half()
    method = esd(checkpoint_every=1, checkpoints=str(tmp_path))
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(KilledError):
            method.make(tiny_model, [church])
    state = Checkpoint(next(tmp_path.iterdir())).read()
    assert state is not None
    assert state.scaler["_growth_tracker"] == 2
    resumed, whole = method.make(tiny_model, [church]), esd().make(tiny_model, [church])
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.history == whole.history


def test_what_did_not_change_is_no_change(tiny_model, church, caplog):
    made = esd(iterations=1, lr=1e-30)(tiny_model, church)
    assert made.fingerprint == NO_EDIT
    assert not made.changes
    assert "changed nothing" in caplog.text


def test_a_loss_that_is_not_finite_is_named(tiny_model, church):
    with pytest.raises(UserError, match=r"(?s)loss of iteration 2 is .*edit\.lr=1e\+30.*float32"):
        esd(parameters="full", lr=1e30).make(tiny_model, [church])
    tiny_model.denoiser.half()
    tiny_model.text_encoder.half()
    with pytest.raises(UserError, match=r"attn2.* is not finite: .*edit\.lr=1e\+06.*float16"):
        esd(lr=1e6, iterations=1).make(tiny_model, [church])


def test_what_a_model_cannot_do_is_said_first(tiny_model, church):
    tiny_model.provenance()  # that of the network from before
    tiny_model.denoiser = torch.nn.Linear(4, 4)
    for settings, words in (
        ({"parameters": "noxattn"}, "model=tiny .*no cross-attention"),
        ({"parameters": "selfattn"}, r"edit\.parameters=selfattn.*model=tiny"),
        (
            {"parameters": "full", "gradient_checkpointing": True},
            r"edit\.gradient_checkpointing=true.*model=tiny",
        ),
    ):
        with pytest.raises(UserError, match=f"edit=esd: {words}"):
            esd(**settings)(tiny_model, church)
