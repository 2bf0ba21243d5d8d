"""Whether what a run names as extensions is what it must be, before anything starts (see `config.plugins`)."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from feddm_flwr.aggregation.base import Aggregator, aggregator_class
from feddm_flwr.aggregation.server_optimizers import ServerOptimizer, server_optimizer
from feddm_flwr.codecs import registry
from feddm_flwr.config import ConfigError, RunConfig
from feddm_flwr.config.plugins import is_plugin
from feddm_flwr.data.readers import reader_class
from feddm_flwr.reporting.trackers import tracker_class
from feddm_flwr.training.build import objective_class


def check_extensions(config: RunConfig) -> None:
    """Loads the extensions that a run names, and tries on a few numbers those that can be.

    Raises:
        ConfigError: one cannot be loaded, is something else than its key asks for, or does something else.
    """
    registry.check(config)
    s = config.server
    optimizer = server_optimizer(s.optimizer, s.learning_rate, s.momentum)
    if is_plugin(s.optimizer):
        _try("server.optimizer", s.optimizer, "update", lambda: _moved(optimizer))
    if is_plugin(s.aggregation):
        _try("server.aggregation", s.aggregation, "mean", lambda: _mean(aggregator_class(s.aggregation)))
    for name, find in (
        (config.train.objective, objective_class),
        (config.data.reader, reader_class),
        (config.tracker, tracker_class),
    ):
        if is_plugin(name):
            find(name)


_SIZE = 4


def _moved(optimizer: ServerOptimizer) -> Any:
    weights, delta = np.ones(_SIZE, np.float32), np.ones(_SIZE, np.float32)
    moved, state = optimizer.update(weights, delta, optimizer.init(weights))
    if not all(isinstance(vector, np.ndarray) for vector in state.values()):
        raise TypeError("the state must be a dictionary of vectors")
    if not (weights == 1).all() or not (delta == 1).all():
        raise ValueError("update must change none of what it is given")
    return moved


def _mean(kind: type[Aggregator]) -> Any:
    with TemporaryDirectory() as folder:
        made = kind.make(_SIZE, lambda frame: iter([np.ones(_SIZE, np.float32)]), Path(folder))
        for _ in range(3):
            made.add(np.ones(_SIZE, np.float32), 1, b"frame", 1.0)
        if made.count != 3:
            raise ValueError(f"count is {made.count} after three updates")
        return made.mean()


def _try(key: str, name: str, what: str, make: Callable[[], Any]) -> None:
    try:
        made = make()
    except ConfigError:
        raise
    except Exception as error:  # whatever is wrong with it
        *_, at = traceback.extract_tb(error.__traceback__)
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise ConfigError(f"{key} = {name!r}: {text} ({Path(at.filename).name}, line {at.lineno})") from error
    if not isinstance(made, np.ndarray) or made.dtype != np.float32 or made.shape != (_SIZE,):
        found = f"{made.dtype} {made.shape}" if isinstance(made, np.ndarray) else type(made).__name__
        raise ConfigError(f"{key} = {name!r}: {what} must return a float32 vector of the size it is given, not {found}")
