"""FID in closed form, against other programs, from records alone; real images and their places."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from cad.errors import UserError
from cad.files import file_digest
from evaluation.evaluators import features, fid
from evaluation.evaluators.base import bootstrap_standard
from evaluation.evaluators.features import (
    ClassifierFeatures,
    CocoImages,
    FeatureExtractor,
    FeatureStatistics,
    InceptionFeatures,
    SavedStatistics,
)
from evaluation.evaluators.fid import FID, FrechetDistance
from evaluation.evaluators.small_resnet import load_classifier
from evaluation.prompts import ObjectPrompts, Prompt, PromptSet


class ChannelMeans(FeatureExtractor):
    """The mean of each channel, in [0, 1]; keeps count of what it was shown."""

    label = "channel_means-1"

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.shapes.append(images.shape)
        return (images.mean(axis=(1, 2)) / 255).astype(np.float32)


def prompts(count: int) -> list[Prompt]:
    return [Prompt("a caption", seed, "general") for seed in range(count)]


def gaussian(count: int, dim: int, seed: int) -> NDArray[np.float64]:
    """Draws (count, dim) with correlated, differently scaled columns and a mean of its own."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((dim, dim))
    return random.standard_normal((count, dim)) @ mixing + random.standard_normal(dim)


def save(real: NDArray[np.float64], folder: Path) -> SavedStatistics:
    """The features of real images as a reference in a file."""
    FeatureStatistics.of(real).save(folder / "real.safetensors", ChannelMeans())
    return SavedStatistics(folder / "real.safetensors")


def torchmetrics_distance(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    identity = torch.nn.Identity()
    identity.num_features = x.shape[1]
    metric = FrechetInceptionDistance(identity)
    metric.update(torch.from_numpy(x), real=False)
    metric.update(torch.from_numpy(y), real=True)
    return float(metric.compute())


def scipy_distance(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Heusel et al., Eq. 6, with scipy's matrix square root, as pytorch-fid has it."""
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t)
    shift = x.mean(axis=0) - y.mean(axis=0)
    return float(shift @ shift + np.trace(s + t - 2 * np.real(root)))


class Captions(PromptSet):
    """Captions of COCO's photographs with these numbers."""

    name = "captions"

    def __init__(self, *ids: str | None) -> None:
        self._ids = ids

    def build(self) -> list[Prompt]:
        return [Prompt("a caption", 0, "captions", id=each) for each in self._ids]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three of random pixels, saved exactly, whatever their names."""
    folder, random = tmp_path / "val", np.random.default_rng(0)
    folder.mkdir()
    for number, shape in {7: (6, 8, 3), 42: (8, 6, 3), 100: (8, 8, 3)}.items():
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / features.FILE_NAME.format(number), format="png")
    return folder


def test_two_gaussians_in_closed_form():
    """Four points have the mean (1, 2) and variances 4/3 a^2: |m|^2 + sum (s - s_r)^2."""
    points = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) * np.sqrt([6.0, 1.5])
    generated = points + np.array([1.0, 2.0])  # variances (4, 1)
    real = FeatureStatistics(np.zeros(2), np.diag([9.0, 16.0]), 100)
    assert np.cov(generated, rowvar=False) == pytest.approx(np.diag([4.0, 1.0]))
    assert FrechetDistance(real)(generated) == pytest.approx(5 + (2 - 3) ** 2 + (1 - 4) ** 2)


@pytest.mark.parametrize(("count", "dim"), [(200, 8), (5, 16)])
def test_distance_agrees_with_other_programs_also_below_full_rank(count, dim):
    generated, real = gaussian(count, dim, seed=1), gaussian(300, dim, seed=2)
    distance = FrechetDistance(FeatureStatistics.of(real))
    assert distance(generated) == pytest.approx(scipy_distance(generated, real), rel=1e-5)
    assert distance(generated) == pytest.approx(torchmetrics_distance(generated, real), rel=1e-5)
    assert 0 <= distance(real) < 1e-8


def test_fid_from_records_alone(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    real = gaussian(100, 3, seed=1) / 20
    evaluator = FID(ChannelMeans(), save(real, tmp_path))
    records = evaluator.score(images, prompts(30))
    assert records[3]["features"].dtype == np.float32
    assert records[3]["features"] == pytest.approx(images[3].mean(axis=(0, 1)) / 255)
    metric = evaluator.aggregate(records)
    found = images.mean(axis=(1, 2)) / 255
    assert metric.value == pytest.approx(scipy_distance(found, real), rel=1e-4)
    assert 0 <= metric.low < metric.value < metric.high
    assert metric == evaluator.aggregate(records)
    assert (metric.n, metric.unit) == (30, "squared distance")
    assert not metric.higher_is_better
    assert (evaluator.measures, evaluator.paired) == ("general", False)
    assert metric.version == f"channel_means-1/{evaluator.reference.label}"
    assert evaluator.aggregate(records[:10]).n == 10


def test_the_interval_takes_the_real_images_root_once_and_shows_its_progress(tmp_path, monkeypatch):
    eigh, bar = Mock(wraps=np.linalg.eigh), MagicMock()
    monkeypatch.setattr(np.linalg, "eigh", eigh)
    monkeypatch.setattr(fid, "tqdm", Mock(return_value=bar))
    evaluator = FID(ChannelMeans(), save(gaussian(9, 3, seed=0), tmp_path))
    rows = gaussian(9, 3, seed=1).astype(np.float32)
    evaluator.aggregate([{"features": row} for row in rows])
    assert eigh.call_count == 1
    assert bar.__enter__.return_value.update.call_count == 1 + fid.RESAMPLES


def test_fewer_than_two_images_are_refused_early(tmp_path):
    evaluator = FID(ChannelMeans(), save(gaussian(9, 3, seed=0), tmp_path))
    evaluator.check(prompts(2))
    records = evaluator.score(np.zeros((1, 4, 4, 3), np.uint8), prompts(1))
    for refuse, given in ((evaluator.check, prompts(1)), (evaluator.aggregate, records)):
        with pytest.raises(UserError, match="at least 2 images, got 1"):
            refuse(given)


def test_interval_is_the_spread_of_fid_over_new_images_and_holds_the_value():
    """Where percentiles of the resamples lie above the value: resampling adds bias of its own."""
    distance = FrechetDistance(FeatureStatistics.of(gaussian(5000, 4, seed=3)))
    mixing = np.random.default_rng(3).standard_normal((4, 4))
    sets = np.random.default_rng(0).standard_normal((60, 200, 4)) @ mixing * 1.2
    true = np.std([distance(x) for x in sets], ddof=1)
    found = bootstrap_standard(lambda chosen: distance(sets[0][chosen]), 200, 25, seed=0)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * true, rel=0.5)
    assert found.low < found.value < found.high


def test_saved_statistics_round_trip_and_know_their_extractor(tmp_path):
    real = gaussian(20, 3, seed=0)
    made, reference = FeatureStatistics.of(real), save(real, tmp_path)
    read = reference.statistics(ChannelMeans())
    assert np.array_equal(read.mean, made.mean)
    assert np.array_equal(read.covariance, made.covariance)
    assert read.count == 20
    assert file_digest(tmp_path / "real.safetensors")[:12] in reference.label

    other = ChannelMeans()
    other.label = "channel_means-2"
    with pytest.raises(UserError, match=r"channel_means-1.*channel_means-2"):
        reference.statistics(other)
    (tmp_path / "real.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        reference.statistics(ChannelMeans())
    missing = SavedStatistics(tmp_path / "none.safetensors")
    for ask in (lambda: missing.statistics(ChannelMeans()), missing.identity):
        with pytest.raises(UserError, match=r"none\.safetensors"):
            ask()


def test_classifier_features_are_the_networks_own(metrics):
    extractor = ClassifierFeatures(metrics / "classifier", "cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    expected = load_classifier(metrics / "classifier").features(x).numpy()
    found = extractor.features(images)
    assert (found.shape, found.dtype) == ((3, 8), np.float32)
    assert np.allclose(found, expected, atol=1e-6)


def test_real_images_are_those_of_the_captions_cut_square(photographs, tmp_path):
    captions = Captions("100", "000000000007", "100")
    extractor = ChannelMeans()
    found = CocoImages(photographs, captions, tmp_path / "cache", True).statistics(extractor)
    assert found.count == 2
    assert extractor.shapes == [(1, 6, 6, 3), (1, 8, 8, 3)]
    pixels = [np.asarray(Image.open(photographs / features.FILE_NAME.format(i))) for i in (7, 100)]
    means = [pixels[0][:, 1:7].mean(axis=(0, 1)) / 255, pixels[1].mean(axis=(0, 1)) / 255]
    assert found.mean == pytest.approx(np.mean(means, axis=0), abs=1e-6)

    everything = CocoImages(photographs, None, tmp_path / "cache", False).statistics(extractor)
    assert everything.count == 3
    assert (1, 6, 8, 3) in extractor.shapes


def test_statistics_are_kept_until_files_or_extractor_change(photographs, tmp_path):
    extractor = ChannelMeans()

    def measure() -> int:
        before = len(extractor.shapes)
        CocoImages(photographs, None, tmp_path / "cache").statistics(extractor)
        return len(extractor.shapes) - before

    assert [measure(), measure()] == [3, 0]
    next((tmp_path / "cache").iterdir()).write_bytes(b"damaged")
    assert [measure(), measure()] == [3, 0]
    photographs = photographs.rename(tmp_path / "moved")
    assert measure() == 0
    Image.new("RGB", (5, 5)).save(photographs / "new.JPG")
    assert measure() == 4
    extractor.label = "channel_means-2"
    assert measure() == 4


def test_real_images_are_told_apart_by_their_files(photographs, tmp_path):
    """And by the captions that choose among them; wherever they lie."""
    found = [CocoImages(photographs, None, tmp_path).identity()]
    photographs = photographs.rename(tmp_path / "moved")
    assert CocoImages(photographs, None, "elsewhere").identity() == found[0]
    found.append(CocoImages(photographs, None, tmp_path, square=False).identity())
    captions = ObjectPrompts({"church": "church"}, images_per_class=1, seed=0)
    found.append(CocoImages(photographs, captions, tmp_path).identity())
    found.append(CocoImages(None, captions, tmp_path).identity())
    Image.new("RGB", (5, 5)).save(photographs / "new.JPG")
    found.append(CocoImages(photographs, None, tmp_path).identity())
    assert all(found.count(each) == 1 for each in found)


def test_archive_is_read_in_place_and_not_at_all_once_measured(photographs, tmp_path, monkeypatch):
    archive = tmp_path / "hub" / "checkpoints" / "val2014.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in photographs.iterdir():
            file.write(path, f"val2014/{path.name}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = replace(features.ARCHIVE, digest=file_digest(archive, "md5"))
    monkeypatch.setattr(features, "ARCHIVE", published)
    extractor = ChannelMeans()
    for chosen, count in ((Captions("42", "7"), 2), (Captions(None), 3), (None, 3)):
        found = CocoImages(None, chosen, tmp_path / "cache").statistics(extractor)
        folder = CocoImages(photographs, chosen, tmp_path / "other").statistics(extractor)
        assert (found.count, folder.count) == (count, count)
        assert np.array_equal(found.mean, folder.mean)
    archive.unlink()
    assert CocoImages(None, None, tmp_path / "cache", True).statistics(extractor).count == 3


def test_what_is_missing_is_said_before_anything_is_measured(photographs, tmp_path):
    (tmp_path / "empty").mkdir()
    extractor = ChannelMeans()
    for folder, captions, message in (
        (photographs, Captions("7", "8", "42"), r"lacks 1, .*000000000008\.jpg"),
        (tmp_path / "nowhere", None, "holds 0 pictures"),
        (tmp_path / "empty", None, "holds 0 pictures"),
        (photographs, Captions("flickr-7"), r"not COCO's numbers.*captions=null"),
    ):
        evaluator = FID(extractor, CocoImages(folder, captions, tmp_path / "cache"))
        with pytest.raises(UserError, match=message):
            evaluator.check(prompts(2))
    assert not extractor.shapes
    with pytest.raises(UserError, match="holds 0 pictures"):
        CocoImages(tmp_path / "nowhere", None, tmp_path).identity()


def test_a_damaged_photograph_is_named(photographs, tmp_path):
    (photographs / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.jpg.*cannot be read"):
        CocoImages(photographs, None, tmp_path / "cache", True).statistics(ChannelMeans())


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in the place of the published file, whose hash they are said to have."""
    path = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(random_inception(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{file_digest(path)}, expected 6726825d"):
        InceptionFeatures("pytorch_fid", "cpu").load()
    published = replace(features.INCEPTION, digest=file_digest(path))
    monkeypatch.setattr(features, "INCEPTION", published)
    return path


@torch.no_grad()
def test_inception_sees_what_pytorch_fid_and_what_torchmetrics_would(inception):
    images = np.random.default_rng(0).integers(0, 256, (2, 340, 320, 3), dtype=np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception))
    extractor = InceptionFeatures("torchmetrics", "cpu")
    antialiased = extractor.features(images)
    assert antialiased.shape == (2, 2048)
    assert np.allclose(antialiased, theirs(x).numpy(), atol=1e-4)  # they are about 1

    pixels = 2 * torch.from_numpy(bilinear(images, 299)).permute(0, 3, 1, 2) / 255 - 1
    theirs.Conv2d_1a_3x3.register_forward_pre_hook(lambda layer, given: (pixels.float(),))
    published = InceptionFeatures("pytorch_fid", "cpu")
    found = published.features(images)
    assert np.allclose(found, theirs(x).numpy(), atol=1e-4)
    assert np.abs(found - antialiased).max() > 0.01
    assert published.label != extractor.label


def test_an_unknown_resampling_is_refused():
    with pytest.raises(UserError, match=r"resampling=.*bicubic.*pytorch_fid, torchmetrics"):
        InceptionFeatures("bicubic", "cpu")


def bilinear(images: NDArray[np.uint8], size: int) -> NDArray[np.float64]:
    """(N, size, size, C): between the two nearest pixels a side, whose centres are at halves."""
    found = images.astype(np.float64)
    for axis in (1, 2):
        length = images.shape[axis]
        at = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        below = at.astype(int).clip(max=length - 2)
        share = (at - below).reshape([-1 if each == axis else 1 for each in range(4)])
        lower, upper = (np.take(found, below + step, axis) for step in (0, 1))
        found = (1 - share) * lower + share * upper
    return found


def random_inception() -> dict[str, torch.Tensor]:
    """A state dict for Inception-v3 without the download that its class would start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda path, weights_only: {})
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], "nowhere")
    state = network.state_dict()
    for name, weight in state.items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(weight)  # so that images are told apart to the end
    return state
