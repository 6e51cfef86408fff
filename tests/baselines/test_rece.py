"""RECE finds the embedding that brings a concept back, erases it, and starts from UCE."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.closed_form import Text, adversarial_map
from baselines.rece import RECE, StartingUCE, unreached
from baselines.uce import UCE
from cad.components import text_projections
from cad.concepts import Concept
from cad.digests import parameter_digest
from cad.errors import UserError
from cad.models.stable_diffusion import StableDiffusionModel

OUT, WIDTH = 3, 6
START = StartingUCE(" ", ["tench"], regularisation=0.1)


def layers(seed: int, count: int = 4) -> list[Tensor]:
    """Projections (OUT, WIDTH), float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(OUT, WIDTH, generator=generator).double() for _ in range(count)]


def objective(
    embedding: Tensor, c: Tensor, current: list[Tensor], original: list[Tensor], near: float
) -> Tensor:
    distances = [
        (v @ embedding - w @ c).square().sum() for v, w in zip(current, original, strict=True)
    ]
    return torch.stack(distances).sum() + near * embedding.square().sum()


@pytest.mark.parametrize("near", [1e-3, 0.1, 10.0])
def test_the_adversarial_embedding_minimises_its_objective(near: float) -> None:
    current, original = layers(0), layers(1)
    generator = torch.Generator().manual_seed(2)
    c = torch.randn(WIDTH, generator=generator).double()
    found = (adversarial_map(current, original, near) @ c).requires_grad_()
    lowest = objective(found, c, current, original, near)
    (slope,) = torch.autograd.grad(lowest, found)
    start = torch.zeros(WIDTH, dtype=c.dtype, requires_grad=True)
    (at_start,) = torch.autograd.grad(objective(start, c, current, original, near), start)
    assert slope.norm() < 1e-10 * at_start.norm()
    for size in (1e-3, 0.1, 10.0):
        for _ in range(10):
            away = found.detach() + size * torch.randn(WIDTH, generator=generator)
            assert objective(away, c, current, original, near) > lowest


def test_the_adversarial_embedding_agrees_with_the_explicit_inverse() -> None:
    current, original = layers(0), layers(1)
    system = sum(v.T @ v for v in current) + 0.1 * torch.eye(WIDTH).double()
    crossed = sum(v.T @ w for v, w in zip(current, original, strict=True))
    expected = torch.linalg.inv(system) @ crossed
    torch.testing.assert_close(adversarial_map(current, original, 0.1), expected)


def test_of_an_unedited_model_the_concept_itself_is_found() -> None:
    current = layers(0)
    identity = torch.eye(WIDTH).double()
    torch.testing.assert_close(adversarial_map(current, current, 1e-10), identity)
    with pytest.raises(ValueError, match="projection"):
        adversarial_map([], [], 0.1)


def test_unreached_is_a_share_without_a_scale() -> None:
    """0 for weights as they were, 1 for weights that only the guide's outputs come out of."""
    original = layers(0, 2)
    states = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    concept, guide = Text(states[0], 3), Text(states[1], 1)
    whole = adversarial_map(original, original, 1e-10)
    assert unreached(original, original, whole, concept, guide) < 1e-12
    to_guide = torch.eye(WIDTH).double()
    alone = Text(states[0][:4], 3)  # one position, so that one matrix can map it to the guide's
    c, g = alone.states[3], guide.states[1]
    blind = [w @ torch.outer(g, c) / c.dot(c) for w in original]
    assert unreached(blind, original, to_guide, alone, guide) == pytest.approx(1)

    current = layers(1, 2)
    small = unreached(current, original, adversarial_map(current, original, 0.1), concept, guide)
    current, original = [10 * v for v in current], [10 * w for w in original]
    large = unreached(current, original, adversarial_map(current, original, 10.0), concept, guide)
    assert small == pytest.approx(large)
    assert small > 0


def test_no_epochs_are_uce(tiny_model: StableDiffusionModel, church: Concept) -> None:
    made = RECE(START, 0, 0.1)(tiny_model, church)
    assert made.fingerprint == START(tiny_model, church).fingerprint
    assert made.history == ()


def states(model: StableDiffusionModel, text: str) -> Tensor:
    return model.encode_prompts([text]).tensors["states"][0].double()  # (L, D)


def rounds_by_inverse(
    model: StableDiffusionModel, concepts: tuple[Concept, ...], epochs: int, near: float
) -> dict[str, Tensor]:
    """UCE's weights, then `epochs` rounds as the paper writes them, with inverses, in float64."""
    original = {name: weight.double() for name, weight in text_projections(model).items()}
    start = START.make(model, concepts).changes
    weights = {name: change.tensor.double() for name, change in start.items()}
    identity = torch.eye(32, dtype=torch.float64)
    guide = states(model, " ")
    for _ in range(epochs):
        system = near * identity + sum(v.T @ v for v in weights.values())
        crossed = sum(v.T @ original[name] for name, v in weights.items())
        recover = torch.linalg.inv(system) @ crossed
        found = [states(model, each.text) @ recover.T for each in concepts]
        pairs = len(concepts)
        right = 0.1 * identity + sum(c.T @ c for c in found) + 0.1 * pairs * guide.T @ guide
        inputs = sum(guide.T @ c for c in found) + 0.1 * pairs * guide.T @ guide
        inverse = torch.linalg.inv(right)
        weights = {n: (v @ inputs + 0.1 * v) @ inverse for n, v in weights.items()}
    return weights


@pytest.mark.parametrize(("epochs", "near"), [(1, 1e-3), (2, 0.1)])
def test_rounds_agree_with_the_explicit_inverse(
    epochs: int,
    near: float,
    tiny_model: StableDiffusionModel,
    church: Concept,
    parachute: Concept,
) -> None:
    made = RECE(START, epochs, near)(tiny_model, church, parachute)
    expected = rounds_by_inverse(tiny_model, (church, parachute), epochs, near)
    assert list(made.changes) == list(text_projections(tiny_model))
    for name, change in made.changes.items():
        torch.testing.assert_close(
            change.tensor, expected[name].float(), rtol=1e-3, atol=1e-4, msg=name
        )
    assert [record["step"] for record in made.history] == list(range(epochs))
    assert all(record["residual"] >= 0 for record in made.history)
    assert made.cost.seconds > 0


def test_a_round_moves_what_was_found_towards_the_guide(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    before = {n: c.tensor for n, c in START.make(tiny_model, [church]).changes.items()}
    after = {n: c.tensor for n, c in RECE(START, 1, 0.1).make(tiny_model, [church]).changes.items()}
    original = {name: weight.detach() for name, weight in text_projections(tiny_model).items()}
    recover = adversarial_map(before.values(), original.values(), 0.1)
    found, guide = states(tiny_model, "church") @ recover.T, states(tiny_model, " ")

    def distance(weights: dict[str, Tensor]) -> float:
        return sum(
            ((found @ w.double().T - guide @ before[n].double().T).square().sum()).item()
            for n, w in weights.items()
        )

    assert distance(after) < 0.5 * distance(before)


def test_rounds_are_skipped_only_where_nothing_is_near(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    whole = RECE(START, 2, 0.1)(tiny_model, church)
    residual = whole.history[0]["residual"]
    for threshold, rounds in ((0.5 * residual, 0), (1e6, 2)):
        method = RECE(START, 2, 0.1, skip_if_erased=True, erased_threshold=threshold)
        made = method(tiny_model, church)
        same = START(tiny_model, church) if rounds == 0 else whole
        assert made.fingerprint == same.fingerprint
        assert len(made.history) == max(rounds, 1)  # the round that was found not to be needed
        assert made.history[0] == whole.history[0]


def test_settings_are_json_and_tell_edits_apart(church: Concept) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"uce": StartingUCE(" ", [])},
        {"epochs": 2},
        {"regularisation": 1e-3},
        {"update_regularisation": 0.5},
        {"preserve_scale": 1},
        {"guide": "art"},
        {"skip_if_erased": True},
        {"erased_threshold": 0.7},
    ]
    basic: dict[str, Any] = {"uce": START, "epochs": 1, "regularisation": 0.1}
    written = {json.dumps(RECE(**basic | each).settings([church])) for each in variants}
    assert len(written) == len(variants)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uce", None),
        ("epochs", -1),
        ("epochs", 1.5),
        ("epochs", None),
        ("regularisation", 0),
        ("regularisation", None),
        ("update_regularisation", -0.1),
        ("preserve_scale", -1),
        ("guide", None),
        ("skip_if_erased", "yes"),
        ("erased_threshold", 0),
    ],
)
def test_bad_values_are_named(key: str, value: Any) -> None:
    arguments: dict[str, Any] = {"uce": START, "epochs": 1, "regularisation": 0.1} | {key: value}
    with pytest.raises(UserError, match=rf"edit\.{key}="):
        RECE(**arguments)


def test_the_keys_of_its_uce_are_named_where_they_stand(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    with pytest.raises(UserError, match=r"edit\.uce\.regularisation=-1"):
        StartingUCE(" ", [], regularisation=-1)
    with pytest.raises(UserError, match=r"edit\.uce\.guide='church'"):
        RECE(StartingUCE("church", []), 1, 0.1)(tiny_model, church)
    with pytest.raises(UserError, match=r"^edit\.guide='church'"):
        RECE(UCE(" ", []), 1, 0.1, guide="church")(tiny_model, church)


def test_the_model_is_left_as_found_also_after_an_error(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    def look() -> tuple[str, bytes, bool]:
        return (
            parameter_digest(tiny_model.denoiser),
            torch.get_rng_state().numpy().tobytes(),
            any(p.requires_grad for p in tiny_model.denoiser.parameters()),
        )

    before = look()
    first, second = (RECE(START, 1, 0.1)(tiny_model, church) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert look() == before
    with pytest.raises(UserError, match=r"edit=rece: the prompt 'a+' has"):
        RECE(START, 1, 0.1, guide="a" * 99)(tiny_model, church)
    assert look() == before


def test_a_model_without_cross_attention_is_refused(
    tiny_model: StableDiffusionModel, church: Concept
) -> None:
    tiny_model.denoiser = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"edit=rece: model=tiny .* no cross-attention"):
        RECE(START, 1, 0.1).make(tiny_model, [church])
