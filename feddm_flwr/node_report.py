"""What a node says of its training, checked: it may be broken, or lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from feddm_flwr.config import NOISE_LEVELS
from feddm_flwr.messages import Failure, clean

ABSURD = 1e6  # losses and errors above this are a broken node's


@dataclass(frozen=True)
class NodeReport:
    """What came of a node's part of a round, beside its weights."""

    images: int  # that it trains on now
    steps: int
    train_loss: float
    eval_loss: float | None  # of the weights that it got; None where they were not evaluated
    eval_levels: list[float]  # the same by noise level; empty where it does not say
    coding_error: float
    state_lost: bool


def checked(said: Mapping[str, object], name: str, number: int) -> NodeReport | Failure:
    """The report of the node of that name on a round, or what is wrong with it.

    Raises:
        KeyError: something is missing.
    """
    if (said["name"], said["round"]) != (name, number):
        return Failure("stale", clean(f"the reply is of {said['name']!r}, round {said['round']!r}"))
    images, steps, train_loss, eval_loss = said["images"], said["steps"], said["train-loss"], said["eval-loss"]
    coding_error, lost = said["coding-error"], said["state-lost"]
    if not (isinstance(train_loss, float) and 0 <= train_loss <= ABSURD and isinstance(eval_loss, float)):
        return Failure("malformed", clean(f"losses {train_loss!r} and {eval_loss!r}"))
    if not (isinstance(coding_error, float) and 0 <= coding_error <= ABSURD and isinstance(lost, bool)):
        return Failure("malformed", clean(f"coding-error = {coding_error!r}, state-lost = {lost!r}"))
    if type(steps) is not int or steps < 1 or type(images) is not int:
        return Failure("malformed", clean(f"steps = {steps!r}, images = {images!r}"))
    evaluated = eval_loss if 0 <= eval_loss <= ABSURD else None  # NaN where it was not
    return NodeReport(images, steps, train_loss, evaluated, levels_of(said.get("eval-levels")), coding_error, lost)


def levels_of(text: object) -> list[float]:
    """Losses by noise level, as JSON; none where they are not that."""
    try:
        values = json.loads(str(text)[:1000])
        if isinstance(values, list) and len(values) == NOISE_LEVELS and all(0 <= float(v) <= ABSURD for v in values):
            return [float(v) for v in values]
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    return []
