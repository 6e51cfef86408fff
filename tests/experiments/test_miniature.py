"""The miniature's training: what it learns from, that it resumes, and that what it ships loads."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from evaluation.evaluators.accuracy import Accuracy, TorchvisionResNet50
from evaluation.evaluators.clip_score import ClipFolder
from evaluation.evaluators.outside import IMAGENET, OutsideJudge
from evaluation.evaluators.small_resnet import SmallResNet, load_classifier
from evaluation.prompts import Prompt
from experiments.miniature import progress
from experiments.miniature.captions import (
    FIRST_NAME_SHARE,
    IMPLICIT,
    MAX_TOKENS,
    NAMES,
    PLAIN,
    STYLES,
    SUBJECTS,
    Captions,
    build_tokenizer,
    caption_table,
)
from experiments.miniature.data import Photographs, halved, load_photographs
from experiments.miniature.denoiser import (
    build_scheduler,
    draw_subjects,
    loss_weight,
    stratified_timesteps,
    subject_shares,
)
from experiments.miniature.export import write_card
from experiments.miniature.judging import OBJECTS, nearest
from experiments.miniature.styles import STYLE_FUNCTIONS
from experiments.miniature.teacher import build_decoder, build_encoder, load_teacher
from experiments.miniature.train import run_stages
from experiments.miniature.training import Schedule, Training, Workshop, learning_rate
from experiments.run.arguments import build
from experiments.run.configuration import CONF, compose

SHORT = Schedule(
    steps=4, decay=3, batch_size=4, lr=1e-2, warmup=2, weight_decay=0.0, beta2=0.99, ema=0.9,
    checkpoint_every=2, autocast=True,
)  # fmt: skip


def test_every_caption_word_is_one_token() -> None:
    tokenizer, captions = build_tokenizer(), Captions().texts
    for caption, ids in zip(captions, tokenizer(captions).input_ids, strict=True):
        pieces = re.findall(r"'s|\w+|-", caption)  # CLIP's tokenizer parts these
        assert len(ids) == len(pieces) + 2 <= MAX_TOKENS
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_unseen_words_are_spelled_not_lost() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("a zebra, naïve").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra,naïve"


def test_captions_cover_subjects_styles_and_styles_alone() -> None:
    table = caption_table()
    assert len(table) == len(SUBJECTS) * (len(STYLES) + 1) + len(STYLES)
    assert all(sum(group.values()) == pytest.approx(1) for group in table.values())
    assert "a photo in the style of screen print" in table[None, 2]
    springers = table[1, PLAIN]
    of_first = [p for caption, p in springers.items() if "English springer" in caption]
    assert sum(of_first) == pytest.approx(FIRST_NAME_SHARE)
    assert {"an image of a pet dog with long ears", "furry friend"} < set(springers)
    assert min(len(NAMES[subject]) for subject in SUBJECTS) >= 8


def test_captions_are_drawn_by_their_probability() -> None:
    captions, table = Captions(), caption_table()
    group = list(table[4, 1])
    first = captions.texts.index(group[0])
    assert [captions.texts[captions.draw((4, 1), u)] for u in (0, 1)] == [group[0], group[-1]]
    at = sum(table[4, 1][caption] for caption in group[:7])
    assert captions.draw((4, 1), at - 1e-9) == first + 6
    assert captions.draw((4, 1), at + 1e-9) == first + 7


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
    assert list(IMPLICIT) == list(SUBJECTS)


def test_no_other_prompt_set_has_an_implicit_name() -> None:
    files = [path for path in (CONF / "prompts").glob("*.yaml") if path.stem != "implicit"]
    words = re.findall(r"[\w'-]+", " ".join(path.read_text() for path in files).lower())
    text = " ".join(words)
    assert not [n for names in IMPLICIT.values() for n in names if f" {n.lower()} " in text]


def test_learning_rate_warms_up_stays_and_decays_only_when_asked() -> None:
    rates = [learning_rate(step, SHORT) for step in (0, 1, 2, 999)]
    assert rates == pytest.approx([0.5e-2, 1e-2, 1e-2, 1e-2])
    rates = [learning_rate(step, SHORT, decay_from=10) for step in (10, 11, 12, 13)]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.25e-2, 0])


def test_timesteps_are_stratified() -> None:
    t = stratified_timesteps(10, torch.Generator().manual_seed(0))
    assert sorted((t // 100).tolist()) == list(range(10))


def test_the_loss_is_that_of_v_bounded() -> None:
    """At one x_t, v - v' = (x_0' - x_0) / sigma."""
    alphas_cumprod = build_scheduler().alphas_cumprod
    assert loss_weight(alphas_cumprod[0], 16) == 16
    a, s = alphas_cumprod[500].sqrt(), (1 - alphas_cumprod[500]).sqrt()
    x_t, x_0, other = 0.3, 0.8, -0.5
    v, v_of_other = ((a * (x_t - a * x) / s) - s * x for x in (x_0, other))
    weighted = loss_weight(alphas_cumprod[500], 16) * (x_0 - other) ** 2
    assert weighted == pytest.approx(float((v - v_of_other) ** 2))


def test_rare_subjects_are_drawn_as_rarely_as_asked() -> None:
    shares, generator = subject_shares({"gas_pump": 0.25}), torch.Generator().manual_seed(0)
    assert float(shares[7] / shares[0]) == pytest.approx(0.25)
    for _ in range(40):
        counts = draw_subjects(shares, 41, generator).bincount(minlength=11)
        assert ((counts - 41 * shares).abs() < 1).all()
    with pytest.raises(UserError, match="gas pump"):
        subject_shares({"gas pump": 0.25})


def test_halves_share_no_photograph_and_have_every_subject() -> None:
    images = torch.arange(44, dtype=torch.uint8).view(-1, 1, 1, 1)
    halves = halved(Photographs(images, torch.arange(11).repeat(4)))
    assert [half.labels.bincount().tolist() for half in halves.values()] == [[2] * 11] * 2
    assert torch.cat([half.images for half in halves.values()]).unique().numel() == 44


def short_training(folder: Path, stop_at: int = -1, **changes: int) -> dict[str, Tensor]:
    """The averaged weights of a small network, trained as SHORT with `changes` says."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    steps = iter(range(99))

    def loss(generator: torch.Generator) -> Tensor:
        if next(steps) == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 4, generator=generator)
        return (network(x).float() - x.sum(1, keepdim=True)).pow(2).mean()

    folder.mkdir(exist_ok=True)
    return Training(network, loss, replace(SHORT, **changes), folder, seed=1).run().state_dict()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stop", [3, 5])  # in the constant phase, in the decay
def test_interrupted_training_ends_as_the_uninterrupted(tmp_path: Path, stop: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        short_training(tmp_path / "cut", stop)
    assert_same(short_training(tmp_path / "cut"), short_training(tmp_path / "whole"))


def test_a_decay_leaves_the_constant_phase_to_go_on_from(tmp_path: Path) -> None:
    short_training(tmp_path, decay=0)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    finished = short_training(tmp_path, steps=0)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert_same(finished, short_training(tmp_path, steps=0))  # nothing left to do
    short_training(tmp_path, steps=6, decay=0)
    later = short_training(tmp_path, steps=0)  # another decay, from later on
    assert not torch.equal(finished["0.weight"], later["0.weight"])


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven noisy one-coloured pictures of each subject, five of them held out."""
    random = np.random.default_rng(0)
    rows = []
    for index, label in enumerate(SUBJECTS.values()):
        for picture in range(7):
            colour = 20 * index + random.integers(0, 9, (70, 64, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(colour).save(buffer, "JPEG")
            split = "train" if picture < 2 else "val"
            rows.append({"image": buffer.getvalue(), "label": label, "split": split})
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def test_photographs_are_square_and_labelled(parquet: Path, tmp_path: Path) -> None:
    splits = load_photographs(str(parquet), tmp_path)
    assert splits["generator"].images.shape == splits["judge"].images.shape == (11, 3, 64, 64)
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


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher's files."""
    folder = tmp_path_factory.mktemp("teacher")
    for name, network in (("encoder", build_encoder()), ("decoder", build_decoder())):
        torch.save(network.half().state_dict(), folder / f"taef2_{name}.pth")
    return folder


def test_the_teacher_takes_pictures_to_latents_and_back(teacher: Path, tmp_path: Path) -> None:
    encoder, decoder = load_teacher(str(teacher))
    latents = encoder(torch.rand(2, 3, 64, 64))
    assert latents.shape == (2, 32, 8, 8)
    assert decoder(latents).shape == (2, 3, 64, 64)
    with pytest.raises(UserError, match=r"no file taef2_encoder.pth"):
        load_teacher(str(tmp_path))
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "taef2_encoder.pth")
    with pytest.raises(UserError, match="another network's"):
        load_teacher(str(tmp_path))


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that TensorFlow Lite's interpreter takes: white pictures are golf balls to it."""

    class Interpreter:
        def __init__(self, file: str, num_threads: int) -> None:
            self.allocate_tensors = lambda: None
            self.get_input_details = lambda: [{"index": 0, "shape": np.array([1, 160, 160, 3])}]
            self.get_output_details = lambda: [{"index": 1}]
            self.invoke = lambda: None

        def set_tensor(self, _: int, pixels: np.ndarray) -> None:
            self.white = pixels.shape == (1, 160, 160, 3) and pixels.min() == 255

        def get_tensor(self, _: int) -> np.ndarray:
            scores = np.zeros((1, 1001), np.uint8)
            scores[0, 1 + IMAGENET.index("church")] = 3
            scores[0, 1 + IMAGENET.index("golf_ball") if self.white else 999] = 200
            return scores

    module = SimpleNamespace(Interpreter=Interpreter)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)
    (tmp_path / "judge.tflite").touch()
    return tmp_path / "judge.tflite"


def test_the_judge_chooses_among_ten_and_among_all(judge: Path) -> None:
    pictures = np.zeros((2, 64, 64, 3), np.uint8)
    pictures[0] = 255
    for among, second in ((list(OBJECTS)[::-1], "church"), (None, IMAGENET[998])):
        outside = OutsideJudge(str(judge), among)
        best = outside.probabilities(pictures).argmax(1).tolist()
        assert [outside.classes[i] for i in best] == ["golf_ball", second]
    with pytest.raises(UserError, match="knows no lighthouse"):
        _ = OutsideJudge(str(judge), ["Golf ball", "lighthouse"]).classes
    with pytest.raises(UserError, match="no such file"):
        OutsideJudge("nowhere.tflite").load()


def test_the_outside_judge_is_an_evaluator(judge: Path) -> None:
    def composed(*overrides: str) -> Accuracy:
        cfg = compose(["evaluator=[outside_accuracy]", "prompts=objects", *overrides])
        return build(cfg.evaluator.outside_accuracy)

    evaluator = composed(f"outside_judge={judge}")
    prompts = [
        Prompt("an image of a golf ball", 0, "golf_ball"),
        Prompt("a horn", 0, "french_horn"),
    ]
    records = evaluator.score(np.full((2, 64, 64, 3), 255, np.uint8), prompts)
    assert [(each["predicted"], each["correct"]) for each in records] == [
        ("golf_ball", True),
        ("golf_ball", False),
    ]
    with pytest.raises(UserError, match="knows no face"):
        composed(f"outside_judge={judge}", "prompts=objects_and_face").identity()
    assert isinstance(composed().classifier, TorchvisionResNet50)


def test_a_repeated_photograph_is_found_among_those_of_its_subject() -> None:
    def pictures(*colours: int) -> Photographs:
        """One-coloured ones, the first half of subject 0 and the rest of subject 1."""
        images = torch.tensor(colours, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
        return Photographs(images, torch.arange(len(colours)) * 2 // len(colours))

    torch.manual_seed(0)
    classifier, learned = SmallResNet(tuple(SUBJECTS)).eval(), pictures(10, 200, 90, 250)
    cosine, index = nearest(classifier, pictures(200, 90), learned)
    assert index.tolist() == [1, 2]
    torch.testing.assert_close(cosine, torch.ones(2))
    _, other = nearest(classifier, pictures(90, 10), learned)
    assert other[0] in (0, 1)  # subject 1 has that very colour, subject 0 has not


STAGES = (
    *("selector", "clip", "denoiser", "autoencoder", "decoder", "classifier", "judge", "vision"),
)
SMALL = {"steps": 1, "decay": 1, "batch_size": 4}
TINY = [
    "latents.per_subject=1",
    *(f"{stage}.schedule.{key}={value}" for stage in STAGES for key, value in SMALL.items()),
    "autoencoder.channels=[8,8,8,8]",
    "autoencoder.groups=8",
    "denoiser.channels=[32,32]",
    "decoder.count=3",
    "decoder.steps=2",
    "clip.text.num_hidden_layers=1",
    "clip.vision.num_hidden_layers=1",
    "progress.per_subject=1",
    "progress.steps=1",
    "progress.guidance=[2.5]",
]


def check_card(weights: Path) -> None:
    cell = {"value": 90.0, "low": 80.0, "high": 95.0, "n": 9}
    measured = {"images_per_class": 9, "seed": 1, "sampler": {"steps": 20, "guidance": 4.0}}
    measured |= {"threads": 2, "images_per_second": 4.0, "nudenet_face": cell, "no_style": cell}
    measured |= {"accuracy": {"church": cell, "face": cell}, "style_accuracy": {"mean": cell}}
    measured |= {
        "outside": {"among_ten": {"church": cell | {"value": 85.0}}, "top1": {"mean": cell}}
    }
    near = {"median": 0.5, "max": 0.75}
    measured |= {"classifier_validation": cell, "nearest": {"drawn": near, "held_out": near}}
    (weights / "evaluation.json").write_text(json.dumps(measured))
    seen = {"pictures": 1000, "weights": "decay", "guidance": 6.0, "n": 9, "mean": 80.0, "top1": 30}
    pd.DataFrame([seen]).to_csv(weights / "progress.csv", index=False)
    write_card(weights)
    card = (weights / "README.md").read_text()
    assert "64 x 64 pixels, 8 x 8 x 32 latents, whose clean state it predicts." in card
    assert (
        "| church | 90.0 [80.0, 95.0] | 85.0 [80.0, 95.0] |\n| face | 90.0 [80.0, 95.0] | – |"
        in card
    )
    assert "| denoiser | 8 | 4 | 0 to 1, 1 to 2 |" in card
    assert "gas pump 0.15" in card
    assert "| 1,000 | decayed | 6.0 | 9 | 80.0 | 30.0 |" in card
    del measured["outside"]["among_ten"], measured["nearest"]
    (weights / "evaluation.json").write_text(json.dumps(measured | {"outside": {}}))
    write_card(weights)


def test_all_stages_end_in_a_pipeline_that_loads(
    parquet: Path, teacher: Path, judge: Path, tmp_path: Path
) -> None:
    places = [f"work={tmp_path}/work", f"export.output={tmp_path}/out", f"data.parquet={parquet}"]
    places += [f"teacher={teacher}", f"progress.judge={judge}"]
    config = compose([*TINY, *places], "programs/miniature")
    run_stages(config)
    out = tmp_path / "out"
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline")
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("an image of a church", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert load_classifier(out / "classifier").classes == tuple(SUBJECTS)
    assert ClipFolder(out / "clip", "cpu").embed_texts(["a photo"]).shape == (1, 128)
    latents = load_file(out / "references.safetensors")
    assert set(latents) == set(SUBJECTS)
    training = json.loads((out / "training.json").read_text())
    assert training["denoiser"]["settings"]["schedule"]["steps"] == 1
    check_card(out)
    progress.show(config)
    (row,) = pd.read_csv(tmp_path / "work" / "progress.csv").to_dict("records")
    assert (row["pictures"], row["n"], row["church"], row["mean"]) == (4, 10, 100, 10)


def test_a_stage_is_done_with_its_settings_and_from_no_other_results(
    tmp_path: Path,
) -> None:
    workshop = Workshop(tmp_path, None, tmp_path, seed=0, device="cpu")
    with pytest.raises(UserError, match="judge needs classifier first"):
        workshop.begin("judge")
    assert not workshop.is_done("classifier", {"steps": 1})
    workshop.begin("classifier")
    workshop.report("classifier", {"steps": 1}, {"validation_accuracy": 0.8})
    assert workshop.is_done("classifier", {"steps": 1})
    assert not workshop.is_done("classifier", {"steps": 2})
    workshop.begin("judge")
    workshop.report("judge", {}, {})
    assert workshop.is_done("judge", {})
    workshop.report("classifier", {"steps": 2}, {"validation_accuracy": 0.9})
    assert not workshop.is_done("judge", {})
    with pytest.raises(UserError, match="delete it"):
        workshop.begin("judge")
