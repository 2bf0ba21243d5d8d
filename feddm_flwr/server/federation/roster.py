"""Who takes part: nodes introduce themselves by name, since Flower's ids are random in a simulation."""

from __future__ import annotations

import logging
import time
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
        """Tells whether a round waits for the answer."""
        return time.monotonic() - self.since < _ANSWER


@dataclass
class Member:
    """What is known of one of Flower's ids. It has a name once it takes part; else it is asked who it is, claims the
    name of another, or is left out."""

    name: str = ""
    query: str = ""  # the message that asks who it is, unanswered
    claim: _Claim | None = None
    left_out: str = ""  # why
    problem: str = ""  # what it found wrong before the run began, with its name before each line
    tries: int = 0  # introductions that failed
    activated: str | None = None  # when it came last; None while it is away
    was: str = ""  # its name before it was asked again what it has
    awaited: bool = False  # whether the next round waits for its answer to that

    @property
    def is_known(self) -> bool:
        """Whether it need not be asked who it is."""
        return bool(self.name or self.query or self.claim or self.left_out)

    def seen(self, activated: str | None) -> None:
        """Notes whether it is there. One that went away may come back, with what was wrong put right, and with its key
        under the same id: while a round ran, say. What it was asked is lost then."""
        if activated is None or self.activated not in (None, activated):
            self.query, self.claim, self.left_out, self.problem, self.tries = "", None, "", "", 0
        self.activated = activated


@dataclass(frozen=True)
class _View:
    """Who is there at a moment."""

    ids: list[int]
    online: dict[str, int]  # name -> id of those that take part
    absent: list[str]  # those of before the run was resumed that are not there
    silent: int  # how many have not answered that are waited for
    settled: bool  # whether nobody is waited for
    few: bool  # whether they are too few for a round


class Roster:
    """The nodes by name, and which of Flower's ids each has at present."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.nodes: dict[str, Introduction] = {}  # by name, all that ever took part
        self.processes: dict[int, str] = {}  # by id: which process of the node's machine it is
        self.connected = 0  # nodes that Flower had when the last round began, whatever they said of themselves
        self._members: dict[int, Member] = {}
        self._patience = Patience()
        self._replies: Replies | None = None
        self._expected: set[str] = set()  # those that took part before the run was resumed
        self._admitted: set[str] = set()
        self._said = 0  # nodes introduced in the log since the last round

    def wait(self, grid: Grid, *, first: bool) -> dict[str, int]:
        """Returns name -> id of the nodes that are online, once they are enough for a round.

        Before the first round all that are connected are heard. Where they are too few, or others took part before the
        run was resumed, one that reads all its images first, or ends what it does, may take `round-timeout` longer.
        Later a new node takes part from the round after its introduction, and nobody waits for it.

        Raises:
            ConfigError: before the first round, nodes found the configuration or their data wrong, and the others are
                too few.
            RunFailedError: there are too few nodes after `wait-timeout`.
        """
        begun = time.monotonic()
        deadline = begun + self.config.wait_timeout
        before: list[int] = []
        said = ""
        while True:
            registered = {node.node_id: node for node in grid.get_nodes()}
            self._introduce(grid, registered, first=first)
            view = self._view(sorted(registered), before, first=first)
            now, longer = time.monotonic(), first and view.silent and (view.few or view.absent)
            late = now > deadline + (self.config.round_timeout if longer else 0)
            problems = [member.problem for member in self._members.values() if member.problem]
            if first and (view.settled or now > deadline) and problems and view.few and not self._expected:
                raise ConfigError(_told(problems))
            if (view.settled or late) and not view.few:
                self._begin(view)
                return view.online
            hopeless = first and view.settled and view.ids and all(self._members[i].left_out for i in view.ids)
            if late or hopeless:
                raise RunFailedError(self._shortage(view))
            before = view.ids
            slow = bool(view.silent) and now > begun + _SLOW
            text = self._waiting_for(view, slow=slow)
            if text != said and (view.settled or view.absent or slow):
                log.info("%s", said := text)
            time.sleep(_PAUSE)

    def take_admitted(self) -> set[str]:
        """Returns the nodes that were admitted since this was last asked."""
        admitted, self._admitted = self._admitted, set()
        return admitted

    def expect(self, nodes: list[Introduction]) -> None:
        """Remembers those who took part before the run was resumed."""
        self.nodes = {node.name: node for node in nodes}
        self._expected = {*self.nodes}

    def introduce_again(self, name: str) -> None:
        """Asks a node anew what it has, before its next round: it is not what it said."""
        log.warning("node %s has other images than it said", name)
        for member in self._members.values():
            if member.name == name:
                member.name, member.was, member.awaited = "", name, True

    def _view(self, ids: list[int], before: list[int], *, first: bool) -> _View:
        """Looks at who is there; `before` are the ids of a moment ago."""
        there = {i: self._members[i] for i in ids}
        online = {member.name: i for i, member in there.items() if member.name}
        absent = sorted(self._expected - {*online}) if first else []
        claimed = any(member.claim and member.claim.is_young() for member in there.values())
        silent = sum(bool(member.query) and (first or member.awaited) for member in there.values())
        settled = not (claimed or silent) and (not first or (ids == before and not absent))
        return _View(ids, online, absent, silent, settled, len(online) < self.needed)

    def _begin(self, view: _View) -> None:
        """Notes that a round begins with those who are there, and says who is left out of a new run."""
        for line in _told(member.problem for member in self._members.values()).splitlines():
            log.warning("the run begins without %s", line)
        if view.absent:
            log.warning("the run goes on without %s", _list({*view.absent}, 20))
        if view.silent:
            log.warning("the round begins without %d nodes that are connected but do not answer", view.silent)
        if self._said > _SAID:
            images = sum(node.images for node in self.nodes.values())
            log.info("%d more nodes; %d images in all, see nodes.json", self._said - _SAID, images)
        self._said = 0
        for member in self._members.values():
            member.awaited, member.problem = False, ""
        self.connected = len(view.ids)

    def _waiting_for(self, view: _View, *, slow: bool) -> str:
        if slow:
            return f"waiting for {view.silent} nodes that are connected: they may be reading their images"
        if view.absent:
            return f"waiting for nodes that took part before: {_list({*view.absent}, 20)}"
        return f"waiting for nodes: {len(view.online)} of {self.needed}"

    @property
    def needed(self) -> int:
        """Returns the least number of online nodes for a round."""
        needed = self.config.min_nodes
        while nodes_asked(self.config, needed) < least_replies(self.config):
            needed += 1
        return needed

    def _shortage(self, view: _View) -> str:
        there = [self._members[i] for i in view.ids]
        silent = sum(bool(member.query) for member in there)
        reasons = sorted({member.left_out for member in there if member.left_out})
        return (
            f"{len(view.online)} usable nodes of {len(view.ids)} connected, {self.needed} are needed "
            f"(min-nodes = {self.config.min_nodes}, min-replies = {self.config.min_replies}, "
            f"server.aggregation = {self.config.server.aggregation!r}, "
            f"privacy.secure-aggregation = {str(self.config.privacy.secure_aggregation).lower()}, "
            f"wait-timeout = {self.config.wait_timeout:g} s)"
            + (f"; {silent} have not answered" if silent else "")
            + "".join(f"; left out: {r}" for r in reasons)
        )

    def _introduce(self, grid: Grid, registered: Mapping[int, NodeInfo], *, first: bool) -> None:
        """Asks whoever is new, and takes in the answers that are there. `registered`: those that are connected, by id,
        with the names that their keys were registered under, "" for none."""
        for i in sorted(registered):
            self._members.setdefault(i, Member())
        for i, member in self._members.items():
            member.seen(registered[i].last_activated_at if i in registered else None)
        self._ask(grid, registered)
        introduced: list[Introduction] = []
        for i, member in self._members.items():
            if member.query and (node := self._answered(i, member, registered, first=first)):
                introduced += self._admit_or_ask(grid, i, node, registered)
        introduced += self._settle_claims(registered)
        for node in sorted(introduced, key=lambda n: n.name):
            self._said += 1
            if self._said <= _SAID:
                _say(node)

    def _ask(self, grid: Grid, registered: Mapping[int, NodeInfo]) -> None:
        """Asks those who they are of whom nothing is known, and reminds those that are slow to answer."""
        self._replies = self._replies or Replies(grid)
        members = self._members.values()
        self._replies.forget_all_but({*(m.query for m in members), *(m.claim.question for m in members if m.claim)})
        for i in sorted(registered):
            if not self._members[i].is_known:
                timeout = _TTL * self.config.round_timeout
                self._members[i].query = push(grid, RecordDict(), i, MessageType.QUERY, timeout)
        # A SuperNode (Flower 1.41) sends one reply for each message, and may be one behind, for ever, if its SuperLink
        # was restarted: it is asked something else.
        for i in self._patience.is_over({i for i, member in self._members.items() if member.query}):
            ask(grid, i, self.config.round_timeout)

    def _answered(
        self, i: int, member: Member, registered: Mapping[int, NodeInfo], *, first: bool
    ) -> Introduction | None:
        """Returns a node's introduction if it is there and nothing is wrong with it; the node is left out otherwise, or
        asked once more."""
        assert self._replies
        if (reply := self._replies.pull(member.query)) is None:
            return None
        member.query = ""
        answer = reply if isinstance(reply, Failure) else _introduction(reply)
        if isinstance(answer, Failure):
            member.tries += answer.reason != "timeout"  # it had no time beside its training
            if answer.reason == "malformed" or member.tries >= _TRIES:
                self._leave_out(member, f"a node did not introduce itself: {answer}")
            return None
        node, problem = answer
        assert isinstance(reply, RecordDict)
        self.processes[i] = process_of(reply)
        if member.was not in ("", node.name):
            problem = f"this node was {member.was} before"
        if (bound := registered[i].name) != node.name and (bound or node.name in {n.name for n in registered.values()}):
            problem = f"the node is registered as {clean(bound)!r}" if bound else "another node is registered as this"
            problem += "; node-name must be the name that its key was registered under"
        if first and not problem and self._namesakes(node, registered):
            problem = "two nodes have this name; give each its own node-name, or wait until a restarted one is gone"
        if not problem:
            return node
        # Of a new run it is said when the run begins, or does not, for want of nodes.
        if new := first and not self._expected:
            member.problem = "\n".join(f"{node.name}: {line}" for line in problem.splitlines())
        self._leave_out(member, f"{node.name}: {problem}", quiet=new)
        self._expected.discard(node.name)
        return None

    def _namesakes(self, node: Introduction, registered: Mapping[int, NodeInfo]) -> list[int]:
        """Returns the ids that are connected and have the node's name."""
        return [other for other in sorted(registered) if self._members[other].name == node.name]

    def _admit_or_ask(
        self, grid: Grid, i: int, node: Introduction, registered: Mapping[int, NodeInfo]
    ) -> list[Introduction]:
        """Lets a node in; one that has the name of another waits until that one is gone, which is asked."""
        if not (namesakes := self._namesakes(node, registered)):
            self._admit(self._members[i], node)
            return [node]
        question = ask(grid, namesakes[0], self.config.round_timeout)
        self._members[i].claim = _Claim(node, namesakes[0], question, time.monotonic())
        log.info("another node says that it is %s: it waits until that one is gone", node.name)
        return []

    def _settle_claims(self, registered: Mapping[int, NodeInfo]) -> list[Introduction]:
        """Lets those in whose name nobody has any more. One that is silent may be at work: it keeps its name."""
        assert self._replies
        admitted = []
        for member in self._members.values():
            if not (claim := member.claim):
                continue
            answer = self._replies.pull(claim.question) if claim.question else None
            claim.question = claim.question if answer is None else ""
            name = claim.node.name
            if isinstance(answer, RecordDict):
                member.claim = None
                self._leave_out(member, f"{name}: another node of this name is at work; give each its own node-name")
            elif claim.holder not in registered or (isinstance(answer, Failure) and answer.reason == "node-offline"):
                member.claim = None
                for other in [other for other in self._members.values() if other.name == name]:
                    self._leave_out(other, f"{name}: came back under another id")
                    other.name = ""
                self._admit(member, claim.node)
                admitted.append(claim.node)
        return admitted

    def _admit(self, member: Member, node: Introduction) -> None:
        member.name = node.name
        if (before := self.nodes.get(node.name)) and before != node:
            log.warning("node %s has other images than before: %d, were %d", node.name, node.images, before.images)
        self.nodes[node.name] = node
        self._admitted.add(node.name)

    def _leave_out(self, member: Member, why: str, *, quiet: bool = False) -> None:
        member.left_out = clean(why)
        log.log(logging.DEBUG if quiet else logging.WARNING, "left out: %s", clean(why))


def _say(node: Introduction) -> None:
    """Says in the log what a node has."""
    classes = " ".join(f"{c}:{n}" for c, n in node.class_counts.items()) or "unknown"
    skipped = f", {node.skipped} skipped" if node.skipped else ""
    sizes = f" of {node.sizes}" if node.sizes else ""
    groups = f" in {node.groups} groups" if node.groups else ""
    log.info(
        "node %s: %d images%s%s, %d held out%s, classes %s",
        *(node.name, node.images, groups, sizes, node.held_out, skipped, clean(classes, 1000)),
    )
    for what, count in node.remarks.items():
        log.warning("node %s: %s: %d", node.name, what, count)


def _introduction(reply: RecordDict) -> tuple[Introduction, str] | Failure:
    """Returns what a node said of itself, and what it found wrong ("" if nothing), or what is wrong with that."""
    try:
        return Introduction.from_record(reply.config_records[REPORT])
    except (KeyError, TypeError, AttributeError) as error:
        return Failure("malformed", clean(repr(error)))


def _told(problems: Iterable[str]) -> str:
    """Returns what nodes found wrong, one line for each, with the names of those that have it."""
    names: dict[str, set[str]] = {}
    for text in problems:
        for line in text.splitlines():
            name, _, what = line.partition(": ")
            names.setdefault(what, set()).add(name)
    return "\n".join(f"{_list(of)}: {line}" for line, of in names.items())


def _list(names: set[str], shown: int = 3) -> str:
    """Returns a few names and how many more there are."""
    ordered = sorted(names, key=lambda name: (len(name), name))
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + more
