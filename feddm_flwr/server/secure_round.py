"""The server's part in a secure sum (see `privacy.secure_sum`): it carries what nodes tell each other, adds up what it
cannot read, and takes the masks off the sum.

A round has five messages to each node: keys, shares, the training, who is left, and the opening of the sum. Nodes may
vanish between any two. What is told at the opening depends on who is left, and each node tells it once. So a training
whose sum was told of with some nodes is summed over these again or not at all: two sums that differ by a node would be
that node's update. Where that cannot be the round's training is drawn anew.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from feddm_flwr.config import RunConfig, least_replies
from feddm_flwr.exchange.sums import Figures, Scales, SumGrid, facts_of, read_words, shares_of
from feddm_flwr.privacy.secure_sum import (
    SEALED,
    SECRET,
    SecureSumError,
    add_pairwise_masks,
    context,
    from_hex,
    join,
    own_mask,
    public_key,
    threshold,
)
from feddm_flwr.protocol.failures import Failure, clean
from feddm_flwr.protocol.tasks import (
    CONFIRM,
    KEYS,
    OPEN,
    OPENED,
    PROBLEM,
    REFUSED,
    REPORT,
    SHARES,
    SUMS,
    SecureTask,
    TrainTask,
)
from feddm_flwr.server.federation.dispatch import collect
from feddm_flwr.server.federation.liveness import Probes
from feddm_flwr.server.federation.traffic import Traffic
from feddm_flwr.server.federation.transport import arrays_of, content_of
from feddm_flwr.vector import Vector, Words

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
        self._scales, self._session = scales, ""
        self.failures: dict[str, Failure] = {}  # of nodes, beside the training
        self.frame = b""  # of the scales
        self.needed = 0  # nodes that a sum must be of
        self._nodes: dict[str, dict[str, str]] = {}  # public keys and signatures of all that shares were split among
        self._sealed: dict[str, dict[str, str]] = {}  # by node: the shares that it gave, by receiver
        self._added: set[str] = set()
        self.is_told = False  # whether nodes may have told of another sum of this training

    def begin(self, names: list[str], images: Mapping[str, int]) -> None:
        """Has the nodes of that name exchange keys and shares; `images` are those of all that are online."""
        self.needed = self.needed or least_replies(self._config, len(names))
        self._session = uuid.uuid4().hex
        answers = self._keys(names, images)
        self._nodes = {name: keys for name, said in sorted(answers.items()) if (keys := self._checked(name, said))}
        if len(self._nodes) < self.needed:
            return
        sealed = dict(self._ask(SHARES, dict.fromkeys(self._nodes, json.dumps(self._nodes))))
        if wrong := self._refused(sealed):  # the others begin again
            self.begin([name for name in names if name not in wrong], images)
            return
        sealed = {name: said for name, said in sorted(sealed.items()) if self._are_shares(name, said)}
        if len(sealed) < max(self.needed, threshold(len(self._nodes), self._config.privacy.threshold)):
            return
        self._sealed = {name: {other: sealed[name][other] for other in sealed if other != name} for name in sealed}
        self._images = {name: images[name] for name in sealed}
        self.grid = SumGrid(self._config, self._size, self._task.round, shares_of(self._config, self._images))
        self.frame, self._expected = self._scales.frame(self.grid, self._task.round)
        self._total: Words = np.zeros(self.grid.words, np.uint64)

    def _keys(self, names: list[str], images: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Returns the answers with public keys of those who may be in the sum. If one of the same training was told of,
        to this server or before it was started anew, these are the same nodes, or none of them."""
        answers = dict(self._ask(KEYS, dict.fromkeys(names, "{}")))
        claims = {name: claim for name, said in answers.items() if (claim := _claim(said))}
        if not claims:
            return answers
        self.is_told = True
        counts = Counter(claims.values())
        before = max(counts, key=lambda claim: (counts[claim], claim))
        answers |= self._ask(KEYS, dict.fromkeys([n for n in before if n in images and n not in names], "{}"))
        if {*before} <= {*answers}:
            return {name: answers[name] for name in before}
        log.warning("a sum of round %d was told of, with nodes that are not there", self._task.round)
        return {name: said for name, said in answers.items() if not _claim(said)}

    def _checked(self, name: str, said: Mapping[str, Any]) -> dict[str, str]:
        """Returns a node's public keys and signature; none where they are none."""
        keys = {kind: str(said.get(kind)) for kind in ("sealing", "masking", "signature")}
        if len(from_hex(keys["sealing"])) == len(from_hex(keys["masking"])) == SECRET:
            return keys
        self.failures[name] = Failure("malformed", "keys that are none")
        return {}

    def _are_shares(self, name: str, said: Mapping[str, Any]) -> bool:
        """Tells whether a node answered with shares for all others."""
        right = {*said} == {*self._nodes} - {name} and all(len(from_hex(share)) == SEALED for share in said.values())
        if not right:
            self.failures.setdefault(name, Failure("malformed", "shares that are none"))
        return right

    def _refused(self, sealed: Mapping[str, dict[str, Any]]) -> set[str]:
        """Returns the nodes whose keys half of the nodes refuse, or more, and says why; those who refuse others' are
        left out."""
        refused = [
            (name, str(other), str(why))
            for name, said in sealed.items()
            if isinstance(found := said.get(REFUSED), dict)
            for other, why in found.items()
        ]
        counts = Counter(other for _, other, _ in refused)
        wrong = {other for other, count in counts.items() if other in self._nodes and 2 * count >= len(self._nodes)}
        for name, other, why in refused:
            at_fault = other if other in wrong else name
            self.failures[at_fault] = Failure("secure-sum", clean(f"{name} refuses the keys of {other}: {why}"))
        return wrong

    @property
    def names(self) -> list[str]:
        """The nodes that are to train."""
        return [*self._sealed]

    def said_to(self, name: str) -> str:
        """Returns what the task of a node says of the sum."""
        sealed = {other: self._sealed[other][name] for other in self._sealed if other != name}
        return json.dumps({"session": self._session, "images": self._images, "sealed": sealed})

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
        shares = self._told(survivors)
        if (count := len(shares[survivors[0]])) < needed:
            why = "; ".join(f"{name}: {failure}" for name, failure in sorted(self.failures.items()))
            raise SecureSumError(f"{count} nodes told of the masks, {needed} are needed; {why}".removesuffix("; "))
        about = context(
            {"session": self._session, "nodes": self._nodes, "images": self._images}
            | facts_of(self._config, self._task, weights, self.frame)
        )
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

    def _told(self, survivors: list[str]) -> dict[str, dict[str, bytes]]:
        """Returns what the nodes in the sum tell of the secrets of each, by name."""
        tags = dict(self._ask(CONFIRM, dict.fromkeys(survivors, json.dumps(survivors))))
        said_to = {
            name: json.dumps({other: str(said[name]) for other, said in tags.items() if name in said}) for name in tags
        }
        self.is_told = True
        shares: dict[str, dict[str, bytes]] = {name: {} for name in self._sealed}
        for name, said in self._ask(OPEN, said_to):
            told = {other: from_hex(said.get(other)) for other in shares}
            if any(len(share) != SECRET for share in told.values()):
                self.failures[name] = Failure("malformed", "shares that are none")
                continue
            for other, share in told.items():
                shares[other][name] = share
        return shares

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


def _claim(said: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the nodes of whom a sum was told of, by a node's answer; none where none was."""
    names = said.get(OPENED)
    return tuple(sorted({name for name in names if isinstance(name, str)})) if isinstance(names, list) else ()
