"""Who takes part: nodes introduce themselves by name, since Flower's ids are random in a simulation."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from feddm_flwr.config import ConfigError, RunConfig, least_replies, nodes_asked
from feddm_flwr.protocol.failures import Failure, RunFailedError, clean
from feddm_flwr.protocol.replies import Introduction
from feddm_flwr.protocol.tasks import REPORT
from feddm_flwr.server.federation.liveness import Patience, ask, process_of
from feddm_flwr.server.federation.transport import Replies, push

log = logging.getLogger(__name__)

_TRIES = 3  # introductions that a node may fail before it is left out
_SLOW = 20.0  # seconds after which those that do not introduce themselves are mentioned
_PAUSE = 0.2  # seconds
_ANSWER = 5.0  # seconds in which a node answers that is there and not at work
_TTL = 2.0  # round-timeouts that an introduction may take: it waits for the round that goes on
_SAID = 50  # nodes that have a line of their own in the log


@dataclass
class _Claim:
    """A node says that it has the name of one that is connected: one that was restarted, whose old id Flower lists for
    a minute, or a second one."""

    node: Introduction
    holder: int  # the other's id
    question: str  # to the other, "" once it is answered
    since: float

    def is_young(self) -> bool:
        """Whether a round waits for the answer."""
        return time.monotonic() - self.since < _ANSWER


class Roster:
    """The nodes by name, and which of Flower's ids each has at present."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.nodes: dict[str, Introduction] = {}
        self._ids: dict[int, str] = {}
        self._left_out: dict[int, str] = {}  # id -> why
        self._problems: dict[int, tuple[str, str]] = {}  # id -> name, and what it found wrong
        self._activated: dict[int, str] = {}  # id -> when it came last
        self._tries: Counter[int] = Counter()
        self._queries: dict[str, int] = {}  # message id -> node id, unanswered
        self._patience = Patience()
        self._claims: dict[int, _Claim] = {}  # by the id of one that has the name of another
        self._was: dict[int, str] = {}  # names of those that were asked again what they have
        self._awaited: set[int] = set()  # of these: those that the next round waits for
        self._replies: Replies | None = None
        self._expected: set[str] = set()  # those that took part before the run was resumed
        self.connected = 0  # nodes that Flower had when the last round began, whatever they said of themselves
        self._said = 0  # nodes introduced in the log since the last round
        self.processes: dict[int, str] = {}  # by id: which process of the node's machine it is

    def wait(self, grid: Grid, *, first: bool) -> dict[str, int]:
        """Name -> id of the nodes that are online, once they are enough for a round.

        Before the first round all that are connected are heard. Where they are too few, or others took part before the
        run was resumed, one that reads all its images first, or ends what it does, may take `round-timeout` longer.
        Later a new node takes part from the round after its introduction, and nobody waits for it.

        Raises:
            ConfigError: before the first round, a node found the configuration or its data wrong.
            RunFailedError: there are too few nodes after `wait-timeout`.
        """
        begun = time.monotonic()
        deadline = begun + self.config.wait_timeout
        before: list[int] = []
        said = ""
        while True:
            registered = {node.node_id: node for node in grid.get_nodes()}
            ids = sorted(registered)
            self._introduce(grid, registered, first=first)
            online = {self._ids[i]: i for i in ids if i in self._ids}
            absent = sorted(self._expected - {*online}) if first else []
            claimed = any(claim.is_young() for claim in self._claims.values())
            silent = [i for i in self._queries.values() if first or i in self._awaited]
            settled = not (claimed or silent) and (not first or (ids == before and not absent))
            few = len(online) < self._needed()
            longer = first and silent and (few or absent)
            now = time.monotonic()
            over = now > deadline
            late = now > deadline + (self.config.round_timeout if longer else 0)
            if first and (settled or over) and self._problems and not self._expected:
                raise ConfigError(_told(self._problems.values()))
            if (settled or late) and not few:
                if absent:
                    log.warning("the run goes on without %s", _list({*absent}, 20))
                if silent:
                    log.warning("the round begins without %d nodes that are connected but do not answer", len(silent))
                if self._said > _SAID:
                    images = sum(node.images for node in self.nodes.values())
                    log.info("%d more nodes; %d images in all, see nodes.json", self._said - _SAID, images)
                self._said = 0
                self._awaited.clear()
                self.connected = len(ids)
                return online
            hopeless = first and settled and ids and all(i in self._left_out for i in ids)
            if late or hopeless:
                raise RunFailedError(self._shortage(len(online), ids))
            before = ids
            text = f"waiting for nodes: {len(online)} of {self._needed()}"
            if absent:
                text = f"waiting for nodes that took part before: {_list({*absent}, 20)}"
            if slow := bool(silent) and now > begun + _SLOW:
                text = f"waiting for {len(silent)} nodes that are connected: they may be reading their images"
            if text != said and (settled or absent or slow):
                log.info("%s", said := text)
            time.sleep(_PAUSE)

    def expect(self, nodes: list[Introduction]) -> None:
        """Remember those who took part before the run was resumed."""
        self.nodes = {node.name: node for node in nodes}
        self._expected = {*self.nodes}

    def introduce_again(self, name: str) -> None:
        """Ask a node anew what it has, before its next round: it is not what it said."""
        log.warning("node %s has other images than it said", name)
        again = {i: name for i, known in self._ids.items() if known == name}
        self._was |= again
        self._awaited |= {*again}
        self._ids = {i: known for i, known in self._ids.items() if known != name}

    def _needed(self) -> int:
        """The least number of online nodes for a round."""
        needed = self.config.min_nodes
        while nodes_asked(self.config, needed) < least_replies(self.config):
            needed += 1
        return needed

    def _shortage(self, online: int, ids: list[int]) -> str:
        reasons = sorted({self._left_out[i] for i in ids if i in self._left_out})
        return (
            f"{online} usable nodes of {len(ids)} connected, {self._needed()} are needed "
            f"(min-nodes = {self.config.min_nodes}, min-replies = {self.config.min_replies}, "
            f"server.aggregation = {self.config.server.aggregation!r}, "
            f"wait-timeout = {self.config.wait_timeout:g} s)"
            + (f"; {len(self._queries)} have not answered" if self._queries else "")
            + "".join(f"; left out: {r}" for r in reasons)
        )

    def _introduce(self, grid: Grid, registered: Mapping[int, NodeInfo], *, first: bool) -> None:
        """Ask whoever is new, and take in the answers that are there. `registered`: those that are connected, by id,
        with the names that their keys were registered under, "" for none."""
        ids = sorted(registered)
        names = {node.name for node in registered.values()}
        # One that went away may come back, with what was wrong put right, and with its key under the same id: while a
        # round ran, say. What it was asked is lost.
        activated = {i: node.last_activated_at for i, node in registered.items()}
        stayed = {i for i, since in activated.items() if self._activated.get(i, since) == since}
        self._activated = activated
        self._queries = {message: i for message, i in self._queries.items() if i in stayed}
        self._claims = {i: claim for i, claim in self._claims.items() if i in stayed}
        self._left_out = {i: why for i, why in self._left_out.items() if i in stayed}
        self._problems = {i: problem for i, problem in self._problems.items() if i in stayed}
        self._tries = Counter({i: tries for i, tries in self._tries.items() if i in stayed})
        self._replies = self._replies or Replies(grid)
        self._replies.forget_all_but({*self._queries, *(claim.question for claim in self._claims.values())})
        known = {*self._ids, *self._left_out, *self._queries.values(), *self._claims}
        for i in ids:
            if i in known:
                continue
            if message := push(grid, RecordDict(), i, MessageType.QUERY, _TTL * self.config.round_timeout):
                self._queries[message] = i
        # A SuperNode (Flower 1.41) sends one reply for each message, and may be one behind, for ever, if its SuperLink
        # was restarted: it is asked something else.
        for i in self._patience.is_over({*self._queries.values()}):
            ask(grid, i, self.config.round_timeout)
        introduced: list[Introduction] = []
        for message, i in list(self._queries.items()):
            if (reply := self._replies.pull(message)) is None:
                continue
            del self._queries[message]
            answer = reply if isinstance(reply, Failure) else _introduction(reply)
            if isinstance(answer, Failure):
                self._tries[i] += answer.reason != "timeout"  # it had no time beside its training
                if answer.reason == "malformed" or self._tries[i] >= _TRIES:
                    self._leave_out(i, f"a node did not introduce itself: {answer}")
                continue
            node, problem = answer
            assert isinstance(reply, RecordDict)
            self.processes[i] = process_of(reply)
            namesakes = [other for other in ids if self._ids.get(other) == node.name]
            if (was := self._was.get(i, node.name)) != node.name:
                problem = f"this node was {was} before"
            if (bound := registered[i].name) != node.name and (bound or node.name in names):
                problem = (
                    f"the node is registered as {clean(bound)!r}" if bound else "another node is registered as this"
                )
                problem += "; node-name must be the name that its key was registered under"
            if first and namesakes and not problem:
                problem = "two nodes have this name; give each its own node-name, or wait until a restarted one is gone"
            if problem:
                self._problems[i] = node.name, problem
                # It ends a new run, and is said there; one that is resumed goes on without the node.
                self._leave_out(i, f"{node.name}: {problem}", quiet=first and not self._expected)
                self._expected.discard(node.name)
                continue
            if namesakes:
                question = ask(grid, namesakes[0], self.config.round_timeout)
                self._claims[i] = _Claim(node, namesakes[0], question, time.monotonic())
                log.info("another node says that it is %s: it waits until that one is gone", node.name)
                continue
            self._admit(i, node)
            introduced.append(node)
        introduced += self._judge_claims(ids)
        for node in sorted(introduced, key=lambda n: n.name):
            self._said += 1
            if self._said > _SAID:
                continue
            classes = " ".join(f"{c}:{n}" for c, n in node.class_counts.items()) or "unknown"
            skipped = f", {node.skipped} skipped" if node.skipped else ""
            sizes = f" of {node.sizes}" if node.sizes else ""
            log.info(
                "node %s: %d images%s, %d held out%s, classes %s",
                *(node.name, node.images, sizes, node.held_out, skipped, clean(classes, 1000)),
            )

    def _judge_claims(self, ids: list[int]) -> list[Introduction]:
        """Let those in whose name nobody has any more. One that is silent may be at work: it keeps its name."""
        assert self._replies
        admitted = []
        for i, claim in list(self._claims.items()):
            answer = self._replies.pull(claim.question) if claim.question else None
            claim.question = claim.question if answer is None else ""
            name = claim.node.name
            if isinstance(answer, RecordDict):
                del self._claims[i]
                self._leave_out(i, f"{name}: another node of this name is at work; give each its own node-name")
            elif claim.holder not in ids or (isinstance(answer, Failure) and answer.reason == "node-offline"):
                del self._claims[i]
                for other in [other for other, known in self._ids.items() if known == name]:
                    self._leave_out(other, f"{name}: came back under another id")
                    del self._ids[other]
                self._admit(i, claim.node)
                admitted.append(claim.node)
        return admitted

    def _admit(self, node_id: int, node: Introduction) -> None:
        self._ids[node_id] = node.name
        if (before := self.nodes.get(node.name)) and before != node:
            log.warning("node %s has other images than before: %d, were %d", node.name, node.images, before.images)
        self.nodes[node.name] = node

    def _leave_out(self, node_id: int, why: str, *, quiet: bool = False) -> None:
        self._left_out[node_id] = clean(why)
        log.log(logging.DEBUG if quiet else logging.WARNING, "left out: %s", clean(why))


def _introduction(reply: RecordDict) -> tuple[Introduction, str] | Failure:
    """Returns what a node said of itself, and what it found wrong ("" if nothing), or what is wrong with that."""
    try:
        return Introduction.from_record(reply.config_records[REPORT])
    except (KeyError, TypeError, AttributeError) as error:
        return Failure("malformed", clean(repr(error)))


def _told(problems: Iterable[tuple[str, str]]) -> str:
    """What nodes found wrong, one line for each, with the names of those that have it."""
    names: dict[str, set[str]] = {}
    for name, text in problems:
        for line in text.splitlines():
            names.setdefault(line, set()).add(name)
    return "\n".join(f"{_list(of)}: {line}" for line, of in names.items())


def _list(names: set[str], shown: int = 3) -> str:
    """A few names and how many more there are."""
    ordered = sorted(names, key=lambda name: (len(name), name))
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + more
