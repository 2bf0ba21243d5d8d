"""A site's policy: what the configuration of a run may say, that its nodes are to take part in.

[allow]                               # one of these
strategy = ["feddm-lean", "feddm-slow-link"]
privacy.mechanism = ["dp-sgd"]
eval.audit = [false]

[least]
eval.min-images = 200

[most]
num-server-rounds = 200
privacy.epsilon = 8.0                 # 0, no limit, is more than any
steps = 500                           # of a round, however the run says it
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feddm_flwr.config import KEYS, ConfigError, RunConfig, flatten, local_steps
from feddm_flwr.config.fields import Scalar

_STEPS = "steps"
#: Where 0 is no limit, or all that there is.
_UNLIMITED = {
    *("privacy.epsilon", "train.max-seconds", "train.threads", "train.micro-batch", "model.lora-rank"),
    *("server.norm-limit", "server.clip-norm"),
}
#: Where 0 leaves it to another key.
_OTHERS = {
    "train.local-steps": _STEPS,
    "train.local-epochs": _STEPS,
    "privacy.noise-multiplier": "privacy.epsilon",
    "min-replies": "min-nodes",
}


@dataclass(frozen=True)
class Rule:
    """What one key may be."""

    key: str
    kind: str  # allow, least or most
    bound: Any

    def permits(self, value: Scalar) -> bool:
        """Tells whether the key may have a value."""
        if self.kind == "allow":
            return bool(value in self.bound)
        number = float("inf") if self.key in _UNLIMITED and value == 0 else float(value)
        return bool(number >= self.bound if self.kind == "least" else number <= self.bound)

    def __str__(self) -> str:
        if self.kind == "allow":
            return f"must be {' or '.join(map(repr, self.bound))}"
        return f"must be at {self.kind} {self.bound:g}"


class Policy:
    """The rules of a file."""

    def __init__(self, path: Path) -> None:
        """Reads them.

        Raises:
            ConfigError: the file cannot be read, or has a rule that is none; the message names it.
        """
        self._name = path.name
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"policy = {str(path)!r} in the --node-config cannot be read: {error}") from error
        self.rules = []
        for kind, table in found.items():
            if kind not in ("allow", "least", "most") or not isinstance(table, dict):
                raise ConfigError(f"{self._name}: [{kind}] is not allowed: must be [allow], [least] or [most]")
            for key, bound in _flat(table):
                try:
                    self.rules.append(_rule(key, kind, bound))
                except ConfigError as error:
                    raise ConfigError(f"{self._name}, [{kind}]: {key} {error}") from None

    def check(self, config: RunConfig, images: int | None) -> None:
        """Holds a run against the rules, on a node that trains on so many images; None: that is not known yet.

        Raises:
            ConfigError: it breaks one; the message has a line for each, with key, value and rule.
        """
        values: dict[str, Scalar] = dict(flatten(config))
        if images is not None:
            values[_STEPS] = max(local_steps(config.in_round(n), images) for n in (1, config.num_server_rounds))
        broken = [rule for rule in self.rules if rule.key in values and not rule.permits(values[rule.key])]
        if broken:
            lines = (f"{r.key} = {values[r.key]!r}: {r} ({self._name}, [{r.kind}])" for r in broken)
            raise ConfigError("\n".join(f"this site's policy: {line}" for line in lines))


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _rule(key: str, kind: str, bound: Any) -> Rule:
    """Returns a rule, with values as a configuration has them.

    Raises:
        ConfigError: it is none; the message says why.
    """
    spec = KEYS.get(key)
    if not spec and key != _STEPS:
        raise ConfigError("is not a key of a run (docs/configuration.md)")
    number = not spec or spec.kind in (int, float)
    if kind == "allow":
        if not spec or not isinstance(bound, list) or not bound:
            raise ConfigError("must have a list of the values that are allowed" if spec else "is for [least] or [most]")
        return Rule(
            key, kind, [",".join(map(str, v)) if isinstance(v := spec.convert(one), tuple) else v for one in bound]
        )
    if not number:
        raise ConfigError("is no number: put it under [allow]")
    if key in _OTHERS:
        raise ConfigError(f"may be 0 and say nothing: bound {_OTHERS[key]} instead")
    if type(bound) not in (int, float):
        raise ConfigError(f"= {bound!r}: must be a number")
    return Rule(key, kind, bound)
