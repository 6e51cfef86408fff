"""From a composed configuration to one experiment: defaults and checks.

Light on purpose: PyTorch comes with the functions that are called for a job, so `run.py --help`
answers at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from cad.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
HASH_LENGTH = 12  # hexadecimal digits
SHARD = re.compile(r"(\d+)/(\d+)")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
GROUPS = {  # the key of a prompt set's configuration that names the groups of its images
    "evaluation.prompts.ObjectPrompts": "subjects",
    "evaluation.prompts.StylePrompts": "styles",
}


def register_resolvers() -> None:
    """Make the resolvers of conf/ known to OmegaConf: `${first:...}`, `${setting:...}` and others.

    `short_hash` is cached in the configuration, so all jobs of a multirun share its folder.
    """
    OmegaConf.register_new_resolver("first", first, replace=True)
    OmegaConf.register_new_resolver("setting", setting, replace=True)
    OmegaConf.register_new_resolver("default_ratio", default_ratio, replace=True)
    OmegaConf.register_new_resolver("default_per", default_per, replace=True)
    OmegaConf.register_new_resolver("default_evaluators", default_evaluators, replace=True)
    OmegaConf.register_new_resolver("short_hash", short_hash, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)


def first(nodes: DictConfig) -> Any:
    """The first value of a mapping."""
    return next(iter(nodes.values()))


def setting(name: str, *, _root_: DictConfig, _parent_: DictConfig) -> Any:
    """The value of `values.<name>` of the method, an edit or attack, that it is a setting of.

    The one that fits the model and the (first) concept, in this order: <model>.<concept>,
    <model>.<kind of concept>, default.<concept>, default.<kind>. What `quick` has (debug=tiny)
    comes before all. Raises UserError where there is none of them.
    """
    if name in _root_.quick:
        return _root_.quick[name]
    method, model, concept = _method(_parent_), _root_.model, _root_.concept
    tables = method["values"][name]
    for table in (tables.get(model.name, {}), tables.get("default", {})):
        for key in (concept.name, concept.kind):
            if key in table:
                return table[key]
    place = _parent_._get_full_key(name)
    raise UserError(
        f"{place.split('.')[0].removesuffix('s')}={method.name} has no default of {name} for "
        f"concept={concept.name} (kind {concept.kind}) of model={model.name}: set {place}"
    )


def _method(node: DictConfig) -> DictConfig:
    """The configuration with `values` that a node is a part of."""
    while "values" not in node:
        node = cast(DictConfig, node._get_parent())
    return node


def default_ratio(ratios: DictConfig, edit: str, concept: DictConfig) -> float | None:
    """The ratio that a model's `ratios` name for an edit and a concept, a fraction in (0, 1].

    In this order: `ratios.<edit>.by_concept.<concept>`, `ratios.<edit>.<kind of concept>`. None
    where the model has no ratios for the edit (`edit=none`, methods without a ratio) or none for
    the kind; `check` refuses the latter for an edit that needs one.
    """
    if edit not in ratios:
        return None
    table = ratios[edit]
    if concept.name in table.by_concept:
        return float(table.by_concept[concept.name])
    return float(table[concept.kind]) if concept.kind in table else None


def default_per(ratios: DictConfig, edit: str) -> str:
    """What a ratio is of, by default: `ratios.<edit>.per` if there is one, else `ratios.per`."""
    own = ratios[edit].get("per") if edit in ratios else None
    return str(own or ratios.per)


def default_evaluators(model: DictConfig, concept: DictConfig) -> DictConfig | None:
    """Those that the model names for the concept's kind; none for weights that mean nothing."""
    return model.evaluators[concept.kind] if model.weights == "published" else None


def check(cfg: DictConfig) -> None:
    """Raise UserError for the first value that cannot work, before anything is loaded."""
    _check_weights(cfg)
    _check_prompts(cfg)
    _check_concepts(cfg)
    _check_ratio(cfg)
    _check_choices(cfg)
    _check_count("seed", cfg.seed, 0)
    _check_count("images_per_class", cfg.images_per_class, 1)
    _check_count("model.sampler.steps", cfg.model.sampler.steps, 1)
    _check_count("model.sampler.batch_size", cfg.model.sampler.batch_size, 1)
    guidance = cfg.model.sampler.guidance
    if not isinstance(guidance, int | float) or not math.isfinite(guidance):
        raise UserError(f"model.sampler.guidance={guidance} is not allowed: it is a finite number")
    if cfg.limit is not None:
        _check_count("limit", cfg.limit, 1)
    _check_effect(cfg)
    _check_attack(cfg)
    parse_shard(cfg.shard)


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """ "2/4" as (1, 4): the shard's number from 0, and how many there are. UserError otherwise."""
    if text is None:
        return None
    found = SHARD.fullmatch(str(text))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"shard={text} is not allowed: the second of four is shard=2/4")
    return int(found[1]) - 1, int(found[2])


def _check_choices(cfg: DictConfig) -> None:
    from cad.components import UNET_COMPONENTS
    from cad.models.base import DTYPES
    from cad.selection import PER

    _check_choice("component", cfg.component, UNET_COMPONENTS)
    _check_choice("ratio.per", cfg.ratio.per, PER)
    _check_choice("dtype", cfg.dtype, ("auto", *DTYPES))
    if not DEVICE.fullmatch(str(cfg.device)):
        raise UserError(f"device={cfg.device} is unknown; allowed: auto, cpu, cuda, cuda:N")


def _check_effect(cfg: DictConfig) -> None:
    _check_count("effect.count", cfg.effect.count, 0)
    if cfg.effect.count == 1:
        raise UserError("effect.count=1: a correlation needs at least 2 ablations; 0 means none")
    _check_fraction("effect.share", cfg.effect.share)
    if cfg.effect.share == 1:
        raise UserError("effect.share=1 leaves nothing to choose; it lies above 0 and below 1")
    if cfg.effect.count and "attribution" not in cfg.edit:
        raise UserError(
            f"effect.count={cfg.effect.count} needs an edit with an attribution; "
            f"edit={cfg.edit.name} has none. Use effect.count=0 or edit=erase"
        )
    if cfg.effect.count and len(cfg.concepts) > 1:
        raise UserError(
            f"effect.count={cfg.effect.count} looks at the objective of one concept; chosen are "
            f"{', '.join(cfg.concepts)}. Use effect.count=0 or name one"
        )


def _check_attack(cfg: DictConfig) -> None:
    from cad.models.base import PUBLISHED

    if cfg.attack.limit is not None:
        _check_count("attack.limit", cfg.attack.limit, 1)
    if cfg.attacks and cfg.model.weights != PUBLISHED:
        raise UserError(
            f"attack={','.join(cfg.attacks)} has nothing to find: images of model.weights="
            f"{cfg.model.weights} mean nothing. Leave attack out"
        )


def settle(cfg: DictConfig, *, for_gpu: bool = False) -> DictConfig:
    """A copy of `cfg` whose device and dtype are chosen: "auto" becomes what this machine has.

    `for_gpu`: what it becomes on a machine that has a GPU; then nobody asks what this one has.
    Raises UserError for a device that is not there.
    """
    import torch

    from cad.models.base import resolve_device, resolve_dtype

    settled: DictConfig = cfg.copy()
    if for_gpu:
        device = torch.device("cuda" if cfg.device == "auto" else cfg.device)
    else:
        device = resolve_device(cfg.device)
    settled.device = str(device)
    settled.dtype = str(resolve_dtype(cfg.dtype, device)).removeprefix("torch.")
    return settled


def short_hash(value: Any) -> str:
    """The first HASH_LENGTH digits of the SHA-256 of a value's JSON."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def plain(node: Any) -> Any:
    """A configuration node as plain resolved dictionaries and lists; other values as they are."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _check_weights(cfg: DictConfig) -> None:
    from cad.models.base import PUBLISHED, WEIGHTS

    _check_choice("model.weights", cfg.model.weights, WEIGHTS)
    if cfg.model.weights == PUBLISHED:
        return
    if "weights" not in cfg.model.adapter:
        raise UserError(
            f"model.weights={cfg.model.weights} is not for model={cfg.model.name}, whose weights "
            "are part of the repository; use model.weights=published, or model=sd14"
        )
    if cfg.evaluator:
        raise UserError(
            f"evaluator={','.join(cfg.evaluator)} has nothing to measure: images of "
            f"model.weights={cfg.model.weights} mean nothing. Leave evaluator out: the edit is "
            "made, and its time and memory are reported"
        )


def _check_prompts(cfg: DictConfig) -> None:
    if cfg.prompts is None:
        return
    if "_target_" in cfg.prompts:
        _check_images_per_class(cfg)
        return
    given = ", ".join(str(key) for key in cfg.prompts)
    key = "styles" if cfg.concept.kind == "style" else "subjects"
    raise UserError(
        f"prompts has {given} alone, which is no prompt set: the default prompts belong to the "
        "model and cannot be added to. Name the set and add to that, for example "
        f"{_adding(cfg.concept, key)}"
    )


def _check_images_per_class(cfg: DictConfig) -> None:
    if "images_per_class" in cfg.prompts or cfg.images_per_class == cfg.model.images_per_class:
        return
    raise UserError(
        f"images_per_class={cfg.images_per_class} has no effect on the chosen prompts, a set of "
        "its own size: take the first with limit=N, or choose others, such as prompts=objects"
    )


def _check_concepts(cfg: DictConfig) -> None:
    kinds = {concept.name: concept.kind for concept in cfg.concepts.values()}
    if len(set(kinds.values())) > 1:
        raise UserError(
            f"concept=[{','.join(kinds)}] are of different kinds ({', '.join(kinds.values())}); "
            "several concepts are edited and measured together only if they are of one kind"
        )
    for concept in cfg.concepts.values():
        _check_concept(cfg, concept)


def _check_concept(cfg: DictConfig, concept: DictConfig) -> None:
    known = cfg.model.concepts
    if known is not None and concept.name not in known:
        raise UserError(
            f"concept={concept.name} is unknown to model={cfg.model.name}, which draws: "
            f"{', '.join(known)}. Choose one of these, or another model"
        )
    groups = concept_groups(cfg)
    if groups and concept.name not in groups:
        raise UserError(
            f"concept={concept.name} has no images in the chosen prompts, whose groups are: "
            f"{', '.join(groups)}. Choose a concept among them, other prompts (prompts=NAME), or "
            f"add it: {_adding(concept, 'styles' if 'styles' in cfg.prompts else 'subjects')}"
        )


def _adding(concept: DictConfig, key: str) -> str:
    """What to type so that the concept is among the prompts: the set by its name, and the entry."""
    prompt_set = "styles" if key == "styles" else "objects"
    return f"prompts={prompt_set} '+prompts.{key}.{concept.name}={concept.text}'"


def concept_groups(cfg: DictConfig) -> list[str]:
    """The groups that the chosen prompts announce: their styles or subjects; [] if they do not."""
    if cfg.prompts is None or cfg.prompts._target_ not in GROUPS:
        return []
    return [str(name) for name in cfg.prompts[GROUPS[cfg.prompts._target_]]]


def _check_ratio(cfg: DictConfig) -> None:
    if "selection" not in cfg.edit:
        return
    if cfg.ratio.value is None:
        raise UserError(
            f"conf/model/{cfg.model.name}.yaml has no default ratio for edit={cfg.edit.name} of "
            f"concept={cfg.concept.name} (kind {cfg.concept.kind}): set ratio.value, a fraction "
            "in (0, 1]"
        )
    _check_fraction("ratio.value", cfg.ratio.value)


def _check_fraction(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UserError(
            f"{key}={value} is not allowed: it is a fraction of the weights, above 0 and at most 1"
        )


def _check_count(key: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{key}={value} is not allowed: it is a whole number, at least {least}")


def _check_choice(key: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value} is not allowed; choose one of {', '.join(allowed)}")
