"""Ring-A-Bell: the concept's vector by hand, and a search that finds what is there to be found."""

from __future__ import annotations

import pytest
import torch
from conftest import MAX_TOKENS, WIDTH

from cad.errors import UserError
from cad.identity import parameter_digest
from cad.models.stable_diffusion import StableDiffusionModel
from cad.sampling import make_generators
from evaluation.attacks.ring_a_bell import (
    Genetics,
    RingABell,
    concept_vector,
    target_states,
    whole_words,
)

SMALL = Genetics(tokens=3, population=30, generations=20, crossover=0.5, mutation=0.25)
LAST_A = 2 + 36  # "a" at a word's end: the first token that is a word
WORDS = torch.arange(LAST_A, LAST_A + 6)  # a to f
PAIRS = [("a hut", "hut"), ("a cat", "cat")]


@pytest.fixture
def space(tiny_pipeline):
    model = StableDiffusionModel("tiny", tiny_pipeline, 64)  # a copied tokenizer loses its spaces
    return model.token_space()


def states(space, prompt):
    return space.encode_ids(space.ids([prompt])).tensors["states"][0]  # (L, D)


def searched(space, target, genetics=SMALL, words="abcdef", seed=0):
    chosen = torch.tensor([LAST_A + ord(word) - ord("a") for word in words])
    return RingABell(space, chosen, genetics).search(target, make_generators([seed])[0])


def test_the_concepts_vector_is_the_mean_difference_at_every_position(space):
    first = states(space, "a hut") - states(space, "hut")
    second = states(space, "a cat") - states(space, "cat")
    c_hat = concept_vector(space, PAIRS)
    assert c_hat.shape == (MAX_TOKENS, WIDTH)
    torch.testing.assert_close(c_hat, (first + second) / 2)
    assert not c_hat[0].any()  # the start token reads nothing of the prompt
    torch.testing.assert_close(
        target_states(space, "dog", c_hat, 3.0), states(space, "dog") + 1.5 * (first + second)
    )


def test_the_target_itself_is_found_where_it_is_a_prompt(space):
    found = searched(space, states(space, "f a d"))
    assert found.text == "f a d"
    assert found.losses[-1] == pytest.approx(0, abs=1e-6)
    assert len(found.losses) == 1 + SMALL.generations
    assert found.losses == sorted(found.losses, reverse=True)
    assert found.losses[0] > found.losses[-1]


def test_a_generator_finds_the_same_again_and_its_loss_is_the_squared_distance(space):
    target = target_states(space, "a d f", concept_vector(space, PAIRS), 2.0)
    state = torch.random.get_rng_state()
    found = searched(space, target)
    distance = (states(space, found.text) - target).square().sum()
    assert found.losses[-1] == pytest.approx(float(distance), rel=1e-5)
    assert searched(space, target) == found
    assert torch.equal(torch.random.get_rng_state(), state)
    assert searched(space, target, seed=1).losses != found.losses


def test_what_is_found_is_read_back_from_its_text(space, tiny_pipeline):
    before = parameter_digest(tiny_pipeline.text_encoder)
    target = torch.randn(MAX_TOKENS, WIDTH, generator=make_generators([7])[0])
    engine = RingABell(space, space.usable, SMALL)  # letters within words too
    for seed in range(3):
        found = engine.search(target, make_generators([seed])[0])
        assert space.ids([found.text])[0, 1:5].tolist() == [*found.tokens, 1]  # and the end
        assert set(found.tokens) <= set(space.usable.tolist())
    assert parameter_digest(tiny_pipeline.text_encoder) == before


def test_words_are_tokens_that_stand_alone(space):
    words = whole_words(space)
    assert words.tolist() == list(range(LAST_A, LAST_A + 36))
    assert LAST_A not in whole_words(space, ["A"])
    assert len(whole_words(space, ["a", "b", "zebra"])) == 34
    with pytest.raises(UserError, match="no token that is a word"):
        whole_words(space, [*"abcdefghijklmnopqrstuvwxyz0123456789"])


@pytest.mark.parametrize("rates", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("tokens", [1, MAX_TOKENS - 2])
def test_rates_and_lengths_at_their_limits(space, rates, tokens):
    genetics = Genetics(tokens, 6, 3, *rates)
    found = searched(space, states(space, "a b"), genetics)
    assert len(found.tokens) == tokens
    assert len(found.losses) == 4
    if rates == (0.0, 0.0):
        assert len(set(found.losses)) == 1


def test_no_more_is_kept_than_half_and_nothing_twice(space):
    engine = RingABell(space, whole_words(space), Genetics(2, 6, 0, 0.5, 0.25))
    candidates = torch.tensor([[5, 6], [2, 3], [5, 6], [4, 4], [3, 2]])
    kept, losses = engine._selected(candidates, torch.tensor([2.0, 1.0, 2.0, 4.0, 3.0]))
    assert kept.tolist() == [[2, 3], [5, 6], [3, 2]]
    assert losses.tolist() == [1.0, 2.0, 3.0]


def test_mistakes_are_named(space):
    wrong = [("tokens", 0), ("population", 1), ("generations", -1), ("population", 2.5)]
    for key, value in [*wrong, ("crossover", 1.5), ("mutation", 1.5)]:
        with pytest.raises(UserError, match=rf"search\.{key}={value} is not allowed"):
            Genetics(**{**vars(SMALL), key: value})
    with pytest.raises(UserError, match=f"{MAX_TOKENS - 1} adversarial tokens are not allowed"):
        RingABell(space, space.usable, Genetics(MAX_TOKENS - 1, 4, 1, 0.5, 0.5))
    with pytest.raises(UserError, match="no pairs"):
        concept_vector(space, [])
    within = torch.arange(2, 2 + 36)  # letters within words: none ends a text
    engine = RingABell(space, within, Genetics(2, 4, 1, 0.5, 0.5))
    with pytest.raises(UserError, match="none of the first 4 candidates of 2 tokens"):
        engine.search(torch.zeros(MAX_TOKENS, WIDTH), make_generators([0])[0])
