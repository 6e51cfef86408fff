"""Attacks as run.py has them: the contract of conf/attack, the choices, and a run end to end."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import hydra
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from omegaconf import DictConfig, OmegaConf
from weights import write_weights

from cad.errors import UserError
from cad.models.random_weights import random_pipeline
from cad.models.stable_diffusion_xl import StableDiffusionXLModel
from cad.weight_edit import NO_EDIT
from evaluation.attacks.base import Attack
from evaluation.attacks.search import TokenAttack
from evaluation.evaluators.base import Evaluator
from evaluation.prompts import Prompt
from experiments.run import attacking, configuration
from experiments.run.arguments import build
from experiments.run.attacking import judge_node, plan_attacks
from experiments.run.configuration import CONF
from experiments.run.experiment import prepare, run
from experiments.run.rendering import find_metric, result_table
from experiments.run.results import read_json, read_lines

NAMES = [path.stem for path in sorted((CONF / "attack").glob("*.yaml"))]
ALONE = ("evaluator=[]", "+evaluator={}")
BOTH = "attack=[p4d,unlearn_diff]"
PROBES = ("sdedit", "inpainting", "learned_token")
TOKENS = [name for name in NAMES if not name.startswith(PROBES)]


@functools.cache
def compose(*overrides: str) -> DictConfig:
    return configuration.compose(["device=cpu", "logger=none", *overrides])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


@pytest.mark.parametrize("name", NAMES)
def test_attack(name: str) -> None:
    """Its file makes it; its name is the file's; what it does is told in JSON, less its memory."""
    (attack,) = plan_attacks(compose(f"attack={name}")).attacks
    assert isinstance(attack, Attack)
    assert attack.name == name
    settings = json.loads(json.dumps(attack.settings()))
    assert settings["attack"] == name
    assert "gradient_checkpointing" not in settings
    assert {"iterations", "batch_size", "version"} <= settings.keys()
    assert isinstance(attack, TokenAttack) == (name in TOKENS)
    if name in TOKENS:
        assert {"tokens", "timesteps", "lr"} <= settings.keys()
        assert {"optimizer", "weight_decay", "retokenize"} <= settings.keys()


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_has_its_control(name: str) -> None:
    """It differs in the pictures alone, which are of the next concept."""
    chosen = compose(f"attack=[{name},{name}_control]", "concept=church")
    attack, control = plan_attacks(chosen).attacks
    assert (attack.name, control.name) == (name, f"{name}_control")
    assert vars(control) == vars(attack) | {"name": control.name, "other": "French horn"}


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize(
    ("model", "concept", "tokens"),
    [
        *(("sd14", "nudity", 5), ("sd14", "church", 3), ("sd14", "van_gogh", 3)),
        *(("sd21", "nudity", 5), ("sd21", "tench", 3), ("mini", "church", 3)),
    ],
)
def test_the_released_settings(name: str, model: str, concept: str, tokens: int) -> None:
    """Those of Zhang et al.'s release, for both attacks; the miniature's search is shorter."""
    attack = build(compose(f"model={model}", f"concept={concept}", f"attack={name}").attacks[name])
    timesteps, iterations = (6, 10) if model == "mini" else (50, 40)
    assert (attack.tokens, attack.timesteps, attack.retokenize) == (tokens, timesteps, True)
    if attack.optimises:
        assert (attack.iterations, attack.lr, attack.weight_decay) == (iterations, 0.01, 0.1)
        assert attack.optimizer == "adam"
    if name == "p4d":
        assert attack.states == "image"


def test_what_decides_an_attack_is_in_the_identity() -> None:
    def identify(*overrides: str) -> str:
        return prepare(compose("attack=p4d", *overrides)).folder.digest

    same = ("attack.store=x", "attacks.p4d.gradient_checkpointing=true", "paths.scores=y")
    assert {identify(override) for override in same} == {identify()}
    assert identify("evaluator@attack.judge=accuracy") == identify()  # the default one
    others = ("attack.limit=3", "attack.tokens=4", "evaluator@attack.judge=face", BOTH)
    others += ("attack.retokenize=false", "attacks.p4d.states=trajectory")
    assert len({identify(override) for override in others} | {identify()}) == 7


@pytest.mark.parametrize(
    ("overrides", "judge"),
    [
        (("concept=church",), "accuracy"),
        (("concept=face",), "accuracy"),
        (("concept=face", "evaluator@attack.judge=face"), "face"),
        (("concept=pop_art",), "style_accuracy"),
        (("model=sd14", "concept=nudity", "prompts=attack_nudity"), "nudity"),
        (("model=sd14", "concept=church", *ALONE), "accuracy"),
    ],
)
def test_who_judges(overrides: tuple[str, ...], judge: str) -> None:
    assert class_of(judge_node(compose("attack=p4d", *overrides))).name == judge


def class_of(node: DictConfig) -> type[Evaluator]:
    found: type[Evaluator] = hydra.utils.get_class(node._target_)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=sd14", "concept=van_gogh"),  # measured by LPIPS alone
        ("concept=church", "evaluator@attack.judge=clip_score"),
    ],
)
def test_who_cannot_judge_is_named(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"\((lpips|clip_score)\) does not: evaluator@attack"):
        prepare(compose("attack=p4d", *overrides))


def test_evaluators_that_judge_say_by_which_record(weights: Path) -> None:
    judging = {"accuracy": "correct", "style_accuracy": "correct", "nudity": "count"}
    judging |= {"face": "count", "open_accuracy": "correct", "outside_accuracy": "correct"}
    for path in sorted((CONF / "evaluator").glob("*.yaml")):
        if path.stem != "default":
            (node,) = compose(f"evaluator=[{path.stem}]").evaluator.values()
            evaluator: type[Evaluator] = class_of(node)
            assert evaluator.judges == judging.get(path.stem)


def test_a_missing_default_names_its_place() -> None:
    cfg = compose("attack=p4d").copy()
    cfg["values"].attack.tokens = {}
    with pytest.raises(Exception, match=r"attack\.tokens has no default .*: set attack\.tokens"):
        OmegaConf.to_container(cfg.attacks, resolve=True)


def test_shares_of_one_and_of_several_targets() -> None:
    prompts = [Prompt("x", i, "church" if i < 4 else "tench") for i in range(6)]
    success = [True, True, False, False, True, True]
    target, church, tench = attacking._rows("p4d_success_rate", "1", prompts, success)
    assert (church["value"], church["n"], tench["value"]) == (0.5, 4, 1.0)
    assert (target["value"], target["over"], target["groups"]) == (0.75, "mean of groups", 2)
    target, _ = attacking._rows("p4d_success_rate", "1", prompts[:4], success[:4])
    assert (target["value"], target["over"], target["group"]) == (0.5, "all images", "church")
    assert 0 < target["low"] < 0.5 < target["high"] < 1


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A judge who sees the second prompt's concept at once and the others' in the second round."""
    rounds: list[int] = []

    class Judge(attacking.EvaluatorJudge):
        def __call__(self, images, prompts) -> list[bool]:
            rounds.append(len(prompts))
            if len(rounds) == 1:
                return [index == 1 for index in range(len(prompts))]
            return [len(rounds) > 2] * len(prompts)

    monkeypatch.setattr(attacking, "EvaluatorJudge", Judge)
    return rounds


def test_a_run_with_attacks_alone(weights: Path, tmp_path: Path, stubborn: list[int]) -> None:
    """One of three prompts succeeds as it is, the others when attacked; nothing else is drawn."""
    overrides = ("concept=church", "edit=uce", BOTH, *ALONE, "prompts=objects", "debug=tiny")
    more = ("model.images_per_class=3", "attack.limit=3", "edit.preserve=[day]")
    places = (f"paths.miniature={weights}", f"paths.results={tmp_path}")
    experiment = prepare(compose(*overrides, *more, *places, "limit=null"))
    final = run(experiment)
    records = read_lines(final / "attacks.jsonl")
    assert [record["attack"] for record in records] == ["p4d"] * 3 + ["unlearn_diff"] * 3
    assert [record["without_attack"] for record in records[:3]] == [False, True, False]
    assert all(record["success"] for record in records)
    assert [record["timesteps"] for record in records[:3]] == [2, 0, 2]
    assert [len(record["losses"]) for record in records] == [4, 0, 4, 2, 0, 2]
    assert [len(record["tokens"]) for record in records[:2]] == [3, 0]
    assert stubborn == [3, 2, 2, 2]
    metrics = read_json(final / "metrics.json")
    values = {row["name"]: row["value"] for row in metrics["metrics"] if row["scope"] == "target"}
    assert values == {
        "success_rate_without_attack": pytest.approx(1 / 3),
        "p4d_success_rate": 1.0,
        "unlearn_diff_success_rate": 1.0,
    }
    assert find_metric(metrics, "p4d_success_rate", "target", "after") is not None
    assert "p4d success rate on church, share (n = 3)" in set(
        result_table(metrics, read_json(final / "cost.json"))[""]
    )
    assert (final / "attack.png").is_file()
    assert not (final / "before_after.png").exists()
    made = [read_json(path)["edit"] for path in (tmp_path / "images").glob("*/set.json")]
    assert len(made) == 2  # no other images than it needs
    assert NO_EDIT in made
    assert experiment.folder.is_complete()


def test_a_run_with_probes(weights: Path, tmp_path: Path, stubborn: list[int]) -> None:
    """Controls look at other pictures, which are drawn once; a second run learns nothing anew."""
    chosen = ",".join(f"{name},{name}_control" for name in PROBES)
    overrides = (f"attack=[{chosen}]", "concept=church", "edit=uce", *ALONE, "prompts=objects")
    more = ("debug=tiny", "model.images_per_class=3", "attack.limit=3", "edit.preserve=[day]")
    places = (f"paths.miniature={weights}", f"paths.results={tmp_path}", "limit=null")
    final = run(prepare(compose(*overrides, *more, *places)))
    records = read_lines(final / "attacks.jsonl")
    assert [record["success"] for record in records] == [False, True, False] + 15 * [True]
    assert [record["iterations"] for record in records[::3]] == [0, 0, 0, 0, 2, 2]
    assert stubborn == [3, *6 * [2]]
    metrics = read_json(final / "metrics.json")
    rates = [row for row in metrics["metrics"] if row["scope"] == "target"]
    names = [f"{name}{kind}_success_rate" for name in PROBES for kind in ("", "_control")]
    assert [row["name"] for row in rates[1:]] == names
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rates)
    drawn = [read_json(path)["prompts"] for path in (tmp_path / "images").glob("*/set.json")]
    texts = sorted(prompts[0][0] for prompts in drawn)
    assert texts == ["French horn", "an image of a church", "an image of a church"]
    kept = len(list((tmp_path / "attacks").glob("*.safetensors")))
    run(prepare(compose(*overrides, *more, *places, "safety.mask=false")))
    assert len(list((tmp_path / "attacks").glob("*.safetensors"))) == kept == 8


def test_a_model_that_cannot_be_attacked_is_refused_by_name() -> None:
    pipeline = random_pipeline(StableDiffusionXLPipeline, "sdxl", torch.float32, small=True)
    model = StableDiffusionXLModel("sdxl", pipeline, 64)
    plan = plan_attacks(compose("attack=p4d"))
    with pytest.raises(UserError, match="model=sdxl reads a prompt through 2 text encoders"):
        plan.check(model, [Prompt("x", 0, "parachute")])
