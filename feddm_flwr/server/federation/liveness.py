"""Finding out that a node was restarted in the middle of a task.

A SuperNode that comes back with its key has the same id, and Flower goes on waiting for the reply to
what the one before had been given, which nobody will ever send. So nodes that are late are asked now and
then which process they are; one that is not the same as before has lost its task.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from flwr.app import ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid

from feddm_flwr.protocol.failures import Failure, clean
from feddm_flwr.protocol.tasks import PROBE, REPORT
from feddm_flwr.server.federation.transport import Replies, push

_FIRST = 20.0  # seconds until a node is asked; then twice as long each time
_LONGEST = 600.0


class Patience:
    """Which of the nodes that are waited for have been silent for so long that they are asked."""

    def __init__(self) -> None:
        self._due: dict[int, tuple[float, float]] = {}  # by node: when it is over, and for how long it was

    def is_over(self, waiting: Collection[int]) -> list[int]:
        """Returns those with whom it is, and then not before it was twice as long; of others nothing is remembered."""
        now = time.monotonic()
        self._due = {node: self._due.get(node, (now + _FIRST, _FIRST)) for node in waiting}
        silent = [node for node, (when, _) in self._due.items() if now >= when]
        for node in silent:
            interval = min(2 * self._due[node][1], _LONGEST)
            self._due[node] = (now + interval, interval)
        return silent


class Probes:
    """The questions of one round; `processes` (id -> what a node last said) is kept up to date."""

    def __init__(self, grid: Grid, processes: dict[int, str]) -> None:
        self._grid, self._processes, self._replies = grid, processes, Replies(grid)
        self._patience = Patience()
        self._asked: dict[str, int] = {}  # message -> node

    def restarted(self, waiting: Collection[int]) -> set[int]:
        """Returns which of the nodes that a reply is waited for were started anew since they were last heard."""
        for node in self._patience.is_over(waiting):
            if node in self._asked.values() or not self._processes.get(node):
                continue  # simulated nodes have no process of their own
            if message := ask(self._grid, node, _LONGEST):
                self._asked[message] = node
        found = set()
        for message, node in list(self._asked.items()):
            if (reply := self._replies.pull(message)) is None:
                continue
            del self._asked[message]
            said = "" if isinstance(reply, Failure) else process_of(reply)
            if said and said != self._processes[node]:
                self._processes[node] = said
                found.add(node)
        return found & {*waiting}


def ask(grid: Grid, node: int, ttl: float) -> str:
    """Asks a node which process it is, and no more; returns the message's id, or "" where Flower did not take it."""
    return push(grid, RecordDict({PROBE: ConfigRecord({})}), node, MessageType.QUERY, ttl)


def process_of(reply: RecordDict) -> str:
    """Returns which process a node says that it is; "" where it does not say."""
    try:
        return clean(str(reply.config_records[REPORT]["process"]), 100)
    except (KeyError, TypeError, AttributeError):
        return ""
