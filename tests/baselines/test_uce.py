"""UCE solves its objective, does nothing without a concept, and keeps what it is told to keep."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.closed_form import shared_update, updated
from baselines.uce import UCE
from cad.components import text_projections
from cad.concepts import Concept
from cad.digests import parameter_digest
from cad.errors import UserError
from cad.models.stable_diffusion import StableDiffusionModel

OUT, WIDTH = 5, 8
SCALES = [(1.0, 1.0, 0.5), (1.0, 0.1, 0.1), (3.0, 0.0, 2.0), (0.2, 5.0, 1e-3)]


def problem(erased: int = 3, kept: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight (OUT, WIDTH) and the states of erased, guides and kept texts, float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = (OUT, erased, erased, kept)
    w, c, g, k = (torch.randn(n, WIDTH, generator=generator).double() for n in sizes)
    return w, c, g, k


def objective(
    v: Tensor, w: Tensor, c: Tensor, g: Tensor, k: Tensor, scales: tuple[float, float, float]
) -> Tensor:
    erase, preserve, near = scales
    return (
        erase * (c @ v.T - g @ w.T).square().sum()
        + preserve * (k @ v.T - k @ w.T).square().sum()
        + near * (v - w).square().sum()
    )


def gradient(v: Tensor, *of: Any) -> Tensor:
    v = v.detach().requires_grad_()
    (found,) = torch.autograd.grad(objective(v, *of), v)
    return found


def by_inverse(
    w: Tensor, c: Tensor, g: Tensor, k: Tensor, scales: tuple[float, float, float]
) -> Tensor:
    """The weight as the paper writes it, with v* = W g and the inverse, in float64."""
    w, c, g, k = w.double(), c.double(), g.double(), k.double()
    erase, preserve, near = scales
    right = erase * c.T @ c + preserve * k.T @ k + near * torch.eye(w.shape[1], dtype=w.dtype)
    left = erase * (w @ g.T) @ c + preserve * (w @ k.T) @ k + near * w
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("scales", SCALES)
def test_the_update_is_the_stationary_point_of_the_objective(
    scales: tuple[float, float, float],
) -> None:
    w, c, g, k = problem()
    update = shared_update(c, g, k, *scales)
    at_start = gradient(w, w, c, g, k, scales).norm()
    assert gradient(w + w @ update, w, c, g, k, scales).norm() < 1e-10 * at_start
    rounded = updated({"w": w.float()}, update)["w"].double()
    assert gradient(rounded, w, c, g, k, scales).norm() < 1e-5 * at_start


@pytest.mark.parametrize("scales", SCALES)
def test_the_update_agrees_with_the_explicit_inverse(scales: tuple[float, float, float]) -> None:
    w, c, g, k = problem()
    torch.testing.assert_close(
        w + w @ shared_update(c, g, k, *scales), by_inverse(w, c, g, k, scales)
    )


def test_nothing_to_erase_changes_no_bit() -> None:
    w, c, g, k = problem()
    weights = {"a": w.float(), "b": torch.tensor([[-0.0, 0.0] * (WIDTH // 2)])}
    result = updated(weights, shared_update(c[:0], g[:0], k, 1, 1, 0.5))
    for name, weight in weights.items():
        assert torch.equal(result[name].view(torch.int32), weight.view(torch.int32))
        assert result[name].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("scales", SCALES)
def test_what_is_kept_moves_no_further_than_the_scales_allow(
    scales: tuple[float, float, float],
) -> None:
    """With D = V - W and r = W (g - c), a stationary D has, as the objective is quadratic,

    s_e <D c - r, D c> + s_p ||D k||^2 + lambda ||D||^2 = 0, and <r - x, x> <= ||r||^2 / 4, so
    s_p ||D k||^2 + lambda ||D||^2 <= s_e ||r||^2 / 4.
    """
    w, c, g, k = problem()
    erase, preserve, near = scales
    moved = w @ shared_update(c, g, k, *scales)
    distance = preserve * (k @ moved.T).square().sum() + near * moved.square().sum()
    assert 0 < distance <= erase / 4 * ((g - c) @ w.T).square().sum()


def test_a_larger_preserve_scale_moves_what_is_kept_less() -> None:
    w, c, g, k = problem()
    moved = [
        (k @ (w @ shared_update(c, g, k, 1, scale, 0.5)).T).norm().item()
        for scale in (0.0, 0.1, 1.0, 10.0, 1e4)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-2 * moved[0]


def test_the_concept_moves_to_the_guide_and_reaches_it_without_regularisation() -> None:
    w, c, g, k = problem()
    distances = [
        (c @ (w + w @ shared_update(c, g, k, 1, 1, near)).T - g @ w.T).norm().item()
        for near in (1e3, 10, 1, 0.1, 1e-9)
    ]
    assert (c @ w.T - g @ w.T).norm() > distances[0]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6 * distances[0]


def test_a_concept_that_is_its_guide_is_left() -> None:
    w, c, _, k = problem()
    assert torch.equal(updated({"w": w}, shared_update(c, c, k, 1, 1, 0.5))["w"], w.float())


def states(model: StableDiffusionModel, text: str) -> Tensor:
    return model.encode_prompts([text]).tensors["states"][0]  # (L, D)


@pytest.mark.parametrize("positions", ["last", "from_last"])
def test_the_edit_of_a_model(
    positions: str, tiny_model: StableDiffusionModel, church: Concept, parachute: Concept
) -> None:
    """Every projection against the explicit inverse, for two concepts of other lengths."""
    method = UCE("art", ["tench", "Parachute"], positions=positions, preserve_scale=0.3)
    made = method(tiny_model, church, parachute)
    guide, kept = states(tiny_model, "art")[3:], states(tiny_model, "tench")
    one = {"church": states(tiny_model, "church")[6:], "parachute": states(tiny_model, "parachute")}
    one["parachute"] = one["parachute"][9:]
    length = 1 if positions == "last" else None
    c = torch.cat([each[:length] for each in one.values()])
    g = torch.cat([guide[: len(each[:length])] for each in one.values()])
    k = kept[5:6] if positions == "last" else kept
    projections = text_projections(tiny_model)
    assert list(made.changes) == list(projections)
    for name, weight in projections.items():
        expected = by_inverse(weight, c, g, k, (1.0, 0.3, 0.5)).float()
        torch.testing.assert_close(made.changes[name].tensor, expected, rtol=1e-4, atol=1e-5)
    assert made.cost.seconds > 0
    assert made.history == ()


def test_a_longer_guide_is_cut_and_so_is_the_concept(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    made = UCE("cassetteplay", [])(tiny_model, church)
    c, g = states(tiny_model, "church")[6:10], states(tiny_model, "cassetteplay")[12:]
    assert len(c) == len(g)
    for name, weight in text_projections(tiny_model).items():
        expected = by_inverse(weight, c, g, c[:0], (1.0, 0.0, 0.5)).float()
        torch.testing.assert_close(made.changes[name].tensor, expected, rtol=1e-4, atol=1e-5)


def test_a_blank_guide_is_the_empty_one(tiny_model: StableDiffusionModel, church: Concept) -> None:
    assert tiny_model.last_tokens([" ", ""]) == [0, 0]
    blank, empty = (UCE(guide, [])(tiny_model, church) for guide in (" ", ""))
    assert blank.fingerprint == empty.fingerprint


def test_own_texts_are_not_kept_and_the_scale_follows(church: Concept, parachute: Concept) -> None:
    method = UCE(" ", ["Church", "tench", "PARACHUTE ", "gas pump", "tench"])
    assert method.settings([church])["preserve"] == ["tench", "PARACHUTE ", "gas pump"]
    assert method.settings([church, parachute])["preserve"] == ["tench", "gas pump"]
    assert method.settings([church, parachute])["preserve_scale"] == 0.5
    many = UCE(" ", [f"text {i}" for i in range(20)])
    assert many.settings([church])["preserve_scale"] == 0.1
    assert UCE(" ", ["tench"], preserve_scale=0.7).settings([church])["preserve_scale"] == 0.7


def test_templates_are_for_erased_and_kept_texts_but_not_the_guide(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    both = ["{concept}", "art of {concept}"]
    method = UCE("art", ["tench", ""], positions="last", templates=both)
    assert method.settings([church])["preserve"] == ["tench", "art of tench", ""]
    made = method(tiny_model, church)
    c = torch.stack([states(tiny_model, "church")[6], states(tiny_model, "art of church")[11]])
    g = states(tiny_model, "art")[3].expand(2, -1)
    kept = {"tench": 5, "art of tench": 10, "": 0}
    k = torch.stack([states(tiny_model, text)[last] for text, last in kept.items()])
    for name, weight in text_projections(tiny_model).items():
        expected = by_inverse(weight, c, g, k, (1.0, 1 / 3, 0.5)).float()
        torch.testing.assert_close(made.changes[name].tensor, expected, rtol=1e-4, atol=1e-5)


def test_settings_are_json_and_tell_edits_apart(church: Concept) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"guide": "art"},
        {"preserve": ["tench"]},
        {"erase_scale": 2},
        {"regularisation": 0.1},
        {"positions": "last"},
        {"templates": ["image of {concept}"]},
    ]
    written = {
        json.dumps(UCE(**{"guide": " ", "preserve": []} | each).settings([church]))
        for each in variants
    }
    assert len(written) == len(variants)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guide", None),
        ("preserve", "tench"),
        ("preserve", [1]),
        ("erase_scale", 0),
        ("erase_scale", float("nan")),
        ("preserve_scale", -1),
        ("preserve_scale", "none"),
        ("regularisation", 0),
        ("regularisation", float("inf")),
        ("regularisation", True),
        ("positions", "all"),
        ("templates", []),
        ("templates", ["image of"]),
    ],
)
def test_bad_values_are_named(key: str, value: Any) -> None:
    arguments: dict[str, Any] = {"guide": " ", "preserve": []} | {key: value}
    with pytest.raises(UserError, match=rf"edit\.{key}"):
        UCE(**arguments)


def test_a_concept_cannot_be_its_own_guide(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    with pytest.raises(UserError, match=r"edit\.guide='Church'.*concept=church"):
        UCE("Church", [])(tiny_model, church)


def test_the_model_is_left_as_found_also_after_an_error(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    def look() -> tuple[str, str, bytes, bool, bool]:
        return (
            parameter_digest(tiny_model.denoiser),
            parameter_digest(tiny_model.text_encoder),
            torch.get_rng_state().numpy().tobytes(),
            any(p.requires_grad for p in tiny_model.denoiser.parameters()),
            tiny_model.denoiser.training or tiny_model.text_encoder.training,
        )

    before = look()
    first, second = (UCE(" ", ["tench"])(tiny_model, church) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert look() == before
    with pytest.raises(UserError, match=r"edit=uce: the prompt 'a+' has"):
        UCE(" ", ["a" * 99])(tiny_model, church)
    assert look() == before


def test_values_have_the_weights_dtype(tiny_model: StableDiffusionModel, church: Concept) -> None:
    exact = UCE(" ", [])(tiny_model, church)
    tiny_model.denoiser.to(torch.bfloat16)
    made = UCE(" ", []).make(tiny_model, [church])
    for name, change in made.changes.items():
        assert change.tensor.dtype == torch.bfloat16
        difference = (change.tensor.float() - exact.changes[name].tensor).norm()
        assert difference < 0.02 * exact.changes[name].tensor.norm()


def test_a_model_without_cross_attention_is_refused(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    tiny_model.denoiser = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"edit=uce: model=tiny .* no cross-attention"):
        UCE(" ", []).make(tiny_model, [church])
