"""One experiment: edit a model, generate with and without the edit, measure, write it down.

The way through it is `run_experiment`, top to bottom. The edit, every image and the attribution
scores have places of their own on disk and are made once, whatever interrupts the run; measuring
and writing down are done again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cad.concepts import Concept
from cad.edits import Edit, NoEdit
from cad.errors import UserError
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit
from evaluation.evaluators.base import CONCEPT, GENERAL, Evaluator, Record, score_image_set
from evaluation.files import write_atomically
from evaluation.generation import SamplerSettings, check_prompts, generate
from evaluation.image_sets import ImageSet
from evaluation.masking import Masker
from evaluation.prompts import Prompt, build_prompts
from experiments.aggregation import aggregate
from experiments.config import plain
from experiments.effect import check_effects, correlate_effects
from experiments.environment import describe_environment
from experiments.pictures import before_after
from experiments.rendering import result_table, title, to_markdown
from experiments.results import ResultFolder, read_json, write_json, write_records

EDIT = "edit.safetensors"
COST = "cost.json"

Images = dict[str, dict[str, ImageSet]]
"""What is measured (CONCEPT, GENERAL) -> state ("before", "after") -> its images."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a configuration is made into before any work is done."""

    model: DiffusionModel
    concept: Concept
    method: Edit
    prompts: dict[str, list[Prompt]]  # by what the evaluators measure: CONCEPT, GENERAL
    settings: SamplerSettings


def run_experiment(cfg: DictConfig, folder: ResultFolder) -> Path:
    """Run a checked and settled configuration into its folder, which is returned.

    Goes on where an earlier attempt stopped; call it while `folder` is locked. Raises UserError for
    what is missing or misfits.
    """
    parts = build_parts(cfg)
    check_parts(cfg, parts)
    work = folder.open()
    edit = make_edit(work, parts)
    effect = report_effects(work, cfg, parts)
    images = make_images(parts, edit, Path(cfg.paths.images))
    records, rows = evaluate(build_evaluators(cfg), parts.concept.name, images)
    summary = {
        "config_hash": folder.digest,
        "model": {"name": cfg.model.name, **parts.model.provenance()},
        "concept": cfg.concept.name,
        "edit": _describe_edit(cfg, edit),
        "seed": cfg.seed,
        "sampler": asdict(parts.settings),
        "effect": effect,
        "images": _describe_images(images),
        "metrics": rows,
    }
    write_records(work, records)
    write_json(work / "metrics.json", summary)
    write_presentation(work, cfg, images)
    return folder.close()


def make_shard(cfg: DictConfig, folder: ResultFolder, shard: tuple[int, int]) -> None:
    """Make the shard's part of the run's images, beside other processes with the other shards.

    `shard` is its number, from 0, and how many there are. The edit is made once, by the first.
    Raises UserError as `run_experiment`.
    """
    parts = build_parts(cfg)
    check_parts(cfg, parts)
    with folder.locked():
        if folder.is_complete():
            return
        edit = make_edit(folder.open(), parts)
    images = make_images(parts, edit, Path(cfg.paths.images), shard)
    missing = sum(made.missing() for sets in images.values() for made in sets.values())
    if missing:
        logger.info("this shard is made; the others have %d images to make", missing)
    else:
        logger.info("all images are made: run the same command without shard to measure them")


def build_parts(cfg: DictConfig) -> Parts:
    """Instantiate everything, the model first. Raises UserError for what is missing or misfits."""
    quiet_libraries()
    model: DiffusionModel = hydra.utils.instantiate(cfg.model.adapter, _convert_="all")
    concept: Concept = hydra.utils.instantiate(cfg.concept)
    # The name is how the configuration calls the method; the class has its own.
    method = plain(cfg.edit)
    del method["name"]
    return Parts(
        model=model,
        concept=concept,
        method=hydra.utils.instantiate(method),
        prompts=build_needed_prompts(cfg, concept),
        settings=SamplerSettings(**plain(cfg.model.sampler)),
    )


def build_needed_prompts(cfg: DictConfig, concept: Concept) -> dict[str, list[Prompt]]:
    """The prompts that the chosen evaluators measure. UserError where the model has none of them.

    General captions are the model's (`model.prompts.general`); with none to measure, none are made.
    """
    sources = {CONCEPT: cfg.prompts, GENERAL: cfg.model.prompts.general}
    found = {}
    for node in _evaluator_nodes(cfg):
        evaluator: type[Evaluator] = hydra.utils.get_class(node._target_)
        measured = evaluator.measures
        if sources[measured] is None:
            raise UserError(
                f"evaluator={evaluator.name} measures {measured} prompts, and model="
                f"{cfg.model.name} has none for concept={concept.name}: choose prompts=NAME, or "
                f"set model.prompts.{GENERAL if measured == GENERAL else concept.kind}"
            )
        if measured not in found:
            prompt_set = hydra.utils.instantiate(sources[measured], _convert_="all")
            prompts = build_prompts(prompt_set)
            if measured == CONCEPT:
                _check_target(prompts, concept.name, prompt_set.name)
            found[measured] = take_in_turn(prompts, concept.name, cfg.limit)
    if not found:
        logger.warning(
            "model=%s has no evaluator for %s concepts: the edit is made and saved, nothing is "
            "measured",
            cfg.model.name,
            concept.kind,
        )
    return found


def _check_target(prompts: Sequence[Prompt], target: str, set_name: str) -> None:
    groups = dict.fromkeys(prompt.group for prompt in prompts)
    if target not in groups:
        raise UserError(
            f"concept={target} has no images in the prompts {set_name}, whose groups are: "
            f"{', '.join(groups)}. Choose a concept among them, or other prompts (prompts=NAME)"
        )


def build_evaluators(cfg: DictConfig) -> list[Evaluator]:
    """The chosen evaluators with their weights loaded; none where nothing is measured."""
    return [hydra.utils.instantiate(node, _convert_="all") for node in _evaluator_nodes(cfg)]


def _evaluator_nodes(cfg: DictConfig) -> list[DictConfig]:
    return [] if not cfg.evaluator else [node for node in cfg.evaluator.values() if node]


def check_parts(cfg: DictConfig, parts: Parts) -> None:
    """Raise UserError for what would fail later: prompts, evaluators, ablations.

    The evaluators are loaded to be asked, so that missing weights are known now, and let go again:
    the edit's peak of memory is measured without them.
    """
    if cfg.effect.count:
        check_effects(parts.model, parts.method, cfg.effect.share)
    for prompts in parts.prompts.values():
        check_prompts(parts.model, prompts)
    for evaluator in build_evaluators(cfg):
        evaluator.check(parts.prompts[evaluator.measures])
        del evaluator
    gc.collect()


def take_in_turn(prompts: Sequence[Prompt], target: str, limit: int | None) -> list[Prompt]:
    """At most `limit` prompts, in their order: group by group in turn, the target's group first."""
    if limit is None:
        return list(prompts)
    seen: dict[str, int] = {}
    ranks: list[tuple[int, bool, int]] = []
    for index, prompt in enumerate(prompts):
        seen[prompt.group] = seen.get(prompt.group, 0) + 1
        ranks.append((seen[prompt.group], prompt.group != target, index))
    return [prompts[index] for index in sorted(index for *_, index in sorted(ranks)[:limit])]


def make_edit(work: Path, parts: Parts) -> WeightEdit:
    """The edit and, beside it, what it cost; both are read back if an earlier attempt made them."""
    if (work / EDIT).exists() and (work / COST).exists():
        logger.info("the edit was made before")
        return WeightEdit.load(work / EDIT)
    edit = parts.method(parts.model, parts.concept)
    write_json(work / COST, asdict(edit.cost))  # first: a saved edit always has its cost
    edit.save(work / EDIT)
    logger.info("edit of %s weights made in %.1f s", f"{edit.num_weights:,}", edit.cost.seconds)
    return edit


def report_effects(work: Path, cfg: DictConfig, parts: Parts) -> dict[str, Any] | None:
    """Figure 2 in small, if asked for: Pearson r, and every ablation in `effects.csv`."""
    if not cfg.effect.count:
        return None
    wanted = {"count": cfg.effect.count, "share": cfg.effect.share}
    found = correlate_effects(parts.model, parts.concept, parts.method, **wanted, seed=cfg.seed)
    pairs = zip(found.predicted.tolist(), found.measured.tolist(), strict=True)
    lines = [
        "predicted,measured",
        *(f"{predicted!r},{measured!r}" for predicted, measured in pairs),
    ]
    write_atomically(work / "effects.csv", ("\n".join(lines) + "\n").encode())
    return wanted | {"pearson_r": found.pearson_r}


def make_images(
    parts: Parts, edit: WeightEdit, root: Path, shard: tuple[int, int] | None = None
) -> Images:
    """Image sets without and with the edit; without only, for a method that changes nothing."""
    edits = {"before": NoEdit()(parts.model, parts.concept)}
    if not isinstance(parts.method, NoEdit):
        edits["after"] = edit
    return {
        measured: {
            state: generate(parts.model, applied, prompts, parts.settings, root, shard)
            for state, applied in edits.items()
        }
        for measured, prompts in parts.prompts.items()
    }


def evaluate(
    evaluators: Sequence[Evaluator], target: str, images: Images
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Per-image records, and aggregates over the target's group, the others, and each group.

    Paired evaluators measure what the edit changed, so they have nothing to say before it.
    """
    records: list[Record] = []
    rows: list[dict[str, Any]] = []
    for evaluator in evaluators:
        sets = images[evaluator.measures]
        for state, judged in sets.items():
            if evaluator.paired and state == "before":
                continue
            logger.info("measuring %s %s the edit", evaluator.name, state)
            references = sets["before"] if evaluator.paired else None
            scored = list(score_image_set(evaluator, judged, references))
            origin = {"state": state, "metric": evaluator.name, "images": judged.folder.name}
            records += [origin | record for record in scored]
            rows += aggregate(evaluator, scored, target, state)
    return records, rows


def write_presentation(work: Path, cfg: DictConfig, images: Images) -> None:
    """Everything of the folder that is for people: table, picture, configuration, environment."""
    metrics = read_json(work / "metrics.json")
    table = to_markdown(result_table(metrics, read_json(work / COST)))
    write_atomically(work / "table.md", f"{title(metrics)}\n\n{table}".encode())
    if images:
        shown = images[CONCEPT] if CONCEPT in images else images[GENERAL]
        mask = Masker() if cfg.safety.mask and cfg.concept.kind == "explicit" else None
        before_after(shown, cfg.concept.name, work / "before_after.png", mask)
    write_atomically(work / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
    write_json(work / "environment.json", describe_environment(cfg.device))


def quiet_libraries() -> None:
    """Silence progress bars and advice of the libraries below; errors still come through."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _describe_images(images: Images) -> dict[str, dict[str, dict[str, str | int]]]:
    """Of each set: its folder, how many images it has, and how many of them were not finite."""
    return {
        measured: {
            state: {"folder": made.folder.name, "count": len(made), "broken": made.broken()}
            for state, made in sets.items()
        }
        for measured, sets in images.items()
    }


def _describe_edit(cfg: DictConfig, edit: WeightEdit) -> dict[str, Any]:
    ratio = cfg.ratio if "selection" in cfg.edit else None
    return {
        "name": cfg.edit.name,
        "fingerprint": edit.fingerprint,
        "num_weights": edit.num_weights,
        "ratio": ratio.value if ratio else None,
        "per": ratio.per if ratio else None,
        "component": cfg.component if ratio else None,
    }
