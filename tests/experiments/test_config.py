"""conf/ composes in every combination of choices, and wrong values are refused by name."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cad.errors import UserError
from experiments.config import (
    REPOSITORY,
    check,
    concept_groups,
    parse_shard,
    register_resolvers,
    settle,
    short_hash,
)
from experiments.identity import BY_CONTENT, LEFT_OUT, content_digest, identity

CONF = REPOSITORY / "conf"
GROUPS = (
    "model",
    "concept",
    "edit",
    "ratio",
    "prompts",
    "evaluator",
    "attack",
    "logger",
    "paths",
    "debug",
)
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
MINIATURE_CONCEPTS = 16
REVISION_DIGITS = 40


@functools.cache
def compose(*overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", list(overrides))


def identify(*overrides: str) -> str:
    return short_hash(identity(settle(compose(*overrides))))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_resolves(group: str, option: str) -> None:
    cfg = compose(f"{group}={option}")
    assert OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_says_how_to_run_it_or_what_it_is(group: str, option: str) -> None:
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    comments = [line for line in lines[:4] if line.startswith("# ") and "@package" not in line]
    assert comments


def test_the_defaults() -> None:
    cfg = compose()
    assert (cfg.model.name, cfg.concept.name, cfg.edit.name) == ("mini", "parachute", "erase")
    check(cfg)


def test_all_concepts_of_the_miniature_pass() -> None:
    known = list(compose().model.concepts)
    assert len(known) == MINIATURE_CONCEPTS
    for name in known:
        check(compose(f"concept={name}"))


@pytest.mark.parametrize("model", ["sd14", "sd21", "sdxl", "sd35"])
def test_hub_models_pin_a_revision(model: str) -> None:
    source = compose(f"model={model}").model.source
    assert len(source.revision) == REVISION_DIGITS
    assert source.repo
    assert source.size_gb > 1


@pytest.mark.parametrize(
    ("overrides", "ratio"),
    [
        (("model=sd14",), 0.001),
        (("model=sd14", "concept=nudity"), 0.00075),
        (("model=sd14", "concept=nudity", "edit=amplify"), 0.001),
        (("model=sd14", "concept=van_gogh"), 0.001),
        (("model=sdxl",), 0.0003),
        (("model=sd35", "concept=nudity"), 0.0003),
        (("edit=none",), None),
        (("concept=face", "+model.ratios.erase.by_concept.face=0.25"), 0.25),
        (
            (
                "concept=face",
                "+model.ratios.erase.by_concept.church=0.25",
                "model.ratios.erase.object=0.5",
            ),
            0.5,
        ),
        (("ratio.value=0.02",), 0.02),
    ],
)
def test_default_ratios(overrides: tuple[str, ...], ratio: float | None) -> None:
    assert compose(*overrides).ratio.value == ratio


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ratio.value=0", ("ratio.value=0", "above 0")),
        ("ratio.value=2", ("ratio.value=2", "at most 1")),
        ("ratio.value=many", ("ratio.value=many",)),
        ("ratio.per=column", ("ratio.per=column", "row, layer")),
        ("component=lora", ("component=lora", "attn1")),
        ("seed=-1", ("seed=-1",)),
        ("seed=null", ("seed=None",)),
        ("images_per_class=0", ("images_per_class=0", "at least 1")),
        ("limit=0", ("limit=0",)),
        ("effect.count=1", ("effect.count=1",)),
        ("effect.share=0", ("effect.share=0",)),
        ("model.sampler.steps=0", ("model.sampler.steps=0", "at least 1")),
        ("model.sampler.guidance=.inf", ("model.sampler.guidance=",)),
        ("model.sampler.guidance=inf", ("model.sampler.guidance=inf",)),
        ("model.sampler.batch_size=0", ("model.sampler.batch_size=0",)),
        ("device=tpu", ("device=tpu", "cuda")),
        ("shard=5/4", ("shard=5/4", "2/4")),
        ("shard=0/4", ("shard=0/4",)),
        ("shard=2", ("shard=2",)),
        ("dtype=int8", ("dtype=int8", "bfloat16")),
        ("concept=nudity", ("concept=nudity", "model=mini", "parachute")),
        ("concept=van_gogh", ("concept=van_gogh", "pop_art")),
    ],
)
def test_bad_values_are_named(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        check(compose(override))
    for word in words:
        assert word in str(caught.value)


def test_shards_are_counted_from_one() -> None:
    assert parse_shard(None) is None
    assert parse_shard("1/1") == (0, 1)
    assert parse_shard("2/4") == (1, 4)


def test_published_prompts_are_as_many_as_they_are() -> None:
    check(compose("model=sd14"))
    with pytest.raises(UserError, match=r"images_per_class=7 has no effect.*limit=N"):
        check(compose("model=sd14", "images_per_class=7"))
    check(compose("model=sd14", "images_per_class=7", "prompts=objects"))


def test_effects_need_an_attribution() -> None:
    with pytest.raises(UserError, match=r"effect\.count=5"):
        check(compose("edit=none", "effect.count=5"))


def test_a_concept_needs_images_of_its_own_and_the_advice_works() -> None:
    overrides = ["concept=face", "prompts=objects"]
    with pytest.raises(UserError, match="concept=face has no images") as caught:
        check(compose(*overrides))
    advice = shlex.split(str(caught.value).partition("add it: ")[2])
    assert advice == ["prompts=objects", "+prompts.subjects.face=face"]
    check(compose("concept=face", *advice))


LIGHTHOUSE = ("concepts.parachute.name=lighthouse", "concepts.parachute.text=red lighthouse")


def test_the_default_prompts_cannot_be_added_to_but_named_ones_can() -> None:
    lighthouse = ["model=sd14", *LIGHTHOUSE]
    with pytest.raises(UserError, match="prompts has subjects alone") as caught:
        check(compose(*lighthouse, "+prompts.subjects.lighthouse=red lighthouse"))
    advice = shlex.split(str(caught.value).partition("for example ")[2])
    cfg = compose(*lighthouse, *advice)
    check(cfg)
    assert cfg.prompts.subjects.lighthouse == "red lighthouse"
    assert cfg.prompts.subjects.church == "church"


@pytest.mark.parametrize("override", ["images=3", "concept=unicorn", "edit.ratoi=1", "model=sd9"])
def test_unknown_keys_and_options_are_errors(override: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)):
        compose(override)


def test_several_concepts_follow_the_first_and_are_of_one_kind() -> None:
    cfg = compose("concept=[church,tench]")
    check(cfg)
    assert list(cfg.concepts) == ["church", "tench"]
    assert cfg.concept.name == "church"
    assert cfg.ratio.value == compose("concept=church").ratio.value
    assert identify("concept=[church,tench]") != identify("concept=church")
    with pytest.raises(UserError, match=r"concept=\[church,pop_art\] are of different kinds"):
        check(compose("concept=[church,pop_art]"))
    with pytest.raises(UserError, match="concept=nudity is unknown"):
        check(compose("concept=[nudity]"))
    with pytest.raises(UserError, match=r"effect\.count=5 looks at the objective of one concept"):
        check(compose("concept=[church,tench]", "effect.count=5"))


def test_what_a_ratio_is_of_follows_the_edit() -> None:
    assert compose("edit=erase").ratio.per == "layer"
    assert compose("edit=amplify", "concept=chain_saw").ratio.per == "row"
    assert compose("edit=uce").ratio.per == compose("model=sd14").ratio.per == "row"


def test_settings_follow_model_and_concept() -> None:
    rows = {"default": {"object": 1, "church": 2}, "sd21": {"object": 3}, "sdxl": {"church": 4}}
    expected = {
        ("sd14", "parachute"): 1,
        ("sd14", "church"): 2,
        ("sd21", "church"): 3,  # the model comes before the concept
        ("sdxl", "church"): 4,
        ("sdxl", "parachute"): 1,
    }
    for (model, concept), value in expected.items():
        cfg = compose(f"model={model}", f"concept={concept}").copy()
        OmegaConf.set_struct(cfg, False)
        cfg.edit = {"name": "new", "rounds": "${setting:rounds}", "values": {"rounds": rows}}
        assert cfg.edit.rounds == value
        cfg.quick = {"rounds": 0}
        assert cfg.edit.rounds == 0
        cfg.quick = {}
    cfg.concepts = {"nudity": compose("model=sd14", "concept=nudity").concepts.nudity}
    with pytest.raises(OmegaConfBaseException, match=r"no default of rounds for concept=nudity"):
        _ = cfg.edit.rounds


def test_groups_follow_the_kind_of_concept() -> None:
    assert "face" in concept_groups(compose())
    assert concept_groups(compose("concept=woodcut"))[0] == "pencil_sketch"
    assert list(compose("concept=woodcut").evaluator) == ["style_accuracy"]
    assert list(compose("evaluator=[accuracy,style_accuracy]").evaluator) == [
        "accuracy",
        "style_accuracy",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "ratio.value=0.3",
        "component=attn1",
        "images_per_class=3",
        "limit=4",
        "concept=church",
        "edit=rescale",
        "effect.count=3",
        "evaluator=[style_accuracy]",
        "model.sampler.steps=3",
        "edit.attribution.eta=0.5",
        "debug=tiny",
    ],
)
def test_what_changes_the_result_changes_the_hash(override: str) -> None:
    assert identify(override) != identify()


@pytest.mark.parametrize("override", ["logger=none", "paths.results=/elsewhere", "dtype=auto"])
def test_what_does_not_change_the_result_keeps_the_hash(override: str) -> None:
    assert identify(override) == identify()


@pytest.mark.parametrize("name", ["store", "device", "note", "dtype", "size_gb"])
def test_names_of_settings_may_be_names_of_subjects(name: str) -> None:
    plain = identify("prompts=objects")
    named = identify("prompts=objects", f"+prompts.subjects.{name}=a thing")
    other = identify("prompts=objects", f"+prompts.subjects.{name}=another")
    assert len({plain, named, other}) == 3


def test_a_subject_called_path_is_no_path() -> None:
    overrides = ("prompts=objects", "+prompts.subjects.path=garden path")
    assert identity(settle(compose(*overrides)))["prompts"]["subjects"]["path"] == "garden path"


def test_every_left_out_and_content_place_is_in_some_configuration() -> None:
    combinations = (
        ("edit=amplify",),
        ("edit=esd",),
        ("evaluator=[accuracy,style_accuracy,nudity,fid]",),
        ("model=sd14", "prompts=imagenette", "evaluator=[fid]"),
        ("attack=p4d", "evaluator@attack.judge=accuracy"),
        ("attack=p4d", "evaluator@attack.judge=style_accuracy"),
        ("attack=p4d", "evaluator@attack.judge=face"),
    )
    places = {
        place
        for overrides in combinations
        for place in leaves(OmegaConf.to_container(compose(*overrides), resolve=True))
    }
    for pattern in (*LEFT_OUT, *BY_CONTENT):
        keys = pattern.split(".")
        assert any(
            all(key in ("*", at) for key, at in zip(keys, place, strict=False))
            for place in places
            if len(place) >= len(keys)
        ), pattern


def leaves(node: object, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(node, dict):
        yield place
        return
    for key, item in node.items():
        yield from leaves(item, (*place, str(key)))


def test_all_gpus_are_one_device() -> None:
    cfg = compose().copy()
    hashes = []
    for device in ("cuda", "cuda:0", "cuda:1", "cpu"):
        cfg.device = device
        hashes.append(short_hash(identity(cfg)))
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def test_versions_of_libraries_and_of_results_count(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = identify()
    for constant, value in (
        ("cad.runtime.LIBRARIES", ("torch",)),
        ("cad.score_store.VERSION", 0),
        ("evaluation.generation.VERSION", 0),
        ("experiments.identity.RESULT_VERSION", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(constant, value)
            assert identify() != plain
    assert identify() == plain


def test_seed_zero_is_a_seed_of_its_own() -> None:
    assert identify("seed=0") == identify() != identify("seed=1")


def test_local_weights_enter_by_content_not_by_place(tmp_path: Path) -> None:
    hashes = []
    for place, content in (("a", "x"), ("b", "x"), ("c", "y")):
        folder = tmp_path / place / "classifier"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(content)
        hashes.append(identify(f"paths.miniature={tmp_path / place}"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_content_digest_sees_names_and_bytes(tmp_path: Path) -> None:
    assert content_digest(tmp_path / "nothing") == "absent"
    (tmp_path / "a").write_text("1")
    first = content_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_digest(tmp_path) != first
