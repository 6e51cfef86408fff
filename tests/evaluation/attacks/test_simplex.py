"""The projection onto the simplex: by hand, against a bisection, and what it promises."""

from __future__ import annotations

import pytest
import torch

from evaluation.attacks.unlearn_diff import project_onto_simplex


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
def test_by_hand(point, projection):
    torch.testing.assert_close(project_onto_simplex(torch.tensor(point)), torch.tensor(projection))


@pytest.mark.parametrize("size", [2, 629, 49408])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_equals_the_bisection(size, scale):
    generator = torch.Generator().manual_seed(size)
    points = scale * torch.randn(2, 3, size, generator=generator)
    projected = project_onto_simplex(points)
    assert (projected - bisected(points)).abs().max() < 1e-5
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(-1), torch.ones(2, 3))
