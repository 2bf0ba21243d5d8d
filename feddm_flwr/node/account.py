"""What a node may spend of its images' privacy: its own budget, which no run can raise, and the run's."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

from feddm_flwr.config import ConfigError, RunConfig, local_steps
from feddm_flwr.data.node_data import NodeData
from feddm_flwr.node.canaries import with_canaries
from feddm_flwr.node.settings import NodeConfig, node_data
from feddm_flwr.privacy.accounting import Steps, noise_for
from feddm_flwr.privacy.ledger import Ledger, Limits, Spent
from feddm_flwr.privacy.policy import Policy
from feddm_flwr.protocol.tasks import TrainTask
from feddm_flwr.storage.state_folder import RUN_UUID

log = logging.getLogger(__name__)

_DELTA = 1e-5
_MOST_STEPS = 10_000_000  # of a run: accounting more takes minutes
#: Keys of a node config.
_KNOWN = {
    *("node-name", "data-path", "state-path", "worker", "dp-epsilon", "dp-delta", "policy"),
    *("partition-id", "num-partitions", "secure-key", "secure-peers"),
}


class Account:
    """A node's, in a run with differential privacy."""

    def __init__(self, config: RunConfig, own: NodeConfig, name: str, data: NodeData, root: Path) -> None:
        """Finds out how much noise the run's steps need on so many images.

        Raises:
            ConfigError: the node's budget is none.
        """
        p, records = config.privacy, data.records
        mine = budget(own)
        self._limits = Limits(p.epsilon or math.inf, p.delta, *(mine or (math.inf, p.delta)))
        # Whatever a node with a name of its own trains on is one account; of a simulation, each part of a data set is.
        whose = name if mine or "node-name" in own else f"{name}-{data.fingerprint[:16]}"
        self._ledger = Ledger(root / "privacy" / f"{whose}.json")
        for what, delta in (("privacy.delta", p.delta), ("dp-delta", self._limits.node_delta)):
            if delta * records >= 1:
                raise ConfigError(f"{what} = {delta:g}: must be less than 1 over the {records} records of this node")
        steps, sampling = local_steps(config, len(data.train)), min(1.0, config.train.batch_size / records)
        if (count := steps * config.num_server_rounds) > _MOST_STEPS:
            raise ConfigError(
                f"num-server-rounds = {config.num_server_rounds}: {count} private steps; at most {_MOST_STEPS}"
            )
        noise = p.noise_multiplier or noise_for(p.epsilon, p.delta, sampling, count)
        self._steps, self._rounds = Steps(sampling, noise, steps), config.num_server_rounds

    @property
    def noise(self) -> float:
        """The noise multiplier."""
        return self._steps.noise

    def check(self) -> None:
        """Finds out whether a round of a new run could be paid.

        Raises:
            ConfigError: it could not, or the ledger cannot be read.
        """
        self._ledger.check("", self._steps, self._limits)

    def spend(self, task: TrainTask) -> Spent:
        """Pays for a round, durably.

        Raises:
            BudgetSpentError: too little is left.
            ConfigError: the ledger cannot be read, or has lost what was spent in this run.
            OSError: it cannot be written.
        """
        if not (re.fullmatch(RUN_UUID, str(task.run_uuid)) and 0 < task.round <= self._rounds):
            raise ConfigError(
                f"round {task.round!r} of {self._rounds} of the run {str(task.run_uuid)[:40]!r}: there is none"
            )
        return self._ledger.spend(task.run_uuid, self._steps, self._limits, task.private_steps)


def budget(own: NodeConfig) -> tuple[float, float] | None:
    """Returns the epsilon and delta of `dp-epsilon` and `dp-delta` in a node config; None where it sets no budget.

    Raises:
        ConfigError: they are not what they must be.
    """
    if "dp-epsilon" not in own:
        if "dp-delta" in own:
            raise ConfigError("dp-delta in the --node-config without dp-epsilon: set both, or none")
        return None
    epsilon, delta = own["dp-epsilon"], own.get("dp-delta", _DELTA)
    if not (isinstance(epsilon, float | int) and 0 < epsilon < math.inf) or isinstance(epsilon, bool):
        raise ConfigError(f"dp-epsilon = {epsilon!r} in the --node-config is not allowed: must be a number above 0")
    if not (isinstance(delta, float) and 0 < delta < 1):
        raise ConfigError(f"dp-delta = {delta!r} in the --node-config is not allowed: must be between 0 and 1")
    return float(epsilon), delta


def allowed_data(config: RunConfig, own: NodeConfig, name: str, *, trains: bool = True) -> NodeData:
    """Returns the images of node `name` for a run that it may take part in, with its canaries where it `trains`. What
    an error says of them stays in the node's own log, where the run hides figures or the node has a budget.

    Raises:
        ConfigError: as `check_allowed`, or the images do not go with the run.
    """
    check_allowed(config, own)  # before the images are looked at
    try:
        data = node_data(config, own)
        data = with_canaries(config, name, data) if trains else data
    except Exception:
        if not (config.privacy.hides_figures or budget(own)):
            raise
        log.exception("this node's images do not go with the run")
        raise ConfigError("this node cannot do that with its images; its own log says why") from None
    check_allowed(config, own, len(data.train))
    return data


def check_allowed(config: RunConfig, own: NodeConfig, images: int | None = None) -> None:
    """Finds out whether a node with this config may take part in a run: by its `policy`, and with a budget in private
    ones only. As long as the number of its `images` is not known, what hangs on that is left open.

    Raises:
        ConfigError: it may not, or its budget or its policy is none, or it has a key that there is not.
    """
    if unknown := sorted({*own} - _KNOWN):
        raise ConfigError(
            f"{unknown[0]!r} in the --node-config is not known: must be one of {', '.join(sorted(_KNOWN))}"
        )
    if "policy" in own:
        if not isinstance(own["policy"], str) or not own["policy"]:
            raise ConfigError(f"policy = {own['policy']!r} in the --node-config is not allowed: must be a TOML file")
        Policy(Path(own["policy"]).expanduser()).check(config, images)
    mine, p = budget(own), config.privacy
    if mine and not p.hides_losses:
        wrong = f"privacy.figures = {p.figures!r}" if p.of_images else f"privacy.mechanism = {p.mechanism!r}"
        raise ConfigError(
            f"{wrong}: this node has a budget (dp-epsilon = {mine[0]:g}) and takes part with "
            "privacy.mechanism = 'dp-sgd' and privacy.figures = 'none' only"
        )
