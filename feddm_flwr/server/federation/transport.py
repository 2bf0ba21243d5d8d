"""Sending to nodes and pulling what comes back, one message at a time, whatever it turns out to be."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from threading import Thread

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from feddm_flwr.protocol.failures import Failure, clean
from feddm_flwr.protocol.tasks import FRAME, TASK, WEIGHTS_RECORD, Frames, Scalar
from feddm_flwr.server.federation.flower_patches import TOO_LARGE, IncompleteError, PendingReply, install, pulling

#: What Flower raises when it unpacks what a node made up.
_UNPACKING = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RecursionError,
    DecodeError,
    MemoryError,
)

#: Flower's error codes in the words of `metrics.jsonl`. 0 (simulation) and 8: the client's process died;
#: 3 and 4: the message, or the reply, was not fetched while it was valid.
_REASONS = {
    0: "process-died",
    1: "app-not-loaded",
    2: "exception",
    3: "timeout",
    4: "timeout",
    5: "node-offline",
    8: "process-died",
}


def push(grid: Grid, content: RecordDict, node_id: int, kind: str, ttl: float) -> str:
    """Sends one message, valid for `ttl` seconds; returns its id, or "" where Flower did not take it."""
    message_ids = list(grid.push_messages([Message(content, node_id, kind, ttl=ttl)]))
    return message_ids[0] or "" if message_ids else ""


class Replies:
    """Pulls replies. Flower says that there is one when its upload begins, and then waits for the end of it,
    two hours if need be: such a reply is waited for aside. It holds up nobody else and takes no memory meanwhile,
    however many do so."""

    def __init__(self, grid: Grid, most: int = 10_000_000) -> None:
        """`most`: bytes that a reply may have; larger ones of real nodes are not taken into memory."""
        install()
        self._grid, self._most = grid, most
        self._aside: dict[str, PendingReply] = {}

    def pull(self, message_id: str) -> RecordDict | Failure | None:
        """Returns the reply to a message, or None while there is none."""
        if (reply := self._aside.get(message_id)) is None:
            reply = PendingReply(self._most)
            Thread(target=_pull_into, args=(reply, self._grid, message_id), daemon=True).start()
        elif reply.ready.is_set():
            del self._aside[message_id]
            reply.wanted.set()
        else:
            return None
        pulled: RecordDict | Failure | BaseException | None = reply.box.get()
        if isinstance(pulled, IncompleteError):
            self._aside[message_id] = reply
            return None
        if isinstance(pulled, BaseException):
            raise pulled
        return pulled

    def forget_all_but(self, messages: Container[str]) -> None:
        """Gives up on the replies to other messages."""
        for message in [message for message in self._aside if message not in messages]:
            reply = self._aside.pop(message)
            reply.given_up = True
            reply.wanted.set()


def _pull_into(reply: PendingReply, grid: Grid, message_id: str) -> None:
    """Puts what there is of a reply into its box."""
    pulling.reply, pulling.left = reply, reply.most
    try:
        reply.box.put(_pull(grid, message_id))
    except BaseException as error:  # raised where the reply is asked for
        reply.box.put(error)
    reply.ready.set()


def _pull(grid: Grid, message_id: str) -> RecordDict | Failure | None:
    try:
        replies = list(grid.pull_messages([message_id]))
    except _UNPACKING as error:
        return Failure("malformed", f"Flower cannot unpack the reply: {clean(repr(error))}")
    if not replies:
        return None
    if replies[0].has_error():
        told = replies[0].error
        reason = "oversized" if TOO_LARGE in str(told.reason) else _REASONS.get(told.code, f"error-{told.code}")
        return Failure(reason, _gist(told))
    return replies[0].content


def arrays_of(frames: Frames) -> ArrayRecord:
    """Returns frames as the arrays of a message."""
    return ArrayRecord({name: Array("uint8", (len(f),), "feddm.frame", f) for name, f in frames.items()})


def content_of(arrays: ArrayRecord, task: Mapping[str, Scalar]) -> RecordDict:
    """Returns the content of a message that asks a node for something."""
    return RecordDict({WEIGHTS_RECORD: arrays, TASK: ConfigRecord({**task})})


def frame_of(reply: RecordDict, name: str = FRAME) -> bytes:
    """Returns the frame of that name in a reply.

    Raises:
        KeyError, TypeError, AttributeError: there is none.
    """
    return reply.array_records[WEIGHTS_RECORD][name].data


def _gist(error: Error) -> str:
    """Returns the line that tells: the last of a traceback in Flower's `<class 'X'>:<'…'>`, else the first."""
    text = re.sub(r"^<class '[^']*'>:<['\"](.*)['\"]>$", r"\1", str(error.reason).strip(), flags=re.DOTALL)
    lines = text.strip().splitlines() or ["no reason given"]
    line = lines[-1] if _REASONS.get(error.code) == "exception" else lines[0]
    return clean(line.rpartition("ClientAppException: ")[2])
