"""Accuracy by hand with a stub classifier; classifier folders; torchvision's classes; styles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer
from weights import MAX_TOKENS, SUBJECTS

from cad.errors import UserError
from evaluation.evaluators import accuracy
from evaluation.evaluators.accuracy import Accuracy, Classifier, FolderClassifier
from evaluation.evaluators.base import score_image_set, wilson
from evaluation.evaluators.clip_score import ClipFolder
from evaluation.evaluators.small_resnet import SmallResNet, load_classifier, resize, save_classifier
from evaluation.evaluators.zero_shot import (
    NO_STYLE,
    OpenAccuracy,
    StyleAccuracy,
    ZeroShotObjects,
    ZeroShotStyles,
)
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt


class BrightestChannel(Classifier):
    """Calls an image by its brightest channel; the probabilities are the channels' shares."""

    classes = ("tench", "French horn", "gas pump")
    label = "stub-1"

    def probabilities(self, images: NDArray[np.uint8]) -> Tensor:
        sums = torch.from_numpy(images.astype(np.float32)).sum(dim=(1, 2))  # (N, 3)
        return sums / sums.sum(dim=1, keepdim=True)


class StubClip:
    """Texts point along an axis of their style, tilted by their subject; images by their colour."""

    label = "stub-1"
    logit_scale = 1.0

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            style = [float("pop art" in text), float("woodcut" in text)]
            tilt = 0.5 if "church" in text else -0.5
            rows.append([*style, float(not any(style)), tilt])
        return F.normalize(torch.tensor(rows), dim=1)

    def embed_images(self, images: NDArray[np.uint8]) -> Tensor:
        colours = torch.from_numpy(images.astype(np.float32)).mean(dim=(1, 2))  # (N, 3)
        return F.normalize(F.pad(colours, (0, 1)), dim=1)


STYLES = {"pop_art": "pop art", "woodcut": "woodcut"}
STYLED = {"church": "church", "apple": "apple"}
STYLE_ACCURACY = StyleAccuracy(ZeroShotStyles(StubClip(), STYLES, STYLED))


def plain(*colours: tuple[int, int, int]) -> NDArray[np.uint8]:
    """An image of each colour, (N, 4, 4, 3)."""
    return np.stack([np.full((4, 4, 3), colour, dtype=np.uint8) for colour in colours])


def prompts(*groups: str) -> list[Prompt]:
    return [Prompt(f"an image of a {group}", 7, group) for group in groups]


@pytest.fixture
def folder(metrics: Path, tmp_path: Path) -> Path:
    return shutil.copytree(metrics / "classifier", tmp_path / "classifier")


def test_accuracy_by_hand():
    evaluator = Accuracy(BrightestChannel())
    colours = [(200, 50, 0), (0, 150, 50), (0, 100, 0), (10, 10, 20), (9, 1, 0)]
    asked = prompts("tench", "french_horn", "gas_pump", "gas_pump", "Tench")
    records = evaluator.score(plain(*colours), asked)
    assert records[0] == {"predicted": "tench", "probability": 0.8, "correct": True}
    assert records[2] == {"predicted": "french_horn", "probability": 1.0, "correct": False}
    assert [record["correct"] for record in records] == [True, True, False, True, True]
    metric = evaluator.aggregate(records)
    interval = wilson(4, 5)
    assert (metric.value, metric.n, metric.unit) == (80.0, 5, "%")
    assert (metric.low, metric.high) == (100 * interval.low, 100 * interval.high)
    assert (metric.name, metric.version, metric.higher_is_better) == ("accuracy", "stub-1", True)
    assert evaluator.aggregate(records[2:3]).value == 0.0


def test_a_group_that_the_classifier_does_not_know_is_refused_not_scored_zero():
    evaluator = Accuracy(BrightestChannel())
    with pytest.raises(UserError, match=r"pop_art.*tench, french_horn, gas_pump"):
        evaluator.check(prompts("tench", "pop_art"))
    with pytest.raises(UserError, match="pop_art"):
        evaluator.score(plain((1, 2, 3)), prompts("pop_art"))
    with pytest.raises(UserError, match=r"church.*pop_art, woodcut"):
        STYLE_ACCURACY.check(prompts("church"))


def test_records_of_an_image_set_name_their_image(tmp_path):
    images = ImageSet(tmp_path, tuple(prompts("tench", "gas_pump")))
    for index, image in enumerate(plain((9, 0, 0), (0, 9, 0))):
        Image.fromarray(image).save(images.path(index))
    first, second = score_image_set(Accuracy(BrightestChannel()), images)
    asked = {"index": 0, "prompt": "an image of a tench", "seed": 7, "group": "tench"}
    assert first == asked | {"predicted": "tench", "probability": 1.0, "correct": True}
    assert (second["index"], second["group"], second["correct"]) == (1, "gas_pump", False)


def test_classifier_folder_round_trip(folder):
    network = load_classifier(folder)
    assert network.classes == SUBJECTS
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    x = torch.rand(3, 3, 64, 64)
    assert network(x).shape == (3, len(SUBJECTS))
    assert network.features(x).shape == (3, 8)
    save_classifier(folder.parent / "again", network)
    for name in ("config.json", "model.safetensors"):
        assert (folder.parent / "again" / name).read_bytes() == (folder / name).read_bytes()
    save_classifier(folder.parent / "half", network, torch.float16)
    assert torch.allclose(load_classifier(folder.parent / "half")(x), network(x), atol=1e-2)


def test_classifier_normalises_its_input_and_judges_at_its_own_size():
    torch.manual_seed(0)
    shape = {"widths": (4, 8), "blocks": 1, "size": 64}
    bare = SmallResNet(("a", "b"), (0.0,) * 3, (1.0,) * 3, **shape).eval()
    network = SmallResNet(("a", "b"), (0.5,) * 3, (0.25,) * 3, **shape).eval()
    network.load_state_dict(bare.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(network(x), bare((x - 0.5) / 0.25), atol=1e-6)
    network.size = 72
    assert torch.equal(network(x), network(resize(x, 72)))
    assert torch.equal(resize(x, 64), x)


def test_folder_classifier_judges_uint8_images(folder):
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    probabilities = FolderClassifier(folder, "cpu").probabilities(images)
    expected = load_classifier(folder)(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert torch.allclose(probabilities, expected.softmax(dim=1), atol=1e-6)


def test_bad_classifier_folders_are_named(folder):
    with pytest.raises(UserError, match=r"No such file.*config\.json"):
        load_classifier(folder.parent)
    config = json.loads((folder / "config.json").read_text())
    for changed, message in (
        (json.dumps(config | {"architecture": "vgg"}), "architecture is not 'small_resnet'"),
        (json.dumps(config | {"widths": [4, 16]}), "cannot be read"),
        (json.dumps({"architecture": "small_resnet"}), "missing 1 required"),
        ("{", "cannot be read"),
    ):
        (folder / "config.json").write_text(changed)
        with pytest.raises(UserError, match=message):
            load_classifier(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x00" * 10)
    with pytest.raises(UserError, match="cannot be read"):
        load_classifier(folder)


def test_resnet_knows_the_imagenette_classes_by_name():
    indices = {0: "tench", 217: "english_springer", 482: "cassette_player", 491: "chain_saw"}
    indices |= {497: "church", 566: "french_horn", 569: "garbage_truck", 571: "gas_pump"}
    indices |= {574: "golf_ball", 701: "parachute"}
    categories = accuracy.TorchvisionResNet50.classes
    assert {i: accuracy.canonical(categories[i]) for i in indices} == indices


def test_style_accuracy_by_hand():
    images = plain((9, 0, 0), (0, 9, 1), (0, 1, 9))
    records = STYLE_ACCURACY.score(images, prompts("pop_art", "pop_art", "woodcut"))
    assert [record["predicted"] for record in records] == ["pop_art", "woodcut", NO_STYLE]
    # The tilts of the two subjects cancel, so the styles are the axes: cosines 1, 0, 0.
    expected = float(torch.tensor([1.0, 0.0, 0.0]).softmax(dim=0)[0])
    assert records[0]["probability"] == pytest.approx(expected, abs=1e-6)
    metric = STYLE_ACCURACY.aggregate(records)
    assert (metric.value, metric.n) == (pytest.approx(100 / 3), 3)


def test_clip_folder_agrees_with_the_model_called_directly(metrics):
    clip = ClipFolder(metrics / "clip", "cpu")
    model = CLIPModel.from_pretrained(metrics / "clip").eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    ids = torch.tensor([[0, 28 + 2, 28] + [1] * (MAX_TOKENS - 3)])  # <start> c</w> a</w> <end>...
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
    assert torch.allclose(clip.embed_images(images), output.image_embeds, atol=1e-6)
    cosine = clip.embed_images(images) @ clip.embed_texts(["c a"]).T
    assert torch.allclose(cosine * clip.logit_scale, output.logits_per_image, atol=1e-5)


def test_clip_folder_resizes_and_refuses(metrics, tmp_path):
    clip, copy = ClipFolder(metrics / "clip", "cpu"), tmp_path / "copy"
    grey = np.full((1, 100, 100, 3), 100, np.uint8)
    small, large = clip.embed_images(grey[:, :64, :64]), clip.embed_images(grey)
    assert torch.allclose(large, small, atol=1e-5)
    with pytest.raises(UserError, match="takes 77 tokens"):
        clip.embed_texts([MAX_TOKENS * "a "])
    with pytest.raises(UserError, match="does not load"):
        ClipFolder(tmp_path, "cpu").load()
    shutil.copytree(metrics / "clip", copy)
    CLIPTokenizer(vocab={"a": 0}, merges=[]).save_pretrained(copy)
    with pytest.raises(UserError, match="its tokenizer does not fit"):
        ClipFolder(copy, "cpu").load()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),  # cut short
        ("preprocessor_config.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("config.json", b""),
    ],
)
def test_a_damaged_clip_folder_is_named_with_its_key(metrics, tmp_path, name, content):
    copy = Path(shutil.copytree(metrics / "clip", tmp_path / "copy"))
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=r"copy does not load: .*; model\.clip\.folder names it"):
        ClipFolder(copy, "cpu").load()


def test_any_names_are_classes():
    class Colours(StubClip):
        def embed_texts(self, texts: Sequence[str]) -> Tensor:
            axes = {"an image of a lighthouse": 0, "an image of an owl": 1}
            return torch.eye(4)[[axes[text] for text in texts]]

    evaluator = OpenAccuracy(ZeroShotObjects(Colours(), {"lighthouse": "lighthouse", "owl": "owl"}))
    records = evaluator.score(plain((9, 0, 0), (0, 9, 0)), prompts("lighthouse", "lighthouse"))
    assert [record["predicted"] for record in records] == ["lighthouse", "owl"]
    assert evaluator.aggregate(records).value == 50.0
    with pytest.raises(UserError, match=r"church.*lighthouse, owl"):
        evaluator.check(prompts("church"))
    with pytest.raises(UserError, match="name no subjects"):
        ZeroShotObjects(Colours(), None)
