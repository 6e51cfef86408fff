"""One experiment: edit a model, generate with and without the edit, measure, write it down.

The way through it is `run_experiment`, top to bottom. The edit, every image and the attribution
scores have places of their own on disk and are made once, whatever interrupts the run; measuring
and writing down are done again.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from cad.components import component_weights
from cad.concepts import Concept
from cad.edit_store import EditStore
from cad.edits import Edit, NoEdit
from cad.files import link_or_copy
from cad.models.base import DiffusionModel
from cad.weight_edit import WeightEdit
from evaluation.engines.base import Engine, Order
from evaluation.evaluators.base import CONCEPT, GENERAL, Evaluator, Record, score_image_set
from evaluation.files import write_atomically
from evaluation.generation import SamplerSettings, Watcher, check_prompts
from evaluation.image_sets import ImageSet
from evaluation.masking import Masker
from evaluation.prompts import Prompt
from experiments.aggregation import aggregate
from experiments.attacking import Assault, build_assault, check_attacks, run_attacks
from experiments.config import plain
from experiments.effect import check_effects, correlate_effects
from experiments.environment import describe_environment
from experiments.measuring import build_evaluators, build_needed_prompts, build_watchers
from experiments.pictures import before_after, loss_curve
from experiments.rendering import result_table, title, to_markdown
from experiments.results import ResultFolder, read_json, read_lines, write_json, write_records

NOT_ARGUMENTS = {"name", "values"}  # of the edit's class: what the configuration says of itself
EDIT = "edit.safetensors"
COST = "cost.json"
HISTORY = "history.jsonl"

Images = dict[str, dict[str, ImageSet]]
"""What is measured (CONCEPT, GENERAL) -> state ("before", "after") -> its images."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelBuild:
    """Makes the configured model on a device, in any process: `evaluation.engines` sends it."""

    adapter: str  # model.adapter of a settled configuration, as JSON: can be compared and hashed

    def __call__(self, device: str) -> DiffusionModel:
        quiet_libraries()
        node = json.loads(self.adapter) | {"device": device}
        model: DiffusionModel = hydra.utils.instantiate(node, _convert_="all")
        return model


@dataclass(frozen=True)
class Parts:
    """What a configuration is made into before any work is done."""

    engine: Engine
    build: ModelBuild
    model: DiffusionModel
    concepts: tuple[Concept, ...]  # all of one kind
    method: Edit
    prompts: dict[str, list[Prompt]]  # by what the evaluators measure: CONCEPT, GENERAL
    settings: SamplerSettings
    assault: Assault


def run_experiment(cfg: DictConfig, folder: ResultFolder) -> Path:
    """Run a checked and settled configuration into its folder, which is returned.

    Goes on where an earlier attempt stopped; call it while `folder` is locked. Raises UserError for
    what is missing or misfits.
    """
    parts = build_parts(cfg)
    check_parts(cfg, parts)
    work = folder.open()
    edit = make_edit(work, cfg, parts)
    effect = report_effects(work, cfg, parts)
    watchers = build_watchers(cfg, parts.model)
    images = make_images(parts, edit, Path(cfg.paths.images), watchers=watchers)
    targets = [concept.name for concept in parts.concepts]
    records, rows = evaluate(build_evaluators(cfg, watchers), targets, images)
    rows += run_attacks(work, cfg, parts.assault, parts.model, edit, parts.settings)
    summary = {
        "config_hash": folder.digest,
        "model": {
            "name": cfg.model.name,
            **parts.model.provenance(),
            "files": parts.model.file_digests(),
        },
        "concepts": targets,
        "edit": _describe_edit(cfg, parts.model, edit),
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
        edit = make_edit(folder.open(), cfg, parts)
    images = make_images(parts, edit, Path(cfg.paths.images), shard)
    missing = sum(made.missing() for sets in images.values() for made in sets.values())
    if missing:
        logger.info("this shard is made; the others have %d images to make", missing)
    else:
        logger.info("all images are made: run the same command without shard to measure them")


def build_parts(cfg: DictConfig) -> Parts:
    """Instantiate everything, the model early. Raises UserError for what is missing or misfits."""
    engine: Engine = hydra.utils.instantiate(cfg.engine, _convert_="all")
    build = ModelBuild(json.dumps(plain(cfg.model.adapter)))
    model = build(cfg.device)
    concepts = tuple(hydra.utils.instantiate(node) for node in cfg.concepts.values())
    return Parts(
        engine=engine,
        build=build,
        model=model,
        concepts=concepts,
        method=build_method(cfg),
        prompts=build_needed_prompts(cfg, concepts),
        settings=SamplerSettings(**plain(cfg.model.sampler)),
        assault=build_assault(cfg, [concept.name for concept in concepts]),
    )


def build_method(cfg: DictConfig) -> Edit:
    """The chosen edit. Raises UserError for its settings' mistakes."""
    arguments = plain(cfg.edit)
    for key in NOT_ARGUMENTS & arguments.keys():
        del arguments[key]
    method: Edit = hydra.utils.instantiate(arguments, _convert_="all")
    return method


def check_parts(cfg: DictConfig, parts: Parts) -> None:
    """Raise UserError for what would fail later: prompts, evaluators, ablations, attacks.

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
    check_attacks(cfg, parts.assault, parts.model)
    gc.collect()


def make_edit(work: Path, cfg: DictConfig, parts: Parts) -> WeightEdit:
    """The edit, with what it cost and how it went beside it in `work`.

    An earlier attempt's is read back; else it is taken from the store of edits, or made and kept
    there.
    """
    if (work / EDIT).exists() and (work / COST).exists():
        logger.info("the edit was made before")
        return WeightEdit.load(work / EDIT)
    edit, kept = EditStore(cfg.paths.edits).edit(parts.method, parts.model, parts.concepts)
    write_json(work / COST, asdict(edit.cost))  # first: a saved edit always has its cost
    if edit.history:
        lines = "".join(json.dumps(record) + "\n" for record in edit.history)
        write_atomically(work / HISTORY, lines.encode())
    link_or_copy(kept, work / EDIT)
    logger.info("edit of %s weights made in %.1f s", f"{edit.num_weights:,}", edit.cost.seconds)
    return edit


def report_effects(work: Path, cfg: DictConfig, parts: Parts) -> dict[str, Any] | None:
    """Figure 2 in small, if asked for: Pearson r, and every ablation in `effects.csv`."""
    if not cfg.effect.count:
        return None
    wanted = {"count": cfg.effect.count, "share": cfg.effect.share}
    found = correlate_effects(parts.model, parts.concepts[0], parts.method, **wanted, seed=cfg.seed)
    pairs = zip(found.predicted.tolist(), found.measured.tolist(), strict=True)
    lines = [
        "predicted,measured",
        *(f"{predicted!r},{measured!r}" for predicted, measured in pairs),
    ]
    write_atomically(work / "effects.csv", ("\n".join(lines) + "\n").encode())
    return wanted | {"pearson_r": found.pearson_r}


def make_images(
    parts: Parts,
    edit: WeightEdit,
    root: Path,
    shard: tuple[int, int] | None = None,
    watchers: Sequence[Evaluator] = (),
) -> Images:
    """Image sets without and with the edit; without only, for a method that changes nothing.

    The configured engine makes them, a `shard` this process. `watchers` are shown the images that
    they will be asked to score, as far as this process makes them.
    """

    def show(measured: str) -> Watcher:
        asked = [evaluator for evaluator in watchers if evaluator.measures == measured]

        def watch(images: NDArray[np.uint8]) -> None:
            for evaluator in asked:
                evaluator.foresee(images)

        return watch

    edits = {"before": NoEdit()(parts.model, *parts.concepts)}
    if not isinstance(parts.method, NoEdit):
        edits["after"] = edit
    orders = {
        (measured, state): Order(applied, tuple(prompts), parts.settings, root, show(measured))
        for measured, prompts in parts.prompts.items()
        for state, applied in edits.items()
    }
    if shard is None:
        sets = parts.engine.make(parts.model, parts.build, list(orders.values()))
    else:
        sets = [order.generate(parts.model, shard) for order in orders.values()]
    images: Images = {}
    for (measured, state), made in zip(orders, sets, strict=True):
        images.setdefault(measured, {})[state] = made
    return images


def evaluate(
    evaluators: Sequence[Evaluator], targets: Sequence[str], images: Images
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Per-image records, and aggregates over the targets' groups, the others, and each group.

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
            rows += aggregate(evaluator, scored, targets, state)
    return records, rows


def write_presentation(work: Path, cfg: DictConfig, images: Images) -> None:
    """Everything of the folder that is for people: table, picture, configuration, environment."""
    metrics = read_json(work / "metrics.json")
    table = to_markdown(result_table(metrics, read_json(work / COST)))
    write_atomically(work / "table.md", f"{title(metrics)}\n\n{table}".encode())
    if images:
        shown = images[CONCEPT] if CONCEPT in images else images[GENERAL]
        mask = Masker() if cfg.safety.mask and cfg.concept.kind == "explicit" else None
        before_after(shown, metrics["concepts"], work / "before_after.png", mask)
    if (work / HISTORY).exists():
        loss_curve(read_lines(work / HISTORY), work / "training.png")
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


def _describe_edit(cfg: DictConfig, model: DiffusionModel, edit: WeightEdit) -> dict[str, Any]:
    described = {
        "name": cfg.edit.name,
        "fingerprint": edit.fingerprint,
        "num_weights": edit.num_weights,
    }
    if "selection" not in cfg.edit:
        return described | {"ratio": None, "per": None, "component": None}
    weights = [  # in the network's order
        {
            "name": name,
            "changed": edit.changes[name].num_weights if name in edit.changes else 0,
            "of": weight.numel(),
        }
        for name, weight in component_weights(model, cfg.component).items()
    ]
    ratio = {"ratio": cfg.ratio.value, "per": cfg.ratio.per, "component": cfg.component}
    return described | ratio | {"weights": weights}
