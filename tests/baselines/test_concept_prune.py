"""ConceptPrune: against brute force on a toy transformer, by hand, and on a tiny UNet."""

from __future__ import annotations

import math
from typing import Any

import pytest
import readings
import torch
from linear_toy import LinearToyModel
from torch import nn
from torch.nn import functional as F

from baselines.concept_prune import ConceptPrune, recorded
from cad.components import UNET_COMPONENTS
from cad.concepts import Concept
from cad.errors import UserError
from cad.identity import parameter_digest
from cad.models.base import DiffusionModel, Origin
from cad.models.conditioning import Conditioning
from cad.sampling import draw_noise, make_generators
from cad.weight_edit import Zero

SETTINGS: dict[str, Any] = {
    "base_template": "a {filler}",
    "concept_template": "a {concept} in a {filler}",
    "fillers": ["forest", "kitchen", "street", "park", "big blue room"],
    "ratio": 0.3,
    "first_steps": 3,
    "majority": 0.5,
    "steps": 10,
    "guidance": 3.0,
    "batch_size": 2,
}
WIDTH = 8  # of the toy's feed-forward layers, within


def make_edit(**changes):
    return ConceptPrune(**(SETTINGS | changes))


class FeedForward(nn.Module):
    """Keeps the last input of its second linear layer, (N, T, WIDTH)."""

    def __init__(self):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(4, WIDTH)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(WIDTH, 4)])

    def forward(self, h):
        self.last = F.gelu(self.net[0].proj(h))
        return self.net[2](self.last)


class Denoiser(nn.Module):
    """Two blocks over the pixels as tokens. Fails at the `fails_at`-th call, counted from 1."""

    def __init__(self):
        super().__init__()
        self.entry, self.exit = nn.Linear(2, 4), nn.Linear(4, 2)
        self.body = nn.Module()
        self.body.transformer_blocks = nn.ModuleList([nn.Module(), nn.Module()])
        for block in self.body.transformer_blocks:
            block.ff = FeedForward()
        self.calls, self.fails_at = 0, 0

    def forward(self, x_t, t, c):
        h = self.entry(x_t.flatten(2).mT) + c[:, None] + t / 1000  # (N, T, 4)
        for block in self.body.transformer_blocks:
            h = h + block.ff(h + h.mean(dim=1, keepdim=True))  # a mean in the place of attention
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of memory")
        return self.exit(h).mT.reshape(x_t.shape)


class ToyTransformer(LinearToyModel):
    """In double precision, so that batches hardly round."""

    components = UNET_COMPONENTS

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = Denoiser().double()
        DiffusionModel.__init__(self, "toy", denoiser, 2, (2, 2, 3), Origin("toy", "local"))

    def check_prompts(self, prompts):
        for prompt in prompts:
            if len(prompt) > 60:
                raise UserError(f"the prompt {prompt!r} is too long")

    def encode_prompts(self, prompts, *, truncate=False, apart=False):
        c = [[prompt.count(letter) for letter in "aeio"] for prompt in prompts]
        return Conditioning({"c": torch.tensor(c, dtype=torch.float64)})

    def predict(self, x_t, t, conditioning):
        return self.denoiser(x_t, t, conditioning.tensors["c"])

    def sampler(self, steps, kind="default", eta=0.0):
        assert (kind, eta) == ("default", 0.0)
        return super().sampler(steps, kind, eta)


@pytest.fixture
def toy():
    return ToyTransformer()


def name_of(layer):
    return f"body.transformer_blocks.{layer}.ff.net.2.weight"


def chosen(changes):
    return {name: change.tensor.tolist() for name, change in changes.items()}


def activations(model, edit, prompt, pair):
    """[step][layer][token][column], of one prompt alone."""
    sampler = model.sampler(edit.steps)
    c, empty = model.encode_prompts([prompt]), model.encode_prompts([""])
    start = pair if edit.noise == "own" else 0
    x_t = draw_noise(model, make_generators([start], f"concept_prune-{edit.seed}"))
    blocks = model.denoiser.body.transformer_blocks
    seen = []
    for t in sampler.timesteps[: edit.first_steps]:
        phi_c = model.predict(x_t, t, c)
        seen.append([block.ff.last[0].tolist() for block in blocks])
        phi_u = model.predict(x_t, t, empty)
        if edit.record == "both" and edit.guidance != 1:
            for tokens, block in zip(seen[-1], blocks, strict=True):
                tokens += block.ff.last[0].tolist()
        x_t = sampler.step(phi_u + edit.guidance * (phi_c - phi_u), t, x_t, None)
    return seen


def column_norms(tokens):
    sums = [0.0] * WIDTH
    for token in tokens:
        length = math.sqrt(sum(a * a for a in token))
        for j, a in enumerate(token):
            sums[j] += (a / length) ** 2
    return [math.sqrt(each) for each in sums]


def brute_force(model, edit, concept):
    """Flat indices of the pruned weights, prompt by prompt and weight by weight."""
    base, told = [], []
    for pair, filler in enumerate(edit.fillers):
        base.append(activations(model, edit, f"a {filler}", pair))
        told.append(activations(model, edit, f"a {concept.text} in a {filler}", pair))
    k = math.floor(edit.ratio * WIDTH)
    pruned = {}
    for layer in range(2):
        weight = dict(model.denoiser.named_parameters())[name_of(layer)].tolist()
        counts = [[0] * WIDTH for _ in weight]
        for step in range(edit.first_steps):
            norms_b = column_norms([token for seen in base for token in seen[step][layer]])
            norms_c = column_norms([token for seen in told for token in seen[step][layer]])
            for i, row in enumerate(weight):
                score = [abs(w) * norm for w, norm in zip(row, norms_c, strict=True)]
                for j in sorted(range(WIDTH), key=lambda j: -score[j])[:k]:
                    counts[i][j] += score[j] > abs(row[j]) * norms_b[j]
        pruned[name_of(layer)] = [
            i * WIDTH + j
            for i, row in enumerate(counts)
            for j, count in enumerate(row)
            if count / edit.first_steps > edit.majority
        ]
    return {name: indices for name, indices in pruned.items() if indices}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 9])
def test_equals_brute_force_whatever_the_batch(toy, church, batch_size):
    edit = make_edit(batch_size=batch_size)
    changes = edit(toy, church).changes
    assert chosen(changes) == brute_force(toy, edit, church)
    assert set(changes) == {name_of(0), name_of(1)}
    for change in changes.values():
        assert isinstance(change, Zero)
        assert change.tensor.dtype == torch.int32
        assert 0 < change.num_weights <= 4 * 2  # rows, k
        assert change.tensor.tolist() == sorted(set(change.tensor.tolist()))


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 1.0, "majority": 0.0},
        {"ratio": 1.0, "majority": 0.99},
        {"ratio": 1.0, "majority": 0.5, "first_steps": 2},  # a majority is more than m
        {"ratio": 0.125, "first_steps": 1, "majority": 0.0},
        {"guidance": 1.0},
        {"record": "prompted"},
        {"noise": "own"},
        {"seed": 3, "first_steps": 10},
    ],
)
def test_equals_brute_force_at_other_settings(toy, parachute, changes):
    edit = make_edit(**changes)
    assert chosen(edit(toy, parachute).changes) == brute_force(toy, edit, parachute)


def test_only_the_first_steps_are_sampled(toy, church):
    for changes, calls in (
        ({}, 2 * 3),
        ({"record": "prompted"}, 2 * 3 - 1),  # the last prediction is not guided
        ({"guidance": 1.0}, 3),
    ):
        toy.denoiser.calls = 0
        make_edit(batch_size=5, **changes)(toy, church)
        assert toy.denoiser.calls == calls


def test_the_masks_of_a_pipeline_are_the_released_ones(tiny_model, church):
    """Recording whole guidance batches, prompt by prompt: at most 1 in 1,000 differs."""
    words = {"fillers": ["hut", "road"], "base_template": "{filler}"}
    edit = make_edit(**words, concept_template="{concept} {filler}")
    prompts = edit.prompts(church)
    assert [*prompts] == [["hut", "road"], ["church hut", "church road"]]
    (generator,) = make_generators([0], "concept_prune-0")
    noise = torch.randn(1, *tiny_model.latent_shape, generator=generator)
    settings = edit.ratio, edit.first_steps, edit.steps, edit.guidance
    masks = readings.skilled(tiny_model, prompts, noise, settings, edit.majority)
    found = chosen(edit(tiny_model, church).changes)
    expected = {name: mask.flatten().nonzero().squeeze(1).tolist() for name, mask in masks.items()}
    assert found.keys() == {name for name, indices in expected.items() if indices}
    wrong = sum(len({*indices} ^ {*expected[name]}) for name, indices in found.items())
    assert wrong <= sum(map(len, expected.values())) / 1000
    for way in ({"record": "prompted"}, {"noise": "own"}):
        other = make_edit(**words, concept_template="{concept} {filler}", **way)
        assert chosen(other(tiny_model, church).changes) != found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # summed in float64 all the same
def test_both_halves_of_a_batch_are_recorded_apart_and_add_up(dtype):
    denoiser = nn.ModuleDict({"layer": nn.Linear(2, 2, dtype=dtype)})
    sums = torch.zeros(2, 2, dtype=torch.float64)
    batch = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]])  # (4, 1, 2)
    batch = batch.to(dtype)
    with recorded(denoiser, {"layer.weight": sums}):
        denoiser["layer"](batch)
        denoiser["layer"](batch[1:3])
    denoiser["layer"](batch)  # not recorded
    expected = torch.tensor([[0.36 + 1 + 1, 0.64], [0.0, 1.0]])  # a token of zeros adds none
    torch.testing.assert_close(sums, expected.double(), rtol=1e-6, atol=1e-7)


def test_a_ratio_that_chooses_nothing_is_refused_before_the_work(toy, church):
    with pytest.raises(UserError, match=r"edit\.ratio=0\.1 chooses nothing.*at least 0\.125"):
        make_edit(ratio=0.1)(toy, church)
    assert toy.denoiser.calls == 0


def test_several_concepts_lose_what_each_would(toy, church, parachute):
    edit = make_edit()
    singles = [chosen(edit(toy, concept).changes) for concept in (church, parachute)]
    assert singles[0] != singles[1]
    both = chosen(edit(toy, church, parachute).changes)
    assert both == {
        name: sorted({*singles[0].get(name, []), *singles[1].get(name, [])})
        for name in singles[0] | singles[1]
    }


def test_layers_without_skilled_weights_are_left_out(toy, church, caplog):
    weights = dict(toy.denoiser.named_parameters())
    weights[name_of(1)].data.zero_()
    assert set(make_edit()(toy, church).changes) == {name_of(0)}
    weights[name_of(0)].data.zero_()
    with caplog.at_level("WARNING"):
        assert make_edit()(toy, church).changes == {}
    assert "0 weights are skilled at church" in caplog.text


def hooks_of(module):
    return sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in module.modules())


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_an_exception_leaves_no_hook_and_the_model_as_it_was(toy, church, fails_at):
    before, random = parameter_digest(toy.denoiser), torch.get_rng_state()
    toy.denoiser.fails_at = fails_at
    with pytest.raises(RuntimeError, match="out of memory"):
        make_edit()(toy, church)
    assert hooks_of(toy.denoiser) == 0
    assert parameter_digest(toy.denoiser) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_values_that_are_not_finite_are_an_error(toy, church):
    toy.denoiser.entry.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"edit=concept_prune.*model=toy.*dtype=torch.float64"):
        make_edit()(toy, church)


def test_what_the_model_cannot_do_is_refused_before_the_work(toy, church):
    with pytest.raises(UserError, match=r"edit=concept_prune: .*is too long"):
        make_edit(fillers=["very " * 20 + "big room"])(toy, church)
    assert toy.denoiser.calls == 0


@pytest.mark.parametrize(
    "components",
    [{"attn1": "."}, {"ff": r"\.no_such\."}, {"ff": r"\.ff\.net\.0\.proj\.weight$"}],
)
def test_a_model_without_such_layers_is_refused_by_name(toy, church, components):
    toy.components = components
    with pytest.raises(UserError, match=r"edit=concept_prune: .*model=toy"):
        make_edit()(toy, church)


def test_prompts_are_paired_and_take_the_concept_s_text_or_prompt():
    nudity = Concept("nudity", "explicit", "nudity", "naked")
    explicit = make_edit(concept_template="a photo of a {prompt} {filler}", fillers=["man", "lady"])
    base, told = explicit.prompts(nudity)
    assert base == ["a man", "a lady"]
    assert told == ["a photo of a naked man", "a photo of a naked lady"]
    base, told = make_edit(fillers=["park"]).prompts(Concept("pop_art", "style", "pop art", "x"))
    assert (base, told) == (["a park"], ["a pop art in a park"])
