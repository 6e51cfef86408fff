"""Every evaluator of conf/evaluator: what it is told apart by, and when it loads its weights."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import hydra
import lpips
import numpy as np
import onnxruntime
import open_clip
import pytest
import torch

from cad import identity
from cad.errors import UserError
from evaluation.evaluators import features, small_resnet
from evaluation.evaluators.accuracy import TorchvisionResNet50
from evaluation.evaluators.base import GENERAL, Download, Evaluator
from evaluation.evaluators.clip_score import CLIPModel, OpenClipEmbedder
from evaluation.evaluators.features import CocoImages, InceptionFeatures
from evaluation.evaluators.lpips import AlexNetDistance
from evaluation.prompts import Prompt
from experiments.run.configuration import CONF, compose

NAMES = [file.stem for file in sorted((CONF / "evaluator").glob("*.yaml"))]
NAMES = [name for name in NAMES if name not in ("default", "outside_accuracy")]
OWN = ("open_accuracy", "style_accuracy")  # the paper has none such
PUBLISHED = [name for name in NAMES if name not in OWN]
FILES = {  # of the miniature's weights -> the evaluators that read them
    "classifier": {"accuracy", "fid", "lpips"},
    "clip": {"clip_score", "open_accuracy", "style_accuracy"},
    "features.safetensors": {"fid"},
}
LIBRARIES = {
    "accuracy": {"torchvision"},
    "clip_score": {"open_clip_torch"},
    "face": {"nudenet", "onnxruntime"},
    "fid": {"pytorch-fid"},
    "lpips": {"lpips", "torchvision"},
    "nudity": {"nudenet", "onnxruntime"},
}


def evaluators(*overrides: str, names: list[str] = NAMES) -> dict[str, Evaluator]:
    cfg = compose([f"evaluator=[{','.join(names)}]", "device=cpu", *overrides])
    nodes = cfg.evaluator.items()
    return {name: hydra.utils.instantiate(node, _convert_="all") for name, node in nodes}


def identities(*overrides: str, names: list[str] = NAMES) -> dict[str, Any]:
    return {key: each.identity() for key, each in evaluators(*overrides, names=names).items()}


def differing(found: dict[str, Any], others: dict[str, Any]) -> set[str]:
    return {name for name in found if found[name] != others[name]}


def alterations(folder: Path, altered: Callable[[bytes], bytes]) -> Iterator[set[str]]:
    """Alter each of the weights' files in turn and name the evaluators that read it."""
    for name, readers in FILES.items():
        file = folder / name
        file = file / "model.safetensors" if file.is_dir() else file
        whole = file.read_bytes()
        file.write_bytes(altered(whole))
        yield readers
        file.write_bytes(whole)


@pytest.mark.parametrize("model", ["mini", "sd14"])
def test_creating_and_identifying_one_loads_nothing(metrics, monkeypatch, model):
    for owner, name in (
        (torch, "load"),
        (small_resnet, "load_file"),
        (features, "safe_open"),
        (features, "InceptionV3"),
        (CLIPModel, "from_pretrained"),
        (open_clip, "create_model_and_transforms"),
        (lpips, "LPIPS"),
        (onnxruntime, "InferenceSession"),
        (Download, "fetch"),
    ):
        monkeypatch.setattr(owner, name, Mock(side_effect=AssertionError("weights were loaded")))
    names = NAMES if model == "mini" else PUBLISHED
    found = identities(f"model={model}", f"paths.miniature={metrics}", names=names)
    assert set(found) == set(names)


def test_a_raised_version_is_another_identity_and_shows(metrics, monkeypatch):
    for name, evaluator in evaluators(f"paths.miniature={metrics}").items():
        before, instrument = evaluator.identity(), evaluator.instrument
        records = 2 * [{"correct": 1, "cosine": 0.5, "count": 1, "distance": 0.5}]
        if name == "fid":
            records = [{"features": np.eye(8, dtype=np.float32)[i]} for i in range(2)]
        assert evaluator.aggregate(records).version == instrument
        monkeypatch.setattr(type(evaluator), "version", 2)
        assert evaluator.identity() == before | {"version": 2}
        assert evaluator.aggregate(records).version == f"{instrument}/v2"


def test_device_workers_and_caches_are_immaterial(metrics, tmp_path):
    own = f"paths.miniature={metrics}"
    workers = [f"evaluator.{name}.workers=3" for name in ("nudity", "face")]
    assert identities(own) == identities(own, "device=cuda:7", *workers)
    published = identities("model=sd14", names=PUBLISHED)
    moved = ("device=cuda:7", f"paths.statistics={tmp_path}", *workers)
    assert published == identities("model=sd14", *moved, names=PUBLISHED)


def test_settings_are_material():
    before = identities("model=sd14", names=PUBLISHED)

    def found(*overrides: str) -> set[str]:
        return differing(before, identities("model=sd14", *overrides, names=PUBLISHED))

    assert found("evaluator.nudity.threshold=0.6") == {"nudity"}
    assert found("evaluator.face.labels=[FACE_MALE]") == {"face"}
    assert found("evaluator.face.labels=[FACE_MALE,FACE_FEMALE]") == set()
    assert found("model.perceptual_distance.size=128") == {"lpips"}
    assert found("model.feature_extractor.resampling=torchmetrics") == {"fid"}
    assert found("model.real_images.square=false") == {"fid"}
    assert found(f"model.prompts.general.sha256={64 * '0'}") == {"fid"}


def test_a_local_copy_is_known_by_its_content(metrics, tmp_path):
    copied = shutil.copytree(metrics, tmp_path / "elsewhere")
    found = identities(f"paths.miniature={metrics}")
    assert identities(f"paths.miniature={copied}") == found
    for readers in alterations(copied, lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])):
        assert differing(found, identities(f"paths.miniature={copied}")) == readers


def test_the_libraries_that_measure_are_part_of_the_identity(monkeypatch):
    monkeypatch.setattr(identity, "library_version", lambda name: "1")
    before = identities("model=sd14", names=PUBLISHED)
    found: dict[str, set[str]] = {name: set() for name in PUBLISHED}
    for library in set.union(*LIBRARIES.values()):
        with monkeypatch.context() as patch:
            versions = {library: "another"}
            patch.setattr(identity, "library_version", lambda name, of=versions: of.get(name, "1"))
            for name in differing(before, identities("model=sd14", names=PUBLISHED)):
                found[name].add(library)
    assert found == LIBRARIES


def judged(evaluator: Evaluator) -> list[Prompt]:
    group = {"style_accuracy": "pop_art"}.get(evaluator.name, "church")
    group = "caption" if evaluator.measures == GENERAL else group
    return [Prompt("an image of a church", seed, group) for seed in range(2)]


def test_checking_loads_the_weights_and_refuses_damaged_ones(metrics, tmp_path):
    copied = shutil.copytree(metrics, tmp_path / "elsewhere")
    for evaluator in evaluators(f"paths.miniature={metrics}").values():
        evaluator.check(judged(evaluator))
    for readers in alterations(copied, lambda whole: whole[:-100]):
        for evaluator in evaluators(f"paths.miniature={copied}", names=sorted(readers)).values():
            with pytest.raises(UserError):
                evaluator.check(judged(evaluator))


def test_float_images_and_no_images_are_refused(metrics):
    images = np.zeros((2, 64, 64, 3))
    for evaluator in evaluators(f"paths.miniature={metrics}").values():
        for wrong in (images, images.astype(np.float32), images.astype(np.uint8)[0]):
            with pytest.raises(TypeError, match="uint8"):
                evaluator.score(wrong, judged(evaluator), images.astype(np.uint8))
        with pytest.raises(UserError, match="images, got 0"):
            evaluator.aggregate([])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (TorchvisionResNet50("cpu"), r"98 MB.*resnet50-11ad3fa6\.pth.*TORCH_HOME.*model=mini"),
        (OpenClipEmbedder("openai", "cpu"), r"338 MB.*ViT-B-32\.pt.*clip_embedder\.weights=hub"),
        (OpenClipEmbedder("hub", "cpu"), r"605 MB.*openai-hub\.safetensors.*weights=openai"),
        (
            InceptionFeatures("pytorch_fid", "cpu"),
            r"Inception-v3 \(91 MB\).*6726825d\.pth.*model=mini",
        ),
        (AlexNetDistance(64, "cpu"), r"AlexNet \(233 MB\).*alexnet-owt-7be5be79\.pth.*model=mini"),
        (CocoImages(None, None, "cache"), r"6,337 MB.*val2014\.zip.*coco\.images"),
    ],
)
def test_missing_weights_say_what_to_do(part, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    unreachable = Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=message):
        part.statistics(InceptionFeatures("pytorch_fid", "cpu")) if part.label[
            :4
        ] == "coco" else part.load()
