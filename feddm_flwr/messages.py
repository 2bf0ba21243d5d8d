"""Sending to nodes and pulling what comes back, one message at a time, whatever it turns out to be."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

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


@dataclass(frozen=True)
class Failure:
    """Why there is no good reply: a short reason that is counted, and a line for the log."""

    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.text}"


def push(grid: Grid, content: RecordDict, node_id: int, kind: str, ttl: float) -> str:
    """Send one message, valid for `ttl` seconds; its id, or "" where Flower did not take it."""
    message_ids = list(grid.push_messages([Message(content, node_id, kind, ttl=ttl)]))
    return message_ids[0] or "" if message_ids else ""


def pull(grid: Grid, message_id: str) -> RecordDict | Failure | None:
    """The reply to a message, or None while there is none."""
    try:
        replies = list(grid.pull_messages([message_id]))
    except _UNPACKING as error:
        return Failure("malformed", f"Flower cannot unpack the reply: {clean(repr(error))}")
    if not replies:
        return None
    if replies[0].has_error():
        told = replies[0].error
        return Failure(_REASONS.get(told.code, f"error-{told.code}"), _gist(told))
    return replies[0].content


def clean(text: str, limit: int = 300) -> str:
    """Text of a node on one printable line of bounded length: it cannot forge lines of the log."""
    return "".join(c if c.isprintable() else " " for c in text[: 4 * limit]).strip()[:limit]


def _gist(error: Error) -> str:
    """The line that tells: the last of a traceback in Flower's `<class 'X'>:<'…'>`, else the first."""
    text = re.sub(r"^<class '[^']*'>:<['\"](.*)['\"]>$", r"\1", str(error.reason).strip(), flags=re.DOTALL)
    lines = text.strip().splitlines() or ["no reason given"]
    line = lines[-1] if _REASONS.get(error.code) == "exception" else lines[0]
    return clean(line.rpartition("ClientAppException: ")[2])
