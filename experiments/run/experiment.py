"""One experiment: edit a model, generate with and without the edit, measure, write it down.

The way through it is `prepare`, which loads and makes nothing, then `run`, top to bottom. The edit,
every image and the attribution scores have places of their own on disk and are made once, whatever
interrupts the run; measuring and writing down are done again.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf
from tqdm.contrib.logging import logging_redirect_tqdm

from cad.attribution import attribute
from cad.components import component_weights
from cad.concepts import Concept
from cad.edits import CADAmplify, Edit, NoEdit, ScoredEdit, make_edit
from cad.errors import UserError
from cad.files import link_or_copy, write_atomically
from cad.identity import answer, describe_runtime
from cad.models.base import DiffusionModel
from cad.models.pretrained import Pretrained
from cad.store import Store
from cad.weight_edit import WeightEdit
from evaluation.evaluators.base import CONCEPT, GENERAL, Evaluator
from evaluation.generation import check_prompts, generate
from evaluation.prompts import Prompt, PromptSet
from evaluation.sampler import Engine, SamplerSettings
from experiments.run.arguments import build, build_each
from experiments.run.configuration import check, settle
from experiments.run.groups import ATTACKED, Images, Prompts, evaluate, needed_prompts, read_prompts
from experiments.run.photographs import check_photographs
from experiments.run.pictures import Mask, before_after, loss_curve
from experiments.run.rendering import result_table, show_result, title, to_markdown
from experiments.run.results import (
    EDIT,
    ResultFolder,
    describe_environment,
    read_json,
    write_json,
    write_lines,
    write_records,
)
from experiments.run.tracking import Tracker

VERSION = 4  # raise it when equal parts give another result
COST = "cost.json"
HISTORY = "history.jsonl"
EFFECTS = "effects.csv"
logger = logging.getLogger(__name__)


class Attacks(Protocol):
    """What an experiment asks of its attacks: of an `experiments.run.attacking.AttackPlan`."""

    def identity(self) -> dict[str, Any]: ...

    def check(self, model: DiffusionModel, prompts: Sequence[Prompt]) -> None: ...

    def run(
        self,
        model: DiffusionModel,
        edit: WeightEdit,
        prompts: Sequence[Prompt],
        sampler: SamplerSettings,
        work: Path,
        mask: Mask | None,
    ) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Experiment:
    """The parts of an experiment. None has loaded weights or made anything."""

    cfg: DictConfig  # settled
    model: Pretrained
    concepts: tuple[Concept, ...]  # all of one kind
    method: Edit
    prompt_sets: Mapping[str, PromptSet]  # by their use, as `Prompts`
    sampler: SamplerSettings
    evaluators: tuple[Evaluator, ...]
    attacks: Attacks | None
    engine: Engine
    tracker: Tracker

    @property
    def targets(self) -> list[str]:
        return [concept.name for concept in self.concepts]

    def identity(self) -> dict[str, Any]:
        """All that determines the result, in the parts' own words; JSON-able.

        Raises UserError for an input, such as a file, that is missing.
        """
        effect = self.cfg.effect
        return {
            "version": VERSION,
            "model": self.model.identity(),
            "edit": self.method.identity(self.concepts),
            "sampler": self.sampler.identity(),
            "prompts": answer(self.prompt_sets),
            "evaluators": answer(self.evaluators),
            "attacks": None if self.attacks is None else self.attacks.identity(),
            "seed": self.cfg.seed,
            "limit": [self.cfg.limit, self.cfg.others_per_class],
            "effect": [*effect.values()] if effect.count or effect.seeds else None,
            "runtime": describe_runtime(self.cfg.device),
        }

    @cached_property
    def folder(self) -> ResultFolder:
        """Where the result is, or will be."""
        names = {
            "model.adapter.name": self.model.name,
            "concept.name": "+".join(self.targets),
            "the edit's name": self.method.name,
        }
        return ResultFolder.of(Path(self.cfg.paths.runs), names, self.identity())

    @cached_property
    def mask(self) -> Mask | None:
        """Covers what pictures of an explicit concept must not show."""
        if self.concepts[0].kind != "explicit" or not self.cfg.safety.mask:
            return None
        from evaluation.masking import Masker  # NudeNet

        return Masker()


def prepare(cfg: DictConfig) -> Experiment:
    """The experiment of a composed configuration.

    Raises UserError for all that can be refused without loading weights or reading prompts.
    """
    concepts = check(cfg)
    cfg, attacks = settle(cfg), None
    if cfg.attacks:
        from experiments.run.attacking import plan_attacks  # with all that attacks need

        attacks = plan_attacks(cfg)
    evaluators = build_each(cfg, "evaluator")
    method = build(cfg.edit)
    for after in build_each(cfg, "after"):
        method = after(method)
    experiment = Experiment(
        cfg=cfg,
        model=build(cfg.model.adapter),
        concepts=concepts,
        method=method,
        prompt_sets=needed_prompts(cfg, evaluators),
        sampler=build(cfg.model.sampler, SamplerSettings),
        evaluators=evaluators,
        attacks=attacks,
        engine=build(cfg.engine),
        tracker=build(cfg.logger),
    )
    _check_component(experiment)
    _ = experiment.folder  # every part says its settings
    return experiment


def run(experiment: Experiment, group: str | None = None) -> Path:
    """Run the experiment unless it is finished, followed by the tracker, and show it.

    `group` is the name of the sweep or table that it belongs to, for the tracker. Returns the
    result's folder. Waits for another process that runs the same; goes on where an earlier attempt
    stopped. Raises UserError, before any work, for what is missing or misfits.
    """
    folder = experiment.folder
    with folder.locked(), logging_redirect_tqdm():
        reused = folder.is_complete()
        with experiment.tracker.follow(folder, _describe_work(experiment, group)):
            if not reused:
                _make(experiment, folder.open())
                folder.close()
    show_result(folder.final, reused=reused)
    return folder.final


def _describe_work(experiment: Experiment, group: str | None) -> dict[str, Any]:
    """What `Tracker.follow` is told."""
    return {
        "config": OmegaConf.to_container(experiment.cfg, resolve=True),
        "group": group,
        "job_type": experiment.method.name,
        "tags": [experiment.model.name, *experiment.targets],
    }


def _make(experiment: Experiment, work: Path) -> None:
    """Fill the folder `work` with the result."""
    model = experiment.model.load()
    prompts = read_prompts(experiment.cfg, experiment.prompt_sets)
    _check_loaded(experiment, model, prompts)
    edit = _make_edit(experiment, model, work)
    effect = _report_effects(experiment, model, edit, work)
    images = make_images(experiment, model, edit, prompts)
    records, rows = evaluate(experiment.evaluators, images, experiment.targets)
    if experiment.attacks is not None:
        state = "before" if isinstance(experiment.method, NoEdit) else "after"
        given = (model, edit, prompts[ATTACKED], experiment.sampler, work, experiment.mask)
        rows += [{"state": state} | row for row in experiment.attacks.run(*given)]
    summary = {
        "config_hash": experiment.folder.digest,
        "model": {"name": model.name, **model.provenance(), "files": model.file_digests()},
        "concepts": experiment.targets,
        "edit": _describe_edit(experiment.method, model, edit),
        "seed": experiment.cfg.seed,
        "sampler": asdict(experiment.sampler),
        "effect": effect,
        "images": _describe_images(images),
        "metrics": rows,
    }
    write_records(work, records)
    write_json(work / "metrics.json", summary)
    _present(experiment, images, edit, work)


def make_images(
    experiment: Experiment, model: DiffusionModel, edit: WeightEdit, prompts: Prompts
) -> Images:
    """Image sets without and with the edit; without only, for a method that changes nothing."""
    images: Images = {}
    with experiment.engine:
        for measured in dict.fromkeys(each.measures for each in experiment.evaluators):
            draw = partial(
                generate,
                prompts=prompts[measured],
                settings=experiment.sampler,
                root=Path(experiment.cfg.paths.images),
                engine=experiment.engine,
            )
            images[measured] = {"before": draw(model)}
            if not isinstance(experiment.method, NoEdit):
                with edit.applied(model):
                    images[measured]["after"] = draw(model)
    return images


def _check_component(experiment: Experiment) -> None:
    """Raise UserError for weights that the model's family does not have, or no scores to check."""
    method, effect = experiment.method, experiment.cfg.effect
    scored = method.innermost
    if isinstance(scored, ScoredEdit):
        known = experiment.model.family_class().components
        component = scored.attribution.component
        if component not in known:
            raise UserError(
                f"component={component} is not allowed for model={experiment.model.name}; choose "
                f"one of {', '.join(known)}"
            )
    if (effect.count or effect.seeds) and not isinstance(method, ScoredEdit):
        key = "count" if effect.count else "seeds"
        raise UserError(
            f"effect.{key}={effect[key]}: edit={method.name} makes no scores to check. Use "
            f"effect.{key}=0 or edit=erase"
        )


def _check_loaded(experiment: Experiment, model: DiffusionModel, prompts: Prompts) -> None:
    """Raise UserError for what would fail later: prompts, evaluators, ablations, attacks.

    Copies of the evaluators are loaded to be asked, so that missing weights are known now, and let
    go again: the edit's peak of memory is measured without them.
    """
    effect, method = experiment.cfg.effect, experiment.method
    if effect.count and isinstance(method, ScoredEdit):
        from cad.effects import ablation_size

        weights = component_weights(model, method.attribution.component)
        ablation_size(weights, effect.count, effect.share)
    try:
        asked = experiment.sampler
        model.sampler(asked.steps, asked.kind, asked.eta)
    except UserError as error:
        raise UserError(f"model.sampler: {error}") from error
    for wanted in prompts.values():
        check_prompts(model, wanted)
    for evaluator in experiment.evaluators:
        try:
            copy.deepcopy(evaluator).check(prompts[evaluator.measures])
        except UserError as error:
            other = "Other evaluators judge any images: evaluator=[lpips,clip_score]"
            raise UserError(f"{str(error).rstrip('.')}. {other}") from error
    amplifying = method.innermost
    if isinstance(amplifying, CADAmplify):
        given = amplifying, experiment.concepts, experiment.evaluators
        check_photographs(*given, model.resolution)
    if experiment.attacks is not None:
        experiment.attacks.check(model, prompts[ATTACKED])
    gc.collect()


def _make_edit(experiment: Experiment, model: DiffusionModel, work: Path) -> WeightEdit:
    """The edit, from the store of edits or made and kept there; what it cost, and how it went."""
    store = Store(experiment.cfg.paths.edits)
    edit, kept = make_edit(experiment.method, model, experiment.concepts, store)
    write_json(work / COST, asdict(edit.cost))
    if edit.history:
        write_lines(work / HISTORY, edit.history)
    if kept is not None:
        link_or_copy(kept, work / EDIT)
    logger.info("edit of %s weights made in %.1f s", f"{edit.num_weights:,}", edit.cost.seconds)
    return edit


def _report_effects(
    experiment: Experiment, model: DiffusionModel, edit: WeightEdit, work: Path
) -> dict[str, Any] | None:
    """What was asked for: do the scores predict what random ablations, and what the edit does?"""
    effect, method = experiment.cfg.effect, experiment.method
    if not (effect.count or effect.seeds) or not isinstance(method, ScoredEdit):
        return None
    from cad.effects import chosen_effect

    found = _report_ablations(experiment, method, model, work) if effect.count else {}
    if effect.seeds:
        given = method, experiment.concepts[0], edit, effect.seeds
        found |= {"seeds": effect.seeds} | asdict(chosen_effect(model, *given))
    return found


def _report_ablations(
    experiment: Experiment, method: ScoredEdit, model: DiffusionModel, work: Path
) -> dict[str, Any]:
    """Figure 2 in small. Each ablation removes a random share of the component's weights.

    Pearson r, and every predicted and measured change of J in EFFECTS.
    """
    from cad.effects import effect_correlation

    objective, effect = method.objective(experiment.concepts[0]), experiment.cfg.effect
    wanted = {"count": effect.count, "share": effect.share}
    found = effect_correlation(
        model,
        objective,
        method.attribution,
        **wanted,
        seed=experiment.cfg.seed,
        scores=attribute(model, objective, method.attribution, method.store).scores,
    )
    pairs = zip(found.predicted.tolist(), found.measured.tolist(), strict=True)
    lines = ["predicted,measured", *(f"{first!r},{second!r}" for first, second in pairs)]
    write_atomically(work / EFFECTS, ("\n".join(lines) + "\n").encode())
    return wanted | {"pearson_r": found.pearson_r}


def _describe_edit(method: Edit, model: DiffusionModel, edit: WeightEdit) -> dict[str, Any]:
    described = {
        "name": method.name,
        "fingerprint": edit.fingerprint,
        "num_weights": edit.num_weights,
    }
    if not isinstance(method, ScoredEdit):
        return described | dict.fromkeys(("ratio", "per", "unit", "component"))
    selection, component = method.selection, method.attribution.component
    changed = {name: change.num_weights for name, change in edit.changes.items()}
    weights = [  # in the network's order
        {"name": name, "changed": changed.get(name, 0), "of": weight.numel()}
        for name, weight in component_weights(model, component).items()
    ]
    return described | selection.settings() | {"component": component, "weights": weights}


def _describe_images(images: Images) -> dict[str, dict[str, dict[str, str | int]]]:
    """The folder of each set, how many images it has, and how many of them were not finite."""
    return {
        measured: {
            state: {"folder": made.folder.name, "count": len(made), "broken": made.broken()}
            for state, made in sets.items()
        }
        for measured, sets in images.items()
    }


def _present(experiment: Experiment, images: Images, edit: WeightEdit, work: Path) -> None:
    """Write everything that is for people: table, pictures, configuration, environment."""
    metrics = read_json(work / "metrics.json")
    table = to_markdown(result_table(metrics, read_json(work / COST)))
    write_atomically(work / "table.md", f"{title(metrics)}\n\n{table}".encode())
    if images:
        shown = images[CONCEPT] if CONCEPT in images else images[GENERAL]
        before_after(shown, experiment.targets, work / "before_after.png", experiment.mask)
    if edit.history:
        loss_curve(edit.history, work / "training.png")
    resolved = OmegaConf.to_yaml(experiment.cfg, resolve=True)
    write_atomically(work / "config.yaml", resolved.encode())
    write_json(work / "environment.json", describe_environment(experiment.cfg.device))
