"""Loading pipelines: from a folder, and from one file in the layout of the models' authors."""

from __future__ import annotations

import json
import re
import socket

import pytest
import torch
from conftest import WIDTH
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from cad.errors import UserError
from cad.models.hub import Located
from cad.models.pretrained import load_pipeline

FLOAT = torch.float32
RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
TOP = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
)
VAE = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"group_norm", "norm"),
    (r"to_(q|k|v)\.", r"\1."),
    (r"to_out\.0", "proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def asked(*_args, **_options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", asked)


@pytest.fixture
def checkpoint(tiny_pipeline, tmp_path):
    """The tiny pipeline's weights in one file, named as Stable Diffusion 1's authors do."""
    save_file(original_layout(tiny_pipeline), tmp_path / "original.safetensors")
    return tmp_path / "original.safetensors"


def original_layout(pipeline):
    text = {
        f"cond_stage_model.transformer.text_model.{name}": weight
        for name, weight in pipeline.text_encoder.state_dict().items()
    }
    unet = {
        "model.diffusion_model." + unet_name(name, pipeline.unet.config.layers_per_block): weight
        for name, weight in pipeline.unet.state_dict().items()
    }
    vae = {
        "first_stage_model." + vae_name(name, len(pipeline.vae.config.up_block_types)): weight
        for name, weight in pipeline.vae.state_dict().items()
    }
    for name, weight in vae.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            vae[name] = weight[..., None, None]  # they are 1 x 1 convolutions there
    return unet | vae | text


def unet_name(name, layers):
    """Block and layer are counted on in the original: (block, layer) -> one number."""
    for ours, theirs in TOP:
        name = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", name)
    if found := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name):
        side, block, kind, layer, rest = found.groups()
        number = (layers + 1) * int(block) + int(layer)
        if kind == "downsamplers":
            name = f"input_blocks.{number + layers + 1}.0.{rest.replace('conv', 'op')}"
        elif kind == "upsamplers":
            name = f"output_blocks.{number + layers}.2.{rest}"
        else:
            blocks = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
            name = f"{blocks}.{0 if kind == 'resnets' else 1}.{rest}"
    if re.match(r"(\w+_blocks\.\d+\.0|middle_block\.[02])\.", name):
        for ours, theirs in RESNET:
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def vae_name(name, blocks):
    for ours, theirs in VAE:
        name = re.sub(ours, theirs, name)
    if found := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)\.(.*)", name):
        level = blocks - 1 - int(found[1])  # counted from the other end
        name = f"decoder.up.{level}.{'block' if found[2] == 'resnets' else 'upsample'}.{found[3]}"
    return name


def equal(pipeline, other):
    """Whether all weights of two pipelines are the same."""
    return all(
        torch.equal(weight, getattr(other, part).state_dict()[name])
        for part, network in pipeline.components.items()
        if isinstance(network, torch.nn.Module)
        for name, weight in network.state_dict().items()
    )


def test_a_folder_is_loaded_as_it_was_saved(tiny_pipeline, folder):
    loaded = load_pipeline(StableDiffusionPipeline, Located(folder, None, None), None, FLOAT)
    assert equal(tiny_pipeline, loaded)
    assert loaded.safety_checker is None
    assert not loaded.config.requires_safety_checker
    half = load_pipeline(StableDiffusionPipeline, Located(folder, None, None), None, torch.float16)
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.float16}


def test_the_variant_is_taken(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, variant="fp16")
    located = Located(tmp_path, None, None)
    assert equal(tiny_pipeline, load_pipeline(StableDiffusionPipeline, located, "fp16", FLOAT))
    with pytest.raises(UserError, match="does not load"):
        load_pipeline(StableDiffusionPipeline, located, None, FLOAT)


def test_parts_are_left_out(xl, tmp_path):
    """And a pipeline that has no safety checker is not told to do without one."""
    xl.pipeline.save_pretrained(tmp_path)
    located = Located(tmp_path, None, None)
    for file in (tmp_path / "text_encoder").iterdir():
        file.unlink()
    without = ("text_encoder", "tokenizer")
    loaded = load_pipeline(StableDiffusionXLPipeline, located, None, FLOAT, without)
    assert loaded.text_encoder is loaded.tokenizer is None
    assert equal(loaded, xl.pipeline)
    with pytest.raises(UserError, match="does not load"):
        load_pipeline(StableDiffusionXLPipeline, located, None, FLOAT)


@pytest.mark.parametrize(
    "damaged", ["*/unet/*.safetensors", "*/text_encoder/*.safetensors", "*/unet/*.json", "*.saf*"]
)
def test_damaged_files_are_refused(folder, checkpoint, damaged):
    (file,) = folder.parent.glob(damaged)
    file.write_bytes(file.read_bytes()[:-100])
    paths = (checkpoint, folder) if file == checkpoint else (folder, None)
    with pytest.raises(UserError, match="does not load"):
        load_pipeline(StableDiffusionPipeline, Located(*paths, None), None, FLOAT)


def test_a_checkpoint_equals_the_pipeline_that_was_converted(tiny_pipeline, folder, checkpoint):
    for file in folder.glob("*/*.safetensors"):
        file.unlink()  # the configurations alone are enough
    located = Located(checkpoint, folder, None, (checkpoint,))
    loaded = load_pipeline(StableDiffusionPipeline, located, "fp16", FLOAT)
    assert equal(tiny_pipeline, loaded)
    assert len(loaded.tokenizer) == len(tiny_pipeline.tokenizer)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.safety_checker is None
    half = load_pipeline(StableDiffusionPipeline, located, None, torch.float16)
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.float16}


@pytest.mark.parametrize(
    ("prefix", "part"),
    [
        ("cond_stage_model", "CLIPTextModel"),
        ("first_stage_model", "AutoencoderKL"),
        ("model.diffusion_model", "UNet2DConditionModel"),
        ("model.diffusion_model.input_blocks.0", "Cannot copy out of meta"),
        ("first_stage_model.post_quant_conv", "Cannot copy out of meta"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm",
            "text_encoder has no value for 2 of its weights",
        ),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_refused(folder, checkpoint, prefix, part):
    """Although the folder of its configurations holds that part: its weights are others'."""
    weights = load_file(checkpoint)
    kept = {name: weight for name, weight in weights.items() if not name.startswith(prefix + ".")}
    assert len(kept) < len(weights)
    save_file(kept, checkpoint)
    located = Located(checkpoint, folder, None, (checkpoint,))
    with pytest.raises(UserError, match=rf"not hold a whole pipeline: .*{part}") as raised:
        load_pipeline(StableDiffusionPipeline, located, None, FLOAT)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("part", "key"), [("unet", "cross_attention_dim"), ("text_encoder", "intermediate_size")]
)
def test_weights_of_another_architecture_are_refused(folder, checkpoint, part, key):
    config = json.loads((folder / part / "config.json").read_text())
    (folder / part / "config.json").write_text(json.dumps(config | {key: 2 * WIDTH}))
    for path, configurations in ((folder, None), (checkpoint, folder)):
        with pytest.raises(UserError, match="does not load"):
            load_pipeline(StableDiffusionPipeline, Located(path, configurations, None), None, FLOAT)


def test_a_checkpoint_without_text_encoders_is_refused(flow, tmp_path):
    """As SD-3.5's, which is its transformer and its image autoencoder alone."""
    flow.pipeline.save_pretrained(tmp_path)
    checkpoint = tmp_path / "original.safetensors"
    save_file({"model.diffusion_model.x_embedder.proj.bias": torch.zeros(4)}, checkpoint)
    located = Located(checkpoint, tmp_path, None, (checkpoint,))
    with pytest.raises(UserError, match=r"CLIPTextModelWithProjection.*with text encoders"):
        load_pipeline(StableDiffusion3Pipeline, located, None, FLOAT)
