"""Image sets: keys, resumption, repair, and what an image depends on."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from killed_worker import PROMPTS, SETTINGS
from numpy.typing import NDArray
from toy_model import NO_CHANGE, ToyModel, knock_out

from cad import runtime
from cad.errors import UserError
from cad.models.base import Conditioning, DiffusionModel
from cad.models.stable_diffusion import StableDiffusionModel
from cad.weight_edit import Replace, WeightEdit
from evaluation import generation, image_writer
from evaluation.generation import (
    SamplerSettings,
    _to_pixels,
    check_prompts,
    describe_set,
    generate,
    partition,
    plan_batches,
    set_key,
)
from evaluation.image_sets import ImageSet, Shard, Written, verify
from evaluation.image_writer import ImageWriter
from evaluation.prompts import Prompt

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


def contents(images: ImageSet) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(images.folder.iterdir())}


def record_sampling(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of every batch that is sampled from now on."""
    sample, sampled = generation.sample_latents, list[list[int]]()

    def recording(*args: object, **kwargs: object) -> object:
        sampled.append(args[3])  # type: ignore[arg-type]
        return sample(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "sample_latents", recording)
    return sampled


def forbid_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*args: object, **kwargs: object) -> None:
        raise AssertionError("sampled what was there")

    monkeypatch.setattr(generation, "sample_latents", sample)


def test_a_set_holds_one_image_for_each_prompt(model: ToyModel, tmp_path: Path) -> None:
    images = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    assert len(images) == len(PROMPTS) == 22
    assert [prompt for prompt, _ in images] == PROMPTS
    pictures = [picture for _, picture in images]
    assert all(p.shape == (16, 16, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 22
    names = {"set.json", "records.jsonl", ".lock", *(f"{i:06d}.png" for i in range(22))}
    assert set(contents(images)) == names
    batches = list(images.batches(10))
    assert [len(prompts) for prompts, _ in batches] == [10, 10, 2]
    assert np.array_equal(np.concatenate([pixels for _, pixels in batches]), np.stack(pictures))


def test_images_are_those_of_a_plain_loop(model: ToyModel, tmp_path: Path) -> None:
    images = generate(model, NO_CHANGE, PROMPTS[:4], SETTINGS, tmp_path)
    unconditional = model.encode_prompts([""])
    for prompt, picture in images:
        x_0 = generation.sample_latents(
            model,
            model.encode_prompts([prompt.text]),
            unconditional,
            [prompt.seed],
            steps=3,
            guidance=2.0,
        )
        expected = model.decode_latents(x_0)[0].permute(1, 2, 0).numpy() * 255  # (H, W, 3)
        assert np.abs(picture - expected).max() <= 0.5 + 1e-2


def test_images_are_those_of_the_diffusers_pipeline(
    tiny_model: StableDiffusionModel, tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    prompts = [Prompt("a church", 3, "church"), Prompt("a face", 4, "face")]
    images = generate(tiny_model, NO_CHANGE, prompts, SETTINGS, tmp_path)
    for prompt, picture in images:
        expected = tiny_pipeline(
            prompt.text,
            num_inference_steps=SETTINGS.steps,
            guidance_scale=SETTINGS.guidance,
            generator=torch.Generator().manual_seed(prompt.seed),
        ).images[0]
        assert np.abs(picture.astype(int) - np.asarray(expected)).max() <= 1


def test_a_complete_set_is_not_sampled_again(
    model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    before = contents(first)
    forbid_sampling(monkeypatch)
    again = generate(ToyModel(), NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    assert again.folder == first.folder
    assert contents(again) == before


def test_a_watcher_is_shown_what_is_made_and_nothing_else(model: ToyModel, tmp_path: Path) -> None:
    shown: list[NDArray[np.uint8]] = []
    images = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path, watch=shown.append)
    assert np.array_equal(np.concatenate(shown), np.stack([picture for _, picture in images]))
    shown.clear()
    images.path(5).unlink()
    generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path, watch=shown.append)
    assert np.array_equal(np.concatenate(shown), images.read(5)[None])


def test_an_edited_set_differs_and_the_model_comes_back(model: ToyModel, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in model.denoiser.state_dict().items()}
    plain = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    edited = generate(model, knock_out(model), PROMPTS, SETTINGS, tmp_path)
    assert edited.folder != plain.folder
    assert not np.array_equal(edited.read(0), plain.read(0))
    assert all(torch.equal(p, before[name]) for name, p in model.denoiser.state_dict().items())


def test_killed_five_times_equals_never_killed(model: ToyModel, tmp_path: Path) -> None:
    points = ["sample:0", "write:5", "sample:1", "record:3", "write:0"]
    root = tmp_path / "killed"
    path = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    worker = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "killed_worker.py"), str(root), *points],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert worker.stdout.splitlines() == [f"{point} -9" for point in points], worker.stderr
    whole = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "whole")
    folder = root / whole.folder.name
    begun = {path.name for path in folder.glob("*.png")}
    assert 5 <= len(begun) < 22
    assert list(folder.glob(".*.tmp"))
    resumed = generate(model, NO_CHANGE, PROMPTS, SETTINGS, root)
    assert contents(resumed) == contents(whole)


def test_an_exception_between_batches_loses_nothing(
    model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = generation.sample_latents
    batches = iter(range(2))

    def interrupted(*args: object, **kwargs: object) -> object:
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "sample_latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "cut")
    monkeypatch.undo()
    whole = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "whole")
    folder = tmp_path / "cut" / whole.folder.name
    assert len(list(folder.glob("*.png"))) == 8
    assert len((folder / "records.jsonl").read_text().splitlines()) == 8
    resumed = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "cut")
    assert contents(resumed) == contents(whole)


def test_damage_is_found_named_and_repaired(
    model: ToyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
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
        generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    assert contents(images) == whole
    assert "000003.png, 000009.png differs from its recorded SHA-256" in caplog.text
    assert "000017.png is recorded but gone" in caplog.text
    assert "000020.png, 000021.png was written but not recorded" in caplog.text
    assert "17 of 22 images are there" in caplog.text


def test_only_batches_with_something_missing_are_sampled(
    model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    images.path(9).unlink()
    sampled = record_sampling(monkeypatch)
    kept = images.path(8).stat().st_mtime_ns
    generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    assert sampled == [[prompt.seed for prompt in PROMPTS[8:12]]]
    assert images.path(8).stat().st_mtime_ns == kept


def test_a_full_disk_stops_with_a_message_and_keeps_what_was_written(
    model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = image_writer.write_atomically, []

    def filling(path: Path, data: bytes) -> None:
        if len(written) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, data)

    monkeypatch.setattr(image_writer, "write_atomically", filling)
    with pytest.raises(UserError, match=r"No space left on device.*goes on from there"):
        generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "full")
    monkeypatch.undo()
    assert len(list((tmp_path / "full").rglob("*.png"))) == 6
    resumed = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "full")
    whole = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "whole")
    assert contents(resumed) == contents(whole)


def test_each_distinct_prompt_is_encoded_once(model: ToyModel, tmp_path: Path) -> None:
    generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    texts = {"", *(prompt.text for prompt in PROMPTS)}
    assert model.encoded == dict.fromkeys(texts, 1)


@pytest.mark.parametrize("batch_size", [4, 7])
def test_an_image_depends_on_order_and_batch_by_rounding_only(
    model: ToyModel, tmp_path: Path, batch_size: int
) -> None:
    images = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    order = np.random.default_rng(0).permutation(len(PROMPTS))[:15]
    settings = replace(SETTINGS, batch_size=batch_size)
    shuffled = generate(model, NO_CHANGE, [PROMPTS[i] for i in order], settings, tmp_path)
    for position, index in enumerate(order):
        difference = np.abs(shuffled.read(position).astype(int) - images.read(index))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_the_key_changes_with_everything_that_matters(model: ToyModel) -> None:
    def key(
        model: DiffusionModel = model,
        edited: int = 0,
        prompts: list[Prompt] = PROMPTS,
        settings: SamplerSettings = SETTINGS,
    ) -> str:
        edit = knock_out(model, edited) if edited else NO_CHANGE
        return set_key(describe_set(model, edit, prompts, settings))

    larger = ToyModel()
    larger.resolution = 32
    other_scheduler = ToyModel()
    other_scheduler.scheduler_config = {"num_train_timesteps": 50}
    first = PROMPTS[0]
    keys = [
        key(),
        key(model=ToyModel(seed=1)),
        key(model=other_scheduler),
        key(model=larger),
        key(edited=4),
        key(edited=5),
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


def test_the_key_changes_with_library_versions(
    model: ToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set_key(describe_set(model, NO_CHANGE, PROMPTS, SETTINGS))
    monkeypatch.setattr(runtime, "version", lambda name: "0")
    assert set_key(describe_set(model, NO_CHANGE, PROMPTS, SETTINGS)) != before
    monkeypatch.undo()
    monkeypatch.setattr(generation, "VERSION", 0)
    assert set_key(describe_set(model, NO_CHANGE, PROMPTS, SETTINGS)) != before


def test_partition() -> None:
    assert partition(7, 3) == [range(3), range(3, 6), range(6, 7)]
    assert partition(3, 3) == [range(3)]


def test_pixels_are_rounded_clamped_and_finite() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 1.2, -0.1, float("nan")]).view(2, 3, 1, 1)
    pixels, finite = _to_pixels(values)
    assert pixels.reshape(-1).tolist() == [0, 128, 255, 255, 0, 0]
    assert finite.tolist() == [True, False]


def test_images_that_an_edit_broke_are_counted(
    model: ToyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = torch.full((16, 8), float("nan"))
    edit = WeightEdit({"text.weight": Replace(values)}, {"model": model.provenance()})
    for _ in range(2):  # made, then found
        images = generate(model, edit, PROMPTS, SETTINGS, tmp_path)
        assert images.broken() == len(PROMPTS)
        assert "22 of 22 images have values that are not finite" in caplog.text
        caplog.clear()
    assert '"finite": false' in (images.folder / "records.jsonl").read_text()
    assert generate(model, knock_out(model), PROMPTS, SETTINGS, tmp_path).broken() == 0


def test_an_unedited_model_that_overflows_is_refused(model: ToyModel, tmp_path: Path) -> None:
    model.denoiser.text.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"4 images of the unedited model=toy .* dtype=float32"):
        generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path)


def test_prompts_are_checked_before_anything_is_made(model: ToyModel, tmp_path: Path) -> None:
    prompts = [*PROMPTS, Prompt("a" * 101, 0, "church")]
    with pytest.raises(UserError, match="too long"):
        generate(model, NO_CHANGE, prompts, SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "sampler.steps=0"),
        ({"batch_size": 0}, "sampler.batch_size=0"),
        ({"guidance": float("nan")}, "sampler.guidance=nan"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SETTINGS, **change)  # type: ignore[arg-type]


def test_no_prompts_and_an_edit_of_another_model_are_refused(
    model: ToyModel, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no prompts"):
        generate(model, NO_CHANGE, [], SETTINGS, tmp_path)
    with pytest.raises(UserError, match="other weights"):
        generate(model, knock_out(ToyModel(seed=1)), PROMPTS, SETTINGS, tmp_path)


def test_batches_are_of_one_guidance_and_the_first_image_leads(model: ToyModel) -> None:
    # The sampler's guidance is 2, so an image that asks for 2 goes with those that ask nothing.
    asked = [None, 5.0, None, 2.0, 5.0, None, 5.0]
    prompts = [replace(PROMPTS[i], guidance=guidance) for i, guidance in enumerate(asked)]
    batches = plan_batches(model, prompts, replace(SETTINGS, batch_size=2))
    assert [(batch.indices, batch.guidance) for batch in batches] == [
        ((0, 2), 2.0),
        ((1, 4), 5.0),
        ((3, 5), 2.0),
        ((6,), 5.0),
    ]


def test_batches_are_of_one_size(model: ToyModel) -> None:
    asked = [(8, 16), None, (16, 16), (8, 16), (16, 8)]  # the model's own size is 16 x 16
    prompts = [replace(PROMPTS[i], size=size) for i, size in enumerate(asked)]
    batches = plan_batches(model, prompts, SETTINGS)
    assert [batch.indices for batch in batches] == [(0, 3), (1, 2), (4,)]


def test_an_image_is_made_with_its_own_guidance(model: ToyModel, tmp_path: Path) -> None:
    asked = [None, 7.5, None, 1.0]
    prompts = [replace(PROMPTS[i], guidance=guidance) for i, guidance in enumerate(asked)]
    images = generate(model, NO_CHANGE, prompts, SETTINGS, tmp_path)
    for index, (prompt, picture) in enumerate(images):
        guidance = asked[index] or SETTINGS.guidance
        settings = replace(SETTINGS, guidance=guidance, batch_size=1)
        alone = generate(model, NO_CHANGE, [replace(prompt, guidance=None)], settings, tmp_path)
        assert np.abs(picture.astype(int) - alone.read(0)).max() <= 1
    plain = generate(model, NO_CHANGE, PROMPTS[:4], SETTINGS, tmp_path)
    assert np.abs(plain.read(1).astype(int) - images.read(1)).max() > 1


def test_keys_and_records_hold_guidance_and_size_only_where_they_are_asked_for(
    model: ToyModel, tmp_path: Path
) -> None:
    prompts = [PROMPTS[0], replace(PROMPTS[1], guidance=7, size=(16, 16), id="12", truncate=True)]
    described = describe_set(model, NO_CHANGE, prompts, SETTINGS)["prompts"]
    own = {"guidance": 7.0, "size": [16, 16]}
    assert described == [
        [PROMPTS[0].text, PROMPTS[0].seed],
        [PROMPTS[1].text, PROMPTS[1].seed, own],
    ]
    images = generate(model, NO_CHANGE, prompts, SETTINGS, tmp_path)
    lines = (images.folder / "records.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert list(first) == ["index", "prompt", "seed", "sha256", "finite"]
    assert second == first | second | own
    assert verify(images).keys() == {0, 1}


def test_images_of_other_sizes_are_those_of_the_diffusers_pipeline(
    tiny_model: StableDiffusionModel, tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    sizes = [(64, 32), None, (64, 32), (32, 64)]
    prompts = [Prompt("a church", seed, "church", size=size) for seed, size in enumerate(sizes)]
    images = generate(tiny_model, NO_CHANGE, prompts, SETTINGS, tmp_path)
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
        generate(
            tiny_model, NO_CHANGE, [replace(prompts[0], size=(64, 30))], SETTINGS, tmp_path / "odd"
        )


def test_another_size_than_the_models_is_refused(model: ToyModel, tmp_path: Path) -> None:
    prompts = [PROMPTS[0], replace(PROMPTS[1], size=(8, 16)), replace(PROMPTS[2], size=(16, 16))]
    with pytest.raises(
        UserError,
        match=r"model=toy makes images of 16 x 16 pixels only, not of 8 x 16.*rules\.size=null",
    ):
        generate(model, NO_CHANGE, prompts, SETTINGS, tmp_path)
    check_prompts(model, [prompts[0], prompts[2]])


def test_prompts_are_cut_only_where_they_may_be(
    model: ToyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = Prompt("a" * 101, 0, "church")
    with pytest.raises(UserError, match="too long"):
        check_prompts(model, [long])
    with caplog.at_level(logging.INFO):
        prompts = [*PROMPTS[:2], replace(long, truncate=True), replace(long, seed=1, truncate=True)]
        generate(model, NO_CHANGE, prompts, SETTINGS, tmp_path)
    assert "1 of 3 distinct prompts are longer" in caplog.text


def test_a_set_of_mixed_sizes_is_read_in_pieces_of_one_size(tmp_path: Path) -> None:
    images = ImageSet(tmp_path, tuple(PROMPTS[:5]))
    shapes = [(4, 4), (4, 4), (4, 4), (4, 6), (4, 4)]
    with ImageWriter(images) as writer:
        writer.put({i: np.full((*shape, 3), i, np.uint8) for i, shape in enumerate(shapes)})
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


def test_out_of_memory_halves_the_batch_for_the_rest_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    halves = generate(ToyModel(), NO_CHANGE, PROMPTS, replace(SETTINGS, batch_size=2), tmp_path)
    sampled = record_sampling(monkeypatch)
    images = generate(SmallMemory(2), NO_CHANGE, PROMPTS, SETTINGS, tmp_path)
    assert [len(seeds) for seeds in sampled] == [4, *(11 * [2])]
    assert caplog.text.count("do not fit") == 1
    assert "going on with 2. model.sampler.batch_size=2" in caplog.text
    # Pieces of 2 of batches of 4 are the batches of 2, so here even the bytes are theirs.
    for index in range(len(images)):
        assert images.path(index).read_bytes() == halves.path(index).read_bytes()


def test_odd_batches_are_halved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = record_sampling(monkeypatch)
    settings = replace(SETTINGS, batch_size=5)
    images = generate(SmallMemory(1), NO_CHANGE, PROMPTS[:5], settings, tmp_path)
    assert [len(seeds) for seeds in sampled] == [5, 3, 2, 1, 1, 1, 1, 1]
    assert sampled[3:] == [[prompt.seed] for prompt in PROMPTS[:5]]
    assert images.missing() == 0


def test_one_image_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not hold one image of model=toy at 16 x 16 pixels"):
        generate(SmallMemory(0), NO_CHANGE, PROMPTS, SETTINGS, tmp_path)


def test_shards_share_the_batches_and_their_union_is_the_whole(
    model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "whole")
    sampled = record_sampling(monkeypatch)
    seeds = [prompt.seed for prompt in PROMPTS]
    second = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "shards", shard=(1, 4))
    assert sampled == [seeds[4:8], seeds[20:22]]  # of six batches number 1 and 5
    assert second.missing() == 22 - 6
    assert (second.folder / "records-1-of-4.jsonl").exists()
    for index in (3, 0, 2):
        generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "shards", shard=(index, 4))
    assert len(sampled) == 6
    assert contents(second) == contents(whole)


def test_shards_run_side_by_side(tmp_path: Path) -> None:
    whole = generate(ToyModel(), NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "whole")

    models = [ToyModel() for _ in range(3)]  # not in the threads: weights come of the one seed

    def make(index: int) -> None:
        generate(models[index], NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "shards", (index, 3))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(make, range(3)))
    folder = tmp_path / "shards" / whole.folder.name
    assert contents(ImageSet(folder, whole.prompts)) == contents(whole)


def test_a_whole_run_takes_over_what_shards_made_and_left_half_written(
    model: ToyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "whole")
    part = generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "part", shard=(0, 2))
    part.path(0).write_bytes(b"altered")
    (part.folder / ".000004.png.abc.tmp").write_bytes(b"of the other shard, at work")
    sampled = record_sampling(monkeypatch)
    generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "part", shard=(0, 2))
    assert sampled == [[prompt.seed for prompt in PROMPTS[:4]]]
    assert (part.folder / ".000004.png.abc.tmp").exists()
    sampled.clear()
    generate(model, NO_CHANGE, PROMPTS, SETTINGS, tmp_path / "part")
    assert len(sampled) == 3
    assert contents(part) == contents(whole)


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(index: int, count: int) -> None:
    with pytest.raises(UserError, match=rf"shard {index} of {count} does not exist"):
        Shard(index, count)


def test_records_that_a_full_disk_does_not_take_stop_the_writer(tmp_path: Path) -> None:
    images = ImageSet(tmp_path, tuple(PROMPTS[:4]))
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    black = np.zeros((4, 4, 3), np.uint8)
    writer = ImageWriter(images)
    with pytest.raises(UserError, match="No space left on device"), writer:
        writer.put({0: black, 1: black})
    assert writer.written == {}


def test_a_record_that_was_half_written_is_not_taken_for_whole(tmp_path: Path) -> None:
    class AlmostFull:
        def write(self, data: bytes) -> int:
            return len(data) - 1

    writer = ImageWriter(ImageSet(tmp_path, tuple(PROMPTS[:4])))
    writer._records = AlmostFull()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left on device"):
        writer._record("a line\n")


def test_records_of_an_earlier_and_a_later_file_both_vouch(tmp_path: Path) -> None:
    """Shards of another partition may have recorded an image before it was altered and remade."""
    images = ImageSet(tmp_path, tuple(PROMPTS[:1]))
    with ImageWriter(images) as writer:
        writer.put({0: np.zeros((4, 4, 3), np.uint8)})
    line = (tmp_path / "records.jsonl").read_text()
    stale = line.replace(writer.written[0].sha256, "0" * 64)
    (tmp_path / "records-0-of-2.jsonl").write_text(stale)
    assert verify(images) == {0: Written(writer.written[0].sha256, finite=True)}
    assert (tmp_path / "records.jsonl").read_text() == line
    assert not (tmp_path / "records-0-of-2.jsonl").exists()
