"""Overrides that a run does not heed: what somebody asks for and would not get is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from cad.errors import UserError
from experiments.run.configuration import CONF, plain

PROBE = "?"  # a value that no key has
USED = (  # of a run's configuration; what they interpolate is used too
    *("model.name", "model.adapter", "model.sampler", "model.prompts", "model.concepts"),
    *("concepts", "edit", "prompts", "evaluator", "attacks", "engine", "logger", "paths"),
    *("seed", "limit", "device", "dtype", "safety", "effect.count"),
)


def check_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UserError for an override of a run that changes nothing, and for a choice named twice.

    An override has an effect if another value of its key gives another run.
    """
    used = _used(cfg)
    for given in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = given.key_or_group, given.value()
        if (CONF / key).is_dir():
            if isinstance(value, list) and len({*map(str, value)}) < len(value):
                raise UserError(f"{given.input_line}: one is named twice; name each once")
        elif not given.is_delete() and _without(cfg, key) == used:
            raise UserError(
                f"{key} has no effect on this run of model={cfg.model.name}, "
                f"edit={cfg.edit._target_.rpartition('.')[2]}: leave {given.input_line} out"
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
