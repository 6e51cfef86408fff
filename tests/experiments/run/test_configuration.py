"""conf/ composes in every combination of choices, and wrong values are refused by name."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cad.errors import UserError
from experiments.run import configuration
from experiments.run.arguments import build
from experiments.run.configuration import CONF, check, check_results, settle

GROUPS = (
    *("model", "concept", "edit", "after", "ratio", "prompts", "evaluator", "attack", "engine"),
    *("logger", "paths", "debug"),
)
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
MINIATURE_CONCEPTS = 16
REVISION_DIGITS = 40
LIGHTHOUSE = """
# @package concepts.lighthouse
_target_: cad.concepts.Concept
name: lighthouse
kind: object
text: lighthouse
prompt: lighthouse
base_prompt: ""
"""


@functools.cache
def compose(*overrides: str) -> DictConfig:
    return configuration.compose(overrides)


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder for --config-dir, with a concept of one's own."""
    (tmp_path / "concept").mkdir()
    (tmp_path / "concept" / "lighthouse.yaml").write_text(LIGHTHOUSE.lstrip())
    return tmp_path


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_says_how_to_run_it_or_what_it_is(
    group: str, option: str
) -> None:
    cfg = compose(f"{group}={option}")
    assert OmegaConf.to_container(cfg, resolve=True)
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    assert any(line.startswith("# ") and "@package" not in line for line in lines[:4])


@pytest.mark.parametrize("path", sorted((CONF / "fragments").glob("*.yaml")))
def test_every_fragment_says_who_uses_it(path: Path) -> None:
    assert path.read_text().startswith("# ")
    users = [file for file in CONF.rglob("*.yaml") if path.stem in file.read_text()]
    assert len(users) > 1 or users != [path]


def test_the_defaults() -> None:
    cfg = compose()
    assert (cfg.model.name, cfg.concept.name) == ("mini", "parachute")
    assert cfg.edit._target_.endswith("CADErase")
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
        (("edit=uce",), None),
        (("edit=rescale",), 0.02),  # CAD-Erase's concepts are not its own
        (("concept=face", "values.ratio.value.mini.face=0.25"), 0.25),
        (("concept=face", "edit=learned_mask", "values.ratio.value.mini.object=0.5"), 0.5),
        (("ratio.value=0.02",), 0.02),
    ],
)
def test_default_ratios(overrides: tuple[str, ...], ratio: float | None) -> None:
    assert compose(*overrides).ratio.value == ratio


@pytest.mark.parametrize("model", ["mini", "sd14"])
@pytest.mark.parametrize("concept", ["church", "pop_art", "van_gogh"])
def test_a_contrast_preserves_prompts_whose_scores_other_edits_need(
    model: str, concept: str
) -> None:
    """Those of the table's other concepts, letter by letter: else nothing is shared."""
    if (model, concept) in (("mini", "van_gogh"), ("sd14", "pop_art")):
        return
    cfg = compose(f"model={model}", f"concept={concept}", "edit=contrast")
    prompts = {each.prompt for each in _concepts()}
    assert cfg.concept.prompt in cfg.edit.preserve
    assert set(cfg.edit.preserve) <= prompts
    other = compose(f"model={model}", f"concept={concept}", "edit=other_concept").edit.other
    assert other in prompts - {cfg.concept.prompt}


def _concepts() -> list[DictConfig]:
    return [compose(f"concept={path.stem}").concept for path in CONF.glob("concept/*.yaml")]


def test_what_a_ratio_is_of_follows_the_edit() -> None:
    assert compose("edit=erase").ratio.per == "layer"
    assert compose("edit=amplify", "concept=chain_saw").ratio.per == "layer"
    assert compose("edit=amplify", "model=sd14").ratio.per == "row"
    assert compose("edit=uce").ratio.per == compose("model=sd14").ratio.per == "row"


def test_settings_follow_model_and_concept() -> None:
    rows = {"default": {"object": 1, "church": 2}, "sd21": {"object": 3}, "sdxl": {"church": 4}}
    expected = {
        ("sd14", "parachute"): 1,
        ("sd14", "church"): 2,
        ("sd21", "church"): 3,  # the model comes before the concept
        ("sdxl", "church"): 4,
        ("sdxl", "parachute"): 1,
        ("sd35", "parachute"): 5,  # one value for all
    }
    for (model, concept), value in expected.items():
        cfg = compose(f"model={model}", f"concept={concept}").copy()
        OmegaConf.set_struct(cfg, False)
        cfg["values"].new = {"rounds": rows | {"sd35": 5}}
        cfg.edit = {"rounds": "${setting:new.rounds}"}
        assert cfg.edit.rounds == value
        cfg.quick = {"rounds": 0}
        assert cfg.edit.rounds == 0
        cfg.quick = {}
    cfg.model.name = "mine"
    cfg.concepts = {"nudity": compose("model=sd14", "concept=nudity").concepts.nudity}
    with pytest.raises(OmegaConfBaseException, match=r"edit\.rounds has no default.*nudity"):
        _ = cfg.edit.rounds


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=-1", ("seed=-1",)),
        ("seed=null", ("seed=None",)),
        ("images_per_class=0", ("images_per_class=0", "at least 1")),
        ("limit=0", ("limit=0",)),
        ("attack.limit=0", ("attack.limit=0",)),
        ("effect.count=1", ("effect.count=1",)),
        ("effect.share=0", ("effect.share=0",)),
        ("effect.share=1", ("effect.share=1",)),
        ("concept=nudity", ("concept=nudity", "model=mini", "parachute")),
        ("concept=van_gogh", ("concept=van_gogh", "pop_art")),
        ("paths.results=", ("paths.results is empty",)),
        ("paths.results=null", ("paths.results is empty",)),
    ],
)
def test_bad_values_are_named(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        check(compose(override))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("place", ["file", "below a file", "dangling link"])
def test_a_results_folder_that_takes_no_files_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "far")
    folder = {"file": "file", "below a file": "file/x", "dangling link": "link"}[place]
    cfg = compose(f"paths.results={tmp_path / folder}")
    if place == "dangling link":
        (tmp_path / "gone").write_text("")
    with pytest.raises(UserError, match=r"paths\.results=.* cannot be written to \("):
        check_results(cfg)


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"device='{device}'"):
        settle(compose(f"device={device}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("ratio.value=many",), r"ratio\.value=many is not allowed; it is a number"),
        (("ratio.value=null",), r"ratio\.value=None is not allowed"),
        (("ratio.value=0",), r"ratio\.value=0"),
        (("ratio.value=2",), r"ratio\.value=2"),
        (("ratio.per=column",), r"ratio\.per='column'.*row, layer"),
        (("+edit.foo=1",), r"edit\.foo is unknown; CADErase takes: attribution, selection"),
        (("model.attribution.samples=abc",), r"model\.attribution\.samples=abc .* whole number"),
        (("edit=esd", "edit.gradient_checkpointing=1"), r"checkpointing=1 .* true or false"),
        (("edit=uce", "edit.guide=3"), r"edit\.guide=3 is not allowed; it is a text"),
        (("edit=uce", "edit.preserve_scale=x"), r"=x is not allowed; it is a number or null"),
    ],
)
def test_what_the_edit_cannot_take_is_named(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(Exception, match=message):
        build(compose(*overrides).edit)


def test_published_prompts_are_as_many_as_they_are() -> None:
    check(compose("model=sd14"))
    with pytest.raises(UserError, match=r"images_per_class=7 has no effect.*limit=N"):
        check(compose("model=sd14", "images_per_class=7"))
    check(compose("model=sd14", "images_per_class=7", "prompts=objects"))


def test_random_weights_are_not_judged_and_not_the_miniatures() -> None:
    random = ("model=sd14", "model.weights=random")
    check(compose(*random))
    for choice in ("evaluator=[accuracy]", "attack=p4d"):
        with pytest.raises(UserError, match=r"has nothing to measure: images of model\.weights"):
            check(compose(*random, choice))
    with pytest.raises(UserError, match=r"model\.weights=random is not for model=mini"):
        check(compose("model.weights=random"))


def test_a_concept_needs_images_of_its_own_and_the_advice_works() -> None:
    with pytest.raises(UserError, match="concept=face has no images") as caught:
        check(compose("concept=face", "prompts=objects"))
    advice = shlex.split(str(caught.value).partition("add it: ")[2])
    assert advice == ["prompts=objects", "+prompts.subjects.face=face"]
    check(compose("concept=face", *advice))


def test_a_new_concept_from_a_folder_of_ones_own(plugins: Path) -> None:
    """And the default prompts cannot be added to, but named ones can."""
    chosen = ["model=sd14", "concept=lighthouse"]
    check(configuration.compose(chosen, folders=[plugins]))
    more = [*chosen, "+prompts.subjects.lighthouse=lighthouse"]
    with pytest.raises(UserError, match="prompts has subjects alone") as caught:
        check(configuration.compose(more, folders=[plugins]))
    advice = shlex.split(str(caught.value).partition("for example ")[2])
    cfg = configuration.compose([*chosen, *advice], folders=[plugins])
    check(cfg)
    assert cfg.prompts.subjects.lighthouse == "lighthouse"
    assert cfg.prompts.subjects.church == "church"
    with pytest.raises(UserError, match="lighthouse is unknown to model=mini"):
        check(configuration.compose(chosen[1:], folders=[plugins]))


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
    with pytest.raises(UserError, match=r"concept=\[church,pop_art\] are of different kinds"):
        check(compose("concept=[church,pop_art]"))
    with pytest.raises(UserError, match="concept=nudity is unknown"):
        check(compose("concept=[nudity]"))
    with pytest.raises(UserError, match=r"effect\.count=5 looks at the objective of one concept"):
        check(compose("concept=[church,tench]", "effect.count=5"))


def test_evaluators_follow_the_kind_of_concept() -> None:
    assert list(compose("concept=woodcut").evaluator) == ["style_accuracy"]
    chosen = compose("evaluator=[accuracy,style_accuracy]").evaluator
    assert list(chosen) == ["accuracy", "style_accuracy"]
