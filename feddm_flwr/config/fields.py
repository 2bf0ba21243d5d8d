"""Typed configuration keys: a dataclass field that knows its documentation, bounds and raw default.

The machinery only; the keys themselves are in `config.keys`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from itertools import chain
from typing import Any, get_type_hints

Scalar = bool | int | float | str
#: Raw default of a key that the strategy, model preset or data set decides unless the user does.
PRESET = "preset"
#: What tells an extension's name from a built-in one.
PLUGIN_MARK = ":"


class ConfigError(ValueError):
    """The run configuration is wrong; the message has one line per offending key."""


def key(
    default: Scalar,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    plugin: bool = False,
) -> Any:
    """Returns a documented field; its bounds are inclusive (`low`, `high`) or exclusive (`above`, `below`). A `plugin`
    key takes extensions beside its choices (see `config.plugins`)."""
    meta = {
        "default": default,
        "doc": doc,
        "choices": choices,
        "low": low,
        "above": above,
        "high": high,
        "below": below,
        "plugin": plugin,
    }
    return field(metadata=meta)


@dataclass(frozen=True)
class KeySpec:
    """One run-config key: its dotted name, type, raw default, documentation and bounds."""

    name: str
    kind: Any
    default: Scalar
    doc: str
    choices: tuple[str, ...]
    low: float | None
    above: float | None
    high: float | None
    below: float | None
    plugin: bool

    def allowed(self) -> str:
        """Returns what a value must be, in words."""
        if self.choices:
            text = " | ".join(self.choices) + (" | feddm_flwr.contrib.MODULE:NAME" if self.plugin else "")
        elif self.kind in (int, float):
            text = "an integer" if self.kind is int else "a number"
            bounds = [("at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below)]
            text += " and".join(f" {word} {bound:g}" for word, bound in bounds if bound is not None)
        else:
            text = {bool: "true or false", str: "text"}.get(self.kind, 'integers such as "32,64,128"')
        return f"{text}, or {PRESET}" if self.default == PRESET else text

    def convert(self, value: object) -> Any:
        """Returns the value in its type.

        Raises:
            ConfigError: the type or the value is not allowed.
        """
        wrong = ConfigError(f"{self.name} = {value!r} is not allowed: must be {self.allowed()}")
        result: Any = value
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            result = float(value)
        elif self.kind == tuple[int, ...]:
            try:
                # One level is written as a plain integer: TOML and Flower have no lists here.
                result = tuple(int(part) for part in str(value).split(","))
            except ValueError:
                raise wrong from None
            if isinstance(value, bool) or min(result) < 0:
                raise wrong
            return result
        if type(result) is not self.kind:
            raise wrong
        if isinstance(result, int | float) and not isinstance(result, bool) and not self._within(result):
            raise wrong
        if self.choices and result not in self.choices and not (self.plugin and PLUGIN_MARK in result):
            raise wrong
        return result

    def _within(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )


@cache  # every task asks several times
def sections(cls: type, top: bool = True) -> tuple[tuple[str, type, tuple[KeySpec, ...]], ...]:
    """Returns `(prefix, dataclass, keys)` of the top level and of every section, in order."""
    hints = get_type_hints(cls)
    prefix = "" if top else f"{cls.__name__.lower()}."
    own = [f for f in fields(cls) if not is_dataclass(hints[f.name])]
    specs = tuple(KeySpec(prefix + f.name.replace("_", "-"), hints[f.name], **f.metadata) for f in own)
    below = (sections(hints[f.name], top=False) for f in fields(cls) if is_dataclass(hints[f.name]))
    return ((prefix, cls, specs), *chain.from_iterable(below))
