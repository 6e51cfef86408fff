"""SalUn and Concept Ablation: one step of each as published, and what SalUn's mask chooses."""

from __future__ import annotations

import pytest
import readings
import torch

from baselines.concept_ablation import ConceptAblation
from baselines.relearning import Relearned
from baselines.salun import SalUn, largest
from baselines.training import trained_weights
from baselines.uce import UCE
from cad.errors import UserError
from cad.noised import Pictures
from cad.references import GeneratedImages
from cad.sampling import make_generators

PICTURES = GeneratedImages(2, 2, encoding=None)
TRAINED = {"parameters": "xattn_kv", "iterations": 1, "lr": 1e-3, "steps": 3, "pictures": PICTURES}


def salun(**settings):
    return SalUn(**TRAINED | {"other": "tench", "preserve": ["golf ball"]} | settings)


def ablation(**settings):
    pairs = {"base_template": "a {filler}", "concept_template": "{concept} {filler}"}
    return ConceptAblation(**TRAINED | pairs | {"fillers": ["day", "hut"]} | settings)


def predicted(model, x_t, t, text):
    return model.denoiser(x_t, t, readings.embed(model, text)[0].float()[None]).sample


def require_gradients(model):
    named = trained_weights(model, "xattn_kv")
    return {name: weight.requires_grad_() for name, weight in named.items()}


def check_first_step(made, weights, loss, masks=None):
    """Adam's first step is lr g / (|g| + 1e-8), in the masks alone."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    assert list(made.history) == [{"step": 1, "loss": pytest.approx(loss.item(), rel=1e-4)}]
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        moves = gradient.abs() > 1e-6  # below, the sign is a matter of rounding
        stays = torch.zeros_like(moves) if masks is None else ~masks[name]
        expected = weight.detach() - 1e-3 * gradient / (gradient.abs() + 1e-8) * ~stays
        found = made.changes[name].tensor if name in made.changes else weight.detach()
        torch.testing.assert_close(found[moves], expected[moves], rtol=0, atol=1e-5)
        assert torch.equal(found[stays], weight.detach()[stays])


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_salun_relabels_within_its_mask(share, tiny_model, church):
    method = salun(share=share)
    made = method.make(tiny_model, [church])
    latents, kept = (
        Pictures.draw(tiny_model, [text], PICTURES).latents for text in ("church", "golf ball")
    )
    generators = make_generators(range(2), salt="salun-0-0")
    x_t, t, _, _ = readings.noised(tiny_model, latents, 3, generators[0])
    x_k, t_k, v_k, _ = readings.noised(tiny_model, kept, 3, generators[1])
    course = method.course(tiny_model, [church], {})
    weights = require_gradients(tiny_model)
    relabelled = predicted(tiny_model, x_t, t, "tench").detach()
    forget = (predicted(tiny_model, x_t, t, "church") - relabelled).square().mean()
    retain = (predicted(tiny_model, x_k, t_k, "golf ball") - v_k).square().mean()
    masks = course.masks or None
    assert (masks is None) == (share == 1.0)
    check_first_step(made, weights, forget + 0.5 * retain, masks)


def test_saluns_mask_is_of_the_forgetting_losss_gradient(tiny_model, church):
    method = salun(share=0.3, guidance=2.0)
    masks = method.course(tiny_model, [church], {}).masks
    latents = Pictures.draw(tiny_model, ["church"], PICTURES).latents
    weights = require_gradients(tiny_model)
    loss = torch.zeros(())
    for generator in make_generators(range(2), salt="salun-mask-0"):
        x_t, t, v, _ = readings.noised(tiny_model, latents, 3, generator)
        phi_c, phi_u = (predicted(tiny_model, x_t, t, text) for text in ("church", ""))
        loss = loss - (3 * phi_c - 2 * phi_u - v).square().sum()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    sizes = torch.cat([each.abs().flatten() for each in gradients])
    median = sizes.sort(descending=True).values[int(0.3 * len(sizes)) - 1]
    expected = torch.cat([(each.abs() >= median).flatten() for each in gradients])
    found = torch.cat([masks[name].flatten() for name in weights])
    assert (found != expected).float().mean() < 1e-3  # rounding at the threshold
    assert found.float().mean() == pytest.approx(0.3, abs=0.01)


def test_the_largest_are_of_all_together():
    values = {"a": torch.tensor([[3.0, 1.0]]), "b": torch.tensor([5.0, 4.0])}
    found = largest(values, 0.5)
    assert found["a"].tolist() == [[False, False]]
    assert found["b"].tolist() == [True, True]


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_ablation_trains_the_concept_onto_its_anchor(scale, tiny_model, church):
    made = ablation(prior_scale=scale).make(tiny_model, [church])
    latents = Pictures.draw(tiny_model, ["a day", "a hut"], PICTURES).latents
    (generator,) = make_generators([0], salt="concept_ablation-0-0")
    torch.randint(1, (1,), generator=generator)  # the concept
    x_t, t, v, k = readings.noised(tiny_model, latents, 3, generator)
    weights = require_gradients(tiny_model)
    word = ["day", "hut"][k]
    anchor = predicted(tiny_model, x_t, t, f"a {word}")
    told = predicted(tiny_model, x_t, t, f"church {word}")
    loss = (told - anchor.detach()).square().mean() + scale * (anchor - v).square().mean()
    check_first_step(made, weights, loss)


def test_relearning_trains_the_edited_weights_on_pictures_of_the_unedited(tiny_model, church):
    uce = UCE(" ", ["tench"])
    settings = TRAINED | {"batch_size": 1}
    made = Relearned(uce, **settings).make(tiny_model, [church])
    other = Relearned(uce, **settings, prompt="tench")(tiny_model, church)
    latents = Pictures.draw(tiny_model, ["church"], PICTURES).latents
    x_t, t, v, _ = readings.noised(
        tiny_model, latents, 3, make_generators([0], salt="relearned-0-0")[0]
    )
    with uce(tiny_model, church).applied(tiny_model):
        weights = require_gradients(tiny_model)
        loss = (predicted(tiny_model, x_t, t, "church") - v).square().mean()
        check_first_step(made, weights, loss)
        for weight in weights.values():
            weight.requires_grad_(False)
    assert other.fingerprint != made.fingerprint


def test_relearning_refuses_a_long_prompt_before_the_inner_edit_is_made(
    tiny_model, church, monkeypatch
):
    monkeypatch.setattr(UCE, "make", None)
    method = Relearned(UCE(" ", ["tench"]), **TRAINED | {"batch_size": 1}, prompt="a " * 40)
    with pytest.raises(UserError, match="has 42 tokens"):
        method.make(tiny_model, [church])


def test_what_names_nothing_else_is_refused(tiny_model, church):
    for settings in ({"other": "church"}, {"preserve": ["church"]}):
        with pytest.raises(UserError, match=r"edit\.other=.* at least one of each"):
            salun(**settings)(tiny_model, church)


def test_targets_are_of_the_weights_as_they_are_then(tiny_model, church):
    """Not of the unedited model's: with other weights the lesson has another target."""
    method = ablation()
    weights = trained_weights(tiny_model, "xattn_kv")
    course = method.course(tiny_model, [church], weights)
    lessons = [course.lesson(0, {n: f * w for n, w in weights.items()}) for f in (1.0, 1.1)]
    assert torch.equal(lessons[0].x_t, lessons[1].x_t)
    assert not torch.equal(*(each.target(slice(1)) for each in lessons))
