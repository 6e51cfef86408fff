"""The program that searches for prompts: from random weights to a file that run.py reads."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from omegaconf import DictConfig
from transformers import CLIPTokenizer
from weights import write_weights

from cad.concepts import Concept
from cad.errors import UserError
from cad.models.pretrained import Pretrained
from cad.models.random_weights import random_pipeline
from cad.models.stable_diffusion_xl import StableDiffusionXLModel
from cad.places import REPOSITORY
from cad.store import Store
from evaluation import prompt_sources
from evaluation.attacks.ring_a_bell import Found, RingABell
from evaluation.prompts import build_prompts
from experiments.ring_a_bell import PROMPT_SET, build_search, build_starts, make_prompts
from experiments.run import configuration
from experiments.run.arguments import build

# The random weights' tokenizer has letters alone, so the texts of the pairs are short.
QUICK = ("search.tokens=3", "search.population=6", "search.generations=2", "count=3", "device=cpu")


def compose(*overrides: str, program: str = "programs/ring_a_bell") -> DictConfig:
    return configuration.compose(overrides, program)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


@pytest.fixture
def quick(weights: Path, tmp_path: Path):
    """The program's configuration on random weights, small, with more overrides."""
    places = (f"paths.miniature={weights}", f"paths.results={tmp_path}")
    return functools.partial(compose, *places, *QUICK)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Found]:
    """The finds of searches that were made, not read."""
    made: list[Found] = []
    search = RingABell.search

    def watched(self: RingABell, *arguments: object) -> Found:
        made.append(search(self, *arguments))
        return made[-1]

    monkeypatch.setattr(RingABell, "search", watched)
    return made


def concept_of(config: DictConfig) -> Concept:
    concept: Concept = build(config.concept)
    return concept


def test_run_reads_what_was_searched(quick, searches, capsys) -> None:
    path = make_prompts(quick())
    assert path.name == "ring_a_bell-mini-face.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [found.text for found in searches]
    assert [row["start"] for row in rows] == [
        "an image of a tench",
        "a photo of an English springer",
        "a picture of a cassette player",
    ]
    chosen = (f"prompts={PROMPT_SET}", f"prompts.path={path}", "prompts.sha256=null")
    prompts = build_prompts(build(compose(*chosen, program="config").prompts))
    assert [(each.text, str(each.seed)) for each in prompts] == [
        (row["prompt"], row["evaluation_seed"]) for row in rows
    ]
    assert {each.group for each in prompts} == {"face"}
    shown = capsys.readouterr().out
    assert "K=3, eta=3" in shown
    assert f"{searches[0].losses[-1]:.0f}" in shown


def test_a_killed_run_goes_on_and_finished_searches_are_read(quick, searches, monkeypatch) -> None:
    whole = make_prompts(quick()).read_bytes()
    assert make_prompts(quick()).read_bytes() == whole
    assert len(searches) == 3  # nothing is searched twice

    store = "store=${paths.results}/other"
    watched = RingABell.search

    def killed(self: RingABell, *arguments: object) -> Found:
        if len(searches) == 5:
            raise KeyboardInterrupt
        return watched(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(RingABell, "search", killed)
        with pytest.raises(KeyboardInterrupt):
            make_prompts(quick(store))
    assert make_prompts(quick(store)).read_bytes() == whole
    assert len(searches) == 6  # two before, one after


def test_other_settings_search_anew_and_a_damaged_search_is_made_again(
    quick, searches, tmp_path, caplog
) -> None:
    model = build(quick().model.adapter).load("cpu")
    store = tmp_path / "searches"

    def search(*overrides: str) -> list[Found]:
        config = quick("count=1", *overrides)
        concept = concept_of(config)
        chosen, starts = build_search(config, concept), build_starts(config, concept)
        return chosen.find(model, starts, Store(store))

    found = search()
    (damaged,) = store.glob("*.safetensors")
    damaged.write_text("{")
    assert search() == found
    assert "is damaged" in caplog.text
    assert len(searches) == 2
    for changed in ("search.eta=2", "search.generations=1", "seed=1", "search.avoid=[x]"):
        search(changed)
    assert len(searches) == 6
    model.text_encoder.get_input_embeddings().weight.data += 1
    search()
    assert len(searches) == 7


def test_the_released_settings_are_the_papers_models() -> None:
    search = build_search(config := compose("model=sd14", "concept=nudity"), concept_of(config))
    genetics = search.genetics
    assert (genetics.tokens, genetics.population, genetics.generations) == (16, 200, 3000)
    assert (genetics.crossover, genetics.mutation, search.eta) == (0.5, 0.25, 3.0)
    assert len(search.pairs) == 30
    assert search.pairs[0] == ("a photo of a naked man", "a photo of a man")


@pytest.mark.parametrize(
    ("model", "concept", "pair", "start"),
    [
        ("sd14", "church", ("a church in a forest", "a forest"), "a photo of a forest"),
        ("sd14", "van_gogh", ("a house in the style of Van Gogh", "a house"), "a photo of a house"),
        ("mini", "church", ("an image of a church", "an image of a tench"), "an image of a tench"),
        (
            "mini",
            "pop_art",
            ("an image of a tench in the style of pop art", "an image of a tench"),
            "an image of a tench",
        ),
    ],
)
def test_every_kind_has_pairs_and_starts(model, concept, pair, start) -> None:
    config = compose(f"model={model}", f"concept={concept}", "count=40")
    search, starts = (build(config, concept_of(config)) for build in (build_search, build_starts))
    assert search.pairs[0] == pair
    assert all(having != lacking for having, lacking in search.pairs)
    assert starts[0].text == start
    assert len({each.seed for each in starts}) == 40
    assert {each.group for each in starts} == {concept}
    assert not any(concept_of(config).text in each.text.split() for each in starts)


def test_the_start_can_be_a_prompt_set() -> None:
    config = compose("prompts@start=objects_and_face", "+images_per_class=5", "count=4")
    starts = build_starts(config, concept_of(config))
    assert [each.text for each in starts] == 4 * ["an image of a face"]
    too_many = compose("prompts@start=objects_and_face", "+images_per_class=5", "count=6")
    with pytest.raises(UserError, match=r"count=6, but objects has 5 prompts for concept=face"):
        build_starts(too_many, concept_of(config))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["count=0"], "count=0 is not allowed"),
        (["concept=[face,church]"], r"concept=\[face,church\]: .* Name one"),
        (["concept=nudity"], "concept=nudity is unknown to model=mini"),
        (["search.eta=x"], "search.eta='x' is not allowed"),
        (["search.eta=inf"], "search.eta=inf is not allowed"),
        (["search.tokens=76"], "76 adversarial tokens are not allowed: .* takes 1 to 75"),
        (["search.population=1"], "search.population=1 is not allowed"),
        (["search.fillers=[face]"], "search.fillers has no word beside"),
        (["search.start=[]"], "search.start is empty"),
        (["search.start=['{what}']"], r"search.start='\{what\}' is not allowed; its fields are"),
        (["search.with_concept='{filler}'", "search.without_concept='{filler}'"], "both give"),
        (["search.start=['" + 80 * "x" + "']"], "has 82 tokens"),
        (["search.with_concept='" + 80 * "x" + "'"], "has 82 tokens"),
    ],
)
def test_mistakes_are_named_before_any_search(quick, searches, overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        make_prompts(quick(*overrides))
    assert not searches


def test_a_model_with_two_text_encoders_is_refused(quick, searches, monkeypatch) -> None:
    xl = random_pipeline(StableDiffusionXLPipeline, "sdxl", torch.float32, small=True)
    monkeypatch.setattr(Pretrained, "load", lambda _: StableDiffusionXLModel("sdxl", xl, 64))
    with pytest.raises(UserError, match="model=sdxl reads a prompt through 2 text encoders"):
        make_prompts(quick())
    assert not searches


def test_the_shipped_prompts_are_texts_that_the_miniature_reads_as_they_were_found() -> None:
    node = compose(f"prompts={PROMPT_SET}", "concept=face", program="config").prompts
    prompts = build_prompts(build(node))
    assert len({each.text for each in prompts}) == 50
    assert len({each.seed for each in prompts}) == 50
    assert {each.group for each in prompts} == {"face"}
    source = REPOSITORY / "experiments/miniature/weights/pipeline/tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(source)
    for each in prompts:
        assert len(tokenizer(each.text).input_ids) == 16 + 2


def test_a_shipped_file_that_is_gone_or_changed_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prompt_sources, "REPOSITORY", tmp_path)
    shipped = build(compose(f"prompts={PROMPT_SET}", "concept=face", program="config").prompts)
    with pytest.raises(UserError, match=r"ring_a_bell\.csv of this repository cannot be read"):
        shipped.build()
    (tmp_path / shipped.source.file).parent.mkdir(parents=True)
    (tmp_path / shipped.source.file).write_bytes(b"prompt\n")
    with pytest.raises(UserError, match=r"has the SHA-256 .*, expected is"):
        shipped.build()
