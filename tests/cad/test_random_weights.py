"""Random weights of the published architectures: their sizes, and that the small ones work."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import hydra
import pytest
import torch
import transformers
from conftest import source
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from hub_cache import CONF, MODELS, OTHERS, published, write_hub_cache
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import nn

from cad.components import JOINT_COMPONENTS, UNET_COMPONENTS
from cad.errors import UserError
from cad.models import hub
from cad.models.pretrained import load_pipeline
from cad.models.random_weights import (
    ARCHITECTURES,
    WORDS,
    construct_part,
    load_architecture,
    merges_for,
    random_pipeline,
)
from cad.selection import floor_share

NAMES = sorted(file.stem for file in ARCHITECTURES.glob("*.json"))
UNETS = {"sd14": 859_520_964, "sd21": 865_910_724, "sd21_base": 865_910_724, "sdxl": 2_567_463_684}
TRANSFORMERS = {"sd35_medium": 2_243_171_520, "sd35_large": 8_056_627_520}
CLIP_L, CLIP_H, CLIP_BIG_G = 123_060_480, 340_387_840, 694_659_840  # bigG with its projection
T5_XXL = 4_762_310_656
MODULES = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae")
VAE, VAE_OF_16_CHANNELS = 83_653_863, 83_819_683


def pipeline_class(architecture: str) -> type[Any]:
    return getattr(diffusers, load_architecture(architecture)["pipeline"])


def build(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    return random_pipeline(pipeline_class(architecture), architecture, dtype, small=True)


@pytest.fixture(scope="module", params=["sd14", "sdxl", "sd35_medium"])
def small(request) -> tuple[str, Any]:
    return request.param, build(request.param)


def on_meta(architecture: str, part: str, *, small: bool = False) -> nn.Module:
    with torch.device("meta"):
        return construct_part(load_architecture(architecture)["parts"][part], small=small)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def modules(pipeline: Any) -> dict[str, nn.Module]:
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module)}


# The published sizes


def test_the_architectures_of_the_paper_are_there():
    assert set(NAMES) == set(UNETS) | set(TRANSFORMERS)


@pytest.mark.parametrize(
    ("architecture", "part", "expected"),
    [
        *((name, "unet", number) for name, number in UNETS.items()),
        *((name, "transformer", number) for name, number in TRANSFORMERS.items()),
        ("sd14", "text_encoder", CLIP_L),
        ("sd21", "text_encoder", CLIP_H),
        ("sd21_base", "text_encoder", CLIP_H),
        ("sdxl", "text_encoder", CLIP_L),
        ("sdxl", "text_encoder_2", CLIP_BIG_G),
        ("sd35_medium", "text_encoder", CLIP_L + 768 * 768),
        ("sd35_medium", "text_encoder_2", CLIP_BIG_G),
        ("sd35_medium", "text_encoder_3", T5_XXL),
        ("sd14", "vae", VAE),
        ("sd21", "vae", VAE),
        ("sdxl", "vae", VAE),
        ("sd35_medium", "vae", VAE_OF_16_CHANNELS),
    ],
)
def test_numbers_of_parameters(architecture, part, expected):
    assert count(on_meta(architecture, part)) == expected


@pytest.mark.parametrize(
    ("architecture", "part", "components", "widest", "per_row", "per_layer"),
    [
        ("sdxl", "unet", UNET_COMPONENTS, 5120, 76_800, 368_620),
        ("sd35_medium", "transformer", JOINT_COMPONENTS, 6144, 72_192, 266_114),
    ],
)
def test_the_papers_ratio_takes_one_weight_of_the_widest_rows_alone(
    architecture, part, components, widest, per_row, per_layer
):
    """DEVIATIONS.md quotes these: 0.03 % by row is a tenth of 0.03 % of the parameters."""
    denoiser = on_meta(architecture, part)
    pattern = re.compile(components["ff"])
    shapes = [w.shape for name, w in denoiser.named_parameters() if pattern.search(name)]
    taken = {width: floor_share(0.0003, width) for _, width in shapes}
    assert {width: k for width, k in taken.items() if k} == {widest: 1}
    assert sum(rows * taken[width] for rows, width in shapes) == per_row
    assert sum(floor_share(0.0003, shape.numel()) for shape in shapes) == per_layer
    assert round(100 * per_row / count(denoiser), 4) in (0.0030, 0.0032)


def test_the_two_sd35_share_everything_but_the_transformer():
    medium, large = (load_architecture(name)["parts"] for name in TRANSFORMERS)
    assert {name for name in medium if medium[name] != large[name]} == {"transformer"}


@pytest.mark.parametrize("architecture", NAMES)
def test_every_key_of_a_configuration_is_known_to_its_class(architecture):
    for facts in load_architecture(architecture)["parts"].values():
        config = facts["config"]
        assert set(facts.get("small", {})) <= set(config)
        if facts["library"] == "diffusers":
            known = inspect.signature(getattr(diffusers, facts["class"]).__init__).parameters
            assert set(config) <= set(known), facts["class"]
        elif "Tokenizer" not in facts["class"]:
            known = getattr(transformers, facts["class"]).config_class()
            assert all(hasattr(known, key) for key in config), facts["class"]


# The small pipelines


def structure(module: nn.Module) -> set[str]:
    """Names of the parameters, without the numbers of blocks that only their depth adds."""
    repeated = re.compile(r"(layers|block|transformer_blocks)\.\d+")
    return {repeated.sub(r"\1", name) for name, _ in module.named_parameters()}


@pytest.mark.parametrize("architecture", NAMES)
def test_small_modules_are_built_like_the_published_ones(architecture):
    for part in set(load_architecture(architecture)["parts"]) & set(MODULES):
        published, small = (on_meta(architecture, part, small=small) for small in (False, True))
        assert structure(small) == structure(published), part


def test_small_pipelines_draw_a_small_image(small):
    _, pipeline = small
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a photo of a church",
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()
    assert images.std() > 0.1  # not saturated


def test_buffers_hold_what_the_libraries_compute():
    pipeline = build("sd35_medium", torch.bfloat16)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        (positions,) = (b for n, b in encoder.named_buffers() if n.endswith("position_ids"))
        assert positions.tolist() == [list(range(77))]
    config = pipeline.transformer.config
    expected = get_2d_sincos_pos_embed(
        32, config.pos_embed_max_size, base_size=4, output_type="pt"
    ).to(torch.bfloat16)
    assert torch.equal(pipeline.transformer.pos_embed.pos_embed[0], expected)
    shared, own = pipeline.text_encoder_3.shared, pipeline.text_encoder_3.encoder.embed_tokens
    assert shared.weight is own.weight


def test_weights_have_the_size_that_keeps_activations():
    unet = build("sdxl").unet
    weights = dict(unet.named_parameters())
    for name, weight in weights.items():
        if weight.dim() > 1 and weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.15), name
        elif weight.dim() == 1:
            assert set(weight.tolist()) == {0.0 if name.endswith("bias") else 1.0}
    rows = weights["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"]
    assert torch.linalg.matrix_rank(rows) == min(rows.shape)
    assert len(set(rows[:, 0].tolist())) == len(rows)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match=r"model.architecture='sd15' is unknown; allowed: sd14, "):
        random_pipeline(diffusers.StableDiffusionPipeline, "sd15", torch.float32)


# The tokenizers


@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("architecture", NAMES)
def test_tokenizers_have_the_tokens_of_their_encoders(architecture, is_small):
    parts = load_architecture(architecture)["parts"]
    for suffix in ("", "_2"):
        if f"tokenizer{suffix}" not in parts:
            continue
        tokenizer = construct_part(parts[f"tokenizer{suffix}"], small=is_small)
        encoder = parts[f"text_encoder{suffix}"]
        rows = (encoder["config"] | (encoder["small"] if is_small else {}))["vocab_size"]
        assert len(tokenizer) == rows == (1024 if is_small else 49408)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (rows - 2, rows - 1)
        pads_with_end = architecture == "sd14" or (architecture[:4] != "sd21" and not suffix)
        assert tokenizer.pad_token_id == (rows - 1 if pads_with_end else 0)
        assert tokenizer.model_max_length == 77


def test_words_are_tokens_and_every_text_has_tokens():
    tokenizer = construct_part(load_architecture("sd14")["parts"]["tokenizer"])
    for word in WORDS:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    pieces = ["naked</w>", "x", "y</w>", ",</w>", "1</w>", "2</w>"]
    assert tokenizer.tokenize("Naked xy, 12") == pieces
    assert tokenizer.unk_token_id not in tokenizer("é 東 €", add_special_tokens=False).input_ids
    long = tokenizer(" ".join(["church"] * 75)).input_ids
    assert len(long) == 77
    prompts = [OmegaConf.load(file).prompt for file in (CONF.parent / "concept").glob("*.yaml")]
    assert max(len(tokenizer(prompt).input_ids) for prompt in prompts) <= 12


def test_merges_join_each_word_and_leave_earlier_words_joined():
    assert merges_for(["art", "tar"]) == [("a", "r"), ("ar", "t</w>"), ("t", "a"), ("ta", "r</w>")]
    assert merges_for(["aaaa"]) == [("a", "a"), ("aa", "a"), ("aaa", "a</w>")]


@pytest.mark.parametrize("is_small", [False, True])
def test_the_tokenizer_of_t5(is_small):
    parts = load_architecture("sd35_medium")["parts"]
    tokenizer = construct_part(parts["tokenizer_3"], small=is_small)
    assert len(tokenizer) == (484 if is_small else 32100)
    assert len(tokenizer) < parts["text_encoder_3"]["small" if is_small else "config"]["vocab_size"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1
    assert tokenizer.tokenize("A photo, Naked") == ["▁A", "▁photo", ",", "▁Naked"]
    assert tokenizer("naked").input_ids[-1] == 1
    assert tokenizer.unk_token_id in tokenizer("東").input_ids


# The cache of the hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("huggingface")
    write_hub_cache(home)
    return home


@pytest.fixture
def offline(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.httpx, "head", lambda *_a, **_o: pytest.fail("the network was asked"))


@pytest.mark.parametrize("model", MODELS)
def test_the_sources_of_the_paper_find_their_weights_in_the_cache(offline, home, model):
    settings = OmegaConf.load(CONF / f"{model}.yaml").source
    located = hydra.utils.instantiate(settings).locate()
    assert located.path.is_relative_to(home / "hub")
    assert located.path.name == located.origin.revision == settings.revision
    assert located.file_digests()


@pytest.mark.parametrize("model", MODELS)
def test_published_formats_are_loaded_bit_for_bit(offline, model):
    """Names of 2022, T5 in two files with one name for two weights, tokenizers in two files.

    Everything becomes float16 but T5's second feed-forward matrices, which a library keeps.
    """
    settings, architecture = published(model)
    located = hydra.utils.instantiate(settings).locate()
    half, family = torch.float16, pipeline_class(architecture)
    loaded = load_pipeline(family, located, settings.variant, half)
    random_state = torch.get_rng_state()
    built = build(architecture, half)
    assert torch.equal(random_state, torch.get_rng_state())
    for part, module in modules(built).items():
        found = modules(loaded)[part].state_dict()
        assert found.keys() == module.state_dict().keys()
        for name, expected in module.state_dict().items():
            kept = part == "text_encoder_3" and ".wo." in name
            assert found[name].dtype == expected.dtype == (torch.float32 if kept else half), name
            assert torch.equal(found[name].half(), expected.half()), name
    for part in {"tokenizer", "tokenizer_2", "tokenizer_3"} & built.components.keys():
        text = "A photo, of a naked Xy church"
        expected = getattr(built, part)(text, padding="max_length", max_length=20)
        found = getattr(loaded, part)(text, padding="max_length", max_length=20)
        assert found.input_ids == expected.input_ids


def test_the_formats_are_those_of_the_hub(home):
    files = {path.relative_to(home): path for path in home.rglob("snapshots/*/*/*")}
    named = {(path.parts[1][8:], *path.parts[4:]): file for path, file in files.items()}
    sd14 = "CompVis--stable-diffusion-v1-4"
    with safe_open(named[sd14, "vae", "diffusion_pytorch_model.fp16.safetensors"], "pt") as vae:
        attention = [name for name in vae.keys() if name.startswith("decoder.mid_block.att")]  # noqa: SIM118
    kinds = {name.split(".")[4] for name in attention}
    assert kinds == {"group_norm", "query", "key", "value", "proj_attn"}
    with safe_open(named[sd14, "text_encoder", "model.fp16.safetensors"], "pt") as encoder:
        assert encoder.get_tensor("text_model.embeddings.position_ids").tolist() == [[*range(77)]]
    assert not [key for key in named if key[1:] == ("tokenizer", "tokenizer.json")]
    sd35 = "stabilityai--stable-diffusion-3.5-medium"
    assert (sd35, "text_encoder_3", "model-00002-of-00002.safetensors") in named
    index = json.loads(named[sd35, "text_encoder_3", "model.safetensors.index.json"].read_text())
    assert "shared.weight" in index["weight_map"]
    assert "encoder.embed_tokens.weight" not in index["weight_map"]


@pytest.mark.parametrize(("repo", "revision", "variant", "architecture"), OTHERS)
def test_the_other_sizes_are_in_the_cache(offline, repo, revision, variant, architecture):
    for asked in (revision, None):  # its commit, and the main branch
        located = source(repo=repo, revision=asked, variant=variant).locate()
        assert located.path.name == revision
    loaded = pipeline_class(architecture).from_pretrained(
        located.path, variant=variant, local_files_only=True
    )
    assert modules(loaded)
