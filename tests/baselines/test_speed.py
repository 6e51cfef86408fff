"""SPEED solves its constrained problem, and keeps what each layer says that it must."""

from __future__ import annotations

import pytest
import torch

from baselines.closed_form import encode
from baselines.speed import SPEED, invariants, moments, null_space_update
from cad.components import text_projections
from cad.errors import UserError

OUT, WIDTH = 5, 12
KEPT = ["tench", "golf ball", "church"]


def problem():
    generator = torch.Generator().manual_seed(0)
    sizes = (OUT, 2, 2, 3, 4)
    return [torch.randn(n, WIDTH, generator=generator).double() for n in sizes]


def update_of(c, g, *given):
    """Each row of c is a concept's one token."""
    return null_space_update(*moments(list(zip(c.split(1), g.split(1), strict=True))), *given)


@pytest.mark.parametrize("near", [1.0, 0.1])
def test_the_update_is_the_best_of_all_that_keep(near):
    """Brute force: least squares in an explicit basis of the null space."""
    w, c, g, k, e = problem()
    update = w @ update_of(c, g, k, e, 1e-9, near)
    basis = torch.linalg.svd(torch.cat([k, e])).Vh[7:].T  # (D, D - 7)
    seen = c @ basis  # (n, D - 7)
    system = seen.T @ seen / len(c) + near * torch.eye(WIDTH - 7).double()
    expected = (g - c).T @ seen / len(c) @ torch.linalg.inv(system) @ basis.T
    torch.testing.assert_close(update, w @ expected)
    for kept in (k, e):
        assert (kept @ update.T).abs().max() < 1e-9
    assert (c @ update.T - (g - c) @ w.T).norm() < ((g - c) @ w.T).norm()


def test_what_lies_among_the_kept_is_no_trouble():
    w, c, g, k, e = problem()
    found = update_of(c, g, torch.cat([k, e]), e, 1e-9, 1.0)
    torch.testing.assert_close(w @ found, w @ update_of(c, g, k, e, 1e-9, 1.0))


def test_tokens_of_one_concept_add_up_and_concepts_are_averaged():
    w, c, g, k, e = problem()
    of_one, of_two = moments([(c, g)]), moments([(c[:1], g[:1]), (c[1:], g[1:])])
    for one, two in zip(of_one, of_two, strict=True):
        torch.testing.assert_close(one, 2 * two)
    torch.testing.assert_close(of_one[1], (g - c).T @ c)
    weak, strong = (w @ null_space_update(*each, k, e, 1e-9, 1.0) for each in (of_two, of_one))
    torch.testing.assert_close(strong, w @ null_space_update(*of_two, k, e, 1e-9, 0.5))
    assert weak.norm() < strong.norm()


def test_a_high_threshold_lets_rare_directions_go():
    w, c, g, k, e = problem()
    small = (1e-3 * k[:1], torch.cat([k[1:], 1e-3 * k[:1]]))
    strict, loose = (w @ update_of(c, g, small[1], e, t, 1.0) for t in (1e-12, 1e-3))
    assert (k[:1] @ strict.T).abs().max() < 1e-6
    assert (k[:1] @ loose.T).abs().max() > 1e-3


def test_values_alone_change_and_the_empty_text_is_read_as_before(tiny_model, church):
    method = SPEED("art", KEPT, threshold=1e-9, augmentations=0)
    made = method(tiny_model, church)
    weights = text_projections(tiny_model)
    assert {name for name in weights if ".to_v." in name} == set(made.changes)
    encoded = encode(tiny_model, ["", *KEPT, "church", "art"])
    read = {text: (each.states[each.last], each.states[0]) for text, each in encoded.items()}
    for name, change in made.changes.items():
        moved = change.tensor - weights[name]
        for text in ("", *KEPT[:2]):
            torch.testing.assert_close(
                moved @ read[text][0], torch.zeros(len(moved)), atol=1e-4, rtol=0
            )
        c, g = read["church"][0], read["art"][0]
        before, after = ((w @ c - weights[name] @ g).norm() for w in (weights[name], change.tensor))
        assert after < before


def test_each_layer_keeps_what_erasing_would_move(tiny_model, church):
    method = SPEED("art", KEPT, augmentations=20)
    w, c, g, k, _ = problem()
    generator = torch.Generator().manual_seed(0)
    a, b = moments(list(zip(c.split(1), g.split(1), strict=True)))
    refined = method._refined(w, a, b, k, generator)
    plain = w @ ((g - c).T @ c / 2) @ torch.linalg.inv(c.T @ c / 2 + torch.eye(WIDTH).double())
    moved = (k @ plain.T).norm(dim=1)
    chosen = k[moved >= moved.mean()]
    assert 0 < len(chosen) < len(k)
    assert torch.equal(refined[: len(chosen)], chosen)
    copies = refined[len(chosen) :]
    assert 0 < len(copies) < 20 * len(chosen)
    apart = copies[:, None] - chosen  # (copies, chosen, D)
    unread = torch.linalg.svd(w, full_matrices=False).Vh[-1]
    beside = (apart - (apart @ unread)[..., None] * unread).norm(dim=2).amin(dim=1)
    assert beside.max() < 1e-12
    everything = SPEED("art", KEPT, filtered=False, augmentations=20)
    assert torch.equal(everything._refined(w, a, b, k, generator)[:3], k)


def test_centres_are_of_the_empty_texts_positions():
    empty = torch.cat(
        [torch.full((1, 2), 9.0), torch.tensor([0.0, 0.1, 5, 5.1, 8, 8.1])[:, None].expand(6, 2)]
    )
    expected = torch.tensor([9.0, 0.05, 5.05, 8.05])[:, None].expand(4, 2)
    torch.testing.assert_close(invariants(empty.double()), expected.double())


def test_keeping_nothing_is_refused(church):
    with pytest.raises(UserError, match=r"edit\.preserve=\['church'\] keeps nothing"):
        SPEED("", ["church"]).settings([church])
