"""The identity of a result, refusals before any work, and work that is done again."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from omegaconf import DictConfig
from weights import write_weights

from cad.attribution import Attribution
from cad.errors import UserError
from cad.models.pretrained import Pretrained
from evaluation.evaluators.accuracy import Accuracy
from evaluation.sampler import SamplerSettings
from experiments.run import configuration, experiment
from experiments.run.arguments import build
from experiments.run.experiment import prepare, run
from experiments.run.results import read_json

TINY = ("debug=tiny", "limit=2", "device=cpu", "logger=none", "ratio.value=0.05")


@functools.cache
def compose(*overrides: str) -> DictConfig:
    return configuration.compose(("device=cpu", "logger=none", *overrides))


def identify(*overrides: str) -> str:
    return prepare(compose(*overrides)).folder.digest


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("miniature"))


@pytest.fixture
def tiny(weights: Path, tmp_path: Path) -> tuple[str, ...]:
    """Overrides of a run of two images with random weights."""
    return (*TINY, f"paths.miniature={weights}", f"paths.results={tmp_path}")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "ratio.value=0.3",
        "component=attn1",
        "images_per_class=3",
        "limit=4",
        "concept=church",
        "concept=[parachute,church]",
        "edit=rescale",
        "effect.count=3",
        "effect.seeds=1",
        "edit.attribution.stage=late",
        "evaluator=[face]",
        "model.sampler.steps=3",
        "model.adapter.resolution=128",
        "edit.attribution.eta=0.5",
        "attack=p4d",
        "dtype=float16",
        "debug=tiny",
    ],
)
def test_what_changes_the_result_changes_the_hash(override: str) -> None:
    assert identify(override) != identify()


@pytest.mark.parametrize(
    "override",
    [
        "seed=0",
        "logger=wandb",
        "dtype=auto",
        "paths.scores=/elsewhere",
        "paths.results=/elsewhere",
        "edit.attribution.sums_on=cpu",
        "edit.attribution.gradient_checkpointing=true",
        "model.source.note=none",
        "model.source.size_gb=9",
        "attack.limit=3",  # there are no attacks
        "effect.share=0.01",  # nor ablations
        "engine=local",
    ],
)
def test_what_does_not_change_the_result_keeps_the_hash(override: str) -> None:
    assert identify(override) == identify()


def test_all_gpus_are_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    prepared = prepare(compose())
    identities = []
    for device in ("cuda", "cuda:0", "cuda:1", "cpu"):
        cfg = prepared.cfg.copy()
        cfg.device = device
        parts = vars(prepared) | {"cfg": cfg, "model": build(cfg.model.adapter)}
        parts.pop("folder")
        identities.append(experiment.Experiment(**parts).identity())
    assert identities[0] == identities[1] == identities[2] != identities[3]


def test_versions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = identify()
    for owner, name, value in (
        (experiment, "VERSION", 0),
        (Attribution, "version", 99),
        (Accuracy, "version", 99),
        (SamplerSettings, "version", 99),
        (Pretrained, "version", 99),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert identify() != plain
    with monkeypatch.context() as patch:
        patch.setattr("cad.identity.library_version", lambda name: "other")
        assert identify() != plain
    assert identify() == plain


def test_local_weights_enter_by_content_not_by_place(weights: Path, tmp_path: Path) -> None:
    moved, altered = tmp_path / "moved", tmp_path / "altered"
    for folder in (moved, altered):
        folder.mkdir()
        for part in ("pipeline", "classifier"):
            (folder / part).mkdir()
            for file in (weights / part).rglob("*"):
                place = folder / part / file.relative_to(weights / part)
                place.parent.mkdir(exist_ok=True)
                if file.is_file():
                    place.write_bytes(file.read_bytes())
    config = next((altered / "classifier").glob("*.json"))
    config.write_text(config.read_text() + "\n")
    hashes = [identify(f"paths.miniature={folder}") for folder in (weights, moved, altered)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("component=lora",), "component=lora is not allowed for model=mini; choose one of ff"),
        (("edit=none", "effect.count=5"), r"effect\.count=5: edit=none makes no scores"),
        (("model.sampler.steps=0",), r"model\.sampler\.steps=0"),
        (("model.sampler.steps=many",), r"model\.sampler\.steps=many .* whole number"),
        (("+model.sampler.foo=1",), r"model\.sampler\.foo is unknown; SamplerSettings takes"),
        (("model.sampler.guidance=inf",), r"model\.sampler\.guidance=inf"),
        (("model.sampler.batch_size=0",), r"model\.sampler\.batch_size=0"),
        (
            ("model.adapter.name=../../evil",),
            r"adapter\.name='\.\./\.\./evil' is not allowed",
        ),
        (("model.source.path=/nowhere",), "/nowhere"),
        (("logger=wandb", "logger.mode=loud"), r"logger\.mode=loud"),
        (
            ("model.prompts.object=null",),
            r"measures concept prompts, .* set model\.prompts\.object",
        ),
        (
            ("attack=p4d", "model.prompts.object=null", "evaluator=[clip_score]"),
            "attack=p4d starts",
        ),
        (("evaluator=[clip_score]", "model.prompts.general=null"), r"set model\.prompts\.general"),
        (("attack=p4d", "attack.tokens=0"), r"attack\.tokens=0"),
        (("attack=p4d", "attacks.p4d.lr=fast"), r"attacks\.p4d\.lr=fast .* a number"),
        (
            ("attack=p4d", "+attacks.p4d.foo=1"),
            r"p4d\.foo is unknown; P4D takes: .*tokens, .*states",
        ),
        (
            ("attack=random_tokens", "+attacks.random_tokens.lr=1"),
            r"random_tokens\.lr is unknown; RandomTokens takes: tokens, tries, retokenize, batch",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretrained, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(Exception, match=message):
        prepare(compose(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.sampler.steps=1001",), r"model\.sampler\.steps=1001 is not allowed"),
        (("model.sampler.kind=euler",), r"kind='euler'"),
        (("effect.count=2", "effect.share=0.0000001"), r"effect\.share=1e-07"),
        (("prompts=objects", f"prompts.template='{80 * 'x '}{{subject}}'"), "77"),
        (
            ("concepts.parachute.name=cat", "prompts=mini_captions", "model.concepts=null"),
            r"concept=cat has no images in the prompts .* '\+prompts\.subjects\.cat=parachute'",
        ),
        (
            ("concept=pop_art", "evaluator=[accuracy]"),
            r"cannot judge images of .* Other .* evaluator=\[lpips,clip_score\]",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    tiny: tuple[str, ...],
    overrides: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experiment, "make_edit", lambda *_: pytest.fail("an edit was made"))
    with pytest.raises(UserError, match=message):
        run(prepare(compose(*tiny, *overrides)))


def test_equal_identities_give_equal_bytes(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Also where sums are kept elsewhere and activations are computed twice."""
    first = run(prepare(compose(*tiny)))
    memory = ("edit.attribution.sums_on=cpu", "edit.attribution.gradient_checkpointing=true")
    second = run(prepare(compose(*tiny, *memory, f"paths.results={tmp_path / 'other'}")))
    assert first.name == second.name
    for name in ("edit.safetensors", "records.jsonl", "metrics.json", "before_after.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("damaged", ["cost.json", "edit.safetensors"])
def test_what_an_interrupted_attempt_left_damaged_is_made_again(
    tiny: tuple[str, ...], damaged: str
) -> None:
    prepared = prepare(compose(*tiny, "edit=uce", "edit.preserve=[day]"))
    final = run(prepared)
    edit = (final / "edit.safetensors").read_bytes()
    final.replace(prepared.folder.work)
    (prepared.folder.work / damaged).write_text("{")
    assert run(prepared) == final
    assert prepared.folder.is_complete()
    assert (final / "edit.safetensors").read_bytes() == edit
    assert read_json(final / "cost.json")["seconds"] > 0
