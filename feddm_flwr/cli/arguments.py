"""What commands have in common: outputs that can be written, run-config keys."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from feddm_flwr.config import ConfigError


def check_folder(folder: Path, origin: str) -> None:
    """Checks that a folder can be written to, before the work.

    Raises:
        ConfigError: no file can be put in the folder, or it cannot be made; `origin` says who asked for it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
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

    Flower itself merges several `-c` by table: of two that set keys of one table it loses the first.
    """
    from flwr.common.config import parse_config_args

    merged: dict[str, Any] = {}
    for argument in arguments:
        try:
            read = parse_config_args([argument])
        except Exception as error:  # Flower raises many kinds here
            why = error if argument.endswith(".toml") else "text needs quotes, as in 'strategy=\"feddm-prox\"'"
            if "overwrite" in str(error.__cause__):
                why = "a key is there twice"
            raise ConfigError(f"--run-config {argument!r} cannot be read: {why}") from error
        # Flower passes over what it does not understand.
        left = "" if argument.endswith(".toml") else re.sub(r"\S+?=('[^']*'|\"[^\"]*\"|\S+)", "", argument).strip()
        if left or not read:
            raise ConfigError(f"--run-config {argument!r}: must be 'key=value key=value' or a .toml file")
        merged |= read
    return merged
