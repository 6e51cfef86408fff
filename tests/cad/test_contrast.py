"""Contrastive scores and the compensation, by hand and by brute force."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from cad.attribution import Attribution
from cad.compensation import Compensation, compensated, input_moments
from cad.contrast import CADContrast, CADContrastAmplify, accumulate, subtract
from cad.edits import CADAmplify, CADErase
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.objectives import EraseObjective
from cad.references import LatentFile
from cad.sampling import draw_noise, make_generators
from cad.selection import Selection
from cad.store import Store

ATTRIBUTION = Attribution(steps=1, samples=1)
SELECTION = Selection(0.05, "layer")
PROMPTS = ["parachute", "church", "hut"]


def contrast(**changes):
    return CADContrast(ATTRIBUTION, SELECTION, **{"preserve": PROMPTS} | changes)


@pytest.mark.parametrize(
    ("penalty", "over", "sign", "expected"),
    [  # S_c / Z is [.75, .25, -.5] or, amplifying, [.., .., 1 at the last]; Z of the two kept: 4, 2
        ("positive", "mean", 1, [0.75 - 0.5 * 0.5, 0.25 - 0.5 * (0.5 + 0.5), -0.5 - 0.5 * 0.5]),
        ("positive", "max", 1, [0.75 - 0.5, 0.25 - 0.5, -0.5 - 0.5]),
        ("absolute", "mean", 1, [0.75 - 0.5 * 1.0, 0.25 - 0.5, -0.5 - 0.5 * (1.5 + 0.5)]),
        ("positive", "mean", -1, [1.5 + 0.25, 0.5 + 0.5, -1 + 0.25]),
    ],
)
def test_the_contrast_by_hand(penalty, over, sign, expected):
    own = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([[-2.0]])}
    kept = [
        {"a": torch.tensor([[2.0, 2.0]]), "b": torch.tensor([[-6.0]])},
        {"a": torch.tensor([[-1.0, 1.0]]), "b": torch.tensor([[1.0]])},
    ]
    total: dict[str, torch.Tensor] = {}
    for scores in kept:
        accumulate(total, scores, penalty, over)
    if over == "mean":
        total = {name: each / 2 for name, each in total.items()}
    subtract(own, total, 1.0, sign)
    torch.testing.assert_close(torch.cat([own["a"], own["b"]], 1)[0], torch.tensor(expected))
    assert kept[0]["b"].item() == -6.0  # what was given is as it was


def test_erases_what_the_others_need_less(tiny_model, church):
    """The edit against the formula, of scores that are computed one by one."""
    made = contrast(preserve_scale=0.7)(tiny_model, church)
    scores = {
        prompt: ATTRIBUTION.scores(tiny_model, contrast().objective(concept))
        for prompt, concept in (("church", church), *_concepts("parachute", "hut"))
    }
    total = {
        prompt: sum(float(each.clamp(min=0).double().sum()) for each in found.values())
        for prompt, found in scores.items()
    }
    for name, change in made.changes.items():
        own = scores["church"][name] / total["church"]
        others = [scores[p][name].clamp(min=0) / total[p] for p in ("parachute", "hut")]
        ranking = (own - 0.7 * sum(others) / 2).flatten()
        k = SELECTION.budget(ranking.numel())
        assert set(change.tensor.tolist()) == set(ranking.topk(k).indices.tolist())
    plain = CADErase(ATTRIBUTION, SELECTION)(tiny_model, church)
    assert made.fingerprint != plain.fingerprint
    assert contrast(preserve_scale=0)(tiny_model, church).fingerprint == plain.fingerprint


def _concepts(*prompts):
    return [
        (each.concept.prompt, each.concept) for each in contrast(preserve=prompts).preserved([])
    ]


def test_the_store_serves_edits_of_other_concepts(tiny_model, church, parachute, tmp_path, caplog):
    store = Store(tmp_path)
    CADErase(ATTRIBUTION, SELECTION, store=store)(tiny_model, parachute)
    caplog.set_level(logging.INFO)
    first = contrast(store=store)(tiny_model, church)
    assert "contrast: preserves 2 concepts, 1 still to be scored" in caplog.text
    contrast(store=store)(tiny_model, parachute)
    assert "contrast: preserves 2 concepts, 0 still to be scored" in caplog.text
    assert len(list(tmp_path.glob("*.safetensors"))) == len(PROMPTS)
    assert first.fingerprint == contrast()(tiny_model, church).fingerprint


def test_amplifying_spares_what_the_others_need(tiny_model, church, tmp_path):
    save_file({"church": torch.ones(1, *tiny_model.latent_shape)}, tmp_path / "x.safetensors")
    settings = (ATTRIBUTION, SELECTION, LatentFile(tmp_path / "x.safetensors"))
    edit = CADContrastAmplify(*settings, preserve=PROMPTS, preserve_scale=3.0)
    made, plain = edit(tiny_model, church), CADAmplify(*settings)(tiny_model, church)
    own = ATTRIBUTION.scores(tiny_model, edit.objective(church))
    ((_, hut),) = _concepts("hut")
    needed = ATTRIBUTION.scores(tiny_model, EraseObjective(hut))

    def lost(changes, scores):
        pairs = [(scores[n].flatten(), c.tensor.long()) for n, c in changes.items()]
        return sum(float(each[at].clamp(min=0).sum()) for each, at in pairs)

    assert lost(made.changes, needed) < 0.5 * lost(plain.changes, needed)
    for name, change in made.changes.items():
        assert (own[name].flatten()[change.tensor.long()] < 0).all()


def test_settings_tell_edits_apart_and_bad_values_are_named(church, parachute):
    others = [
        {"preserve": ["hut"]},
        {"preserve_scale": 2},
        {"penalty": "absolute"},
        {"over": "max"},
        {"weighting": "epsilon"},
        {"compensation": Compensation(samples=1)},
        {"compensation": Compensation(samples=1, damping=0.1)},
        {"compensation": Compensation(samples=1, erase_scale=0)},
    ]
    plain = contrast().settings([church])
    written = {json.dumps(contrast(**each).settings([church]), sort_keys=True) for each in others}
    assert len(written | {json.dumps(plain, sort_keys=True)}) == 1 + len(others)
    assert contrast(preserve=["parachute", " Church", "hut", "hut"]).settings([church]) == plain
    for key, value in (
        ("preserve", "hut"),
        ("preserve_scale", -1),
        ("penalty", "square"),
        ("over", "sum"),
        ("weighting", "x"),
    ):
        with pytest.raises(UserError, match=rf"edit\.{key}="):
            contrast(**{key: value})
    with pytest.raises(UserError, match=r"edit\.compensation\.damping=0 is not"):
        Compensation(damping=0)
    with pytest.raises(UserError, match=r"edit.preserve=.* keeps nothing"):
        contrast(preserve=["church", "parachute"]).settings([church, parachute])


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_compensation_is_the_constrained_least_squares_solution(scale):
    torch.manual_seed(0)
    mixing = torch.randn(7, 7, dtype=torch.float64)
    x_k, x_c = (torch.randn(n, 7, dtype=torch.float64) @ mixing for n in (40, 9))
    weight = torch.randn(5, 7, dtype=torch.float64)
    removed = torch.rand(5, 7) < 0.4
    removed[0], removed[1] = False, True  # a row without, and one with nothing left
    h_k, h_c, damping = x_k.T @ x_k, scale * x_c.T @ x_c, 0.02
    rho = damping * h_k.diagonal().mean()
    found = compensated(weight, removed, h_k, h_c, damping)
    assert torch.equal(found[0], weight[0])
    assert not found[1].any()
    for row, mask, moved in zip(weight, removed, found, strict=True):
        left, cut = ~mask, row.masked_fill(mask, 0)  # least squares, the ridge as rows of data
        data = torch.cat([x_k, scale**0.5 * x_c, rho.sqrt() * torch.eye(7, dtype=row.dtype)])
        wanted = torch.cat([x_k @ row, data[len(x_k) :] @ cut])
        solution = torch.linalg.lstsq(data[:, left], wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(moved[left], solution)
        assert not moved[mask].any()


def test_moments_are_of_the_inputs_on_the_prompts_trajectories(tiny_model):
    name = next(n for n, _ in tiny_model.denoiser.named_parameters() if n.endswith("net.2.weight"))
    seen = []
    layer = tiny_model.denoiser.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    sampler = tiny_model.sampler(1, "ddim", 1.0)
    noise = draw_noise(tiny_model, make_generators(range(1), salt="attribution-0"))
    for prompt in ("church", "hut"):
        c = tiny_model.encode_prompts([prompt])
        tiny_model.predict(noise * sampler.init_sigma, sampler.timesteps[0], c)
    handle.remove()
    x = torch.cat(seen)
    found = input_moments(tiny_model, [name], ["church", "hut"], ATTRIBUTION)[name]
    torch.testing.assert_close(found, x.T @ x / 2, rtol=1e-4, atol=1e-4)
    assert not layer._forward_pre_hooks


def test_compensation_keeps_what_it_is_told_to_and_the_model(tiny_model, church):
    before = parameter_digest(tiny_model.denoiser)
    plain = contrast()(tiny_model, church)
    compensation = Compensation(samples=1, erase_scale=0.1)
    made = contrast(compensation=compensation)(tiny_model, church)
    assert parameter_digest(tiny_model.denoiser) == before
    assert made.changes.keys() == plain.changes.keys()
    for name, change in made.changes.items():
        zeroed = plain.changes[name].tensor.long()
        assert not change.tensor.flatten()[zeroed].any()
    c = tiny_model.encode_prompts(["hut"])
    x_t = draw_noise(tiny_model, make_generators(range(1), salt="attribution-0"))
    t = tiny_model.sampler(1, "ddim").timesteps[0]
    phi = tiny_model.predict(x_t, t, c)
    moved = {}
    for edit in (plain, made):
        with edit.applied(tiny_model):
            moved[edit is made] = (tiny_model.predict(x_t, t, c) - phi).norm()
    assert moved[True] < 0.5 * moved[False]


def test_convolutions_are_not_compensated(tiny_model, church, monkeypatch):
    monkeypatch.setattr(Attribution, "scores", None)  # calling it would be an error
    attribution = Attribution(steps=1, samples=1, component="residual")
    edit = CADContrast(
        attribution, SELECTION, preserve=PROMPTS, compensation=Compensation(samples=1)
    )
    with pytest.raises(
        UserError, match=r"edit=contrast: edit.compensation.samples=1 is for linear layers"
    ):
        edit(tiny_model, church)
