"""Image sets: keys, resumption, repair, and what an image depends on."""

from __future__ import annotations

import errno
import json
import logging
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from killed_worker import PROMPTS, SETTINGS, make_until
from toy_model import ToyModel, contents, knock_out

from cad import identity
from cad.errors import UserError
from cad.identity import digest
from cad.models.base import DiffusionModel
from cad.models.conditioning import Conditioning
from cad.weight_edit import Replace, WeightEdit
from evaluation import image_sets, sampler
from evaluation.generation import check_prompts, describe_set, generate
from evaluation.image_sets import ImageSet, ImageWriter, verify
from evaluation.prompts import Prompt
from evaluation.sampler import SamplerSettings, plan_batches, sample_latents, to_pixels

LONG = Prompt("a" * 101, 0, "church")


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


def record_sampling(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of everything that is sampled from now on."""
    sampled = list[list[int]]()

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        sampled.append(args[3])
        return sample_latents(*args, **kwargs)

    monkeypatch.setattr(sampler, "sample_latents", recording)
    return sampled


def test_a_set_holds_one_image_for_each_prompt(model, tmp_path):
    images = generate(model, PROMPTS, SETTINGS, tmp_path)
    assert len(images) == len(PROMPTS) == 22
    assert [prompt for prompt, _ in images] == PROMPTS
    pictures = [picture for _, picture in images]
    assert all(p.shape == (16, 16, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 22
    names = {"set.json", "records.jsonl", ".lock", *(f"{i:06d}.png" for i in range(22))}
    assert set(contents(images)) == names
    texts = {"", *(prompt.text for prompt in PROMPTS)}
    assert model.encoded == dict.fromkeys(texts, 1)
    batches = list(images.batches(10))
    assert [len(prompts) for prompts, _ in batches] == [10, 10, 2]
    assert np.array_equal(np.concatenate([pixels for _, pixels in batches]), np.stack(pictures))


def test_only_batches_with_something_missing_are_sampled(model, tmp_path, monkeypatch):
    images = generate(model, PROMPTS, SETTINGS, tmp_path)
    whole, kept = contents(images), images.path(8).stat().st_mtime_ns
    sampled = record_sampling(monkeypatch)
    assert generate(ToyModel(), PROMPTS, SETTINGS, tmp_path).folder == images.folder
    assert not sampled
    images.path(9).unlink()
    assert contents(generate(ToyModel(), PROMPTS, SETTINGS, tmp_path)) == whole
    assert sampled == [[prompt.seed for prompt in PROMPTS[8:12]]]
    assert images.path(8).stat().st_mtime_ns == kept


def test_a_set_is_of_the_model_as_it_is(model, tmp_path):
    edit = knock_out(model)

    def made(edit: WeightEdit) -> ImageSet:
        with edit.applied(model):
            return generate(model, PROMPTS[:4], SETTINGS, tmp_path)

    plain, edited = made(WeightEdit({}, {})), made(edit)
    assert generate(model, PROMPTS[:4], SETTINGS, tmp_path).folder == plain.folder
    assert not np.array_equal(edited.read(0), plain.read(0))
    described = [json.loads((each.folder / "set.json").read_text()) for each in (plain, edited)]
    assert [each["edit"] for each in described] == ["none", edit.fingerprint]


def test_killed_five_times_equals_never_killed(model, tmp_path):
    root = tmp_path / "killed"
    for point in ("sample:0", "write:5", "sample:1", "record:3", "write:0"):
        worker = get_context("fork").Process(target=make_until, args=(point, root))
        worker.start()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL, point
    whole = generate(model, PROMPTS, SETTINGS, tmp_path / "whole")
    folder = root / whole.folder.name
    assert 5 <= len(list(folder.glob("*.png"))) < 22
    assert list(folder.glob(".*.tmp"))
    assert contents(generate(model, PROMPTS, SETTINGS, root)) == contents(whole)


def test_damage_is_found_named_and_repaired(model, tmp_path, caplog):
    images = generate(model, PROMPTS, SETTINGS, tmp_path)
    whole = contents(images)
    truncated = images.path(3)
    truncated.write_bytes(truncated.read_bytes()[:-20])
    images.path(9).write_bytes(images.path(10).read_bytes())
    images.path(17).unlink()
    records = images.folder / "records.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    lines[20] = lines[20].replace("image", "photo")
    records.write_text("".join(lines[:21]) + lines[21][:30])
    (images.folder / ".000005.png.abc.tmp").write_bytes(b"half")
    with caplog.at_level(logging.INFO):
        generate(model, PROMPTS, SETTINGS, tmp_path)
    assert contents(images) == whole
    assert "000003.png, 000009.png differs from its recorded SHA-256" in caplog.text
    assert "000017.png is recorded but gone" in caplog.text
    assert "000020.png, 000021.png was written but not recorded" in caplog.text
    assert "17 of 22 images are there" in caplog.text


def test_a_full_disk_stops_with_a_message_and_keeps_what_was_written(model, tmp_path, monkeypatch):
    write, written = image_sets.write_atomically, []

    def filling(path: Path, data: bytes) -> None:
        if path.suffix == ".png":
            if len(written) == 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(path)
        write(path, data)

    monkeypatch.setattr(image_sets, "write_atomically", filling)
    with pytest.raises(UserError, match=r"No space left on device.*goes on from there"):
        generate(model, PROMPTS, SETTINGS, tmp_path / "full")
    monkeypatch.undo()
    assert len(list((tmp_path / "full").rglob("*.png"))) == 6
    resumed = generate(model, PROMPTS, SETTINGS, tmp_path / "full")
    assert contents(resumed) == contents(generate(model, PROMPTS, SETTINGS, tmp_path))


@pytest.mark.parametrize("batch_size", [4, 7])
def test_an_image_depends_on_order_and_batch_by_rounding_only(model, tmp_path, batch_size):
    images = generate(model, PROMPTS, SETTINGS, tmp_path)
    order = np.random.default_rng(0).permutation(len(PROMPTS))[:15]
    settings = replace(SETTINGS, batch_size=batch_size)
    shuffled = generate(model, [PROMPTS[i] for i in order], settings, tmp_path)
    for position, index in enumerate(order):
        difference = np.abs(shuffled.read(position).astype(int) - images.read(index))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_the_key_changes_with_everything_that_matters(model, monkeypatch):
    def key(
        model: DiffusionModel = model,
        prompts: list[Prompt] = PROMPTS,
        settings: SamplerSettings = SETTINGS,
    ) -> str:
        return digest(describe_set(model, prompts, settings))

    def edited(*counts: int) -> str:
        with ExitStack() as stack:
            for count in counts:
                stack.enter_context(knock_out(model, count).applied(model))
            return key()

    def changed(owner: object, name: str, value: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            return key()

    other_scheduler = ToyModel()
    other_scheduler.scheduler_config = {"num_train_timesteps": 50}
    first = PROMPTS[0]
    keys = [
        key(),
        key(model=ToyModel(seed=1)),
        key(model=other_scheduler),
        changed(model, "resolution", 32),
        changed(identity, "library_version", lambda name: "0"),
        changed(SamplerSettings, "version", 0),
        edited(4),
        edited(5),
        edited(4, 5),
        edited(5, 4),
        key(prompts=PROMPTS[:-1]),
        key(prompts=PROMPTS[::-1]),
        key(prompts=[replace(first, text="a church"), *PROMPTS[1:]]),
        key(prompts=[replace(first, seed=first.seed + 1), *PROMPTS[1:]]),
        key(settings=replace(SETTINGS, steps=4)),
        key(settings=replace(SETTINGS, guidance=2.5)),
        key(settings=replace(SETTINGS, kind="ddim")),
        key(settings=replace(SETTINGS, batch_size=5)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key(model=ToyModel()) == key(settings=replace(SETTINGS, guidance=2))
    assert key(prompts=[replace(prompt, group="other") for prompt in PROMPTS]) == key()


def test_pixels_are_rounded_clamped_and_finite():
    values = torch.tensor([0.0, 0.5, 1.0, 1.2, -0.1, float("nan")]).view(2, 3, 1, 1)
    pixels, finite = to_pixels(values)
    assert pixels.reshape(-1).tolist() == [0, 128, 255, 255, 0, 0]
    assert finite.tolist() == [True, False]


def test_images_that_an_edit_broke_are_counted(model, tmp_path, caplog):
    values = torch.full((16, 8), float("nan"))
    edit = WeightEdit({"text.weight": Replace(values)}, {"model": model.provenance()})
    for _ in range(2):  # made, then found
        with edit.applied(model):
            images = generate(model, PROMPTS, SETTINGS, tmp_path)
        assert images.broken() == len(PROMPTS)
        assert "22 of 22 images have values that are not finite" in caplog.text
        caplog.clear()
    assert '"finite": false' in (images.folder / "records.jsonl").read_text()
    assert generate(model, PROMPTS, SETTINGS, tmp_path).broken() == 0


def test_an_unedited_model_that_overflows_is_refused(model, tmp_path):
    model.denoiser.text.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"images of the unedited model=toy .* dtype=float32"):
        generate(model, PROMPTS, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([*PROMPTS, LONG], "too long"),
        (
            [PROMPTS[0], replace(PROMPTS[1], size=(8, 16))],
            r"toy makes images of 16 x 16 pixels only, not of 8 x 16.*rules\.size=null",
        ),
    ],
)
def test_prompts_are_checked_before_anything_is_made(model, tmp_path, prompts, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts, SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())
    check_prompts(model, [replace(LONG, truncate=True, size=(16, 16))])


def test_noise_at_every_step_makes_other_images_and_none_keeps_its_key(tiny_model, tmp_path):
    plain = SamplerSettings(2, 3.0, "ddim", 1)
    noisy = replace(plain, eta=1.0)
    assert "eta" not in plain.settings()
    assert noisy.settings() == plain.settings() | {"eta": 1.0}
    prompts = [Prompt("church", 0, "church")]
    images = [generate(tiny_model, prompts, each, tmp_path).read(0) for each in (plain, noisy)]
    assert (images[0] != images[1]).any()
    with pytest.raises(UserError, match=r"model\.sampler\.eta=2"):
        replace(plain, eta=2)


def test_bad_settings_are_refused():
    for name, value in {"steps": 0, "batch_size": 0, "guidance": float("nan")}.items():
        with pytest.raises(UserError, match=f"sampler.{name}={value}"):
            replace(SETTINGS, **{name: value})


def test_batches_are_of_one_guidance_and_size_and_the_first_image_leads(model):
    # The sampler's guidance is 2, so an image that asks for 2 goes with those that ask nothing.
    asked = [None, 5.0, None, 2.0, 5.0, None, 5.0]
    prompts = [replace(PROMPTS[i], guidance=guidance) for i, guidance in enumerate(asked)]
    batches = plan_batches(model, prompts, replace(SETTINGS, batch_size=2))
    found = [(batch.indices, batch.guidance) for batch in batches]
    assert found == [((0, 2), 2.0), ((1, 4), 5.0), ((3, 5), 2.0), ((6,), 5.0)]
    sizes = [(8, 16), None, (16, 16), (8, 16), (16, 8)]  # the model's own size is 16 x 16
    prompts = [replace(PROMPTS[i], size=size) for i, size in enumerate(sizes)]
    batches = plan_batches(model, prompts, SETTINGS)
    assert [batch.indices for batch in batches] == [(0, 3), (1, 2), (4,)]
    assert batches[0].prompts == (prompts[0], prompts[3])


def test_an_image_is_made_with_its_own_guidance(model, tmp_path):
    asked = [None, 7.5, None, 1.0]
    prompts = [replace(PROMPTS[i], guidance=guidance) for i, guidance in enumerate(asked)]
    images = generate(model, prompts, SETTINGS, tmp_path)
    for index, (prompt, picture) in enumerate(images):
        guidance = asked[index] or SETTINGS.guidance
        settings = replace(SETTINGS, guidance=guidance, batch_size=1)
        alone = generate(model, [replace(prompt, guidance=None)], settings, tmp_path)
        assert np.abs(picture.astype(int) - alone.read(0)).max() <= 1
    plain = generate(model, PROMPTS[:4], SETTINGS, tmp_path)
    assert np.abs(plain.read(1).astype(int) - images.read(1)).max() > 1


def test_keys_and_records_hold_guidance_and_size_only_where_they_are_asked_for(model, tmp_path):
    prompts = [PROMPTS[0], replace(PROMPTS[1], guidance=7, size=(16, 16), id="12", truncate=True)]
    described = describe_set(model, prompts, SETTINGS)["prompts"]
    own = {"guidance": 7.0, "size": [16, 16]}
    assert described == [
        [PROMPTS[0].text, PROMPTS[0].seed],
        [PROMPTS[1].text, PROMPTS[1].seed, own],
    ]
    images = generate(model, prompts, SETTINGS, tmp_path)
    lines = (images.folder / "records.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert list(first) == ["index", "prompt", "seed", "sha256", "finite"]
    assert second == first | second | own
    assert verify(images).keys() == {0, 1}


def test_images_of_any_size_are_the_diffusers_pipelines(tiny_model, tiny_pipeline, tmp_path):
    sizes = [(64, 32), None, (64, 32), (32, 64)]
    prompts = [Prompt("a church", seed, "church", size=size) for seed, size in enumerate(sizes)]
    images = generate(tiny_model, prompts, SETTINGS, tmp_path)
    for prompt, picture in images:
        height, width = prompt.size or (64, 64)
        assert picture.shape == (height, width, 3)
        expected = tiny_pipeline(
            prompt.text,
            height=height,
            width=width,
            num_inference_steps=SETTINGS.steps,
            guidance_scale=SETTINGS.guidance,
            generator=torch.Generator().manual_seed(prompt.seed),
        ).images[0]
        assert np.abs(picture.astype(int) - np.asarray(expected)).max() <= 1
    with pytest.raises(UserError, match=r"64 x 30 pixels .* multiples of"):
        generate(tiny_model, [replace(prompts[0], size=(64, 30))], SETTINGS, tmp_path / "odd")


def test_a_set_of_mixed_sizes_is_read_in_pieces_of_one_size(tmp_path):
    images = ImageSet(tmp_path, tuple(PROMPTS[:5]))
    shapes = [(4, 4), (4, 4), (4, 4), (4, 6), (4, 4)]
    with ImageWriter(images, {}) as writer:
        for i, shape in enumerate(shapes):
            writer.put([i], np.full((1, *shape, 3), i, np.uint8), np.array([True]))
    pieces = list(images.batches(2))
    assert [pixels[:, 0, 0, 0].tolist() for _, pixels in pieces] == [[0, 1], [2], [3], [4]]
    assert [prompt for prompts, _ in pieces for prompt in prompts] == PROMPTS[:5]


class SmallMemory(ToyModel):
    """Holds `most` images at once, each as a conditional and an unconditional input."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, c: Conditioning) -> torch.Tensor:
        if len(x_t) > 2 * self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().predict(x_t, t, c)


def test_out_of_memory_halves_the_batch_for_the_rest_of_the_run(tmp_path, monkeypatch, caplog):
    halves = generate(ToyModel(), PROMPTS, replace(SETTINGS, batch_size=2), tmp_path)
    sampled = record_sampling(monkeypatch)
    images = generate(SmallMemory(2), PROMPTS, SETTINGS, tmp_path)
    assert [len(seeds) for seeds in sampled] == [4, *(11 * [2])]
    assert caplog.text.count("do not fit") == 1
    assert "going on with 2. model.sampler.batch_size=2" in caplog.text
    # Pieces of 2 of batches of 4 are the batches of 2, so here even the bytes are theirs.
    for index in range(len(images)):
        assert images.path(index).read_bytes() == halves.path(index).read_bytes()


def test_one_image_that_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"does not hold one image of model=toy at 16 x 16 pixels"):
        generate(SmallMemory(0), PROMPTS, SETTINGS, tmp_path)


def test_of_two_that_make_the_same_set_one_waits(tmp_path, monkeypatch):
    whole = generate(ToyModel(), PROMPTS, SETTINGS, tmp_path / "whole")
    sampled = record_sampling(monkeypatch)
    models = [ToyModel(), ToyModel()]  # not in the threads: weights come of the one seed
    with ThreadPoolExecutor(2) as pool:
        for made in pool.map(lambda each: generate(each, PROMPTS, SETTINGS, tmp_path), models):
            assert contents(made) == contents(whole)
    assert len(sampled) == 6  # batches, made once


@pytest.fixture
def writer(tmp_path: Path) -> ImageWriter:
    return ImageWriter(ImageSet(tmp_path, tuple(PROMPTS[:4])), {})


def test_records_that_a_full_disk_does_not_take_stop_the_writer(writer, tmp_path):
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    black = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(UserError, match="No space left on device"), writer:
        writer.put([0, 1], black, np.array([True, True]))
    assert writer.records == {}


def test_a_record_that_was_half_written_is_not_taken_for_whole(writer):
    writer._file = Mock(**{"write.side_effect": lambda data: len(data) - 1})
    with pytest.raises(OSError, match="No space left on device"):
        writer._append(b"a line\n")
