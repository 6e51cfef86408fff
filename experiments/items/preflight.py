"""Whether this machine can make a model's runs at all, asked once before any of them is tried."""

from __future__ import annotations

from huggingface_hub import try_to_load_from_cache
from hydra.utils import instantiate
from omegaconf import DictConfig

from cad.errors import UserError
from cad.models.base import PUBLISHED, resolve_device
from cad.models.hub import INDEX, Source
from cad.models.stable_diffusion_3 import T5_PARTS


def check_machine(cfg: DictConfig, instead: str, *, gpu: bool = True) -> None:
    """Raise UserError if the run's model needs a GPU or weights that are not here.

    Downloads weights that can be downloaded, but not where a GPU lacks. `instead` is a command
    that works without them. A device that is named (device=cpu) is taken as meant. `gpu`: whether
    this machine has to have one; not if the runs go to others.
    """
    if gpu and cfg.device == "auto" and not gpu_is_here(cfg):
        raise UserError(
            f"model={cfg.model.name} cannot be run here: {'; '.join(lacking(cfg))}. In its "
            f"miniature the item can be made here and now: {instead}. (OVERRIDES=device=cpu has "
            "it made without a GPU, in weeks; OVERRIDES=model.source.path=DIR names other weights.)"
        )
    if cfg.model.weights != PUBLISHED:
        return
    source: Source = instantiate(cfg.model.source)
    adapter = cfg.model.adapter
    try:
        source.locate(T5_PARTS if "t5" in adapter and not adapter.t5 else ())
    except UserError as error:
        raise UserError(f"{error} The miniature: {instead}") from error


def lacking(cfg: DictConfig, *, gpu: bool = True) -> list[str]:
    """What the run's model needs and this machine has not, in words; `gpu` as above."""
    found = [] if not gpu or gpu_is_here(cfg) else ["it needs a GPU, and this machine has none"]
    if cfg.model.weights == PUBLISHED and not weights_are_here(cfg):
        source = cfg.model.source
        gated = ", gated: accept the licence there and set a token" if source.gated else ""
        found.append(
            f"its weights are not on this machine; they come from {source.repo} on the Hugging "
            f"Face hub (revision {source.revision}, about {source.size_gb:g} GB, licence "
            f"{source.licence}{gated}), and are downloaded when it is made where there is "
            "a GPU"
        )
    return found


def gpu_is_here(cfg: DictConfig) -> bool:
    """Whether a GPU was named, or there is one."""
    return cfg.device not in ("auto", "cpu") or resolve_device("auto").type != "cpu"


def weights_are_here(cfg: DictConfig) -> bool:
    """Whether the model's folder, or its index in the hub's cache, is on this machine.

    Asks nobody else, and does not look whether all files are there.
    """
    source: Source = instantiate(cfg.model.source)
    if source.path is not None:
        return True  # and if it is not, the run says what is missing
    found = try_to_load_from_cache(source.repo or "", INDEX, revision=source.revision)
    return isinstance(found, str)
