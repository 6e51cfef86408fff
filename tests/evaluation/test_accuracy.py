"""Accuracy by hand with a stub classifier; classifier folders; torchvision's weights."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cad.errors import UserError
from evaluation.evaluators import accuracy
from evaluation.evaluators.accuracy import Accuracy, Classifier, FolderClassifier
from evaluation.evaluators.base import score_image_set
from evaluation.evaluators.small_resnet import (
    SmallResNet,
    load_classifier,
    resize,
    save_classifier,
)
from evaluation.image_sets import ImageSet
from evaluation.image_writer import encode_png
from evaluation.prompts import Prompt
from evaluation.statistics import wilson


class BrightestChannel(Classifier):
    """Calls an image by its brightest channel; the probabilities are the channels' shares."""

    classes = ("tench", "French horn", "gas pump")
    version = "stub-1"

    def probabilities(self, images: NDArray[np.uint8]) -> Tensor:
        sums = torch.from_numpy(images.astype(np.float32)).sum(dim=(1, 2))  # (N, 3)
        return sums / sums.sum(dim=1, keepdim=True)


def plain(red: int, green: int, blue: int) -> NDArray[np.uint8]:
    return np.full((4, 4, 3), (red, green, blue), dtype=np.uint8)


def prompt(group: str) -> Prompt:
    return Prompt(f"an image of a {group}", 0, group)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = SmallResNet(("tench", "church"), widths=(4, 8), blocks=1).eval()
    save_classifier(tmp_path / "classifier", network)
    return tmp_path / "classifier"


def test_accuracy_by_hand() -> None:
    evaluator = Accuracy(BrightestChannel())
    images = np.stack(
        [plain(200, 50, 0), plain(0, 150, 50), plain(0, 100, 0), plain(10, 10, 20), plain(9, 1, 0)]
    )
    groups = ["tench", "french_horn", "gas_pump", "gas_pump", "Tench"]
    records = evaluator.score(images, [prompt(group) for group in groups])
    assert records[0] == {"predicted": "tench", "probability": 0.8, "correct": True}
    assert records[2] == {"predicted": "french_horn", "probability": 1.0, "correct": False}
    assert [record["correct"] for record in records] == [True, True, False, True, True]
    metric = evaluator.aggregate(records)
    interval = wilson(4, 5)
    assert (metric.value, metric.n, metric.unit) == (80.0, 5, "%")
    assert (metric.low, metric.high) == (100 * interval.low, 100 * interval.high)
    assert (metric.name, metric.version, metric.higher_is_better) == ("accuracy", "stub-1", True)
    assert evaluator.aggregate(records[2:3]).value == 0.0


def test_aggregates_need_only_the_records_as_json() -> None:
    evaluator = Accuracy(BrightestChannel())
    records = evaluator.score(np.stack([plain(9, 0, 0), plain(0, 0, 9)]), 2 * [prompt("tench")])
    assert evaluator.aggregate(json.loads(json.dumps(records))) == evaluator.aggregate(records)


def test_a_group_that_the_classifier_does_not_know_is_refused_not_scored_zero() -> None:
    evaluator = Accuracy(BrightestChannel())
    with pytest.raises(UserError, match=r"pop_art.*tench, french_horn, gas_pump"):
        evaluator.check([prompt("tench"), prompt("pop_art")])
    with pytest.raises(UserError, match="pop_art"):
        evaluator.score(plain(1, 2, 3)[None], [prompt("pop_art")])


def test_nothing_to_aggregate_and_float_images_are_refused() -> None:
    evaluator = Accuracy(BrightestChannel())
    with pytest.raises(UserError, match="no images"):
        evaluator.aggregate([])
    with pytest.raises(TypeError, match="uint8"):
        evaluator.score(np.zeros((1, 4, 4, 3), dtype=np.float32), [prompt("tench")])


def test_records_of_an_image_set_name_their_image(tmp_path: Path) -> None:
    prompts = (Prompt("an image of a tench", 7, "tench"), Prompt("x", 8, "gas_pump"))
    images = ImageSet(tmp_path, prompts)
    for index, color in enumerate([(9, 0, 0), (0, 9, 0)]):
        images.path(index).write_bytes(encode_png(plain(*color)))
    first, second = score_image_set(Accuracy(BrightestChannel()), images)
    assert first == {
        "index": 0,
        "prompt": "an image of a tench",
        "seed": 7,
        "group": "tench",
        "predicted": "tench",
        "probability": 1.0,
        "correct": True,
    }
    assert (second["index"], second["seed"], second["correct"]) == (1, 8, False)


def test_classifier_folder_round_trip(folder: Path) -> None:
    network = load_classifier(folder)
    assert network.classes == ("tench", "church")
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    x = torch.rand(3, 3, 64, 64)
    assert network(x).shape == (3, 2)
    assert network.features(x).shape == (3, 8)
    save_classifier(folder.parent / "again", network)
    for name in ("config.json", "model.safetensors"):
        assert (folder.parent / "again" / name).read_bytes() == (folder / name).read_bytes()
    save_classifier(folder.parent / "half", network, torch.float16)
    assert torch.allclose(load_classifier(folder.parent / "half")(x), network(x), atol=1e-2)


def test_classifier_normalises_its_input() -> None:
    torch.manual_seed(0)
    plain_network = SmallResNet(
        ("a", "b"), (0.0,) * 3, (1.0,) * 3, (4, 8), blocks=1, size=64
    ).eval()
    network = SmallResNet(("a", "b"), (0.5,) * 3, (0.25,) * 3, (4, 8), blocks=1, size=64).eval()
    network.load_state_dict(plain_network.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(network(x), plain_network((x - 0.5) / 0.25), atol=1e-6)


def test_classifier_judges_at_its_own_size() -> None:
    torch.manual_seed(0)
    network = SmallResNet(("a", "b"), widths=(4, 8), blocks=1, size=72).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(network(x), network(resize(x, 72)))
    assert torch.equal(resize(x, 64), x)


def test_folder_classifier_judges_uint8_images(folder: Path) -> None:
    classifier = FolderClassifier(folder, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    probabilities = classifier.probabilities(images)
    expected = load_classifier(folder)(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert torch.allclose(probabilities, expected.softmax(dim=1), atol=1e-6)
    before = classifier.version
    save_classifier(folder, SmallResNet(("tench", "church"), widths=(4, 8), blocks=1))
    assert FolderClassifier(folder, "cpu").version != before


def test_bad_classifier_folders_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_classifier(folder.parent)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "vgg"}))
    with pytest.raises(UserError, match="architecture must be 'small_resnet'"):
        load_classifier(folder)
    (folder / "config.json").write_text(json.dumps(config | {"widths": [4, 16]}))
    with pytest.raises(UserError, match="is not this network's"):
        load_classifier(folder)
    (folder / "config.json").write_text(json.dumps({"architecture": "small_resnet"}))
    with pytest.raises(UserError, match="expected"):
        load_classifier(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x00" * 10)
    with pytest.raises(UserError, match="is not this network's"):
        load_classifier(folder)


def test_missing_resnet_weights_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"98 MB.*resnet50-11ad3fa6\.pth.*TORCH_HOME.*model=mini"):
        accuracy.TorchvisionResNet50("cpu")


def test_altered_resnet_weights_are_refused_with_both_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UserError, match=f"{found}.*expected 11ad3fa6"):
        accuracy.resnet_weights_file()


def test_resnet_knows_the_imagenette_classes_by_name() -> None:
    indices = {0: "tench", 217: "english_springer", 482: "cassette_player", 491: "chain_saw"}
    indices |= {497: "church", 566: "french_horn", 569: "garbage_truck", 571: "gas_pump"}
    indices |= {574: "golf_ball", 701: "parachute"}
    categories = accuracy.RESNET_WEIGHTS.meta["categories"]
    assert {i: accuracy.canonical(categories[i]) for i in indices} == indices
