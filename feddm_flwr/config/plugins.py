"""Extensions of the user's own: modules in `feddm_flwr/contrib/`, which Flower sends to every node with the app.

A key that takes them takes a built-in name, or `feddm_flwr.contrib.MODULE:NAME`. That there is such a thing is found
out before anything starts, without importing it: an extension may need torch. What it is, is checked where it is used.
"""

from __future__ import annotations

import ast
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from feddm_flwr.config.fields import PLUGIN_MARK, ConfigError

T = TypeVar("T")

PREFIX = "feddm_flwr.contrib."
_NAME = re.compile(rf"{re.escape(PREFIX)}[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_plugin(name: str) -> bool:
    """Tells whether a value of a key names an extension."""
    return PLUGIN_MARK in name


def look_first_in(folder: Path) -> None:
    """Lets the extensions in a folder be found first, as those of an app are that is no clone; of the same package, or
    where there is no such folder, that changes nothing."""
    places = import_module(PREFIX.rstrip(".")).__path__
    if folder.is_dir() and not any(Path(place).is_dir() and folder.samefile(place) for place in places):
        places.insert(0, str(folder))


def check_there(key: str, name: str) -> None:
    """Checks that an extension is there, by its file alone.

    Raises:
        ConfigError: the name has another form, or there is no such module, or nothing of that name in it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{key} = {name!r} is not allowed: an extension is written {PREFIX}MODULE:NAME")
    module, _, attribute = name.partition(":")
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.origin:
        raise ConfigError(f"{key} = {name!r}: there is no feddm_flwr/contrib/{module.removeprefix(PREFIX)}.py")
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ConfigError(f"{key} = {name!r}: {Path(spec.origin).name}, line {error.lineno}: {error.msg}") from error
    found = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    if attribute not in found:
        raise ConfigError(f"{key} = {name!r}: {module} has no class or function {attribute}; it has {sorted(found)}")


def load(key: str, name: str) -> object:
    """Imports an extension.

    Raises:
        ConfigError: it is not there, or importing it fails.
    """
    check_there(key, name)
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # whatever a user's module does
        raise ConfigError(f"{key} = {name!r}: cannot be imported ({type(error).__name__}: {error})") from error


def load_class(key: str, name: str, base: type[T]) -> type[T]:
    """Imports an extension that is a class.

    Raises:
        ConfigError: as `load`, or it is no class of that base, or lacks a method.
    """
    found = load(key, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{key} = {name!r}: must be a subclass of feddm_flwr.{base.__name__}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"{key} = {name!r}: lacks {', '.join(missing)}, which feddm_flwr.{base.__name__} asks for")
    return found
