"""ConceptPrune: against brute force on a toy transformer, by hand, and on a tiny UNet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.concept_prune import (
    ConceptPrune,
    column_squares,
    count_skilled,
    floor_share,
    recorded,
)
from cad.components import UNET_COMPONENTS
from cad.concepts import Concept
from cad.digests import parameter_digest
from cad.errors import UserError
from cad.models.base import Conditioning, DiffusionModel, Origin
from cad.sampling import Sampler, draw_noise, make_generators
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
SHORT: dict[str, Any] = {
    "concept_template": "{concept} {filler}",
    "fillers": ["day", "hut"],
    "ratio": 0.05,
    "first_steps": 2,
}
SHAPE = (2, 2, 3)
WIDTH = 8  # of the toy's feed-forward layers, within


def make_edit(**changes: Any) -> ConceptPrune:
    return ConceptPrune(**(SETTINGS | changes))


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return F.gelu(self.proj(h))


class FeedForward(nn.Module):
    """Keeps the last input of its second linear layer, (N, T, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([Projection(), nn.Identity(), nn.Linear(WIDTH, 4)])

    def forward(self, h: Tensor) -> Tensor:
        self.last = self.net[0](h)
        return self.net[2](self.last)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward()

    def forward(self, h: Tensor) -> Tensor:
        mixed = h + h.mean(dim=1, keepdim=True)  # (N, T, 4), in the place of attention
        return h + self.ff(mixed)


class Denoiser(nn.Module):
    """Two blocks over the pixels as tokens. Fails at the `fails_at`-th call, counted from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.exit = nn.Linear(2, 4), nn.Linear(4, 2)
        self.body = nn.Module()
        self.body.transformer_blocks = nn.ModuleList([Block(), Block()])
        self.calls, self.fails_at = 0, 0

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        h = self.entry(x_t.flatten(2).mT) + c[:, None] + t / 1000  # (N, T, 4)
        for block in self.body.transformer_blocks:
            h = block(h)
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of memory")
        return self.exit(h).mT.reshape(x_t.shape)


class ToyTransformer(DiffusionModel):
    """In double precision, so that batches hardly round."""

    components: Mapping[str, str] = UNET_COMPONENTS
    prediction_type = "epsilon"

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = Denoiser().double()
        super().__init__("toy", denoiser, 2, SHAPE, Origin("toy", "local"))

    def surroundings_digest(self) -> str:
        return "none"

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if len(prompt) > 60:
                raise UserError(f"the prompt {prompt!r} is too long")

    def encode_prompts(self, prompts: Sequence[str], *, truncate: bool = False) -> Conditioning:
        c = [[prompt.count(letter) for letter in "aeio"] for prompt in prompts]
        return Conditioning({"c": torch.tensor(c, dtype=torch.float64)})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(x_t, t, conditioning.tensors["c"])

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sampler(self, steps: int, kind: str = "default", eta: float | None = 0.0) -> Sampler:
        assert (kind, eta) == ("ddim", 0.0)
        return Sampler(DDIMScheduler(clip_sample=False), steps, self.device, eta)

    def encode_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def decode_latents(self, x_0: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def toy() -> ToyTransformer:
    return ToyTransformer()


def name_of(layer: int) -> str:
    return f"body.transformer_blocks.{layer}.ff.net.2.weight"


def chosen(changes: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: change.tensor.tolist() for name, change in changes.items()}


def activations(
    model: ToyTransformer, edit: ConceptPrune, prompt: str, pair: int
) -> list[list[list[list[float]]]]:
    """[step][layer][token][column], of one prompt alone."""
    sampler = model.sampler(edit.steps, "ddim")
    c, empty = model.encode_prompts([prompt]), model.encode_prompts([""])
    x_t = draw_noise(model, make_generators([pair], f"concept_prune-{edit.seed}"))
    seen = []
    for t in sampler.timesteps[: edit.first_steps]:
        phi_c = model.predict(x_t, t, c)
        blocks = model.denoiser.body.transformer_blocks
        seen.append([block.ff.last[0].tolist() for block in blocks])
        phi_u = model.predict(x_t, t, empty)
        x_t = sampler.step(phi_u + edit.guidance * (phi_c - phi_u), t, x_t, None)
    return seen


def column_norms(tokens: list[list[float]]) -> list[float]:
    sums = [0.0] * WIDTH
    for token in tokens:
        length = math.sqrt(sum(a * a for a in token))
        for j, a in enumerate(token):
            sums[j] += (a / length) ** 2
    return [math.sqrt(each) for each in sums]


def brute_force(model: ToyTransformer, edit: ConceptPrune, concept: Concept) -> dict[str, list]:
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
        assert change.indices.dtype == torch.int32
        assert 0 < change.num_weights <= 4 * 2  # rows, k
        assert change.tensor.tolist() == sorted(set(change.tensor.tolist()))


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 1.0, "majority": 0.0},
        {"ratio": 1.0, "majority": 0.99},
        {"ratio": 0.125, "first_steps": 1, "majority": 0.0},
        {"guidance": 1.0},
        {"seed": 3, "first_steps": 10},
    ],
)
def test_equals_brute_force_at_other_settings(toy, parachute, changes):
    edit = make_edit(**changes)
    assert chosen(edit(toy, parachute).changes) == brute_force(toy, edit, parachute)


def test_only_the_first_steps_are_sampled(toy, church):
    make_edit(batch_size=5)(toy, church)
    assert toy.denoiser.calls == 2 * 3 - 1  # the last prediction is not guided
    toy.denoiser.calls = 0
    make_edit(batch_size=5, guidance=1.0)(toy, church)
    assert toy.denoiser.calls == 3


def test_column_squares_by_hand():
    images = torch.tensor([[[3.0, 4.0], [0.0, -2.0]], [[0.0, 0.0], [5.0, 5.0]]])
    expected = torch.tensor([[0.36, 0.64 + 1.0], [0.5, 0.5]])
    for given in (images, images.half(), images[:, :, None]):
        found = column_squares(given)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-7)
    assert images[0, 0].tolist() == [3.0, 4.0]  # as it was


def test_both_halves_of_a_batch_are_recorded_apart_and_add_up():
    denoiser = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    sums = torch.zeros(2, 2, dtype=torch.float64)
    batch = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 9.0]], [[0.0, 1.0]]])  # (4, 1, 2)
    with recorded(denoiser, {"layer.weight": sums}):
        denoiser["layer"](batch)
        denoiser["layer"](batch[1:3])
    denoiser["layer"](batch)  # not recorded
    expected = torch.tensor([[0.36 + 1 + 1, 0.64], [0.0, 1 + 1 + 1]])
    torch.testing.assert_close(sums, expected.double(), rtol=1e-6, atol=1e-7)


def test_skilled_needs_the_top_of_the_row_and_more_than_the_base():
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    ones = torch.ones(4)
    norms = torch.stack(
        [
            torch.stack([ones, torch.tensor([9.0, 2.0, 2.0, 1.0])]),  # 9 4 6 .5: columns 0, 2
            torch.stack([ones, torch.tensor([1.0, 2.0, 1.0, 99.0])]),  # 1 4 3 49.5: columns 1, 3
            torch.stack([9 * ones, torch.tensor([9.0, 9.5, 8.0, 1.0])]),  # 2 is below its base
        ]
    )
    assert count_skilled(weight, norms, k=2)[0].tolist() == [1, 2, 1, 1]
    assert count_skilled(weight, norms, k=4)[0].tolist() == [1, 3, 1, 1]
    assert count_skilled(weight, norms, k=1)[0].tolist() == [1, 0, 0, 1]
    assert not count_skilled(weight, norms, k=4)[1].any()
    assert not count_skilled(weight, norms, k=0).any()
    assert not count_skilled(weight, norms[:, [1, 1]], k=4).any()  # equal is not more


def test_shares_are_rounded_down_as_written():
    assert floor_share(0.29, 100) == 29
    assert floor_share(0.02, 1280) == 25
    assert floor_share(0.1, 10) == 1
    assert floor_share(1 / 3, 3) == 0


def test_a_majority_is_more_than_m(toy, church):
    """Of two steps, m = 0.5 asks for both, as any m up to 1 does; below it one is enough."""
    one, half, nearly = (
        chosen(make_edit(ratio=1.0, first_steps=2, majority=m)(toy, church).changes)
        for m in (0.49, 0.5, 0.99)
    )
    assert half == nearly
    assert sum(map(len, half.values())) < sum(map(len, one.values()))


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


def hooks_of(module: nn.Module) -> int:
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


def test_hooks_of_others_stay_and_a_missing_layer_leaves_none(toy):
    linear = toy.denoiser.body.transformer_blocks[0].ff.net[2]
    other = linear.register_forward_pre_hook(lambda module, inputs: None)
    sums = {name_of(0): torch.zeros(2, WIDTH), name_of(7): torch.zeros(2, WIDTH)}
    with pytest.raises(AttributeError), recorded(toy.denoiser, sums):
        pass
    assert list(linear._forward_pre_hooks) == [other.id]


def test_values_that_are_not_finite_are_an_error(toy, church):
    toy.denoiser.entry.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"edit=concept_prune.*model=toy.*dtype=torch.float64"):
        make_edit()(toy, church)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_template": "a photo"}, r"edit\.base_template='a photo' lacks \{filler\}"),
        ({"base_template": "a {concept} {filler}"}, r"edit\.base_template=.* not name \{concept\}"),
        ({"base_template": None}, r"edit\.base_template=None"),
        ({"concept_template": "a {filler}"}, r"edit\.concept_template=.*write \{concept\}"),
        ({"concept_template": "a {concept} {scene}"}, r"edit\.concept_template=.*\{scene\}"),
        ({"concept_template": "a {concept {filler}"}, r"edit\.concept_template="),
        ({"fillers": []}, r"edit\.fillers=\[\]"),
        ({"fillers": "forest"}, r"edit\.fillers='forest'"),
        ({"fillers": ["forest", " "]}, r"edit\.fillers has ' '"),
        ({"ratio": 0}, r"edit\.ratio=0 is not allowed"),
        ({"ratio": 1.1}, r"edit\.ratio=1\.1 is not allowed"),
        ({"ratio": float("nan")}, r"edit\.ratio=nan"),
        ({"ratio": None}, r"edit\.ratio=None"),
        ({"majority": 1.0}, r"edit\.majority=1\.0"),
        ({"majority": -0.1}, r"edit\.majority=-0\.1"),
        ({"guidance": float("inf")}, r"edit\.guidance=inf"),
        ({"first_steps": 0}, r"edit\.first_steps=0"),
        ({"first_steps": 11}, r"edit\.first_steps=11 .*edit\.steps=10"),
        ({"steps": 2.5}, r"edit\.steps=2\.5"),
        ({"batch_size": 0}, r"edit\.batch_size=0"),
        ({"batch_size": True}, r"edit\.batch_size=True"),
        ({"seed": -1}, r"edit\.seed=-1"),
    ],
)
def test_bad_values_name_their_key(changes, message):
    with pytest.raises(UserError, match=message):
        make_edit(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2000}, "steps=2000"),
        ({"fillers": ["very " * 20 + "big room"]}, "is too long"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_the_work(toy, church, changes, message):
    with pytest.raises(UserError, match=f"edit=concept_prune: .*{message}"):
        make_edit(**changes)(toy, church)
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


def test_the_settings_are_json_and_tell_edits_apart(church):
    settings = make_edit(guidance=2).settings([church])
    assert json.loads(json.dumps(settings)) == settings
    assert settings == make_edit(guidance=2.0).settings([church])
    assert set(settings) == {*SETTINGS, "seed"}
    assert make_edit(seed=1).settings([church]) != make_edit().settings([church])


def test_on_a_unet(tiny_model, church):
    """Deterministic; the model and the random state stay as they are; it can be applied."""
    before, random = parameter_digest(tiny_model.denoiser), torch.get_rng_state()
    edit = make_edit(**SHORT)
    made = edit(tiny_model, church)
    assert edit(tiny_model, church).fingerprint == made.fingerprint
    assert make_edit(**SHORT, seed=1)(tiny_model, church).fingerprint != made.fingerprint
    assert parameter_digest(tiny_model.denoiser) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks_of(tiny_model.denoiser) == 0
    assert not any(each.requires_grad for each in tiny_model.denoiser.parameters())
    assert not any(each.training for each in tiny_model.denoiser.modules())
    assert made.cost.seconds > 0
    weights = dict(tiny_model.denoiser.named_parameters())
    assert made.changes
    for name, change in made.changes.items():
        assert name.endswith(".ff.net.2.weight")
        rows = torch.bincount(change.tensor // weights[name].shape[1])
        assert rows.max() <= floor_share(0.05, weights[name].shape[1])
    with made.applied(tiny_model):
        assert parameter_digest(tiny_model.denoiser) != before
    assert parameter_digest(tiny_model.denoiser) == before


def test_in_half_precision(tiny_model, church):
    tiny_model.denoiser.to(torch.bfloat16)
    tiny_model.text_encoder.to(torch.bfloat16)
    made = make_edit(**SHORT)(tiny_model, church)
    assert made.num_weights > 0
