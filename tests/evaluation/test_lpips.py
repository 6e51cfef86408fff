"""The distance by hand and against the lpips package; AlexNet's loading; pairs only."""

from __future__ import annotations

from dataclasses import replace

import lpips as package
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cad.errors import UserError
from cad.files import file_digest
from evaluation.evaluators import lpips
from evaluation.evaluators.base import bootstrap_mean
from evaluation.evaluators.lpips import (
    LPIPS,
    AlexNetDistance,
    Distance,
    StageDistance,
    feature_distance,
)
from evaluation.prompts import Prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*weight:UserWarning")  # lpips on torchvision

LAYERS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


class MeanDifference(Distance):
    """The mean absolute difference of the pixels, in [0, 1]."""

    label = "stub-1"

    def distances(self, images: NDArray[np.uint8], references: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(np.abs(images / 255 - references / 255).mean(axis=(1, 2, 3)))


def prompts(count: int) -> list[Prompt]:
    return [Prompt("an image of a church", seed, "church") for seed in range(count)]


def noise(count: int, size: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def random_alexnet() -> dict[str, Tensor]:
    """The convolutions of torchvision's AlexNet, random."""
    random = torch.Generator().manual_seed(0)
    state = {}
    for i, (out, into, kernel) in LAYERS.items():
        shape = (out, into, kernel, kernel)
        state[f"features.{i}.weight"] = torch.randn(shape, generator=random) * 0.05
        state[f"features.{i}.bias"] = torch.randn(out, generator=random) * 0.05
    return state


def test_lpips_averages_the_distances_of_pairs():
    evaluator = LPIPS(MeanDifference())
    before, after = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    after[1] = 51
    records = evaluator.score(after, prompts(2), before)
    assert records == [{"distance": 0.0}, {"distance": 0.2}]
    metric = evaluator.aggregate(records)
    interval = bootstrap_mean([0.0, 0.2], seed=0)
    assert (metric.value, metric.low, metric.high) == tuple(interval)
    assert (metric.value, metric.n, metric.unit) == (0.1, 2, "distance")
    assert (evaluator.measures, evaluator.paired) == ("concept", True)


def test_pairs_are_required():
    evaluator = LPIPS(MeanDifference())
    for references in (None, noise(1)):
        with pytest.raises(TypeError, match="unedited reference"):
            evaluator.score(noise(2), prompts(2), references)
    with pytest.raises(TypeError, match="uint8"):
        evaluator.score(noise(1), prompts(1), noise(1).astype(np.float32))


def test_feature_distance_by_hand():
    """Directions (1, 0) and (0.6, 0.8) are 0.8 apart, squared; opposite ones 4, equal ones 0."""
    first = torch.tensor([[[[5.0, 2.0]], [[0.0, 0.0]]]])  # (1, 2, 1, 2), two places
    other = torch.tensor([[[[3.0, 9.0]], [[4.0, 0.0]]]])
    second = torch.tensor([[[[1.0]], [[1.0]]]])
    assert feature_distance([first], [other]).tolist() == pytest.approx([(0.8 + 0) / 2])
    assert feature_distance([second], [-second]).tolist() == pytest.approx([4.0])
    both = feature_distance([first, second], [other, -second])
    assert both.tolist() == pytest.approx([4.4])
    assert torch.equal(both, feature_distance([other, -second], [first, second]))


def test_feature_distance_is_the_packages_baseline():
    torch.manual_seed(0)
    theirs = package.LPIPS(net="alex", lpips=False, pnet_rand=True, verbose=False)
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        maps = [list(theirs.net(theirs.scaling_layer(x))) for x in (a, b)]
        assert torch.allclose(feature_distance(*maps), theirs(a, b).flatten(), atol=1e-6)


def test_stage_distance_is_zero_for_equals_symmetric_and_of_each_pair_alone(metrics):
    distance = StageDistance(metrics / "classifier", "cpu")
    images, references = noise(4), noise(4, seed=1)
    assert torch.equal(distance.distances(images, images.copy()), torch.zeros(4))
    there = distance.distances(images, references)
    assert torch.equal(there, distance.distances(references, images))
    assert (there > 0).all()
    alone = distance.distances(images[2:3], references[2:3])
    assert torch.allclose(there[2:3], alone, atol=1e-6)
    nudged = images.copy()
    nudged[:, :8, :8] = 255 - nudged[:, :8, :8]
    assert (distance.distances(nudged, images) < there).all()


def test_alexnet_is_the_packages_metric_over_the_downloaded_backbone(tmp_path, monkeypatch):
    """Against lpips itself, its backbone filled in by hand, on images that PIL resized."""
    alexnet = random_alexnet()
    path = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    path.parent.mkdir(parents=True)
    torch.save(alexnet, path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips, "ALEXNET", replace(lpips.ALEXNET, digest=file_digest(path)))
    published = AlexNetDistance(size=64, device="cpu")
    theirs = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    names = theirs.net.state_dict()  # slice2.3.weight, where AlexNet has features.3.weight
    theirs.net.load_state_dict({name: alexnet["features" + name[6:]] for name in names})

    def resized(images: NDArray[np.uint8]) -> Tensor:
        small = [Image.fromarray(x).resize((64, 64), Image.Resampling.BILINEAR) for x in images]
        return torch.from_numpy(np.stack([np.asarray(x) for x in small])).permute(0, 3, 1, 2) / 255

    images, references = noise(3, size=128), noise(3, size=128, seed=1)
    with torch.no_grad():
        expected = theirs(resized(images), resized(references), normalize=True).flatten()
    random = torch.get_rng_state()
    found = published.distances(images, references)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.allclose(found, expected, rtol=2e-2)  # PIL rounds some grey levels differently
    assert torch.equal(published.distances(images, images.copy()), torch.zeros(3))
    assert torch.equal(found, published.distances(references, images))
    assert "alexnet-owt-7be5be79" in published.label
    assert published.label.endswith("64px")


def test_a_size_that_alexnet_cannot_take_is_refused():
    with pytest.raises(UserError, match=r"size=16 is not allowed: .* at least 32"):
        AlexNetDistance(size=16, device="cpu")
