"""The server's part in a secure sum (see `privacy.secure_sum`): it carries what nodes tell each other, adds up what it
cannot read, and takes the masks off the sum.

A round has four messages to each node: keys, shares, the training, and the opening of the sum. Nodes may vanish between
any two. What is told at the opening depends on who is left, and each node tells it once. So a training whose sum was
asked for with some nodes is asked for again with these or not at all: two sums that differ by a node would be that
node's update. Where that cannot be the round's training is drawn anew.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from feddm_flwr.config import LEAST_OF_SUM, RunConfig, least_replies
from feddm_flwr.exchange.sums import Figures, Scales, SumGrid, facts_of, read_words, shares_of
from feddm_flwr.privacy.secure_sum import (
    SecureSumError,
    Words,
    add_pairwise_masks,
    context,
    join,
    own_mask,
    public_key,
    threshold,
)
from feddm_flwr.protocol.failures import Failure, clean
from feddm_flwr.protocol.tasks import KEYS, OPEN, PROBLEM, REPORT, SHARES, SUMS, SecureTask, TrainTask
from feddm_flwr.server.federation.dispatch import collect
from feddm_flwr.server.federation.liveness import Probes
from feddm_flwr.server.federation.traffic import Traffic
from feddm_flwr.server.federation.transport import arrays_of, content_of
from feddm_flwr.vector import Vector

log = logging.getLogger(__name__)

_MOST = 1_000_000  # characters of an answer


@dataclass(frozen=True)
class Opened:
    """What a secure sum came to."""

    mean: Vector  # of the updates
    octaves: NDArray[np.float64]  # see `SumGrid.decode`
    figures: Figures


class Courier:
    """Asks nodes about a sum and hands out their answers."""

    def __init__(self, grid: Grid, ids: Mapping[str, int], probes: Probes, traffic: Traffic, timeout: float) -> None:
        """Reaches the nodes with these ids, by name."""
        self._grid, self._ids, self._probes, self._traffic = grid, ids, probes, traffic
        self._timeout = timeout

    def ask(self, tasks: Mapping[str, SecureTask]) -> Iterator[tuple[str, dict[str, Any] | Failure]]:
        """Yields the answers to a task for each node, as they come."""
        names = {self._ids[name]: name for name in tasks}

        def content(name: str, whole: bool) -> RecordDict:
            self._traffic.down[name] += len(tasks[name].content)
            return content_of(arrays_of({}), tasks[name].to_record())

        for i, reply in collect(self._grid, names, content, Traffic(), 0, self._timeout, self._probes, SUMS):
            name = names[i]
            yield name, reply if isinstance(reply, Failure) else self._read(name, reply)

    def _read(self, name: str, reply: RecordDict) -> dict[str, Any] | Failure:
        try:
            said = reply.config_records[REPORT]
            if PROBLEM in said:
                return Failure("secure-sum", clean(str(said[PROBLEM])))
            text = str(said["answer"])
            self._traffic.up[name] += len(text)
            if len(text) > _MOST or not isinstance(answer := json.loads(text), dict):
                raise ValueError("an answer that is none")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            return Failure("malformed", clean(repr(error)))
        return answer


class SecureRound:
    """One attempt at a round's sum."""

    def __init__(self, config: RunConfig, size: int, scales: Scales, task: TrainTask, courier: Courier) -> None:
        """Is for updates of `size` values; `task` is what every node is asked, without what is its own."""
        self._config, self._size, self._task, self._courier = config, size, task, courier
        self._scales, self._session = scales, uuid.uuid4().hex
        self.failures: dict[str, Failure] = {}  # of nodes, beside the training
        self.frame = b""  # of the scales
        self._nodes: dict[str, dict[str, str]] = {}  # public keys and signatures of all that shares were split among
        self._sealed: dict[str, dict[str, str]] = {}  # by node: the shares that it gave, by receiver
        self._added: set[str] = set()
        self.is_told = False  # whether nodes told, or may tell, of a sum of this training that cannot be had any more

    def begin(self, names: list[str], images: Mapping[str, int]) -> None:
        """Has the nodes of that name exchange keys and shares; `images` are those of all that are online."""
        keys = dict(self._ask(KEYS, dict.fromkeys(names, "{}")))
        if opened := {name for said in keys.values() for name in map(str, said.get("opened", ()))}:
            # The sum of this round was asked for before: by this server, or before it was started anew.
            keys |= self._ask(KEYS, dict.fromkeys(sorted((opened & {*images}) - {*names}), "{}"))
            keys = {name: said for name, said in keys.items() if name in opened}
            if missing := sorted(opened - {*keys}):
                why = f"the sum of round {self._task.round} was asked for with {', '.join(missing)}, who are not there"
                self.failures |= dict.fromkeys(keys, Failure("secure-sum", clean(why)))
                self.is_told = True
                return
        self._nodes = {
            name: {kind: str(said.get(kind)) for kind in ("sealing", "masking", "signature")}
            for name, said in sorted(keys.items())
        }
        sealed = dict(self._ask(SHARES, dict.fromkeys(self._nodes, json.dumps(self._nodes))))
        needed = max(threshold(len(self._nodes), self._config.privacy.threshold), LEAST_OF_SUM)
        if len(sealed) < max(needed, least_replies(self._config, len(names))):
            return
        self._sealed = {
            name: {other: str(said.get(other)) for other in sealed if other != name}
            for name, said in sorted(sealed.items())
        }
        self._images = {name: images[name] for name in self._sealed}
        self.grid = SumGrid(self._config, self._size, self._task.round, shares_of(self._config, self._images))
        self.frame, self._expected = self._scales.frame(self.grid, self._task.round)
        self._total: Words = np.zeros(self.grid.words, np.uint64)

    @property
    def names(self) -> list[str]:
        """The nodes that are to train."""
        return [*self._sealed]

    def said_to(self, name: str) -> str:
        """Returns what the task of a node says of the sum."""
        sealed = {other: self._sealed[other][name] for other in self._sealed if other != name}
        said = {"session": self._session, "names": self.names, "images": self._images, "sealed": sealed}
        return json.dumps(said)

    def add(self, name: str, frame: bytes) -> None:
        """Adds a node's masked words.

        Raises:
            FrameError: they are none.
        """
        self._total += read_words(frame, self._scales.layout, self._task.round, self.grid.words)
        self._added.add(name)

    def open(self, weights: str) -> Opened:
        """Returns the sum of what was added, of nodes that trained from `weights` with this fingerprint.

        Raises:
            SecureSumError: too few nodes told of the masks, or it is no sum.
        """
        survivors = sorted(self._added)
        needed = threshold(len(self._nodes), self._config.privacy.threshold)
        shares: dict[str, dict[str, bytes]] = {name: {} for name in self._sealed}
        asked = dict.fromkeys(survivors, json.dumps(survivors))
        answered, self.is_told = 0, True
        for name, said in self._ask(OPEN, asked):
            with_bytes = {other: _bytes(said.get(other)) for other in shares}
            for other, share in with_bytes.items():
                shares[other][name] = share
            answered += 1
            if answered == needed:
                break
        if answered < needed:
            why = "; ".join(f"{name}: {failure}" for name, failure in sorted(self.failures.items()))
            raise SecureSumError(f"{answered} nodes told of the masks, {needed} are needed; {why}".removesuffix("; "))
        about = self.about(weights)
        publics = {name: bytes.fromhex(self._nodes[name]["masking"]) for name in self._sealed}
        for name, of in shares.items():
            secret = join(of, [*self._nodes], needed)
            if name in self._added:
                self._total -= own_mask(secret, about, len(self._total))
            elif public_key(secret) != publics[name]:
                raise SecureSumError(f"shares of {name}'s key that do not go together")
            else:
                add_pairwise_masks(self._total, name, secret, {v: publics[v] for v in survivors}, about)
        try:
            return Opened(*self.grid.decode(self._total, self._expected, {n: self._images[n] for n in survivors}))
        except ValueError as error:
            raise SecureSumError(f"{error}: a node sent something else") from None

    def about(self, weights: str) -> bytes:
        """Returns what masks are derived from beside secrets."""
        nodes = {name: self._nodes[name] for name in self._sealed}
        return context(
            {"session": self._session, "nodes": nodes, "images": self._images}
            | facts_of(self._config, self._task, weights, self.frame)
        )

    def _ask(self, stage: str, contents: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the answers of a stage as they come; those who give none are among the failures then."""
        t, session = self._task, self._session
        tasks = {
            name: SecureTask(stage, t.run_uuid, t.round, t.repeat, session, content)
            for name, content in contents.items()
        }
        for name, said in self._courier.ask(tasks):
            if isinstance(said, Failure):
                self.failures[name] = said
            else:
                yield name, said


def _bytes(text: object) -> bytes:
    try:
        return bytes.fromhex(str(text))
    except ValueError:
        return b""
