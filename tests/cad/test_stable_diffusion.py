"""The adapter over a Stable Diffusion pipeline: loading, text, targets, images, components."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import MAX_TOKENS, RESOLUTION, build_pipeline
from linear_toy import LinearToyModel
from transformers import CLIPTokenizer

from cad.components import component_weights, text_projections
from cad.errors import UserError
from cad.models import pipeline
from cad.models.base import resolve_device, resolve_dtype
from cad.models.hub import Source
from cad.models.stable_diffusion import StableDiffusionModel


def local(path) -> Source:
    return Source(None, None, str(path), 0.1, "Apache-2.0", False, "Train it.", None)


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def load(folder, dtype="float32"):
    return StableDiffusionModel.from_pretrained("tiny", local(folder), RESOLUTION, "cpu", dtype)


def test_from_pretrained_equals_the_pipeline_that_was_saved(tiny_model, folder):
    loaded = load(folder)
    assert loaded.provenance() == tiny_model.provenance()
    assert loaded.latent_shape == (4, 8, 8)
    assert not loaded.denoiser.training
    assert not any(p.requires_grad for p in loaded.denoiser.parameters())


def test_random_weights_take_the_place_of_the_source():
    nowhere = Source("no/where", None, None, 1.0, "Apache-2.0", False, "", None)
    settings = ("tiny", nowhere, RESOLUTION, "cpu", "float32")
    model = StableDiffusionModel.from_pretrained(*settings, "random-small", "sd14")
    assert (model.origin.id, model.origin.revision) == ("sd14", "random-small")
    assert model.prediction_type == "epsilon"
    for wrong, message in (
        (("none",), r"weights='none' is unknown; allowed: published, random, random-small"),
        (("random",), r"weights=random needs model\.architecture"),
        (("random", "sdxl"), r"architecture=sdxl is a StableDiffusionXLPipeline"),
    ):
        with pytest.raises(UserError, match=message):
            StableDiffusionModel.from_pretrained(*settings, *wrong)


def test_offloaded_parts_visit_the_device_while_they_work(folder, tiny_model, monkeypatch):
    visitors = []

    @contextmanager
    def noted(module, device):
        visitors.append((module, device))
        yield

    monkeypatch.setattr(pipeline, "visiting", noted)
    monkeypatch.setattr(pipeline, "resolve_device", lambda _device: torch.device("meta"))
    model = StableDiffusionModel.from_pretrained(
        "tiny", local(folder), RESOLUTION, "cuda", "float32", offload=True
    )
    assert model.device == torch.device("meta")
    assert {part.device.type for part in (model.text_encoder, model.vae)} == {"cpu"}
    tiny_model.encode_prompts(["church"])
    tiny_model.decode_latents(tiny_model.encode_images(torch.zeros(1, 3, RESOLUTION, RESOLUTION)))
    parts = (tiny_model.text_encoder, tiny_model.vae, tiny_model.vae)
    assert visitors == [(part, tiny_model.device) for part in parts]


def test_encoding_keeps_the_text_encoders_for_a_block(tiny_model, monkeypatch):
    moved = []
    monkeypatch.setattr(pipeline, "visiting", lambda module, _: nullcontext(moved.append(module)))
    with tiny_model.encoding():
        assert moved == [tiny_model.text_encoder]


def test_a_visitor_comes_home_after_an_exception(tiny_model):
    module = tiny_model.text_encoder

    def places():
        return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]

    def visit_and_fail():
        with pipeline.visiting(module, torch.device("cpu")):
            for parameter in module.parameters():
                parameter.data = torch.zeros_like(parameter)
            raise KeyError

    before = places()
    with pytest.raises(KeyError):
        visit_and_fail()
    assert places() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_changes_no_number(folder):
    settings = ("tiny", local(folder), RESOLUTION, "cuda", "float32")
    here = StableDiffusionModel.from_pretrained(*settings)
    away = StableDiffusionModel.from_pretrained(*settings, offload=True)
    assert (away.device.type, away.vae.device.type) == ("cuda", "cpu")
    states, others = (model.encode_prompts(["church"]).tensors["states"] for model in (here, away))
    assert torch.equal(states, others)
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    x_0 = here.encode_images(images)
    assert torch.equal(x_0, away.encode_images(images))
    assert torch.equal(here.decode_latents(x_0), away.decode_latents(x_0))
    assert {part.device.type for part in (away.text_encoder, away.vae)} == {"cpu"}
    assert away.provenance() == here.provenance()


def test_half_precision_is_other_weights(tiny_model, folder):
    half = load(folder, "float16")
    assert half.dtype == torch.float16
    assert half.provenance()["dtype"] == "float16"
    assert half.provenance()["fingerprint"] != tiny_model.provenance()["fingerprint"]


def test_provenance_tells_the_surroundings_apart(tiny_model):
    before = tiny_model.provenance()
    tiny_model.vae.register_to_config(scaling_factor=0.7)
    tiny_model.forget_digests()
    after = tiny_model.provenance()
    assert after["pipeline"] != before["pipeline"]
    assert after["fingerprint"] == before["fingerprint"]


def test_provenance_holds_what_changes_no_weight(tiny_model):
    def digest():
        tiny_model.forget_digests()
        return tiny_model.provenance()["pipeline"]

    digests = [digest()]
    tiny_model.encode_prompts(["church"])  # leaves padding set in the tokenizer
    assert digest() == digests[0]
    tiny_model.denoiser.register_to_config(attention_head_dim=8)
    digests.append(digest())
    tiny_model.text_encoder.config.num_attention_heads = 4
    digests.append(digest())
    tiny_model.tokenizer.pad_token = "a</w>"
    digests.append(digest())
    vocabulary = tiny_model.tokenizer.get_vocab()
    merges = [("a", "b</w>")]
    del vocabulary["9</w>"]
    for each in (merges, []):
        tiny_model.texts[0].tokenizer = CLIPTokenizer(
            vocab=vocabulary | {"ab</w>": 73}, merges=each
        )
        digests.append(digest())
    assert len(set(digests)) == 6
    resolution = tiny_model.provenance()
    assert (resolution["resolution"], resolution["latent_shape"]) == (64, [4, 8, 8])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_forward_process_is_computed_in_float32(tiny_model, dtype):
    x_0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for t in (torch.tensor(3), torch.tensor(990)):
        for method in (tiny_model.add_noise, tiny_model.target):
            exact = method(x_0.float(), noise.float(), t)
            assert torch.equal(method(x_0, noise, t), exact.to(dtype))


def test_prompts_are_checked_without_encoding(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.text_encoder, "forward", None)  # calling it would be an error
    tiny_model.check_prompts(["", "church"])


def test_the_last_token_of_a_prompt_is_the_one_before_its_end(tiny_model):
    prompts = ["", "a", "bc"]  # every letter is a token
    assert tiny_model.last_tokens(prompts) == [0, 1, 2]
    with pytest.raises(UserError, match="tokens"):
        tiny_model.last_tokens(["a" * 99])


def test_what_reads_the_prompt(tiny_model):
    names = list(text_projections(tiny_model))
    assert len(names) == 2 * len(component_weights(tiny_model, "attn2")) // 4
    assert all(name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")) for name in names)
    with pytest.raises(UserError, match=r"has no cross-attention"):
        text_projections(LinearToyModel())


def test_a_missing_tokenizer_is_noticed(folder):
    almost_empty = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    almost_empty.save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match="has 2 tokens and its text encoder 74"):
        load(folder)


def test_an_incomplete_folder_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"model_index.json missing. Train it\."):
        load(tmp_path / "nowhere")
    for file in (folder / "unet").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="unet missing"):
        load(folder)


def test_a_damaged_folder_is_refused(folder):
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match="does not load"):
        load(folder)


@pytest.mark.parametrize("resolution", [0, 8, 60, 72])
def test_resolutions_that_do_not_divide_are_refused(tiny_pipeline, resolution):
    with pytest.raises(UserError, match=f"resolution={resolution} .* multiple of 16"):
        StableDiffusionModel("tiny", tiny_pipeline, resolution)


def test_unknown_parameterisations_are_refused():
    with pytest.raises(UserError, match="predicts 'sample'"):
        StableDiffusionModel("tiny", build_pipeline("sample"), RESOLUTION)


def test_text_is_encoded_as_by_the_pipeline(tiny_pipeline, tiny_model):
    prompts = ["", "church", "a gas pump"]
    expected, _ = tiny_pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)
    assert torch.equal(tiny_model.encode_prompts(prompts).tensors["states"], expected)


def test_prompts_that_do_not_fit_are_refused_or_truncated(tiny_model):
    fits, too_long = "a" * (MAX_TOKENS - 2), "a" * (MAX_TOKENS - 1)
    tiny_model.encode_prompts([fits])
    for check in (tiny_model.check_prompts, tiny_model.encode_prompts):
        with pytest.raises(
            UserError, match=rf"'{too_long}' has {MAX_TOKENS + 1} tok.*{MAX_TOKENS}"
        ):
            check([fits, too_long])
    assert len(tiny_model.encode_prompts([fits, too_long], truncate=True)) == 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_targets_recover_the_clean_latent(prediction_type):
    model = StableDiffusionModel("tiny", build_pipeline(prediction_type), RESOLUTION)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 2, *model.latent_shape, generator=generator)
    t = torch.tensor(300)
    x_t, target = model.add_noise(x_0, noise, t), model.target(x_0, noise, t)
    alpha = model._ddim.alphas_cumprod[t].sqrt()
    sigma = (1 - alpha**2).sqrt()
    recovered = (x_t - sigma * target) / alpha
    if prediction_type == "v_prediction":
        recovered = alpha * x_t - sigma * target
    torch.testing.assert_close(recovered, x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [1, 500, 999])
def test_epsilon_weight_turns_differences_of_v_into_differences_of_noise(tiny_model, t):
    """At one x_t, eps_c - eps_b = alpha (v_c - v_b): the docstring's claim."""
    x_0, other, noise = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(t)
    alpha = tiny_model._ddim.alphas_cumprod[t].sqrt()
    sigma = (1 - alpha**2).sqrt()
    x_t = alpha * x_0 + sigma * noise
    torch.testing.assert_close(tiny_model.add_noise(x_0, noise, t), x_t)
    noise_of_other = (x_t - alpha * other) / sigma
    v_c, v_b = tiny_model.target(x_0, noise, t), tiny_model.target(other, noise_of_other, t)
    torch.testing.assert_close(
        tiny_model.epsilon_weight(t) ** 0.5 * (v_c - v_b),
        noise - noise_of_other,
        rtol=1e-3,
        atol=1e-3,
    )


def test_epsilon_weight_of_other_parameterisations():
    model = StableDiffusionModel("tiny", build_pipeline("epsilon"), RESOLUTION)
    assert model.epsilon_weight(torch.tensor(500)) == 1.0
    toy = LinearToyModel()
    assert toy.epsilon_weight(torch.tensor(0)) == 1.0
    toy.prediction_type = "flow"
    with pytest.raises(UserError, match=r"edit.weighting=epsilon is not allowed for model=toy"):
        toy.epsilon_weight(torch.tensor(0))


def test_images_to_latents_and_back(tiny_model):
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    x_0 = tiny_model.encode_images(images)
    assert x_0.shape == (2, *tiny_model.latent_shape)
    assert torch.equal(x_0, tiny_model.encode_images(images))
    decoded = tiny_model.decode_latents(x_0)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert 0 <= decoded.min() <= decoded.max() <= 1
    expected = tiny_model.vae.encode(2 * images - 1).latent_dist.mode() * 0.5
    torch.testing.assert_close(x_0, expected)


@pytest.mark.parametrize(
    ("component", "per_block", "shape"),
    [("ff", 2, 2), ("attn1", 4, 2), ("attn2", 4, 2), ("residual", None, 4)],
)
def test_components(tiny_model, component, per_block, shape):
    weights = component_weights(tiny_model, component)
    assert all(weight.dim() in (shape, 2) for weight in weights.values())
    assert all(name.endswith(".weight") for name in weights)
    if per_block is not None:
        blocks = {re.sub(r"(transformer_blocks\.\d+)\..*", r"\1", name) for name in weights}
        assert len(weights) == per_block * len(blocks) == per_block * 7
    else:
        assert sum("conv_shortcut" not in name for name in weights) == 2 * 8


def test_unknown_and_empty_components_are_refused(tiny_model):
    with pytest.raises(UserError, match="allowed: ff, attn1, attn2, residual"):
        component_weights(tiny_model, "mlp")
    with pytest.raises(UserError, match="component=attn1 is empty"):
        component_weights(LinearToyModel(), "attn1")


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(UserError, match="device='gpu' is unknown"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="dtype='int8' is unknown; allowed: auto, float32"):
        resolve_dtype("int8", torch.device("cpu"))
    with pytest.raises(UserError, match="is not there"):
        resolve_device("cuda:99")


def test_the_saved_index_names_no_safety_checker(folder):
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"] == [None, None]
