"""One attempt at a round: asking nodes to train, and their replies as they come.

Flower's own strategies collect all replies of a round before they aggregate; here they are pulled
one by one, so that the server's memory does not grow with the number of nodes.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator

from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from feddm_flwr.protocol.failures import Failure
from feddm_flwr.protocol.tasks import LOST
from feddm_flwr.server.federation.liveness import Probes
from feddm_flwr.server.federation.traffic import Traffic, count, most_bytes
from feddm_flwr.server.federation.transport import Replies, push

log = logging.getLogger(__name__)

_WINDOW = 2  # simulated nodes that are asked at a time, beside one for each core
_MOST = 1 << 28  # bytes of what is asked beside the training: sums of features are the most
_PAUSE = 0.05  # seconds between polls at first; they grow to a second


def collect(
    grid: Grid,
    names: dict[int, str],
    content: Callable[[str, bool], RecordDict],
    traffic: Traffic,
    size: int,
    timeout: float,
    probes: Probes,
    kind: str = MessageType.TRAIN,
    *,
    beside: int = 0,
) -> Iterator[tuple[int, RecordDict | Failure]]:
    """Asks the nodes (id -> name) to train, or what else is of a `kind`; yields their replies as they come.

    `content(name, whole)` is what a node is sent, of `size` parameters; its reply may have so many values `beside`
    them. A node that says it lost what it should hold is asked again, once, with the whole of it. A node whose process
    died is asked again for as long as others get through: in a simulation the dead process stays in Flower's pool and
    fails whatever it is handed. So is a real node that was restarted.
    """
    deadline = time.monotonic() + timeout
    # A simulation keeps replies in this process until they are pulled, and may make them faster. Real nodes are all
    # asked at once: their replies wait in the SuperLink, on disk.
    window = _WINDOW + _cores() if simulated(grid) else len(names)
    replies = Replies(grid, most_bytes(size + beside) + 1_000_000 if kind == MessageType.TRAIN else _MOST)
    died: dict[int, Failure] = {}
    whole: set[int] = set()
    again = list(names)
    while again:
        pending: dict[str, int] = {}
        queue, again, through, pause = deque(again), [], 0, _PAUSE
        while queue or pending:
            while queue and len(pending) < window:
                node_id = queue.popleft()
                sent = content(names[node_id], node_id in whole)
                if message := push(grid, sent, node_id, kind, timeout):
                    pending[message] = node_id
                    count(traffic, names[node_id], sent)
                    traffic.float32_down += 0 if node_id in whole else 4 * size
                else:
                    yield node_id, Failure("not-sent", "Flower did not take the message")
            time.sleep(pause)
            pause = min(pause * 1.2, 1.0)
            restarted = probes.restarted(pending.values())
            for message, node_id in list(pending.items()):
                if (reply := replies.pull(message)) is None:
                    if node_id in restarted:
                        del pending[message]
                        died[node_id] = Failure("restarted", "the node was restarted and lost its task")
                        again.append(node_id)
                    continue
                del pending[message]
                pause = _PAUSE
                if isinstance(reply, Failure) and reply.reason == "process-died":
                    died[node_id] = reply
                    again.append(node_id)
                    continue
                through += 1
                if not _lost(reply):
                    yield node_id, reply
                elif node_id in whole:
                    yield node_id, Failure("lost", "the node says that it lost what it was just sent")
                else:
                    log.warning("%s has lost what it was sent before; it gets the whole of it", names[node_id])
                    whole.add(node_id)
                    again.append(node_id)
            if time.monotonic() >= deadline:
                break
        replies.forget_all_but(())
        for node_id in (*pending.values(), *queue):
            yield node_id, Failure("timeout", f"no reply within round-timeout = {timeout:g} s")
        if not through or time.monotonic() >= deadline:
            break
        for node_id in again:
            if node_id in died:
                log.warning("%s: %s; asked again", names[node_id], died[node_id])
    for node_id in again:
        yield node_id, died.get(node_id, Failure("timeout", "no time was left to send the shared weights"))


def simulated(grid: Grid) -> bool:
    """Tells whether the nodes are this machine's own."""
    return hasattr(grid, "state")


def _cores() -> int:
    """Returns the cores of this machine, or of the Ray cluster that the simulation runs on."""
    if os.environ.get("RAY_ADDRESS"):
        import ray

        return int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    return os.cpu_count() or 1


def _lost(reply: RecordDict | Failure) -> bool:
    """Tells whether a node says that it does not hold what the frames add to."""
    return isinstance(reply, RecordDict) and LOST in reply.config_records
