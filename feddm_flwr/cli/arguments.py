"""What commands have in common: outputs that can be written, run-config keys."""

from __future__ import annotations

import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from feddm_flwr.config import ConfigError, expanded


def check_folder(folder: Path, origin: str) -> None:
    """Checks that a folder can be written to, before the work.

    Raises:
        ConfigError: no file can be put in the folder, or it cannot be made; `origin` says who asked for it.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{origin}: nothing can be written there ({error.strerror})") from error


def check_output(output: Path, *endings: str) -> None:
    """Checks that a file can be written, as `check_folder` a folder.

    Raises:
        ConfigError: the name has another ending, is a folder's, or nothing can be written there.
    """
    origin = f"--output = {str(output)!r}"
    if output.suffix not in endings:
        raise ConfigError(f"{origin}: must end in {', '.join(endings[:-1])}{' or ' * (len(endings) > 1)}{endings[-1]}")
    if output.is_dir():
        raise ConfigError(f"{origin}: is a folder")
    check_folder(output.parent, origin)


def run_config_keys(arguments: list[str]) -> dict[str, Any]:
    """Returns the run-config keys of every `-c`; later ones win.

    Flower itself merges several `-c` by table (of two that set keys of one table it loses the first), passes over what
    it does not understand, and takes no text without quotes, which shells are apt to remove.

    Raises:
        ConfigError: a file cannot be read, or a text is not of keys and values.
    """
    merged: dict[str, Any] = {}
    for argument in arguments:
        merged |= _of_file(argument) if argument.endswith(".toml") else _of_text(argument)
    return merged


def _of_file(name: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(expanded(name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--run-config {name!r} cannot be read: {why}") from error
    return dict(_flat(tables))


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, ",".join(map(str, value)) if isinstance(value, list) else value


#: A quoted value ends where its quote does; another at a space. Word processors change quotes.
_PAIR = re.compile(
    r"""\s*([A-Za-z][\w.-]*)\s*=\s*
    ("(?:[^"\\]|\\.)*"|'[^']*'|“[^”]*”|‘[^’]*’|\[[^\]]*\]|[^\s"'“”‘’=\[\]]+)
    (?=\s|$)""",
    re.VERBOSE,
)


def _of_text(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    place = 0
    while match := _PAIR.match(text, place):
        name, value = match.groups()
        if name in found:
            raise ConfigError(f"--run-config {text!r}: {name} is there twice")
        found[name], place = _value(value), match.end()
    if (left := text[place:].strip()) or not found:
        raise ConfigError(
            f"--run-config {text!r}: must be 'key=value key=\"text\"' or a .toml file; not so from {left!r}"
        )
    return found


def _value(text: str) -> Any:
    """Returns a TOML value, or what is plainly meant by one that is not TOML's."""
    if text[0] in "“‘":
        return text[1:-1]
    if text[0] == "[":
        return ",".join(part.strip(" \"'") for part in text[1:-1].split(","))
    with suppress(ValueError):
        value = tomllib.loads(f"x = {text}")["x"]
        if not isinstance(value, str):
            return value if isinstance(value, int | float) else text
        if value.isprintable():
            return value
    if text[0] in "\"'":  # a path of Windows
        return text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    with suppress(ValueError):  # .001 and 5.
        return float(text)
    return text
