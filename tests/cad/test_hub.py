"""Where weights come from, and the one paragraph where they are missing."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from conftest import source as any_source
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from cad.errors import UserError
from cad.models import hub
from cad.models.base import Origin
from cad.models.hub import Located, Source

REPO, COMMIT = "someone/some-model", "0" * 40
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer")
PARTS += ("tokenizer_2", "tokenizer_3", "transformer", "unet", "vae")
UNET = {"unet": ["diffusers", "UNet2DConditionModel"]}
# What the published repositories hold: the needed files, and others.
XL_NEEDED = """
    model_index.json scheduler/scheduler_config.json
    text_encoder/config.json text_encoder/model.fp16.safetensors
    text_encoder_2/config.json text_encoder_2/model.fp16.safetensors
    tokenizer/merges.txt tokenizer/vocab.json tokenizer_2/merges.txt tokenizer_2/vocab.json
    unet/config.json unet/diffusion_pytorch_model.fp16.safetensors
    vae/config.json vae/diffusion_pytorch_model.fp16.safetensors
"""
XL_REST = """
    .gitattributes 01.png README.md sd_xl_base_1.0.safetensors
    sd_xl_offset_example-lora_1.0.safetensors
    text_encoder/flax_model.msgpack text_encoder/model.onnx text_encoder/model.safetensors
    text_encoder_2/model.onnx_data text_encoder_2/openvino_model.bin
    unet/diffusion_pytorch_model.safetensors vae_decoder/model.onnx
    vae_1_0/config.json vae_1_0/diffusion_pytorch_model.fp16.safetensors
"""
T5 = ("text_encoder_3", "tokenizer_3")
T5_CONFIGURATION = """
    text_encoder_3/config.json text_encoder_3/model.safetensors.index.json
    tokenizer_3/spiece.model tokenizer_3/tokenizer.json
"""
T5_WEIGHTS = """
    text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model-00002-of-00002.safetensors
"""
SD35_NEEDED = """
    model_index.json scheduler/scheduler_config.json
    text_encoder/config.json text_encoder/model.safetensors
    text_encoder_2/config.json text_encoder_2/model.safetensors
    tokenizer/merges.txt tokenizer/vocab.json tokenizer_2/merges.txt tokenizer_2/vocab.json
    transformer/config.json transformer/diffusion_pytorch_model.safetensors
    vae/config.json vae/diffusion_pytorch_model.safetensors
"""
SD35_REST = """
    .gitattributes LICENSE.md README.md sd3.5_medium.safetensors SD3.5M_example_workflow.json
    text_encoders/README.md text_encoders/clip_g.safetensors
    text_encoders/t5xxl_fp16.safetensors text_encoders/t5xxl_fp8_e4m3fn.safetensors
    text_encoder/model.fp16.safetensors text_encoder_3/model.fp16-00001-of-00002.safetensors
    text_encoder_3/model.fp16-00002-of-00002.safetensors
    vae/diffusion_pytorch_model.fp16.safetensors
"""


def source(**changes) -> Source:
    return any_source(**{"repo": REPO} | changes)


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


class Repository:
    """A hub that holds `files`; what is fetched appears in `snapshot`, as empty files."""

    def __init__(self, monkeypatch, snapshot, files, index=None):
        self.snapshot, self.files, self.index = snapshot, files.split(), index
        if index is None:  # names the folders that have one of the files
            parts = {Path(name).parent.name for name in self.files} & set(PARTS)
            self.index = {part: ["library", "class"] for part in parts}
        monkeypatch.setattr(hub.httpx, "head", lambda *_args, **_options: None)
        monkeypatch.setattr(hub, "snapshot_download", self.fetch)

    def fetch(self, repo, revision, **patterns):
        self.asked = (repo, revision)
        self.fetched = set(filter_repo_objects(self.files, **patterns))
        for name in self.fetched:
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (self.snapshot / name).touch()
        (self.snapshot / hub.INDEX).write_text(json.dumps(self.index))
        return str(self.snapshot)


def test_a_cached_snapshot_is_found_without_the_network(no_hub, tiny_pipeline):
    snapshot = lay_out(no_hub, tiny_pipeline)
    located = source().locate()
    assert (located.path, located.config) == (snapshot, None)
    assert located.origin == Origin(REPO, COMMIT)
    assert [file.parent.name for file in located.weights] == ["text_encoder", "unet", "vae"]


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
    lost = next((folder / part).glob("*.safetensors"))
    lost.rename(lost.with_suffix(".bin"))
    assert source().missing_parts(folder) == [part]
    index = json.loads((folder / hub.INDEX).read_text())
    Repository(monkeypatch, folder, f"{part}/{lost.name}", index)
    assert lost in source().locate().weights


def test_a_part_that_is_left_out_may_be_missing(no_hub, tiny_pipeline):
    folder = lay_out(no_hub, tiny_pipeline)
    for file in (folder / "text_encoder").iterdir():
        file.unlink()
    assert source().missing_parts(folder) == ["text_encoder"]
    located = source().locate(without=["text_encoder"])
    assert [file.parent.name for file in located.weights] == ["unet", "vae"]


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
    (tmp_path / hub.INDEX).write_text(json.dumps(UNET))
    assert (not source(variant=variant).missing_parts(tmp_path)) == whole


def test_offline_ends_in_one_paragraph(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as raised:
        source(note="A mirror.", revision="abc").locate()
    message = str(raised.value)
    assert "\n" not in message
    for part in (REPO, "5.5 GB", "OpenRAIL", "HF_HUB_OFFLINE", "A mirror.", "mini"):
        assert part in message
    command = f"hf download {REPO} --revision abc --include model_index.json --include '*/*.json'"
    assert command in message
    assert "--include '*/*model.safetensors'" in message
    assert "--exclude 'safety_checker/*'" in message
    assert "model.source.path" in message


def test_an_unreachable_hub_is_noticed_quickly_and_a_missing_token_at_once(monkeypatch):
    with pytest.raises(UserError, match=r"no hub token.*accept the licence.*hf auth login"):
        source(gated=True).locate()

    def refuse(*_args, timeout, **_options):
        assert timeout <= 5
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(hub.httpx, "head", refuse)
    with pytest.raises(UserError, match="cannot be reached from here"):
        source().locate()


@pytest.mark.parametrize(
    ("variant", "needed", "rest", "without"),
    [
        ("fp16", XL_NEEDED, XL_REST, ()),
        (None, SD35_NEEDED + T5_CONFIGURATION + T5_WEIGHTS, SD35_REST, ()),
        (None, SD35_NEEDED, SD35_REST + T5_CONFIGURATION + T5_WEIGHTS, T5),
    ],
    ids=["sdxl", "sd35", "sd35 without T5"],
)
def test_only_needed_files_are_downloaded(monkeypatch, tmp_path, variant, needed, rest, without):
    repository = Repository(monkeypatch, tmp_path / COMMIT, needed + rest)
    located = source(variant=variant, revision="abc").locate(without)
    assert repository.asked == (REPO, "abc")
    assert repository.fetched == set(needed.split())
    assert located.origin == Origin(REPO, COMMIT)
    weights = {name for name in needed.split() if name.endswith(".safetensors")}
    assert set(located.file_digests()) == weights


def test_unused_parts_are_not_downloaded(monkeypatch, tmp_path):
    unused = {"safety_checker": ["a", "b"], "image_encoder": [None, None], "requires_safety": True}
    files = "unet/model.safetensors safety_checker/model.safetensors image_encoder/config.json"
    repository = Repository(monkeypatch, tmp_path / COMMIT, files, UNET | unused)
    source().locate()
    assert repository.fetched == {"unet/model.safetensors"}


def test_weights_that_the_repository_lacks_are_named(monkeypatch, tmp_path):
    files = "unet/config.json unet/diffusion_pytorch_model.safetensors"
    Repository(monkeypatch, tmp_path / COMMIT, files)
    with pytest.raises(UserError, match=r"downloaded.*unet missing.* model\.source\.variant=fp16"):
        source(variant="fp16").locate()


def answered(kind, status=404):
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("Client Error.\n\nFor url: x", response=response)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered(errors.GatedRepoError, 403), "the hub refused the token: its account"),
        (answered(errors.RevisionNotFoundError), "no revision 'abc'"),
        (answered(errors.RepositoryNotFoundError), r"failed \(Client Error\. For url: x"),
        (errors.LocalEntryNotFoundError("no connection"), r"failed \(no connection\)"),
        (hub.TRANSPORT_ERROR("cut off"), r"failed \(cut off\)"),
        (OSError("no space left"), r"failed \(no space left\)"),
    ],
)
def test_a_failed_download_says_why(monkeypatch, error, expected):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(hub.httpx, "head", lambda *_args, **_options: None)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=expected) as raised:
        source(revision="abc").locate()
    assert "\n" not in str(raised.value)


def test_a_repository_or_a_path_is_needed():
    with pytest.raises(UserError, match=r"source\.repo: .*'/data/sd14'.*model\.source\.path"):
        source(repo="/data/sd14").locate()
    with pytest.raises(UserError, match="both null: give one"):
        source(repo=None)


def test_a_local_folder_wins_over_the_repository(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    located = source(path=str(tmp_path)).locate()
    assert (located.path, located.config, located.origin) == (tmp_path, None, None)
    assert len(located.weights) == 3


def test_a_local_folder_with_other_weights_says_which(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"unet, .*missing.*variant=fp16 .*safetensors' is null"):
        source(path=str(tmp_path), variant="fp16").locate()
    for file in tmp_path.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"unet, .*missing\. Only safetensors .*not \.bin"):
        source(path=str(tmp_path)).locate()


@pytest.mark.parametrize("ending", [".ckpt", ".bin", ".pt"])
def test_pickles_are_refused(tmp_path, ending):
    (tmp_path / f"model{ending}").touch()
    with pytest.raises(UserError, match=rf"{ending} file executes.*as \.safetensors"):
        source(path=str(tmp_path / f"model{ending}")).locate()


def test_a_checkpoint_takes_its_configurations_from_the_cache(no_hub, tiny_pipeline, tmp_path):
    snapshot = lay_out(no_hub, tiny_pipeline)
    for file in snapshot.glob("*/*.safetensors"):
        file.unlink()  # they need not be there
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"weights")
    located = source(path=str(checkpoint)).locate()
    assert located == Located(checkpoint, snapshot, None, (checkpoint,))
    assert located.file_digests() == {
        "model.safetensors": hashlib.sha256(b"weights").hexdigest(),
    }


def test_a_checkpoint_downloads_its_configurations_only(monkeypatch, tmp_path, caplog):
    files = SD35_NEEDED + T5_CONFIGURATION + T5_WEIGHTS + SD35_REST
    repository = Repository(monkeypatch, tmp_path / COMMIT, files)
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.touch()
    with caplog.at_level(logging.INFO):
        assert source(path=str(checkpoint)).locate().config == tmp_path / COMMIT
    needed = (SD35_NEEDED + T5_CONFIGURATION).split()
    assert repository.fetched == {name for name in needed if not name.endswith(".safetensors")}
    assert "GB" not in caplog.text


def test_a_checkpoint_without_its_configurations_ends_in_one_paragraph(monkeypatch, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        source(path=str(checkpoint)).locate()
    checkpoint.touch()
    with pytest.raises(UserError, match=r"set model\.source\.repo"):
        source(path=str(checkpoint), repo=None).locate()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"configurations and tokenizers.*a few MB") as raised:
        source(path=str(checkpoint)).locate()
    assert REPO in str(raised.value)
    assert "5.5 GB" not in str(raised.value)
    assert "safetensors'" not in str(raised.value)  # the command fetches no weights


def test_digests_of_cached_files_are_the_names_of_their_blobs(tmp_path):
    """And not the names in the store that blobs may link to, which are of another hash."""
    sha256, other = "a" * 64, "b" * 64
    for folder in ("blobs", "store", "snapshots"):
        (tmp_path / folder).mkdir()
    (tmp_path / "store" / other).write_bytes(b"weights")
    (tmp_path / "blobs" / sha256).symlink_to(Path("..", "store", other))
    linked = tmp_path / "snapshots" / "model.safetensors"
    linked.symlink_to(Path("..", "blobs", sha256))
    elsewhere = tmp_path / "snapshots" / "copied.safetensors"
    elsewhere.symlink_to(Path("..", "store", other))
    assert Located(tmp_path, None, None, (linked, elsewhere)).file_digests() == {
        "snapshots/model.safetensors": sha256,
        "snapshots/copied.safetensors": hashlib.sha256(b"weights").hexdigest(),
    }
