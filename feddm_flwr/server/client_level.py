"""Differential privacy of whole nodes, for federations of many (DP-FedAvg, McMahan et al. 2018, arXiv 1710.06963).

The server clips each node's update to a fixed norm, takes the mean over all nodes that it asked, each alike, and adds
Gaussian noise. Who is asked is drawn at random, without anybody knowing. What is protected is the model, against those
who get it: the server sees every update.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from feddm_flwr.aggregation.outliers import Outliers
from feddm_flwr.compute.secret_random import SecretRandom
from feddm_flwr.config.privacy import Privacy
from feddm_flwr.privacy.accounting import Rounds, epsilon_of_rounds, noise_for_rounds
from feddm_flwr.vector import Vector, euclidean_norm

log = logging.getLogger(__name__)


class FixedClip(Outliers):
    """Shortens updates to a fixed norm; none is refused, since that would tell of others."""

    def __init__(self, norm: float) -> None:
        """Updates are shortened to this norm."""
        super().__init__(0.0, 0.0)
        self._most = norm

    def check(self, part: str, update: Vector, steps: int = 1, least: float = 0.0) -> tuple[float, float]:
        """Returns the norm of an update, and the factor by which it is to be shortened."""
        norm = euclidean_norm(update)
        return norm, min(1.0, self._most / norm) if norm else 1.0


class ClientLevel:
    """A run's noise, and what its rounds have cost."""

    def __init__(self, privacy: Privacy, rounds: int) -> None:
        """Begins a run of so many rounds."""
        self._privacy, self._rounds = privacy, rounds
        self._noise = privacy.noise_multiplier  # 0 until it is known for how many nodes it is to be enough
        self._spent: list[Rounds] = []
        self._secret = SecretRandom()

    def choose(self, names: list[str], count: int) -> list[str]:
        """Returns so many of the nodes, drawn secretly."""
        order = self._secret.uniform(len(names)).argsort()[:count]
        return sorted(names[i] for i in order)

    def protect(self, mean: Vector, accepted: int, asked: int, online: int) -> Vector:
        """Returns the mean of the accepted updates as that of all that were asked, of those that were online, with
        noise; the round is then accounted for."""
        if not self._noise:
            p = self._privacy
            self._noise = noise_for_rounds(p.epsilon, p.delta, online, asked, self._rounds)
            log.info("privacy.noise-multiplier = %g, for %d of %d nodes a round", self._noise, asked, online)
        self._spent = self._after(Rounds(online, asked, self._noise, 1))
        noise = self._secret.normal(len(mean), torch.device("cpu")).numpy()
        noise *= self._noise * self._privacy.clip_norm / asked
        noise += mean.astype(np.float64) * (accepted / asked)
        return noise.astype(np.float32)

    def epsilon(self) -> float:
        """Returns what the rounds so far have cost."""
        return epsilon_of_rounds(self._spent, self._privacy.delta)

    def is_spent(self) -> bool:
        """Tells whether another round such as the last would cost more than the run may."""
        if not self._privacy.epsilon or not self._spent:
            return False
        last = self._spent[-1]
        after = self._after(Rounds(last.nodes, last.asked, last.noise, 1))
        return epsilon_of_rounds(after, self._privacy.delta) > self._privacy.epsilon

    def state(self) -> dict[str, Any]:
        """Returns what `restore` takes."""
        return {"noise": self._noise, "rounds": [[r.nodes, r.asked, r.noise, r.count] for r in self._spent]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`."""
        self._noise = state["noise"]
        self._spent = [Rounds(*each) for each in state["rounds"]]

    def _after(self, new: Rounds) -> list[Rounds]:
        """Returns the rounds so far with another one, which comes last."""
        kind = (new.nodes, new.asked, new.noise)
        same = sum(r.count for r in self._spent if (r.nodes, r.asked, r.noise) == kind)
        others = [r for r in self._spent if (r.nodes, r.asked, r.noise) != kind]
        return [*others, Rounds(*kind, same + new.count)]
