"""Concepts, references, files, digests and the instrument."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cad.concepts import Concept
from cad.digests import parameter_digest, settings_digest
from cad.errors import UserError
from cad.files import atomic_path
from cad.instrument import Cost, measure
from cad.references import GeneratedImages, ImageFolder, LatentFile, read_image


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "French horn"}, "not snake_case"),
        ({"kind": "thing"}, "allowed: object, style, explicit"),
        ({"text": " "}, "concept.text of 'church' is empty"),
        ({"prompt": ""}, "concept.prompt of 'church' is empty"),
        ({"base_prompt": "church"}, "would be zero everywhere"),
    ],
)
def test_concepts_that_make_no_sense_are_refused(changes, message):
    fields = {"name": "church", "kind": "object", "text": "church", "prompt": "church"}
    with pytest.raises(UserError, match=message):
        Concept(**{**fields, **changes})


def test_reference_latents_from_a_file(tiny_model, church, parachute, tmp_path):
    path = tmp_path / "references.safetensors"
    with pytest.raises(UserError, match="is not there"):
        LatentFile(path).describe(church)
    save_file({"church": torch.ones(5, 4, 8, 8, dtype=torch.float16)}, path)
    latents = LatentFile(path).latents(tiny_model, church)
    assert latents.shape == (5, 4, 8, 8)
    assert latents.dtype == torch.float32
    with pytest.raises(UserError, match=r"concept=parachute has no reference.*there are: church"):
        LatentFile(path).latents(tiny_model, parachute)
    described = LatentFile(path).describe(church)
    save_file({"church": torch.ones(5, 8, 8, 8)}, path)
    assert LatentFile(path).describe(church) != described
    with pytest.raises(UserError, match="belong to another model"):
        LatentFile(path).latents(tiny_model, church)
    path.write_text("damaged")
    with pytest.raises(UserError, match="cannot be read"):
        LatentFile(path).describe(church)


def test_reference_images_from_a_folder(tiny_model, church, tmp_path):
    (tmp_path / "church").mkdir()
    pixels = np.zeros((70, 100, 3), np.uint8)
    pixels[:, 15:85] = 200  # the centred square
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / "church" / name)
    image = read_image(tmp_path / "church" / "a.png", 64)
    assert image.shape == (3, 64, 64)
    torch.testing.assert_close(image, torch.full((3, 64, 64), 200 / 255))
    folder = ImageFolder(tmp_path, count=2)
    assert len(folder.describe(church)["sha256"]) == 2
    assert folder.latents(tiny_model, church).shape == (2, *tiny_model.latent_shape)
    with pytest.raises(UserError, match=r"needs 3 reference pictures.*there are 2"):
        ImageFolder(tmp_path, count=3).describe(church)


def test_generated_references(tiny_model, church):
    references = GeneratedImages(count=2, steps=1)
    latents = references.latents(tiny_model, church)
    assert latents.shape == (2, *tiny_model.latent_shape)
    assert references.describe(church)["prompt"] == "church"
    other = GeneratedImages(count=2, steps=1, seed=1).latents(tiny_model, church)
    assert not any(torch.equal(mine, theirs) for mine in latents for theirs in other)
    with pytest.raises(UserError, match="allowed: default, ddim"):
        GeneratedImages(count=2, steps=1, kind="heun").latents(tiny_model, church)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_digests_see_names_shapes_dtypes_and_values():
    layer = torch.nn.Linear(2, 3)
    digests = {parameter_digest(layer)}
    assert parameter_digest(layer) in digests
    digests.add(parameter_digest(torch.nn.Sequential(layer)))
    digests.add(parameter_digest(torch.nn.Linear(3, 2)))
    layer.weight.data[0, 0] += 1
    digests.add(parameter_digest(layer))
    digests.add(parameter_digest(layer.half()))
    assert len(digests) == 5
    assert settings_digest({"a": 1, "b": 2}) == settings_digest({"b": 2, "a": 1})


def test_the_instrument_sees_time_and_memory():
    with measure(torch.device("cpu")) as meter:
        block = torch.ones(20_000_000)  # 80 MB
        time.sleep(0.5)  # many looks, for a machine on which threads wait for their turn
        del block
    assert meter.cost.seconds >= 0.5
    assert meter.cost.peak_memory_mb > 40
    assert not meter.cost.cached
    assert meter.cost.memory_kind == "resident growth"


def test_costs_add_up():
    assert Cost(1.0, 5.0, cached=True) + Cost(2.0, 3.0) == Cost(3.0, 5.0, cached=True)
    assert Cost() + Cost(2.0, 3.0) == Cost(2.0, 3.0)
    small, large = Cost(1.0, 0.0, memory_kind="resident growth"), Cost(1.0, 9.0, memory_kind="x")
    assert (small + large).memory_kind == (large + small).memory_kind == "x"
    assert (Cost() + small).memory_kind == "resident growth"
