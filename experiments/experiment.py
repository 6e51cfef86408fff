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
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit
from evaluation.evaluators.base import Evaluator, Record, score_image_set
from evaluation.files import write_atomically
from evaluation.generation import SamplerSettings, generate
from evaluation.image_sets import ImageSet
from evaluation.prompts import Prompt, build_prompts
from experiments.aggregation import aggregate
from experiments.config import plain
from experiments.effect import check_effects, correlate_effects
from experiments.environment import describe_environment
from experiments.pictures import before_after
from experiments.rendering import result_table, title, to_markdown
from experiments.results import ResultFolder, read_json, write_json, write_lines

EDIT = "edit.safetensors"
COST = "cost.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a configuration is made into before any work is done."""

    model: DiffusionModel
    concept: Concept
    method: Edit
    prompts: list[Prompt]
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
    before, after = make_images(parts, edit, Path(cfg.paths.images))
    records, rows = evaluate(build_evaluators(cfg), parts.concept.name, before, after)
    summary = {
        "config_hash": folder.digest,
        "model": {"name": cfg.model.name, **parts.model.provenance()},
        "concept": cfg.concept.name,
        "edit": _describe_edit(cfg, edit),
        "seed": cfg.seed,
        "sampler": asdict(parts.settings),
        "effect": effect,
        "images": _describe_images(before, after),
        "metrics": rows,
    }
    write_lines(work / "records.jsonl", records)
    write_json(work / "metrics.json", summary)
    write_presentation(work, cfg, before, after)
    return folder.close()


def build_parts(cfg: DictConfig) -> Parts:
    """Instantiate everything, the model first. Raises UserError for what is missing or misfits."""
    quiet_libraries()
    model: DiffusionModel = hydra.utils.instantiate(cfg.model.adapter, _convert_="all")
    concept: Concept = hydra.utils.instantiate(cfg.concept)
    prompts = []
    if cfg.prompts is None or not cfg.evaluator:
        logger.warning(
            "model=%s has no prompts or no evaluator for %s concepts yet: the edit is made and "
            "saved, nothing is measured",
            cfg.model.name,
            concept.kind,
        )
    else:
        prompt_set = hydra.utils.instantiate(cfg.prompts, _convert_="all")
        prompts = take_in_turn(build_prompts(prompt_set), concept.name, cfg.limit)
    # The name is how the configuration calls the method; the class has its own.
    method = plain(cfg.edit)
    del method["name"]
    return Parts(
        model=model,
        concept=concept,
        method=hydra.utils.instantiate(method),
        prompts=prompts,
        settings=SamplerSettings(**plain(cfg.model.sampler)),
    )


def build_evaluators(cfg: DictConfig) -> list[Evaluator]:
    """The chosen evaluators with their weights loaded; none where nothing is measured."""
    if cfg.prompts is None or not cfg.evaluator:
        return []
    nodes = [node for node in cfg.evaluator.values() if node is not None]
    return [hydra.utils.instantiate(node, _convert_="all") for node in nodes]


def check_parts(cfg: DictConfig, parts: Parts) -> None:
    """Raise UserError for what would fail later: prompts, evaluators, ablations.

    The evaluators are loaded to be asked, so that missing weights are known now, and let go again:
    the edit's peak of memory is measured without them.
    """
    if cfg.effect.count:
        check_effects(parts.model, parts.method, cfg.effect.share)
    parts.model.check_prompts(list(dict.fromkeys(prompt.text for prompt in parts.prompts)))
    for evaluator in build_evaluators(cfg):
        evaluator.check(parts.prompts)
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
    parts: Parts, edit: WeightEdit, root: Path
) -> tuple[ImageSet | None, ImageSet | None]:
    """Image sets without and with the edit; the second is None for an edit that changes nothing."""
    if not parts.prompts:
        return None, None
    unedited = NoEdit()(parts.model, parts.concept)
    before = generate(parts.model, unedited, parts.prompts, parts.settings, root)
    if isinstance(parts.method, NoEdit):
        return before, None
    return before, generate(parts.model, edit, parts.prompts, parts.settings, root)


def evaluate(
    evaluators: Sequence[Evaluator], target: str, before: ImageSet | None, after: ImageSet | None
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Per-image records, and aggregates over the target's group, the others, and each group."""
    records: list[Record] = []
    rows: list[dict[str, Any]] = []
    for state, images in _states(before, after).items():
        for evaluator in evaluators:
            logger.info("measuring %s %s the edit", evaluator.name, state)
            scored = list(score_image_set(evaluator, images))
            origin = {"state": state, "metric": evaluator.name, "images": images.folder.name}
            records += [origin | record for record in scored]
            rows += aggregate(evaluator, scored, target, state)
    return records, rows


def write_presentation(
    work: Path, cfg: DictConfig, before: ImageSet | None, after: ImageSet | None
) -> None:
    """Everything of the folder that is for people: table, picture, configuration, environment."""
    metrics = read_json(work / "metrics.json")
    table = to_markdown(result_table(metrics, read_json(work / COST)))
    write_atomically(work / "table.md", f"{title(metrics)}\n\n{table}".encode())
    if before is not None:
        before_after(before, after, cfg.concept.name, work / "before_after.png")
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


def _states(before: ImageSet | None, after: ImageSet | None) -> dict[str, ImageSet]:
    """The image sets that there are, by their state."""
    pairs = {"before": before, "after": after}
    return {state: images for state, images in pairs.items() if images is not None}


def _describe_images(
    before: ImageSet | None, after: ImageSet | None
) -> dict[str, dict[str, str | int]]:
    """By state: the set's folder, how many images it has, and how many of them were not finite."""
    return {
        state: {"folder": images.folder.name, "count": len(images), "broken": images.broken()}
        for state, images in _states(before, after).items()
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
