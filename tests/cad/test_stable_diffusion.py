"""The adapter over a Stable Diffusion pipeline: loading, text, targets, images, components."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import MAX_TOKENS, RESOLUTION, build_pipeline, pretrained
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from linear_toy import LinearToyModel
from transformers import CLIPTokenizer

from cad.components import component_weights, text_projections
from cad.errors import UserError
from cad.models import conditioning, pipeline
from cad.models import pretrained as loading
from cad.models.base import resolve_device, resolve_dtype
from cad.models.stable_diffusion import PREDICTION_TYPES, StableDiffusionModel


def test_offloaded_parts_visit_the_device_while_they_work(folder, tiny_model, monkeypatch):
    visitors = []

    @contextmanager
    def noted(module, device):
        visitors.append((module, device))
        yield

    for user in (conditioning, pipeline):
        monkeypatch.setattr(user, "visiting", noted)
    monkeypatch.setattr(loading, "resolve_device", lambda _device: torch.device("meta"))
    model = pretrained(StableDiffusionModel, folder, offload=True).load()
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
    here = pretrained(StableDiffusionModel, folder, device="cuda").load()
    away = pretrained(StableDiffusionModel, folder, device="cuda", offload=True).load()
    assert (away.device.type, away.vae.device.type) == ("cuda", "cpu")
    states, others = (model.encode_prompts(["church"]).tensors["states"] for model in (here, away))
    assert torch.equal(states, others)
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    x_0 = here.encode_images(images)
    assert torch.equal(x_0, away.encode_images(images))
    assert torch.equal(here.decode_latents(x_0), away.decode_latents(x_0))
    assert {part.device.type for part in (away.text_encoder, away.vae)} == {"cpu"}
    assert away.provenance() == here.provenance()


def test_provenance_holds_what_changes_no_weight(tiny_model):
    def digest():
        del tiny_model.digests
        return tiny_model.provenance()["pipeline"]

    before, digests = tiny_model.provenance(), [digest()]
    tiny_model.encode_prompts(["church"])  # leaves padding set in the tokenizer
    assert digest() == digests[0]
    tiny_model.vae.register_to_config(scaling_factor=0.7)
    digests.append(digest())
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
    assert len(set(digests)) == 7
    after = tiny_model.provenance()
    assert after["fingerprint"] == before["fingerprint"]
    assert (after["resolution"], after["latent_shape"]) == (64, [4, 8, 8])


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
        pretrained(StableDiffusionModel, folder).load()


@pytest.mark.parametrize("resolution", [0, 8, 60, 72])
def test_resolutions_that_do_not_divide_are_refused(tiny_pipeline, resolution):
    with pytest.raises(UserError, match=f"{resolution} x {resolution} .* multiples of 16"):
        StableDiffusionModel("tiny", tiny_pipeline, resolution)


def test_unknown_parameterisations_are_refused():
    with pytest.raises(UserError, match="predicts 'noise'; known are epsilon, v_prediction, sam"):
        StableDiffusionModel("tiny", build_pipeline("noise"), RESOLUTION)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler]
)
def test_schedulers_find_the_clean_latent_in_the_target(prediction_type, scheduler_class):
    """The adapter's training target, as a prediction, is what diffusers takes it for."""
    model = StableDiffusionModel("tiny", build_pipeline(prediction_type), RESOLUTION)
    scheduler = scheduler_class.from_config(model._ddim.config, clip_sample=False)
    scheduler.set_timesteps(10)
    x_0, noise = torch.randn(2, 1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[4]
    step = scheduler.step(model.target(x_0, noise, t), t, model.add_noise(x_0, noise, t))
    multistep = scheduler_class is DPMSolverMultistepScheduler
    found = scheduler.model_outputs[-1] if multistep else step.pred_original_sample
    torch.testing.assert_close(found, x_0, rtol=1e-4, atol=1e-4)


def test_text_is_encoded_as_by_the_pipeline(tiny_pipeline, tiny_model):
    prompts = ["", "church", "a gas pump"]
    expected, _ = tiny_pipeline.encode_prompt(prompts, torch.device("cpu"), 1, False)
    assert torch.equal(tiny_model.encode_prompts(prompts).tensors["states"], expected)


def test_prompts_that_do_not_fit_are_refused_or_truncated(tiny_model, monkeypatch):
    fits, too_long = "a" * (MAX_TOKENS - 2), "a" * (MAX_TOKENS - 1)
    tiny_model.encode_prompts([fits])
    assert len(tiny_model.encode_prompts([fits, too_long], truncate=True)) == 2
    monkeypatch.setattr(tiny_model.text_encoder, "forward", None)  # calling it would be an error
    tiny_model.check_prompts(["", "church"])
    for check in (tiny_model.check_prompts, tiny_model.encode_prompts):
        with pytest.raises(
            UserError, match=rf"'{too_long}' has {MAX_TOKENS + 1} tok.*{MAX_TOKENS}"
        ):
            check([fits, too_long])


def test_epsilon_weight_of_other_parameterisations():
    model = StableDiffusionModel("tiny", build_pipeline("epsilon"), RESOLUTION)
    assert model.epsilon_weight(torch.tensor(500)) == 1.0
    toy = LinearToyModel()
    assert toy.epsilon_weight(torch.tensor(0)) == 1.0
    toy.prediction_type = "flow"
    with pytest.raises(UserError, match=r"edit.weighting=epsilon is not allowed for model=toy"):
        toy.epsilon_weight(torch.tensor(0))


def test_unknown_and_empty_components_are_refused(tiny_model):
    with pytest.raises(UserError, match="ff, attn1, attn2, residual"):
        component_weights(tiny_model, "mlp")
    with pytest.raises(UserError, match="component=attn1 is empty"):
        component_weights(LinearToyModel(), "attn1")


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(UserError, match="dtype='int8' is unknown; allowed: auto, float32"):
        resolve_dtype("int8", torch.device("cpu"))
    with pytest.raises(UserError, match="is not there"):
        resolve_device("cuda:99")
