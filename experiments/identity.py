"""What determines a result: the part of a configuration that its folder's name is the hash of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.config import plain

# Raise it when the same configuration means another result, so that old folders are not reused.
RESULT_VERSION = 3
# Places in the identity; * is any one key. Whatever is not named here counts as it is written.
BY_CONTENT = (  # a local path stands for what lies there
    "model.adapter.source.path",
    "edit.references.path",
    "evaluator.*.folder",
    "evaluator.*.*.folder",
    "evaluator.*.*.path",
    "attack.judge.folder",
    "attack.judge.*.folder",
    "prompts.path",
    "model.prompts.general.path",
)
LEFT_OUT = (  # changes no result, or (device, dtype) is in the identity once, as it was resolved
    "model.adapter.device",
    "model.adapter.dtype",
    "model.adapter.offload",
    "model.adapter.source.size_gb",
    "model.adapter.source.licence",
    "model.adapter.source.gated",
    "model.adapter.source.note",
    "edit.store",
    "edit.attribution.gradient_checkpointing",
    "edit.attribution.sums_on",
    "edit.values",
    "edit.checkpoints",
    "edit.checkpoint_every",
    "prompts.source.licence",
    "model.prompts.general.source.licence",
    "evaluator.*.device",
    "evaluator.*.*.device",
    "evaluator.*.*.cache",
    "evaluator.*.workers",
    "attack.judge.device",
    "attack.judge.*.device",
    "attack.judge.workers",
    "attack.store",
    "attacks.*.values",
    "attacks.*.gradient_checkpointing",
)


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Everything that determines the result of a settled configuration, as plain JSON data.

    The chosen prompts, evaluators, edit and model are in, with their defaults resolved, and the
    kind of device and the versions of code and libraries that scores and images depend on; where
    results lie and who logs them is not. A local path is replaced by the SHA-256 of its content.
    """
    import torch
    from hydra.utils import get_class

    from cad import score_store
    from cad.edits import Edit
    from cad.runtime import describe_runtime
    from evaluation import generation

    method: type[Edit] = get_class(cfg.edit._target_)
    versions = {
        "images": generation.VERSION,
        "scores": score_store.VERSION,
        "edit": method.version,
    }
    chosen = {
        "version": {"result": RESULT_VERSION, **versions},
        "model": {
            "adapter": plain(cfg.model.adapter),
            "sampler": plain(cfg.model.sampler),
            "prompts": {"general": plain(cfg.model.prompts.general)},
        },
        "concepts": plain(cfg.concepts),
        "edit": plain(cfg.edit),
        "prompts": plain(cfg.prompts),
        "evaluator": plain(cfg.evaluator),
        "seed": cfg.seed,
        "limit": cfg.limit,
        "effect": plain(cfg.effect),
        "dtype": cfg.dtype,
        "runtime": describe_runtime(torch.device(cfg.device)),
    }
    if cfg.attacks:
        chosen |= _chosen_attacks(cfg)
    return {key: _essence(value, (key,)) for key, value in chosen.items()}


def _chosen_attacks(cfg: DictConfig) -> dict[str, Any]:
    """What an identity has of attacks; results without any have none of it."""
    from hydra.utils import get_class

    from evaluation.attacks import search
    from evaluation.attacks.base import Attack
    from experiments.measuring import judge_node

    versions = {"search": search.VERSION}
    for name, node in cfg.attacks.items():
        method: type[Attack] = get_class(node._target_)
        versions[str(name)] = method.version
    shared = plain(cfg.attack) | {"judge": plain(judge_node(cfg))}
    return {"attacks": plain(cfg.attacks), "attack": shared, "attack_versions": versions}


def content_digest(path: Path) -> str:
    """SHA-256 over the names and bytes of a file, or of all files of a folder; "absent" if none."""
    if not path.exists():
        return "absent"
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.suffix
        digest.update(f"{name}\0".encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _essence(value: Any, place: tuple[str, ...]) -> Any:
    """`value` without what lies at LEFT_OUT, and with digests for the paths at BY_CONTENT."""
    if isinstance(value, dict):
        kept = {key: (item, (*place, str(key))) for key, item in value.items()}
        return {
            key: _essence(item, inside)
            for key, (item, inside) in kept.items()
            if not _is_at(inside, LEFT_OUT)
        }
    if isinstance(value, list):
        return [_essence(item, (*place, str(index))) for index, item in enumerate(value)]
    if isinstance(value, str) and _is_at(place, BY_CONTENT):
        return content_digest(Path(value))
    return value


def _is_at(place: tuple[str, ...], patterns: Iterable[str]) -> bool:
    return any(
        len(keys) == len(place)
        and all(key in ("*", at) for key, at in zip(keys, place, strict=True))
        for keys in (pattern.split(".") for pattern in patterns)
    )
