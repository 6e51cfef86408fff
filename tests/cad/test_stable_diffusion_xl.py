"""Stable Diffusion XL: what it has beside the other families (`test_families`)."""

from __future__ import annotations

import torch

PROMPTS = ["a photo of a church", "parachute"]


def encoded(pipeline, **options):
    """States, unconditional states, pooled, unconditional pooled: the pipeline's own."""
    return pipeline.encode_prompt(PROMPTS, device=torch.device("cpu"), **options)


def test_text_is_encoded_as_by_the_pipeline(xl, monkeypatch):
    """The empty prompt as the pipeline's unconditional one: zeros where its configuration says."""
    mixed = xl.encode_prompts(["", *PROMPTS])
    assert mixed.tensors["states"].shape == (3, 77, 32 + 48)
    whole = encoded(xl.pipeline)
    for name, text, empty in zip(("states", "pooled"), whole[::2], whole[1::2], strict=True):
        assert not empty.any()
        torch.testing.assert_close(mixed.tensors[name], torch.cat([empty[:1], text]))
    assert xl.encode_prompts([" "]).tensors["states"].all(dim=-1).any()
    monkeypatch.setattr(xl, "_zeros_for_empty", False)
    _, states, _, pooled = encoded(xl.pipeline, negative_prompt="")
    tensors = xl.encode_prompts([""]).tensors
    torch.testing.assert_close(tensors["states"], states[:1])
    torch.testing.assert_close(tensors["pooled"], pooled[:1])


def test_positions_of_both_encoders_agree(xl):
    assert xl.last_tokens(["", "church", "a photo of a church"]) == [0, 1, 5]
    for prompt in PROMPTS:
        assert len({text.count(prompt) for text in xl.texts}) == 1


def test_the_digest_knows_both_encoders_and_the_empty_prompt(xl, monkeypatch):
    digests = [xl.surroundings_digest()]
    for owner, name, value in (
        (xl, "_zeros_for_empty", False),
        (xl.texts[1].network.config, "num_attention_heads", 4),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            digests.append(xl.surroundings_digest())
    assert xl.surroundings_digest() == digests[0]
    assert len(set(digests)) == 3
