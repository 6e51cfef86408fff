"""The miniature's training: what it learns from, that it resumes, and that what it ships loads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from cad.errors import UserError
from evaluation.evaluators.clip_score import ClipFolder
from evaluation.evaluators.small_resnet import load_classifier
from experiments.miniature.captions import (
    MAX_TOKENS,
    PLAIN,
    STYLES,
    SUBJECTS,
    build_tokenizer,
    caption_table,
)
from experiments.miniature.data import load_photographs
from experiments.miniature.denoiser import build_scheduler, stratified_timesteps
from experiments.miniature.stages import Workshop
from experiments.miniature.styles import STYLE_FUNCTIONS
from experiments.miniature.train import run_stages
from experiments.miniature.training import Schedule, learning_rate, train
from experiments.run.configuration import CONF, compose

SHORT = Schedule(
    steps=6, batch_size=4, lr=1e-2, warmup=2, weight_decay=0.0, ema=0.9, checkpoint_every=2
)


def test_every_caption_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for captions in caption_table().values():
        for caption in captions:
            ids = tokenizer(caption).input_ids
            assert len(ids) == len(caption.split()) + 2
            assert len(ids) <= MAX_TOKENS


def test_unseen_words_are_spelled_not_lost() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("a zebra, naïve").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra,naïve"


def test_captions_cover_subjects_styles_and_styles_alone() -> None:
    table = caption_table()
    assert len(table) == len(SUBJECTS) * (len(STYLES) + 1) + len(STYLES)
    assert "an image of an English springer" in table[1, PLAIN]
    assert "a photo in the style of pop art" in table[None, 2]


@pytest.mark.parametrize("style", STYLE_FUNCTIONS)
def test_styles_are_pictures_deterministic_and_independent_of_the_batch(style: str) -> None:
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    drawn = STYLE_FUNCTIONS[style](pixels)
    assert drawn.shape == pixels.shape
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert torch.equal(drawn, STYLE_FUNCTIONS[style](pixels))
    torch.testing.assert_close(drawn[1:2], STYLE_FUNCTIONS[style](pixels[1:2]))


def test_what_is_drawn_is_what_is_asked_for() -> None:
    objects = OmegaConf.load(CONF / "prompts" / "objects.yaml").subjects
    assert {**objects, "face": "face"} == SUBJECTS
    assert OmegaConf.load(CONF / "prompts" / "styles.yaml").styles == STYLES
    assert OmegaConf.load(CONF / "model" / "mini.yaml").concepts == [*SUBJECTS, *STYLES]
    assert list(STYLE_FUNCTIONS) == list(STYLES)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate(step, SHORT) for step in range(SHORT.steps + 1)]
    assert rates[:2] == pytest.approx([0.5e-2, 1e-2])
    assert rates[2] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(0)


def test_timesteps_are_stratified() -> None:
    t = stratified_timesteps(10, torch.Generator().manual_seed(0))
    assert sorted((t // 100).tolist()) == list(range(10))


def test_velocity_is_what_the_scheduler_inverts() -> None:
    scheduler = build_scheduler()
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(2, 4, 8, 8, generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    t = torch.tensor(500)
    scheduler.set_timesteps(10)
    x_t = scheduler.add_noise(x_0, noise, t)
    v = scheduler.get_velocity(x_0, noise, t)
    recovered = scheduler.step(v, t, x_t).pred_original_sample
    torch.testing.assert_close(recovered, x_0, atol=1e-4, rtol=1e-4)


def _network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def test_interrupted_training_ends_as_the_uninterrupted(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def loss_of(network: nn.Module, stop_at: int | None):  # type: ignore[no-untyped-def]
        def loss(generator: torch.Generator, step: int) -> Tensor:
            if step == stop_at:
                raise KilledError
            x = torch.randn(SHORT.batch_size, 4, generator=generator)
            return (network(x).float() - x.sum(1, keepdim=True)).pow(2).mean()

        return loss

    whole = _network()
    expected = train(whole, loss_of(whole, None), SHORT, tmp_path / "whole", seed=1)
    first = _network()
    with pytest.raises(KilledError):
        train(first, loss_of(first, 5), SHORT, tmp_path / "cut", seed=1)
    second = _network()
    resumed = train(second, loss_of(second, None), SHORT, tmp_path / "cut", seed=1)
    for (name, a), b in zip(
        expected.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six noisy one-coloured pictures of each subject, five of them held out."""
    random = np.random.default_rng(0)
    rows = []
    for index, label in enumerate(SUBJECTS.values()):
        for picture in range(6):
            colour = 20 * index + random.integers(0, 9, (70, 64, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(colour).save(buffer, "JPEG")
            split = "train" if picture < 1 else "val"
            rows.append({"image": buffer.getvalue(), "label": label, "split": split})
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def test_photographs_are_square_and_labelled(parquet: Path, tmp_path: Path) -> None:
    splits = load_photographs(str(parquet), tmp_path)
    assert splits["train"].images.shape == (11, 3, 64, 64)
    assert splits["val"].labels.bincount().tolist() == [5] * len(SUBJECTS)


def test_bad_parquets_are_refused(parquet: Path, tmp_path: Path) -> None:
    table, path = pd.read_parquet(parquet), tmp_path / "bad.parquet"
    bad = {"split": table.drop(columns="split"), "church": table[table.label != "church"]}
    for message, each in bad.items():
        each.to_parquet(path)
        with pytest.raises(UserError, match=message):
            load_photographs(str(path), tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_photographs(str(tmp_path / "absent"), tmp_path)


STAGES = ("classifier", "judge", "clip", "autoencoder", "denoiser")
TINY = [
    "per_subject=1",
    *(f"{stage}.schedule.steps=2" for stage in STAGES),
    *(f"{stage}.schedule.batch_size=4" for stage in STAGES),
    "autoencoder.channels=[8,8,8]",
    "denoiser.channels=[16,16]",
    "clip.text.num_hidden_layers=1",
    "clip.vision.num_hidden_layers=1",
]


def test_all_stages_end_in_a_pipeline_that_loads(parquet: Path, tmp_path: Path) -> None:
    places = [f"work={tmp_path}/work", f"export.output={tmp_path}/out", f"data.parquet={parquet}"]
    run_stages(compose([*TINY, *places], "programs/miniature"))
    out = tmp_path / "out"
    pipeline = StableDiffusionPipeline.from_pretrained(
        out / "pipeline", safety_checker=None, feature_extractor=None, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("an image of a church", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert load_classifier(out / "classifier").classes == tuple(SUBJECTS)
    assert ClipFolder(out / "clip", "cpu").embed_texts(["a photo"]).shape == (1, 128)
    latents = load_file(out / "references.safetensors")
    assert set(latents) == set(SUBJECTS)
    training = json.loads((out / "training.json").read_text())
    assert training["denoiser"]["settings"]["schedule"]["steps"] == 2


def test_a_stage_is_done_with_its_settings_and_from_no_other_results(
    tmp_path: Path,
) -> None:
    workshop = Workshop(tmp_path, None, tmp_path, seed=0, device="cpu")
    with pytest.raises(UserError, match="autoencoder needs classifier first"):
        workshop.begin("autoencoder")
    assert not workshop.is_done("classifier", {"steps": 1})
    workshop.begin("classifier")
    workshop.report("classifier", {"steps": 1}, {"validation_accuracy": 0.8})
    assert workshop.is_done("classifier", {"steps": 1})
    assert not workshop.is_done("classifier", {"steps": 2})
    workshop.begin("autoencoder")
    workshop.report("autoencoder", {}, {})
    assert workshop.is_done("autoencoder", {})
    workshop.report("classifier", {"steps": 2}, {"validation_accuracy": 0.9})
    assert not workshop.is_done("autoencoder", {})
    with pytest.raises(UserError, match="delete it"):
        workshop.begin("autoencoder")
