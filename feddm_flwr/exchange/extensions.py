"""Whether what a run names as extensions is what it must be, before anything starts."""

from __future__ import annotations

from feddm_flwr.aggregation.server_optimizers import server_optimizer
from feddm_flwr.codecs import registry
from feddm_flwr.config import RunConfig


def check_extensions(config: RunConfig) -> None:
    """Loads the extensions that a run names.

    Raises:
        ConfigError: one cannot be loaded, or is something else than its key asks for.
    """
    registry.check(config)
    server_optimizer(config.server.optimizer, config.server.learning_rate, config.server.momentum)
