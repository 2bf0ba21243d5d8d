"""The typed, validated run configuration.

Flower hands an app one flat mapping of dotted keys (`"train.batch-size": 64`) and checks neither
types nor values. `parse` turns it into frozen dataclasses (see `config.run_config`) or raises a `ConfigError` that
names every offending key, its value and what is allowed.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feddm_flwr.config import validation
from feddm_flwr.config.fields import PLUGIN_MARK, PRESET, ConfigError, Scalar, sections
from feddm_flwr.config.names import LEAST_OF_SUM
from feddm_flwr.config.plugins import check_there
from feddm_flwr.config.presets import ARCHITECTURE, decided
from feddm_flwr.config.run_config import KEYS, RunConfig


def defaults() -> dict[str, Scalar]:
    """Returns the raw defaults, as `pyproject.toml` has them."""
    return {name: spec.default for name, spec in KEYS.items()}


def parse(run_config: Mapping[str, object]) -> RunConfig:
    """Validates a flat run configuration; missing keys take their defaults.

    Raises:
        ConfigError: one line for each unknown key, wrong type, wrong value or contradiction.
    """
    problems: list[str] = []
    for name in run_config:
        if name not in KEYS:
            close = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "see docs/configuration.md"
            problems.append(f"{name} = {run_config[name]!r}: no such key; {hint}")
    presets = decided(run_config)
    undecided = [key for key in ("strategy", "model.preset") if run_config.get(key, "") not in ("", *KEYS[key].choices)]
    values: dict[str, Any] = {}
    for name, spec in KEYS.items():
        value = run_config.get(name, spec.default)
        if value == PRESET and spec.default == PRESET:
            if name not in presets and undecided:
                continue  # that is said, and would decide this
            if name not in presets:
                decider = "server.optimizer" if name.startswith("server.") else "data.name"
                decided_by = run_config.get(decider, KEYS[decider].default)
                problems.append(f"{name} must be set for {decider} = {decided_by!r}: {spec.doc}")
                continue
            value = presets[name]
        elif run_config.get("model.init-from") and name in ARCHITECTURE and value != presets.get(name):
            problems.append(f"{name} = {value!r} with model.init-from: that model decides it; leave it out")
        try:
            values[name] = spec.convert(value)
            if spec.plugin and PLUGIN_MARK in values[name]:
                check_there(name, values[name])
        except ConfigError as error:
            problems.append(str(error))
    if not problems:
        config = _build(values)
        problems = list(validation.problems(config))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _build(values: Mapping[str, Any]) -> RunConfig:
    parts: dict[str, Any] = {}
    for prefix, cls, specs in sections(RunConfig):
        own = {s.name.removeprefix(prefix).replace("-", "_"): values[s.name] for s in specs}
        if prefix:
            parts[prefix[:-1]] = cls(**own)
        else:
            parts.update(own)
    return RunConfig(**parts)


def _text(value: object) -> Scalar:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    assert isinstance(value, bool | int | float | str)
    return value


def flatten(config: RunConfig) -> dict[str, Scalar]:
    """Returns the resolved configuration as dotted keys; `parse(flatten(c)) == c`."""
    flat: dict[str, Scalar] = {}
    for prefix, _, specs in sections(RunConfig):
        part = getattr(config, prefix[:-1]) if prefix else config
        for spec in specs:
            flat[spec.name] = _text(getattr(part, spec.name.removeprefix(prefix).replace("-", "_")))
    return flat


def local_steps(config: RunConfig, images: int) -> int:
    """Returns how many optimizer steps a node with that many training images takes in a round."""
    return config.train.local_steps or config.train.local_epochs * -(-images // config.train.batch_size)


def nodes_asked(config: RunConfig, online: int) -> int:
    """Returns how many of the online nodes train in a round."""
    return max(1, round(config.fraction_train * online))


def least_replies(config: RunConfig, asked: int = 0) -> int:
    """Returns how many good replies a round needs of those that are `asked`, or at the least. Of two, a robust rule has
    none to leave out, and the sum tells each the other's."""
    of_several = config.server.robust or config.privacy.secure_aggregation
    return config.min_replies or max(LEAST_OF_SUM if of_several else 1, asked // 2 + 1)


def local_path(name: str) -> Path | None:
    """Returns the path that a name means; None where it is an id on a hub, or the digits that are always there."""
    if name == "digits":
        return None
    path = expanded(name)
    return path if path.exists() or path.is_absolute() or name.startswith((".", "~")) else None


def expanded(name: str) -> Path:
    """Returns a path with the home folder in place of `~`.

    Raises:
        ConfigError: there is no such home folder.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name!r}: {name.partition('/')[0]!r} is nobody's home folder here") from error


def derive_seed(*parts: object) -> int:
    """Returns a 63-bit seed from anything with a stable text, such as `(seed, node name, round)`."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
