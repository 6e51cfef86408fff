"""Where weights come from, and the one paragraph where they are missing."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants

from cad.errors import UserError
from cad.models import hub
from cad.models.hub import Source, missing_parts

REPO, COMMIT = "someone/some-model", "0" * 40


def source(**changes) -> Source:
    fields = {
        "repo": REPO,
        "revision": None,
        "path": None,
        "size_gb": 5.5,
        "licence": "OpenRAIL",
        "gated": False,
        "note": "",
        "variant": None,
    }
    return Source(**{**fields, **changes})


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """An empty cache, and a network that fails the test when it is asked."""

    def asked(*_args, **_options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(hub.httpx, "head", asked)
    monkeypatch.setattr(hub, "snapshot_download", asked)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    cache = tmp_path / "hub"
    real = hub.try_to_load_from_cache
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda *a, **k: real(*a, cache_dir=cache, **k)
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return cache


def lay_out(cache, tiny_pipeline):
    folder = cache / "models--someone--some-model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    tiny_pipeline.save_pretrained(folder / "snapshots" / COMMIT)
    return folder / "snapshots" / COMMIT


def test_a_cached_snapshot_is_found_without_the_network(no_hub, tiny_pipeline):
    snapshot = lay_out(no_hub, tiny_pipeline)
    assert source().locate() == snapshot


def test_an_incomplete_snapshot_is_not_taken(no_hub, tiny_pipeline, monkeypatch, caplog):
    folder = lay_out(no_hub, tiny_pipeline)
    for file in (folder / "vae").iterdir():
        file.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        source().locate()
    assert "vae missing" in caplog.text


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_parts_without_weights_are_downloaded(no_hub, tiny_pipeline, monkeypatch, part):
    folder = lay_out(no_hub, tiny_pipeline)
    for file in (folder / part).glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert missing_parts(folder) == [str(folder / part)]
    monkeypatch.setattr(hub.httpx, "head", lambda *_args, **_options: None)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_args, **_options: "downloaded")
    assert source().locate() == Path("downloaded")


@pytest.mark.parametrize(
    ("files", "variant", "whole"),
    [
        (["model.safetensors"], None, True),
        (["model.safetensors"], "fp16", False),
        (["model.fp16.safetensors"], None, False),
        (["model.fp16.safetensors"], "fp16", True),
        (["model-00001-of-00002.safetensors"], None, False),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None, True),
        (["model.fp16-00001-of-00001.safetensors"], "fp16", True),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", True),
        (["config.json", "model.bin"], None, False),
    ],
)
def test_weights_are_those_of_the_variant(tmp_path, files, variant, whole):
    (tmp_path / "unet").mkdir()
    for name in files:
        (tmp_path / "unet" / name).touch()
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    assert (not missing_parts(tmp_path, variant)) == whole


def test_offline_ends_in_one_paragraph(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as raised:
        source(note="A mirror.", revision="abc").locate()
    message = str(raised.value)
    assert "\n" not in message
    for part in (REPO, "5.5 GB", "OpenRAIL", "HF_HUB_OFFLINE", "hf download", "A mirror.", "mini"):
        assert part in message
    command = f"hf download {REPO} --revision abc --include model_index.json --include '*/*.json'"
    assert command in message
    assert "--include '*/*.safetensors' --exclude 'safety_checker/*'" in message


def test_gated_weights_need_a_token():
    with pytest.raises(UserError, match=r"no hub token.*accept the licence.*hf auth login"):
        source(gated=True).locate()


def test_an_unreachable_hub_is_noticed_quickly(monkeypatch):
    def refuse(*_args, timeout, **_options):
        assert timeout <= 5
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(hub.httpx, "head", refuse)
    with pytest.raises(UserError, match="cannot be reached from here"):
        source().locate()


def test_only_needed_files_are_downloaded(monkeypatch, tmp_path):
    asked = {}

    def download(repo, **options):
        asked.update(repo=repo, **options)
        return str(tmp_path)

    monkeypatch.setattr(hub.httpx, "head", lambda *_args, **_options: None)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert source(variant="fp16", revision="abc").locate() == tmp_path
    assert (asked["repo"], asked["revision"]) == (REPO, "abc")
    assert "*/*.fp16*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".ckpt")) for pattern in asked["allow_patterns"])
    assert "safety_checker/*" in asked["ignore_patterns"]


def test_one_of_repo_and_path_is_needed():
    with pytest.raises(UserError, match="give one"):
        source(repo=None)
    with pytest.raises(UserError, match="give one"):
        source(path="somewhere")
