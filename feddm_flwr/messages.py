"""Sending to nodes and pulling what comes back, one message at a time, whatever it turns out to be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Lock, Thread, local

from flwr.app import Array, Error, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflatable_class_registry,
    pull_objects,
)
from flwr.superlink.grid import http_grid
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


_pulling = local()  # `reply`, which this thread pulls, and `left`, the bytes that are left for its arrays


class _Array(Array):
    """Flower's, bounded: a list that names one chunk a million times, or arrays of arrays, would fill the memory."""

    @classmethod
    def inflate(cls, object_content: bytes, children: dict[str, InflatableObject] | None = None) -> Array:
        """As Flower's, for an array that its chunks make up.

        Raises:
            ValueError: it is larger than what is left, or names something that is no chunk.
        """
        sizes = {name: len(child.data) for name, child in (children or {}).items() if type(child) is ArrayChunk}
        if len(sizes) < len(children or {}):
            raise ValueError("an array of other things than chunks")
        names = get_object_children_ids_from_object_content(object_content)
        listed = json.loads(get_object_body(object_content, Array))["arraychunk_ids"]
        size = sum(sizes[names[place]] for place in listed)
        if (left := getattr(_pulling, "left", None)) is not None:
            if size > left:
                raise ValueError(f"an array of {size} bytes, where {left} were left")
            _pulling.left = left - size
        return Array.inflate(object_content, children)


inflatable_class_registry[Array.__name__] = _Array


_TOO_LARGE = "a reply of more than"
_FEW = 100  # objects beside the chunks of its arrays: far more than an honest reply has
_LEAST_CHUNK = 1 << 18  # bytes of a chunk; 5 MiB where a node does not set FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


class _IncompleteError(Exception):
    """A reply is not there in full yet."""


def _pull_objects(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """Flower's takes what there is of a reply, and waits with it for the rest. Here one that is not there in full is
    waited for with nothing of it in memory, and fetched once it is `wanted`; one that is too large never is.

    Raises:
        ObjectPullError: it is, or the rest did not come; Flower makes an error reply of it.
    """
    reply: _Reply | None = getattr(_pulling, "reply", None)
    if reply is None:
        return pull_objects(object_ids, pull_object_fn)
    # Flower sets up something for each of them before the first is fetched.
    if len(object_ids) > (most := _FEW + reply.most // _LEAST_CHUNK):
        raise ObjectPullError(object_ids[0], f"{_TOO_LARGE} {most} objects")

    def fetch(*, patient: bool, keep: bool) -> dict[str, bytes]:
        size, lock = 0, Lock()

        def one(object_id: str) -> bytes:
            nonlocal size
            if reply.given_up:
                raise ObjectPullError(object_id, "nobody waits for it any more")
            try:
                content = pull_object_fn(object_id)
            except ObjectUnavailableError:
                if patient:
                    raise  # it is tried again
                raise _IncompleteError from None
            with lock:
                size += len(content)
            if size > reply.most:
                raise ObjectPullError(object_id, f"{_TOO_LARGE} {reply.most} bytes")
            return content if keep else b""

        return pull_objects(object_ids, one)

    try:
        return fetch(patient=False, keep=True)
    except _IncompleteError:
        reply.box.put(_IncompleteError())  # a new one: what was fetched hangs on the traceback of the other
    fetch(patient=True, keep=False)
    reply.ready.set()
    reply.wanted.wait()
    return fetch(patient=True, keep=True)


http_grid.pull_objects = _pull_objects  # type: ignore[attr-defined, assignment]


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


#: What a pull came to: the reply, None while there is none, or an error of Flower's.
_Pulled = RecordDict | Failure | BaseException | None


class _Reply:
    """A reply that a thread of its own pulls."""

    def __init__(self, most: int) -> None:
        self.most = most  # bytes that it may have
        self.box: SimpleQueue[_Pulled] = SimpleQueue()
        self.ready = Event()  # it is there in full, or will not come
        self.wanted = Event()
        self.given_up = False

    def pull(self, grid: Grid, message_id: str) -> None:
        """Put into the box what there is."""
        _pulling.reply, _pulling.left = self, self.most
        try:
            self.box.put(_pull(grid, message_id))
        except BaseException as error:  # raised where the reply is asked for
            self.box.put(error)
        self.ready.set()


class Replies:
    """Pulls replies. Flower says that there is one when its upload begins, and then waits for the end of it,
    two hours if need be: such a reply is waited for aside. It holds up nobody else and takes no memory meanwhile,
    however many do so."""

    def __init__(self, grid: Grid, most: int = 10_000_000) -> None:
        """`most`: bytes that a reply may have; larger ones of real nodes are not taken into memory."""
        self._grid, self._most = grid, most
        self._aside: dict[str, _Reply] = {}

    def pull(self, message_id: str) -> RecordDict | Failure | None:
        """The reply to a message, or None while there is none."""
        if (reply := self._aside.get(message_id)) is None:
            reply = _Reply(self._most)
            Thread(target=reply.pull, args=(self._grid, message_id), daemon=True).start()
        elif reply.ready.is_set():
            del self._aside[message_id]
            reply.wanted.set()
        else:
            return None
        pulled = reply.box.get()
        if isinstance(pulled, _IncompleteError):
            self._aside[message_id] = reply
            return None
        if isinstance(pulled, BaseException):
            raise pulled
        return pulled

    def forget_all_but(self, messages: Container[str]) -> None:
        """Give up on the replies to other messages."""
        for message in [message for message in self._aside if message not in messages]:
            reply = self._aside.pop(message)
            reply.given_up = True
            reply.wanted.set()


def _pull(grid: Grid, message_id: str) -> RecordDict | Failure | None:
    try:
        replies = list(grid.pull_messages([message_id]))
    except _UNPACKING as error:
        return Failure("malformed", f"Flower cannot unpack the reply: {clean(repr(error))}")
    if not replies:
        return None
    if replies[0].has_error():
        told = replies[0].error
        reason = "oversized" if _TOO_LARGE in str(told.reason) else _REASONS.get(told.code, f"error-{told.code}")
        return Failure(reason, _gist(told))
    return replies[0].content


def frame_of(reply: RecordDict) -> bytes:
    """The frame in a reply.

    Raises:
        KeyError, TypeError, AttributeError: there is none.
    """
    return reply.array_records["weights"]["frame"].data


def clean(text: str, limit: int = 300) -> str:
    """Text of a node on one printable line of bounded length: it cannot forge lines of the log."""
    return "".join(c if c.isprintable() else " " for c in text[: 4 * limit]).strip()[:limit]


def _gist(error: Error) -> str:
    """The line that tells: the last of a traceback in Flower's `<class 'X'>:<'…'>`, else the first."""
    text = re.sub(r"^<class '[^']*'>:<['\"](.*)['\"]>$", r"\1", str(error.reason).strip(), flags=re.DOTALL)
    lines = text.strip().splitlines() or ["no reason given"]
    line = lines[-1] if _REASONS.get(error.code) == "exception" else lines[0]
    return clean(line.rpartition("ClientAppException: ")[2])
