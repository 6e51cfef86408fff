"""Configurations of conf/: how they are composed, and which values cannot work.

Light on purpose: PyTorch comes with the functions that are called for a job, so `run.py --help`
answers at once.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, Node, OmegaConf

from cad.checks import flag, number, optional, seed, texts, whole
from cad.errors import UserError
from cad.places import IS_CHECKOUT, REPOSITORY
from experiments.run.arguments import build_each

CONF = REPOSITORY / "conf"
GROUPS = {  # the key of a prompt set's configuration that names the groups of its images
    "evaluation.prompts.ObjectPrompts": "subjects",
    "evaluation.prompts.StylePrompts": "styles",
}
CHOSEN = ("model", "concepts", "edit", "engine", "logger", "paths")  # no run without one of each
SECTIONS = (  # keys with keys of their own
    *(f"model.{name}" for name in ("source", "adapter", "sampler", "attribution", "prompts")),
    *("model.evaluators", "ratio", "after", "attack", "effect", "safety", "coco", "making"),
    *("values", "quick", "search"),
)
OPTIONAL = ("prompts", "evaluator", "attacks")  # sections, or nothing
FOLDERS = (  # that are written to, where they are chosen
    *(f"paths.{name}" for name in ("results", "runs", "images", "scores", "edits", "statistics")),
    *("attack.store", "edit.store.root", "edit.checkpoints", "logger.folder"),
    *("work", "output", "store"),  # of other programs than run.py
)
FILE = "logger.path"  # that is written to; a file, not a folder
LARGEST = 2**63  # of the numbers that libraries take

PROBE = "?"  # a value that no key has
USED = (  # of a run's configuration; what they interpolate is used too
    *("model.name", "model.adapter", "model.sampler", "model.prompts.general", "model.concepts"),
    *("concepts", "edit", "prompts", "evaluator", "attacks", "engine", "logger", "paths"),
    *("seed", "limit", "others_per_class", "device", "dtype", "safety"),
    *("effect.count", "effect.seeds"),
)

Compose = Callable[..., DictConfig]
"""compose(overrides, name="config"): what a program of the suite would be given."""


def register_resolvers() -> None:
    """Make the resolvers of conf/ known to OmegaConf: `${first:...}`, `${setting:...}` and others.

    `short_hash` is cached in the configuration, so all jobs of a multirun share its folder.
    """
    OmegaConf.register_new_resolver("first", first, replace=True)
    OmegaConf.register_new_resolver("setting", setting, replace=True)
    OmegaConf.register_new_resolver("default_evaluators", default_evaluators, replace=True)
    OmegaConf.register_new_resolver("short_hash", short_hash, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)
    home = REPOSITORY if IS_CHECKOUT else Path.cwd()
    OmegaConf.register_new_resolver("home", lambda: str(home), replace=True)


@contextmanager
def composer(folders: Sequence[str | Path] = ()) -> Iterator[Compose]:
    """Composes configurations of conf/ as the programs do, also inside one of them.

    Options are looked for in `folders` too, as with --config-dir.
    """
    register_resolvers()
    own = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"]
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()  # Hydra composes one program's configuration at a time
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield lambda overrides, name="config": hydra.compose(
                name, [*(own if folders else []), *overrides]
            )
    finally:
        GlobalHydra.instance().hydra = outer


def compose(
    overrides: Sequence[str] = (), name: str = "config", folders: Sequence[str | Path] = ()
) -> DictConfig:
    """One configuration of `composer`."""
    with composer(folders) as composed:
        return composed(overrides, name)


def first(nodes: DictConfig) -> Any:
    """The first value of a mapping."""
    return next(iter(nodes.values()))


def setting(place: str, *, _root_: DictConfig, _node_: Node) -> Any:
    """The default of a setting: what the table `values.<place>` has for model and concept.

    A table has a row for some models and one called "default". A row is a value, or has values by
    concept or kind of concept. The first that there is of these is taken, for the first concept:
    <model>.<concept>, <model>.<kind>, default.<concept>, default.<kind>. A value of `quick`
    (debug=tiny) comes before all. Raises UserError where there is none.
    """
    name = place.rpartition(".")[2]
    if name in _root_.quick:
        return _root_.quick[name]
    model, concept = _root_.model, _root_.concept
    table = OmegaConf.select(_root_, f"values.{place}")
    for row in (table[key] for key in (model.name, "default") if key in table):
        if not isinstance(row, DictConfig):
            return row
        for key in (concept.name, concept.kind):
            if key in row:
                return row[key]
    key = _node_._get_full_key(None)
    raise UserError(
        f"{key} has no default for concept={concept.name} (kind {concept.kind}) of "
        f"model={model.name}: set {key}"
    )


def default_evaluators(model: DictConfig, concept: DictConfig) -> DictConfig | None:
    """Those that the model names for the concept's kind; none for weights that mean nothing.

    Raises UserError where it draws the kind and names none.
    """
    found = model.evaluators[concept.kind] if model.weights == "published" else None
    if not found and model.weights == "published" and model.prompts[concept.kind] is not None:
        raise UserError(
            f"model.evaluators.{concept.kind}={found} measures nothing: name what is measured, "
            "evaluator=NAME, or several, evaluator=[a,b]"
        )
    return found


def short_hash(value: Any) -> str:
    """The name of a log's folder: `cad.identity.short_digest` of a configuration's value."""
    from cad.identity import short_digest  # imports PyTorch

    return short_digest(plain(value))


def plain(node: Any) -> Any:
    """A configuration node as plain resolved dictionaries and lists; other values as they are."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def settle(cfg: DictConfig) -> DictConfig:
    """A copy of `cfg` whose device and dtype are chosen: "auto" becomes what this machine has.

    Raises UserError for a device or dtype that is unknown or not there.
    """
    from cad.models.base import resolve_device, resolve_dtype

    settled: DictConfig = cfg.copy()
    device = resolve_device(cfg.device)
    settled.device = str(device)
    settled.dtype = str(resolve_dtype(cfg.dtype, device)).removeprefix("torch.")
    return settled


def check(cfg: DictConfig) -> tuple[Any, ...]:
    """The concepts. Raises UserError for a value that cannot work, or a senseless combination.

    What a part checks when it is made (`build`) is left to it.
    """
    concepts = _check_chosen(cfg)
    _check_named(cfg)
    _check_values(plain(cfg))
    _check_concepts(cfg)
    _check_weights(cfg)
    _check_prompts(cfg)
    flag("safety.mask", cfg.safety.mask)
    seed("seed", cfg.seed)
    whole(1)("images_per_class", cfg.images_per_class)
    optional(whole(1))("limit", cfg.limit)
    optional(whole(0))("others_per_class", cfg.others_per_class)
    optional(whole(1))("attack.limit", cfg.attack.limit)
    _check_effect(cfg)
    return concepts


def check_concept(cfg: DictConfig, concept: DictConfig) -> None:
    """Raise UserError for a concept that the model does not know."""
    known = optional(texts)("model.concepts", cfg.model.concepts)
    if known is not None and concept.name not in known:
        raise UserError(
            f"concept={concept.name} is unknown to model={cfg.model.name}, which draws: "
            f"{', '.join(known)}. Choose one of these, or another model"
        )


def check_results(cfg: DictConfig, *more: str) -> None:
    """Make the folder of all results. UserError for a folder, also of keys `more`, of no use."""
    _check_sections(cfg)
    _check_named(cfg)
    for key in (*FOLDERS, *more, FILE):
        given = OmegaConf.select(cfg, key, default=PROBE)
        if given == PROBE or (given is None and key == "edit.checkpoints"):
            continue
        place = Path(_check_folder(key, given))
        if key == FILE and place.is_dir():
            raise UserError(f"{key}={place} is a folder: name a file, {key}=DIR/metrics.csv")
        place = place.parent if key == FILE else place
        try:
            if key == "paths.results":
                place.mkdir(parents=True, exist_ok=True)
            there = next(each for each in (place, *place.parents) if os.path.lexists(each))
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise UserError(
                f"{key}={place} cannot be written to ({os.strerror(error.errno or 0)}); choose "
                f"another folder with {key}=DIR"
            ) from error


def check_once(overrides: Sequence[str]) -> None:
    """Raise UserError where a key is given two values, of which one would be lost."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = [(each.key_or_group, each.package, each.type) for each in parsed]
    for (key, *_), count in Counter(given).items():
        if count > 1:
            told = " ".join(str(each.input_line) for each in parsed if each.key_or_group == key)
            raise UserError(f"{told}: {key} is given {count} values; give it one")


def check_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UserError for an override of a run that changes nothing, and for a choice named twice.

    An override has an effect if another value of its key gives another run. A setting of a part
    cannot be deleted: the part would fall back on a default that no file shows.
    """
    used = _used(cfg)
    for given in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = given.key_or_group, given.value()
        if (CONF / key).is_dir():
            if isinstance(value, list) and len({*map(str, value)}) < len(value):
                raise UserError(f"{given.input_line}: one is named twice; name each once")
            continue
        section, _, name = key.rpartition(".")
        part = OmegaConf.select(cfg, section) if section and given.is_delete() else None
        if isinstance(part, DictConfig) and "_target_" in part and name not in part:
            raise UserError(f"{given.input_line}: {key} needs a value; give it one, {key}=...")
        if _without(cfg, key) == used:
            raise UserError(
                f"{key} has no effect on this run of model={cfg.model.name}, "
                f"edit={cfg.edit._target_.rpartition('.')[2]}: leave {given.input_line} out"
            )


def choices(group: str) -> str:
    """What there is in a group of conf/, for messages."""
    return ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


def adding(concept: DictConfig) -> str:
    """The overrides that add a concept to prompts: a set by its name, and the entry."""
    name, key = ("styles", "styles") if concept.kind == "style" else ("objects", "subjects")
    return f"prompts={name} '+prompts.{key}.{concept.name}={concept.text}'"


def _check_chosen(cfg: DictConfig) -> tuple[Any, ...]:
    for group in CHOSEN:
        if not isinstance(OmegaConf.select(cfg, group), DictConfig) or not cfg[group]:
            name = group.removesuffix("s") if group == "concepts" else group
            given = cfg.get(group)
            raise UserError(f"{name}={given} is not allowed; choose one of {choices(name)}")
    concepts = build_each(cfg, "concepts")  # their names and kinds choose much of the rest
    _check_sections(cfg, *OPTIONAL)
    return concepts


def _check_sections(cfg: DictConfig, *more: str) -> None:
    for key in (*SECTIONS, *more):
        given = OmegaConf.select(cfg, key, default=PROBE)
        absent = (PROBE, None) if key in OPTIONAL else (PROBE,)
        if not isinstance(given, DictConfig) and given not in absent:
            raise UserError(f"{key}={given} is not allowed: it has keys of its own, {key}.NAME=...")


def _check_values(value: Any, key: str = "") -> None:
    """Refuse, wherever they stand, numbers that nobody can compute with and texts of no file."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in items:
            _check_values(each, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) < LARGEST):
        raise UserError(f"{key}={value} is not allowed: numbers are finite, and below 2^63")
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):  # bytes that are no text
        raise UserError(f"{key}={value!r} is not allowed: texts are UTF-8, without NUL")


def _check_named(cfg: DictConfig) -> None:
    for name, given in (cfg.get("paths") or {}).items():
        _check_folder(f"paths.{name}", given)
    if cfg.get("attacks"):
        _check_folder("attack.store", cfg.attack.store)


def _check_folder(key: str, given: Any) -> str:
    """The name of a folder; UserError for what is none, or would be one called "~"."""
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        raise UserError(f"{key} is {given or 'empty'}: name a folder, {key}=DIR")
    if given.startswith("~"):
        raise UserError(f"{key}={given}: write the folder in full, ~ stands for nothing here")
    return given


def _check_concepts(cfg: DictConfig) -> None:
    kinds = {concept.name: concept.kind for concept in cfg.concepts.values()}
    if len(set(kinds.values())) > 1:
        raise UserError(
            f"concept=[{','.join(kinds)}] are of different kinds ({', '.join(kinds.values())}); "
            "several concepts are edited and measured together only if they are of one kind"
        )
    groups = _groups(cfg)
    for concept in cfg.concepts.values():
        check_concept(cfg, concept)
        if groups and concept.name not in groups:
            raise UserError(
                f"concept={concept.name} has no images in the chosen prompts, whose groups are: "
                f"{', '.join(groups)}. Choose a concept among them, other prompts (prompts=NAME), "
                f"or add it: {adding(concept)}"
            )


def _groups(cfg: DictConfig) -> list[str]:
    """The groups that the chosen prompts announce: their styles or subjects; [] if they do not."""
    key = GROUPS.get(cfg.prompts._target_) if cfg.prompts and "_target_" in cfg.prompts else None
    names = cfg.prompts[key] if key else None
    return [str(name) for name in names] if isinstance(names, DictConfig) else []


def _check_weights(cfg: DictConfig) -> None:
    if cfg.model.weights == "published":
        return
    if "weights" not in cfg.model.adapter:
        raise UserError(
            f"model.weights={cfg.model.weights} is not for model={cfg.model.name}, whose weights "
            "are part of the repository; use model.weights=published, or model=sd14"
        )
    for group, chosen in (("evaluator", cfg.evaluator), ("attack", cfg.attacks)):
        if chosen:
            raise UserError(
                f"{group}={','.join(chosen)} has nothing to measure: images of "
                f"model.weights={cfg.model.weights} mean nothing. Leave {group} out: the edit is "
                "made, and its time and memory are reported"
            )


def _check_prompts(cfg: DictConfig) -> None:
    if cfg.prompts is None:
        return
    if "_target_" not in cfg.prompts:
        given = ", ".join(str(key) for key in cfg.prompts)
        raise UserError(
            f"prompts has {given} alone, which is no prompt set: the default prompts belong to the "
            "model and cannot be added to. Name the set and add to that, for example "
            f"{adding(cfg.concept)}"
        )
    own = "images_per_class" in cfg.prompts
    if not own and cfg.images_per_class != cfg.model.images_per_class:
        raise UserError(
            f"images_per_class={cfg.images_per_class} has no effect on the chosen prompts, a set "
            "of its own size: take the first with limit=N, or choose others, such as "
            "prompts=objects"
        )


def _check_effect(cfg: DictConfig) -> None:
    count = whole(0)("effect.count", cfg.effect.count)
    number(lambda x: 0 < x < 1, "a fraction of the weights")("effect.share", cfg.effect.share)
    if count == 1:
        raise UserError("effect.count=1: a correlation needs at least 2 ablations; 0 means none")
    whole(0)("effect.seeds", cfg.effect.seeds)
    for key in ("count", "seeds"):
        if cfg.effect[key] and len(cfg.concepts) > 1:
            raise UserError(
                f"effect.{key}={cfg.effect[key]} looks at the objective of one concept; chosen "
                f"are {', '.join(cfg.concepts)}. Use effect.{key}=0 or name one"
            )


def _used(cfg: DictConfig) -> dict[str, Any]:
    """All that the run is made of, resolved."""
    attacked = ("attack", "model.evaluators") if cfg.attacks else ()
    compared = ("effect.share",) if cfg.effect.count else ()
    return {key: plain(OmegaConf.select(cfg, key)) for key in (*USED, *attacked, *compared)}


def _without(cfg: DictConfig, key: str) -> dict[str, Any] | None:
    """What is used where the key has another value; None where nothing can be composed of that."""
    other = cfg.copy()
    try:
        OmegaConf.update(other, key, PROBE, merge=False, force_add=True)
        return _used(other)
    except Exception:  # whatever a resolver makes of the probe: it was looked at
        return None
