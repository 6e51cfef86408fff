"""Everything that determines a result, said by each of its parts for itself.

A model, an edit, a prompt set, a sampler, an evaluator, an attack: every part answers with its
`settings`, and the identity of a result is the hash of its parts' answers. Weights and other
tensors answer with hashes of their content.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

HASH_LENGTH = 12  # hexadecimal digits of names that people read
LIBRARIES = ("torch", "diffusers", "transformers", "pillow")  # all that numbers or pixels pass
_IMMATERIAL = "immaterial"


def immaterial(default: Any = MISSING) -> Any:
    """A dataclass field that changes memory, place or speed, but never the output."""
    return field(default=default, metadata={_IMMATERIAL: True})


class Identified:
    """A part of an experiment that says what its output depends on.

    Dataclasses answer with their fields, those declared `immaterial` left out; other classes
    override `settings`. `version` is raised when equal settings give another output; `libraries`
    are the packages whose versions can change it, beside those of every computation.
    """

    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ()

    def settings(self) -> dict[str, Any]:
        """All that can change the output and nothing that cannot; JSON-able.

        Loads no weights. Raises UserError for an input, such as a file, that is missing.
        """
        return material(self)

    def identity(self) -> dict[str, Any]:
        """The settings with the class, its version and its libraries' versions; JSON-able."""
        found = {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "version": self.version,
            "settings": self.settings(),
        }
        if self.libraries:
            found["libraries"] = {name: library_version(name) for name in self.libraries}
        return found


def material(part: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not `immaterial`, as JSON data."""
    if not is_dataclass(part):
        raise NotImplementedError(f"{type(part).__name__} does not say its settings")
    counted = [each.name for each in fields(part) if not each.metadata.get(_IMMATERIAL, False)]
    return {name: answer(getattr(part, name)) for name in counted}


def answer(value: Any) -> Any:
    """A setting as JSON data; a part among the settings answers with its identity."""
    if isinstance(value, Identified):
        return value.identity()
    if isinstance(value, Mapping):
        return {str(key): answer(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [answer(item) for item in value]
    return value


def digest(value: Any) -> str:
    """SHA-256 of JSON-able data, whatever the order of its keys. TypeError for anything else."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def short_digest(value: Any) -> str:
    """The first HASH_LENGTH digits of `digest`."""
    return digest(value)[:HASH_LENGTH]


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of the names, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parameter_digest(module: nn.Module) -> str:
    """SHA-256 over all parameters of a module: the identity of its weights, as loaded."""
    return tensors_digest(module.named_parameters())


def describe_runtime(device: torch.device | str) -> dict[str, Any]:
    """The device's kind and the libraries that compute; JSON-able. Other ones round differently."""
    versions = {name: library_version(name) for name in LIBRARIES}
    return {"device": torch.device(device).type, "versions": versions}


@functools.cache
def library_version(name: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return installed(name)
    except PackageNotFoundError:
        return "not installed"
