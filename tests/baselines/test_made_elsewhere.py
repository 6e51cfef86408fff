"""Edits, weights and LoRAs that were made elsewhere become edits of this model."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from baselines.made_elsewhere import MadeElsewhere
from cad.concepts import Concept
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.weight_edit import Replace, WeightEdit, Zero

CHURCH = Concept(name="church", kind="object", text="church", prompt="church")
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def made(model, path):
    return MadeElsewhere(str(path))(model, CHURCH)


def test_an_edit_of_the_suite(tiny_model, tmp_path):
    edit = WeightEdit(
        {f"{QUERY}.weight": Zero(torch.tensor([1, 5]))}, {"model": tiny_model.provenance()}
    )
    edit.save(tmp_path / "edit.safetensors")
    assert made(tiny_model, tmp_path / "edit.safetensors").fingerprint == edit.fingerprint
    WeightEdit(edit.changes, {"model": edit.provenance["model"] | {"fingerprint": "0"}}).save(
        tmp_path / "b.safetensors"
    )
    with pytest.raises(UserError, match="made for other weights"):
        made(tiny_model, tmp_path / "b.safetensors")


def test_a_fine_tuned_denoiser_in_every_layout(tiny_model, folder, tmp_path):
    other = copy.deepcopy(tiny_model.denoiser)
    other.get_submodule(QUERY).weight.data += 1
    other.save_pretrained(folder / "unet")
    save_file(other.state_dict(), tmp_path / "unet.safetensors")
    for path in (folder, folder / "unet", tmp_path / "unet.safetensors"):
        edit = made(tiny_model, path)
        assert list(edit.changes) == [f"{QUERY}.weight"]
        assert isinstance(edit.changes[f"{QUERY}.weight"], Replace)
        with edit.applied(tiny_model):
            assert parameter_digest(tiny_model.denoiser) == parameter_digest(other)


def test_a_lora(tiny_model, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
    layers = {f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    before = parameter_digest(tiny_model.denoiser)
    edit = made(tiny_model, tmp_path / "pytorch_lora_weights.safetensors")
    assert list(edit.changes) == [f"{QUERY}.weight"]
    expected = tiny_model.denoiser.get_submodule(QUERY).weight + up @ down
    torch.testing.assert_close(edit.changes[f"{QUERY}.weight"].tensor, expected.detach())
    assert parameter_digest(tiny_model.denoiser) == before


def test_what_is_no_edit_is_refused(tiny_model, folder, tmp_path):
    with pytest.raises(UserError, match="no folder with any"):
        made(tiny_model, tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing changes"):
        made(tiny_model, folder)
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"'w', .* is no weight of model=tiny"):
        made(tiny_model, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read"):
        made(tiny_model, tmp_path / "w.safetensors")
