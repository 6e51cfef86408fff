"""Parts built of a configuration's values, if these fit: a part's annotations say so.

They are checked before the part is made, so that a misfit is told by its key, and nothing of
another type comes to code that trusts its annotations.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from cad.errors import UserError

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
    Path: "a path",
}


def build(
    node: DictConfig, target: Callable[..., Any] | None = None, place: str | None = None
) -> Any:
    """The object that a node describes: `target`, or its `_target_`, called with its other values.

    Raises UserError, naming the key, for a node that is no part, for a value of another type than
    the target asks for, and for a key that it does not have; and what the target raises. `place` is
    the node's key, where it may be none.
    """
    place = place or (node._get_full_key(None) if OmegaConf.is_config(node) else "it")
    check_arguments(node, target or target_of(node, place), place)
    if target is not None:
        given: Any = OmegaConf.to_container(node, resolve=True)
        return target(**given)
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, UserError):
            raise
        part = str(error).rpartition("full_key: ")[2]
        raise UserError(_by_given_key(node, part, str(error.__cause__))) from error


def build_each(cfg: DictConfig, group: str) -> tuple[Any, ...]:
    """The objects of a group of which several may be chosen, or none."""
    nodes = (cfg[group] or {}).items()
    return tuple(build(node, place=f"{group}.{name}") for name, node in nodes)


def _by_given_key(node: DictConfig, part: str, message: str) -> str:
    """A part's message that begins with a key of its own: the key of the value that it was given.

    The part at edit.pictures says "edit.references.steps=0 ..."; it is model.sampler.steps.
    """
    key = re.match(r"[\w.]*", message)[0]  # type: ignore[index]  # matches everything
    section, name = OmegaConf.select(node._get_root(), part), key.rpartition(".")[2]
    if not isinstance(section, DictConfig) or name not in section:
        return message
    return origin(section, name) + message.removeprefix(key)


def target_of(node: Any, key: str) -> Callable[..., Any]:
    """What a node's `_target_` names. UserError where there is none."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(f"{key}={node} is no part: its key _target_ names the class")
    try:
        found: Callable[..., Any] = hydra.utils.get_object(node._target_)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}._target_={node._target_} is nothing to build: {reason}") from error
    return found


def check_arguments(node: DictConfig, target: Callable[..., Any], place: str) -> None:
    """Raise UserError for values of a node, and of nodes in it, that the target cannot take.

    That is an unknown key, or a value of another type than annotated. `place` begins the keys.
    """
    parameters = inspect.signature(target).parameters
    is_open = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    described = target.__init__ if inspect.isclass(target) and not is_dataclass(target) else target
    try:
        hints = typing.get_type_hints(described)
    except NameError:  # of a type that is imported for type checkers alone
        hints = {}
    for name, value in node.items():
        key, hint = origin(node, str(name)), hints.get(str(name), Any)
        if isinstance(value, DictConfig) and "_target_" in value:
            check_arguments(value, target_of(value, key), key)
        if str(name).startswith("_"):
            continue
        if name not in parameters and not is_open:
            called = getattr(target, "__name__", target)
            raise UserError(f"{key} is unknown; {called} takes: {', '.join(parameters)}")
        if not _fits(value, hint):
            raise UserError(f"{key}={value} is not allowed; it is {_words(hint)}")
        if name == "device" and value not in ("auto", "cpu"):
            from cad.models.base import resolve_device  # PyTorch, which --help need not import

            resolve_device(value, key)
    given = () if is_open or node.get("_partial_") else parameters.values()
    needed = (
        each.name
        for each in given
        if each.default is each.empty and each.kind != each.VAR_POSITIONAL
    )
    missing = [name for name in needed if name not in node]
    if missing:
        raise UserError(f"{place}.{missing[0]} is missing: set {place}.{missing[0]}")


def origin(node: DictConfig, name: str) -> str:
    """The key that a value of the node is taken from: its own, or the one that it interpolates."""
    return str(node._get_node(name)._dereference_node()._get_full_key(None))  # type: ignore[union-attr]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type; a node is if its `_target_` makes one."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value == "" and Path in inner:  # which would be the working directory
            return False
        return any(_fits(value, each) for each in inner)
    if kind is typing.Literal:
        return value in inner
    if kind and issubclass(kind, Mapping):
        return isinstance(value, Mapping) and all(_fits(each, inner[1]) for each in value.values())
    if kind and issubclass(kind, Sequence):
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(_fits(each, inner[0]) for each in value)
    if hint in (bool, int, float, str, type(None)):
        return type(value) is hint or (hint is float and type(value) is int)
    if hint is Path:
        return isinstance(value, str) and bool(value)
    if hint is Any or not isinstance(hint, type):
        return True
    if not isinstance(value, DictConfig) or "_target_" not in value:
        return False
    made = hydra.utils.get_object(value._target_)
    return not isinstance(made, type) or issubclass(made, hint)


def _words(hint: Any) -> str:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(map(_words, inner))
    if kind is typing.Literal:
        return " or ".join(map(str, inner))
    if kind and issubclass(kind, Mapping):
        return f"names, and for each {_words(inner[1])}"
    if kind and issubclass(kind, Sequence):
        return f"a list, of which each is {_words(inner[0])}"
    return WORDS.get(hint) or f"a {hint.__name__}, whose class _target_ names"
