"""Whether what a run names as extensions is what it must be, before anything starts (see `config.plugins`)."""

from __future__ import annotations

from feddm_flwr.aggregation.base import aggregator_class
from feddm_flwr.aggregation.server_optimizers import server_optimizer
from feddm_flwr.codecs import registry
from feddm_flwr.config import RunConfig
from feddm_flwr.config.plugins import is_plugin
from feddm_flwr.data.readers import reader_class
from feddm_flwr.reporting.trackers import tracker_class
from feddm_flwr.training.build import objective_class


def check_extensions(config: RunConfig) -> None:
    """Loads the extensions that a run names.

    Raises:
        ConfigError: one cannot be loaded, or is something else than its key asks for.
    """
    registry.check(config)
    s = config.server
    server_optimizer(s.optimizer, s.learning_rate, s.momentum)
    for name, find in (
        (s.aggregation, aggregator_class),
        (config.train.objective, objective_class),
        (config.data.reader, reader_class),
        (config.tracker, tracker_class),
    ):
        if is_plugin(name):
            find(name)
