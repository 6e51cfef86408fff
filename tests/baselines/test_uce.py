"""UCE solves its objective, does nothing without a concept, and keeps what it is told to keep."""

from __future__ import annotations

import pytest
import readings
import torch

from baselines.closed_form import shared_update, updated
from baselines.uce import UCE
from cad.errors import UserError

OUT, WIDTH = 5, 8
SCALES = [(1.0, 1.0, 0.5), (1.0, 0.1, 0.1), (3.0, 0.0, 2.0), (0.2, 5.0, 1e-3)]


def problem(erased=3, kept=2):
    """A weight (OUT, WIDTH) and the states of erased, guides and kept texts, float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = (OUT, erased, erased, kept)
    w, c, g, k = (torch.randn(n, WIDTH, generator=generator).double() for n in sizes)
    return w, c, g, k


def objective(v, w, c, g, k, scales):
    erase, preserve, near = scales
    return (
        erase * (c @ v.T - g @ w.T).square().sum()
        + preserve * (k @ v.T - k @ w.T).square().sum()
        + near * (v - w).square().sum()
    )


def gradient(v, *of):
    v = v.detach().requires_grad_()
    (found,) = torch.autograd.grad(objective(v, *of), v)
    return found


@pytest.mark.parametrize("scales", SCALES)
def test_the_update_is_the_stationary_point_and_the_explicit_inverse(scales):
    w, c, g, k = problem()
    update = shared_update(c, g, k, *scales)
    expected = readings.uce({"w": w}, [(c, g)], [k], scales)["w"]
    torch.testing.assert_close(w + w @ update, expected)
    at_start = gradient(w, w, c, g, k, scales).norm()
    assert gradient(w + w @ update, w, c, g, k, scales).norm() < 1e-10 * at_start
    rounded = updated({"w": w.float()}, update)["w"].double()
    assert gradient(rounded, w, c, g, k, scales).norm() < 1e-5 * at_start


def test_nothing_to_erase_changes_no_bit():
    w, c, g, k = problem()
    weights = {"a": w.float(), "b": torch.tensor([[-0.0, 0.0] * (WIDTH // 2)])}
    result = updated(weights, shared_update(c[:0], g[:0], k, 1, 1, 0.5))
    for name, weight in weights.items():
        assert torch.equal(result[name].view(torch.int32), weight.view(torch.int32))
        assert result[name].data_ptr() != weight.data_ptr()


def states(model, text):
    return readings.embed(model, text)[0]  # (L, D)


def assert_published(made, model, pairs, kept, scales):
    """Equal to the reading of Eq. 7 to 1e-4 of a weight, or 1e-5 where it is small."""
    expected = readings.uce(readings.projections(model), pairs, kept, scales)
    assert made.changes.keys() == expected.keys()
    for name, change in made.changes.items():
        weight = expected[name].float()
        torch.testing.assert_close(change.tensor, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["last", "from_last"])
def test_the_edit_of_a_model(positions, tiny_model, church, parachute):
    """Every projection against the published algorithm, for two concepts of other lengths."""
    method = UCE("art", ["tench", "Parachute"], positions=positions, preserve_scale=0.3)
    made = method(tiny_model, church, parachute)
    guide, kept = states(tiny_model, "art")[3:], states(tiny_model, "tench")
    concepts = states(tiny_model, "church")[6:], states(tiny_model, "parachute")[9:]
    length = 1 if positions == "last" else None
    pairs = [(c[:length], guide[: len(c[:length])]) for c in concepts]
    kept = kept[5:6] if positions == "last" else kept
    assert_published(made, tiny_model, pairs, [kept], (1.0, 0.3, 0.5))
    assert made.cost.seconds > 0
    assert made.history == ()


def test_a_longer_guide_is_cut_and_so_is_the_concept(tiny_model, church):
    made = UCE("cassetteplay", [])(tiny_model, church)
    c, g = states(tiny_model, "church")[6:10], states(tiny_model, "cassetteplay")[12:]
    assert len(c) == len(g)
    assert_published(made, tiny_model, [(c, g)], [], (1.0, 0.0, 0.5))


def test_a_blank_guide_is_the_empty_one(tiny_model, church):
    assert tiny_model.last_tokens([" ", ""]) == [0, 0]
    blank, empty = (UCE(guide, [])(tiny_model, church) for guide in (" ", ""))
    assert blank.fingerprint == empty.fingerprint


def test_own_texts_are_not_kept_and_the_scale_follows(church, parachute):
    method = UCE(" ", ["Church", "tench", "PARACHUTE ", "gas pump", "tench"])
    assert method.settings([church])["preserve"] == ["tench", "PARACHUTE ", "gas pump"]
    assert method.settings([church, parachute])["preserve"] == ["tench", "gas pump"]
    assert method.settings([church, parachute])["preserve_scale"] == 0.5
    many = UCE(" ", [f"text {i}" for i in range(20)])
    assert many.settings([church])["preserve_scale"] == 0.1
    assert UCE(" ", ["tench"], preserve_scale=0.7).settings([church])["preserve_scale"] == 0.7


@pytest.mark.parametrize("expand_guide", [False, True])
def test_templates_are_for_the_erased_texts_not_for_the_kept(expand_guide, tiny_model, church):
    """In the current release the guide goes through them too, in earlier ones it does not."""
    both = ["{concept}", "art of {concept}"]
    kept = ["tench", "", "golf ball", "hut", "day", "road", "sea"]
    method = UCE("sky", kept, positions="last", templates=both, expand_guide=expand_guide)
    settings = method.settings([church])
    assert (settings["preserve"], settings["preserve_scale"]) == (kept, 0.143)  # as released
    guides = ["sky", "art of sky" if expand_guide else "sky"]
    texts = [*zip(["church", "art of church"], guides, strict=True), *zip(kept, kept, strict=True)]
    ends = [[readings.embed(tiny_model, text) for text in pair] for pair in texts]
    pairs = [tuple(found[last : last + 1] for found, last in pair) for pair in ends]
    made = method(tiny_model, church)
    kept_states = [state for state, _ in pairs[2:]]
    assert_published(made, tiny_model, pairs[:2], kept_states, (1.0, 0.143, 0.5))


def test_a_concept_cannot_be_its_own_guide(tiny_model, church):
    with pytest.raises(UserError, match=r"edit\.guide='Church'.*concept=church"):
        UCE("Church", [])(tiny_model, church)
