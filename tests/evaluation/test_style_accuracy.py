"""Zero-shot styles by hand with a stub CLIP, and a real tiny CLIP folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from cad.errors import UserError
from evaluation.evaluators import style_accuracy
from evaluation.evaluators.clip_folder import ClipFolder
from evaluation.evaluators.style_accuracy import NO_STYLE, StyleAccuracy, style_captions
from evaluation.prompts import Prompt

STYLES = {"pop_art": "pop art", "woodcut": "woodcut"}
SUBJECTS = {"church": "church", "apple": "apple"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class StubClip:
    """Texts point along an axis of their style, tilted by their subject; images by their colour."""

    version = "stub-1"
    logit_scale = 1.0

    def __init__(self, folder: Path, device: str) -> None:
        pass

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


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> StyleAccuracy:
    monkeypatch.setattr(style_accuracy, "ClipFolder", StubClip)
    return StyleAccuracy("unused", STYLES, SUBJECTS, "cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    small |= {"num_hidden_layers": 1, "projection_dim": 8}
    text = small | {"vocab_size": len(tokens), "max_position_embeddings": 12}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = small | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def test_captions_cover_subjects_and_no_style() -> None:
    captions = style_captions(STYLES, SUBJECTS)
    assert list(captions) == ["pop_art", "woodcut", NO_STYLE]
    assert captions["woodcut"][1] == "an image of an apple in the style of woodcut"
    assert captions[NO_STYLE] == ["an image of a church", "an image of an apple"]


def test_style_accuracy_by_hand(stubbed: StyleAccuracy) -> None:
    images = np.stack(
        [np.full((4, 4, 3), colour, np.uint8) for colour in [(9, 0, 0), (0, 9, 1), (0, 1, 9)]]
    )
    prompts = [Prompt("x", 0, group) for group in ("pop_art", "pop_art", "woodcut")]
    records = stubbed.score(images, prompts)
    assert [record["predicted"] for record in records] == ["pop_art", "woodcut", NO_STYLE]
    # The tilts of the two subjects cancel, so the styles are the axes: cosines 1, 0, 0.
    expected = float(torch.tensor([1.0, 0.0, 0.0]).softmax(dim=0)[0])
    assert records[0]["probability"] == pytest.approx(expected, abs=1e-6)
    metric = stubbed.aggregate(records)
    assert (metric.value, metric.n) == (pytest.approx(100 / 3), 3)


def test_unknown_style_is_refused(stubbed: StyleAccuracy) -> None:
    with pytest.raises(UserError, match=r"church.*pop_art, woodcut"):
        stubbed.check([Prompt("x", 0, "church")])


def test_clip_folder_agrees_with_the_model_called_directly(clip_folder: Path) -> None:
    clip = ClipFolder(clip_folder, "cpu")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    ids = torch.tensor([[0] + [28 + 2, 28] + [1] * 9])  # <start> c</w> a</w> <end>...
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
    assert torch.allclose(clip.embed_images(images), output.image_embeds, atol=1e-6)
    cosine = clip.embed_images(images) @ clip.embed_texts(["c a"]).T
    assert torch.allclose(cosine * clip.logit_scale, output.logits_per_image, atol=1e-5)


def test_clip_folder_resizes_and_refuses(clip_folder: Path, tmp_path: Path) -> None:
    clip = ClipFolder(clip_folder, "cpu")
    plain = np.full((1, 40, 40, 3), 100, np.uint8)
    assert torch.allclose(
        clip.embed_images(plain), clip.embed_images(plain[:, :16, :16]), atol=1e-5
    )
    with pytest.raises(UserError, match="takes 12 tokens"):
        clip.embed_texts(["a b c d e f g h i j k"])
    with pytest.raises(UserError, match=r"has no config\.json"):
        ClipFolder(tmp_path, "cpu")
