"""What a node may spend of its images' privacy: its own budget, which no run can raise, and the run's."""

from __future__ import annotations

import math
from pathlib import Path

from feddm_flwr.config import ConfigError, RunConfig, local_steps
from feddm_flwr.data.node_data import NodeData
from feddm_flwr.node.settings import NodeConfig
from feddm_flwr.privacy.accounting import Steps, noise_for
from feddm_flwr.privacy.ledger import Ledger, Limits, Spent
from feddm_flwr.privacy.policy import Policy
from feddm_flwr.protocol.tasks import TrainTask

_DELTA = 1e-5


class Account:
    """A node's, in a run with differential privacy."""

    def __init__(self, config: RunConfig, own: NodeConfig, name: str, data: NodeData, root: Path) -> None:
        """Finds out how much noise the run's steps need on so many images.

        Raises:
            ConfigError: the node's budget is none.
        """
        p, records = config.privacy, len(data.train)
        mine = budget(own)
        self._limits = Limits(p.epsilon or math.inf, p.delta, *(mine or (math.inf, p.delta)))
        # A data set's part is known by its content; whatever a node with images of its own trains on is one account.
        whose = name if mine or "data-path" in own else f"{name}-{data.fingerprint[:16]}"
        self._ledger = Ledger(root / "privacy" / f"{whose}.json")
        steps, sampling = local_steps(config, records), min(1.0, config.train.batch_size / records)
        noise = p.noise_multiplier or noise_for(p.epsilon, p.delta, sampling, steps * config.num_server_rounds)
        self._steps = Steps(sampling, noise, steps)

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


def check_allowed(config: RunConfig, own: NodeConfig, images: int) -> None:
    """Finds out whether a node with this config and so many images may take part in a run: by its `policy`, and with a
    budget in private ones only.

    Raises:
        ConfigError: it may not, or its budget or its policy is none.
    """
    if policy := own.get("policy"):
        Policy(Path(str(policy)).expanduser()).check(config, images)
    mine, p = budget(own), config.privacy
    if mine and not p.hides_figures:
        wrong = f"privacy.figures = {p.figures!r}" if p.of_images else f"privacy.mechanism = {p.mechanism!r}"
        raise ConfigError(
            f"{wrong}: this node has a budget (dp-epsilon = {mine[0]:g}) and takes part with "
            "privacy.mechanism = 'dp-sgd' and privacy.figures = 'none' only"
        )
