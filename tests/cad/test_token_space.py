"""Prompts as tokens and embeddings of a text encoder: the same conditionings, and gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import MAX_TOKENS, WIDTH
from diffusers import StableDiffusionPipeline
from linear_toy import LinearToyModel

from cad.errors import UserError
from cad.identity import parameter_digest
from cad.models.conditioning import TokenSpace
from cad.models.random_weights import random_pipeline
from cad.models.stable_diffusion import StableDiffusionModel

PROMPTS = ["a hut", "church", ""]
START, END = 0, 1  # ids of the tiny tokenizer
LETTER_A, LAST_A = 2, 2 + 36  # "a" within a word, and at its end


@pytest.fixture(scope="module", params=["sd14", "sd21"])
def published(request) -> StableDiffusionModel:
    """The published tokenizer's special tokens and padding, over small random networks."""
    pipeline = random_pipeline(StableDiffusionPipeline, request.param, torch.float32, small=True)
    return StableDiffusionModel(request.param, pipeline, 64)


@pytest.fixture
def space(tiny_model) -> TokenSpace:
    return tiny_model.token_space()


def hooks(model: StableDiffusionModel) -> int:
    return sum(len(module._forward_hooks) for module in model.text_encoder.modules())


def test_ids_of_a_text_and_their_own_embeddings_give_its_conditioning(tiny_model, published):
    for model in (tiny_model, published):
        space = model.token_space()
        ids = space.ids(PROMPTS)
        states = space.encode_ids(ids).tensors["states"]
        assert torch.equal(states, model.encode_prompts(PROMPTS).tensors["states"])
        assert not states.requires_grad
        own = space.vocabulary[ids[:, 1:3]]  # (3, 2, D)
        assert torch.equal(states, space.encode(ids, own).tensors["states"])


def test_embeddings_reach_later_positions_only_and_have_gradients(tiny_model, space):
    ids = space.ids(PROMPTS)
    plain = space.encode_ids(ids).tensors["states"]
    given = torch.randn(3, 2, WIDTH, requires_grad=True)
    states = space.encode(ids, given, position=2).tensors["states"]  # (3, L, D)
    assert torch.equal(states[:, :2], plain[:, :2])  # the mask is causal
    assert (states[:, 2:] != plain[:, 2:]).any(dim=-1).all()
    states[:2].square().sum().backward()
    assert given.grad is not None
    assert given.grad[:2].abs().sum(dim=-1).all()
    assert not given.grad[2].any()  # no prompt has to do with another's
    assert not any(weight.requires_grad for weight in tiny_model.text_encoder.parameters())


def test_a_gradient_is_the_difference_quotient(space):
    ids = space.ids(["a hut"])
    space._text.network.double()
    given = torch.randn(1, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(MAX_TOKENS, WIDTH, dtype=torch.float64)

    def value(embeddings: torch.Tensor) -> torch.Tensor:
        return (space.encode(ids, embeddings).tensors["states"] * weights).sum()

    assert torch.autograd.gradcheck(value, (given,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_float32_embeddings(tiny_model, dtype):
    tiny_model.text_encoder.to(dtype)
    tiny_model.denoiser.to(dtype)
    space = tiny_model.token_space()
    ids = space.ids(PROMPTS)
    given = space.vocabulary[ids[:, 1:3]].float().requires_grad_()
    states = space.encode(ids, given).tensors["states"]
    assert states.dtype == dtype
    assert torch.equal(states, tiny_model.encode_prompts(PROMPTS).tensors["states"])
    states.float().square().sum().backward()
    assert given.grad is not None
    assert given.grad.dtype == torch.float32
    assert given.grad.isfinite().all()


def test_no_hook_stays_even_after_an_exception(tiny_model, space):
    ids = space.ids(PROMPTS)
    before = parameter_digest(tiny_model.text_encoder)
    space.encode(ids, torch.zeros(3, 2, WIDTH))
    with pytest.raises(RuntimeError):
        space.encode(ids, torch.zeros(3, 2, WIDTH + 1))
    assert hooks(tiny_model) == 0
    assert parameter_digest(tiny_model.text_encoder) == before


def test_places_stand_right_after_the_start(published):
    space = published.token_space()
    ids, longer = space.ids(PROMPTS), space.prepend(PROMPTS, 3)
    assert longer.shape == ids.shape
    assert torch.equal(longer[:, 0], ids[:, 0])
    assert torch.equal(longer[:, 4:], ids[:, 1:-3])
    assert torch.isin(longer[:, 1:4], space.usable).all()


def test_a_prompt_without_room_is_refused_or_cut(space):
    fits, full = "a" * (MAX_TOKENS - 5), "a" * (MAX_TOKENS - 4)
    assert space.prepend([fits], 3)[0, -2:].tolist() == [LAST_A, END]
    with pytest.raises(UserError, match=r"'aaaaaaaaaaaa' has 14 tokens and leaves no room for 3"):
        space.prepend([full], 3)
    for prompt in (full, 3 * full):
        cut = space.prepend([prompt], 3, truncate=True)[0]
        assert cut[0] == START
        assert cut[4:].tolist() == [LETTER_A] * (MAX_TOKENS - 5) + [END]
    assert torch.equal(space.prepend([fits], 3, truncate=True), space.prepend([fits], 3))
    for count in (0, MAX_TOKENS - 1):
        with pytest.raises(UserError, match=f"{count} adversarial tokens are not allowed"):
            space.prepend(["a"], count)


def test_usable_tokens_are_all_but_the_special_ones(published, space):
    assert space.usable.tolist() == list(range(2, 2 + 72))
    tokenizer, usable = published.tokenizer, published.token_space().usable.tolist()
    assert len(usable) + len(set(tokenizer.all_special_ids)) == len(tokenizer)
    assert not set(usable) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert tokenizer.pad_token_id not in usable


def test_offloaded_encoders_visit_the_device(tiny_model, monkeypatch):
    visitors = []
    monkeypatch.setattr(
        "cad.models.conditioning.visiting", lambda *who: visitors.append(who) or nullcontext()
    )
    space = tiny_model.token_space()
    space.encode_ids(space.ids(["a"]))
    assert visitors == [(tiny_model.text_encoder, tiny_model.device)]


def test_gradients_pass_an_encoder_that_is_kept_on_the_device(tiny_model, space):
    given = torch.zeros(1, 2, WIDTH, requires_grad=True)
    with tiny_model.encoding():
        space.encode(space.ids(["a"]), given).tensors["states"].sum().backward()
    assert given.grad is not None


def test_decoded_texts_end_with_the_end_token_and_have_their_spaces(published, tiny_pipeline):
    space = published.token_space()  # random weights come with a vocabulary of letters
    assert space.decode(space.ids(["a b"])) == ["a b"]
    assert space.decode(space.ids(["ab"])[:, 1:2]) == ["a"]
    space = StableDiffusionModel("tiny", tiny_pipeline, 64).token_space()  # a copy would lose them
    assert space.decode(space.ids(PROMPTS)) == PROMPTS
    assert space.decode(torch.tensor([[LETTER_A, LAST_A, LAST_A]])) == ["aa a"]


def test_models_without_one_encoder_are_refused_by_name(xl, flow):
    for model, count in ((xl, 2), (flow, 3)):
        told = f"model={model.name} reads a prompt through {count} text encoders"
        with pytest.raises(UserError, match=told):
            model.token_space()
    with pytest.raises(UserError, match="has no text encoder"):
        LinearToyModel().token_space()
