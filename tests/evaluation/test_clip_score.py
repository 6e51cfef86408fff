"""CLIP score by hand with a stub embedder; the shipped CLIP's folder; open_clip's loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cad.errors import UserError
from cad.files import file_digest
from evaluation.evaluators import clip_score
from evaluation.evaluators.base import bootstrap_mean
from evaluation.evaluators.clip_score import ClipFolder, ClipScore, Embedder, OpenClipEmbedder
from evaluation.prompts import Prompt

DIRECTIONS = {"red": (1.0, 0.0, 0.0), "yellow": (0.6, 0.8, 0.0), "not red": (-1.0, 0.0, 0.0)}
TINY = {
    "embed_dim": 8,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


class Colors(Embedder):
    """An image's direction is its first pixel's color; a text's is looked up."""

    label = "stub-1"
    logit_scale = 1.0

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def embed_images(self, images: NDArray[np.uint8]) -> Tensor:
        first = torch.from_numpy(images[:, 0, 0].astype(np.float32))  # (N, 3)
        return first / first.norm(dim=1, keepdim=True)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.asked.append(list(texts))
        return torch.tensor([DIRECTIONS[text] for text in texts])


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text, 0, "general") for text in texts]


class Bare(torch.nn.Module):
    """Parameters without a use, for an archive that is read for its parameters alone."""

    def forward(self) -> None:
        return None


def write_archive(path: Path, network: torch.nn.Module) -> None:
    """Write a CLIP as OpenAI's file is one: TorchScript, half precision, three buffers."""
    archive = Bare()
    for name, weight in network.state_dict().items():
        *parents, last = name.split(".")
        module = archive
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, Bare())
            module = module.get_submodule(parent)
        module.register_parameter(last, torch.nn.Parameter(weight.half()))
    for name in ("input_resolution", "context_length", "vocab_size"):
        archive.register_buffer(name, torch.tensor(77))
    torch.jit.script(archive).save(str(path))


def test_clip_score_by_hand():
    embedder = Colors()
    evaluator = ClipScore(embedder)
    reds = np.full((4, 4, 4, 3), (200, 0, 0), dtype=np.uint8)
    records = evaluator.score(reds, prompts("red", "yellow", "not red", "red"))
    assert [record["cosine"] for record in records] == [1.0, 0.6, -1.0, 1.0]
    assert embedder.asked == [["red", "yellow", "not red"]]  # each distinct text once
    metric = evaluator.aggregate(records)
    assert metric.value == pytest.approx(40)  # negative cosines count
    interval = bootstrap_mean([1.0, 0.6, -1.0, 1.0], seed=0)
    assert (metric.low, metric.high) == (100 * interval.low, 100 * interval.high)
    assert (metric.n, metric.unit, metric.version) == (4, "100 x cosine", "stub-1")
    assert metric.higher_is_better
    assert (evaluator.measures, evaluator.paired) == ("general", False)


def test_shipped_clip_scores_the_cosine_of_its_embeddings(metrics):
    folder = metrics / "clip"
    clip = ClipFolder(folder, "cpu")
    evaluator = ClipScore(clip)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    texts = ("a church", "a tench", "a church")
    records = evaluator.score(images, prompts(*texts))
    x, y = clip.embed_images(images).double().numpy(), clip.embed_texts(texts).double().numpy()
    weights = file_digest(folder / "model.safetensors")
    for record, a, b in zip(records, x, y, strict=True):
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert record["cosine"] == pytest.approx(cosine, abs=2e-6)
    assert evaluator.instrument == clip.label == f"clip-{weights[:12]}"


def test_shipped_clip_refuses_long_prompts_before_any_image(metrics):
    evaluator = ClipScore(ClipFolder(metrics / "clip", "cpu"))
    evaluator.check(prompts("a church"))
    with pytest.raises(UserError, match="77 tokens"):
        evaluator.check(prompts("a church", 80 * "a"))


@pytest.mark.parametrize("source", ["openai", "hub"])
def test_open_clip_loads_the_published_file_and_its_own_transform(tmp_path, monkeypatch, source):
    (tmp_path / "tiny-quickgelu.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny-quickgelu.json")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("tiny-quickgelu")
    model.eval().half().float()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = clip_score.WEIGHTS[source].path
    path.parent.mkdir(parents=True)
    save_file(model.state_dict(), path) if source == "hub" else write_archive(path, model)
    monkeypatch.setattr(clip_score, "MODEL", "tiny-quickgelu")
    published = replace(clip_score.WEIGHTS[source], digest=file_digest(path))
    monkeypatch.setitem(clip_score.WEIGHTS, source, published)
    embedder = OpenClipEmbedder(source, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)
    x = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        expected = model.encode_image(x, normalize=True)
    assert torch.allclose(embedder.embed_images(images), expected, atol=1e-6)
    assert file_digest(path)[:12] in embedder.label

    long = "church " * 100  # cut to 75 words between the marks
    texts = embedder.embed_texts(["a tench", long, "church " * 75])
    assert texts.shape == (3, 8)
    assert torch.allclose(texts.norm(dim=1), torch.ones(3))
    assert torch.equal(texts[1], texts[2])


def test_the_published_files_are_open_clips_own_entries():
    published = open_clip.get_pretrained_cfg(clip_score.MODEL, "openai")
    assert published["url"] == clip_score.WEIGHTS["openai"].url
    assert f"huggingface.co/{published['hf_hub']}resolve/" in clip_score.WEIGHTS["hub"].url
    assert open_clip.get_tokenizer(clip_score.MODEL).context_length == 77


def test_texts_are_cleaned_as_openai_does_before_they_are_tokenised():
    tokenise = open_clip.get_tokenizer(clip_score.MODEL)
    curly, straight = tokenise(["don\u2019t &amp; won&#39;t", "don't & won't"])
    assert torch.equal(curly, straight)
