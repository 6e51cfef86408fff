"""Concepts, references, files, digests, identities and the instrument."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cad.concepts import Concept
from cad.errors import UserError
from cad.files import atomic_path, content_digest, file_digest, link_or_copy, write_atomically
from cad.identity import Identified, digest, immaterial, parameter_digest
from cad.instrument import Cost
from cad.references import GeneratedImages, ImageFolder, LatentFile, read_image
from cad.store import write_tensors

REPOSITORY = Path(__file__).parents[2]


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
    with pytest.raises(UserError, match="cannot be read: No such file"):
        LatentFile(path).settings(church)
    save_file({"church": torch.ones(5, 4, 8, 8, dtype=torch.float16)}, path)
    latents = LatentFile(path).latents(tiny_model, church)
    assert latents.shape == (5, 4, 8, 8)
    assert latents.dtype == torch.float32
    with pytest.raises(UserError, match=r"concept=parachute has no reference.*there are: church"):
        LatentFile(path).latents(tiny_model, parachute)
    described = LatentFile(path).settings(church)
    save_file({"church": torch.ones(5, 8, 8, 8)}, path)
    assert LatentFile(path).settings(church) != described
    with pytest.raises(UserError, match="belong to another model"):
        LatentFile(path).latents(tiny_model, church)
    path.write_text("damaged")
    with pytest.raises(UserError, match="cannot be read"):
        LatentFile(path).settings(church)


def whole_picture(folder):
    """The first picture, all of it, as 64 x 64 pixels in [0, 1], (1, 3, 64, 64)."""
    with Image.open(folder / "church" / "a.png") as image:
        pixels = np.array(image.resize((64, 64), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def test_reference_images_from_a_folder(tiny_model, church, tmp_path):
    (tmp_path / "church").mkdir()
    pixels = np.zeros((70, 100, 3), np.uint8)
    pixels[:, 15:85] = 200  # the centred square
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / "church" / name)
    image = read_image(tmp_path / "church" / "a.png", 64, "crop")
    assert image.shape == (3, 64, 64)
    torch.testing.assert_close(image, torch.full((3, 64, 64), 200 / 255))
    whole = read_image(tmp_path / "church" / "a.png", 100, "stretch")  # 15 columns each side stay
    assert whole[:, :, :14].max() == whole[:, :, 86:].max() == 0
    assert whole[:, :, 16:84].min() == 200 / 255
    folder = ImageFolder(tmp_path, count=2)
    assert len(folder.settings(church)["sha256"]) == 2
    sampled = folder.latents(tiny_model, church)
    assert sampled.shape == (2, *tiny_model.latent_shape)
    assert torch.equal(sampled, folder.latents(tiny_model, church))
    assert not torch.equal(sampled[0], sampled[1])  # the same picture twice
    assert not torch.equal(sampled, ImageFolder(tmp_path, 2, seed=1).latents(tiny_model, church))
    posterior = tiny_model.vae.encode(2 * whole_picture(tmp_path) - 1).latent_dist
    scale = tiny_model.vae.config.scaling_factor  # [-1, 1] and the factor, which are not released
    mode = ImageFolder(tmp_path, count=2, encoding="mode").latents(tiny_model, church)
    torch.testing.assert_close(mode, (scale * posterior.mean).expand_as(mode))
    drawn = (sampled - mode) / (scale * posterior.std)
    assert 0.8 < drawn.std() < 1.2
    for key, bad in (("fit", "pad"), ("encoding", None), ("count", 0)):
        with pytest.raises(UserError, match=rf"edit\.references\.{key}="):
            ImageFolder(tmp_path, **{key: bad})
    with pytest.raises(UserError, match=r"needs 3 photographs.*there are 2.*references\.object"):
        ImageFolder(tmp_path, count=3).settings(church)
    (tmp_path / "church" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        folder.pictures(church, 64)


def test_generated_references(tiny_model, church):
    references = GeneratedImages(count=3, steps=1, encoding=None)
    latents = references.latents(tiny_model, church)
    assert latents.shape == (3, *tiny_model.latent_shape)
    batched = GeneratedImages(count=3, steps=1, encoding=None, batch_size=2)
    torch.testing.assert_close(batched.latents(tiny_model, church), latents)
    images = tiny_model.decode_latents(latents)
    again = GeneratedImages(count=3, steps=1, encoding="mode").latents(tiny_model, church)
    torch.testing.assert_close(again, tiny_model.encode_images(images))
    sampled = GeneratedImages(count=3, steps=1).latents(tiny_model, church)
    assert not torch.equal(sampled, again)
    apart = GeneratedImages(count=3, steps=1, batch_size=2).latents(tiny_model, church)
    torch.testing.assert_close(apart, sampled, rtol=1e-4, atol=1e-5)
    assert references.settings(church)["prompt"] == "church"
    other = GeneratedImages(count=2, steps=1, seed=1, encoding=None).latents(tiny_model, church)
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


def test_the_umask_decides_who_may_read(tmp_path):
    mask = os.umask(0o077)
    try:
        write_tensors(tmp_path / "private", {}, {}, "test/1")
        os.umask(0o022)
        write_tensors(tmp_path / "shared", {}, {}, "test/1")
    finally:
        os.umask(mask)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("private", "shared")]
    assert modes == [0o600, 0o644]


def test_a_link_is_the_file_and_a_copy_where_there_are_none(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_text("edit")
    link_or_copy(source, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source)

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("cad.files.os.link", refuse)
    link_or_copy(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "edit"
    assert not (tmp_path / "copied").samefile(source)
    assert len(list(tmp_path.iterdir())) == 3  # nothing half-made is left


def test_hashes_of_files_follow_what_is_written(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.bin"
    write_atomically(path, b"abc")
    assert file_digest(path) == hashlib.sha256(b"abc").hexdigest()
    assert file_digest(path, "md5") == hashlib.md5(b"abc").hexdigest()
    whole = content_digest(path.parent)
    digests = {whole, content_digest(path)}
    monkeypatch.setattr(Path, "open", None)  # read again only once it has changed
    assert content_digest(path.parent) == whole
    monkeypatch.undo()
    write_atomically(path, b"abd")
    digests |= {content_digest(path), content_digest(path.parent)}
    path.rename(path.with_name("other.bin"))
    digests.add(content_digest(path.parent))
    assert len(digests) == 5
    with pytest.raises(UserError, match=r"neither a file nor a folder at .*nowhere"):
        content_digest(tmp_path / "nowhere")


@dataclass(frozen=True)
class Part(Identified):
    value: float
    parts: tuple[Part, ...] = ()
    place: str = immaterial("here")


def test_an_identity_has_the_parts_but_not_what_is_immaterial(monkeypatch):
    part = Part(1.0, (Part(2.0),))
    assert part.identity() == Part(1.0, (Part(2.0, place="there"),), "there").identity()
    assert json.loads(json.dumps(part.identity())) == part.identity()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    found = [part.identity(), Part(1.0, (Part(3.0),)).identity(), Part(1.0).identity()]
    for name, value in (("version", 2), ("libraries", ("torch", "no such package"))):
        monkeypatch.setattr(Part, name, value)
        found.append(part.identity())
    assert len({digest(each) for each in found}) == 5


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


def test_the_instrument_sees_time_and_memory():
    """In a process of its own: what others leave behind, freed meanwhile, would hide the growth."""
    program = """
import time, torch
from cad.instrument import measure
with measure(torch.device("cpu")) as meter:
    block = torch.ones(20_000_000)  # 80 MB
    time.sleep(0.5)  # many looks, for a machine on which threads wait for their turn
    del block
print(meter.cost.seconds, meter.cost.peak_memory_mb, meter.cost.cached, meter.cost.memory_kind)
"""
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    seconds, megabytes, *rest = told.stdout.split()
    assert float(seconds) >= 0.5
    assert float(megabytes) > 40
    assert rest == ["False", "resident", "growth"]


def test_costs_add_up():
    assert Cost(1.0, 5.0, cached=True) + Cost(2.0, 3.0) == Cost(3.0, 5.0, cached=True)
    assert Cost() + Cost(2.0, 3.0) == Cost(2.0, 3.0)
    small, large = Cost(1.0, 0.0, memory_kind="resident growth"), Cost(1.0, 9.0, memory_kind="x")
    assert (small + large).memory_kind == (large + small).memory_kind == "x"
    assert (Cost() + small).memory_kind == "resident growth"
