"""A model before it is loaded: what it is told apart by, and that any process can load it."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace

import conftest
import pytest
import torch
from conftest import source

from cad.errors import UserError
from cad.models import hub
from cad.models import pretrained as loading
from cad.models.stable_diffusion import StableDiffusionModel


def pretrained(path=None, **changes):
    return conftest.pretrained(StableDiffusionModel, path, **{"dtype": "auto"} | changes)


def test_it_loads_the_model_in_any_process(folder, tiny_model):
    one = pretrained(folder)
    sent = pickle.loads(pickle.dumps(one))
    assert (sent, hash(sent)) == (one, hash(one))
    loaded = sent.load()
    assert loaded.provenance() == tiny_model.provenance()
    assert loaded.edits == ()
    assert not loaded.denoiser.training
    assert not any(p.requires_grad for p in loaded.denoiser.parameters())
    random = pretrained(weights="random-small", architecture="sd14").load("cpu")
    assert (random.origin.id, random.origin.revision) == ("sd14", "random-small")
    assert (random.prediction_type, random.file_digests()) == ("epsilon", {})


def test_its_identity_is_what_determines_the_model(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_pipeline", None)  # calling it would be an error
    identity = pretrained(folder).identity()
    for same in (
        pretrained(folder, device="cuda:3", dtype="float32", offload=True),
        pretrained(shutil.copytree(folder, tmp_path / "elsewhere")),
        pretrained(source=source(folder, licence="none", size_gb=9.9, gated=True, note="x")),
    ):
        assert same.identity() == identity
    others = [
        pretrained(folder, resolution=128),
        pretrained(folder, dtype="float16"),
        pretrained(folder, name="other"),
        pretrained(),
        pretrained(source=source(revision="abc")),
        pretrained(source=source(repo="some/where")),
        pretrained(weights="random", architecture="sd14"),
        pretrained(tmp_path / "nowhere", weights="random", architecture="sd21"),
    ]
    weights = next((tmp_path / "elsewhere" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    others.append(pretrained(tmp_path / "elsewhere"))
    found = [each.identity() for each in others]
    assert all(found.count(each) == 1 for each in found)
    assert identity not in found


def test_a_checkpoint_s_identity_has_the_repository_of_its_configurations(tmp_path):
    for name in ("one", "copy"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"weights")
    one, copy = (source(tmp_path / f"{name}.safetensors", repo="a/b") for name in ("one", "copy"))
    assert one.identity() == copy.identity()
    assert source(tmp_path / "one.safetensors", repo="c/d").identity() != one.identity()


def test_a_folder_that_is_no_pipeline_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "index").mkdir()
    monkeypatch.setattr(hub, "content_digest", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(UserError, match=r"photographs does not hold .*model_index\.json missing"):
        pretrained(tmp_path / "photographs").identity()
    damaged = pretrained(tmp_path / "index")
    for index, ask in (("[]", damaged.identity), ("null", damaged.load), ("{", damaged.load)):
        (tmp_path / "index" / hub.INDEX).write_text(index)
        with pytest.raises(UserError, match="does not hold a whole"):
            ask()
    with pytest.raises(UserError, match=r"model_index\.json missing"):
        pretrained(tmp_path / "nowhere").identity()
    with pytest.raises(UserError, match="does not exist"):
        pretrained(source=source(tmp_path / "no.safetensors", repo="a/b")).identity()


def test_mistakes_are_explained(folder):
    with pytest.raises(UserError, match=r"weights='none' is unknown; allowed: published, random"):
        pretrained(folder, weights="none")
    with pytest.raises(UserError, match=r"weights=random needs model\.architecture"):
        pretrained(folder, weights="random")
    with pytest.raises(UserError, match=r"architecture=sdxl is a StableDiffusionXLPipeline"):
        pretrained(weights="random", architecture="sdxl").load()
    for family in ("cad.models.stable_diffusion.Unknown", "no.such.module"):
        with pytest.raises(UserError, match=rf"model\.adapter\.family={family} is no class"):
            replace(pretrained(folder), family=family).load()
    with pytest.raises(UserError, match="model=tiny reads prompts without a T5"):
        pretrained(folder, t5=False).load()
    with pytest.raises(UserError, match="device='gpu' is unknown"):
        pretrained(folder).load("gpu")


def test_weights_of_another_dtype_than_was_asked_for_are_refused(folder, monkeypatch):
    """As diffusers before 0.40 loads them, whatever it is told."""
    real = loading.diffusers.StableDiffusionPipeline.from_pretrained

    def deaf(path, **options):
        return real(path, **options | {"dtype": torch.float32})

    monkeypatch.setattr(loading.diffusers.StableDiffusionPipeline, "from_pretrained", deaf)
    assert pretrained(folder).load().dtype == torch.float32
    with pytest.raises(
        UserError, match=r"dtype=float16 was.*(unet|vae|text_encoder) .*float32.*0\.40"
    ):
        pretrained(folder, dtype="float16").load()
