"""What is changed in Flower so that no node can fill the server's memory; `install` puts it in place.

Both changes replace something private of Flower's (1.41 and 1.42 have it alike; a test says so of the version that is
installed). They act in threads that pull a reply through `transport` and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock, local
from typing import Any

from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
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

#: Of a thread: `reply`, the `PendingReply` that it pulls, and `left`, the bytes that are left for its arrays.
pulling = local()

#: How the error of a reply begins that is too large.
TOO_LARGE = "a reply of more than"
_FEW = 100  # objects beside the chunks of its arrays: far more than an honest reply has
_LEAST_CHUNK = 1 << 18  # bytes of a chunk; 5 MiB where a node does not set FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


def install() -> None:
    """Puts the bounded versions in the place of Flower's; once more changes nothing."""
    inflatable_class_registry[Array.__name__] = _BoundedArray
    http_grid.pull_objects = _pull_objects  # type: ignore[attr-defined, assignment]


class IncompleteError(Exception):
    """A reply is not there in full yet."""


class PendingReply:
    """A reply that a thread of its own pulls."""

    def __init__(self, most: int) -> None:
        self.most = most  # bytes that it may have
        self.box: SimpleQueue[Any] = SimpleQueue()  # what pulling it came to
        self.ready = Event()  # it is there in full, or will not come
        self.wanted = Event()
        self.given_up = False


class _BoundedArray(Array):
    """Flower's, bounded: a list that names one chunk a million times, or arrays of arrays, would fill the memory."""

    @classmethod
    def inflate(cls, object_content: bytes, children: dict[str, InflatableObject] | None = None) -> Array:
        """Does as Flower's, for an array that its chunks make up.

        Raises:
            ValueError: it is larger than what is left, or names something that is no chunk.
        """
        sizes = {name: len(child.data) for name, child in (children or {}).items() if type(child) is ArrayChunk}
        if len(sizes) < len(children or {}):
            raise ValueError("an array of other things than chunks")
        names = get_object_children_ids_from_object_content(object_content)
        listed = json.loads(get_object_body(object_content, Array))["arraychunk_ids"]
        size = sum(sizes[names[place]] for place in listed)
        if (left := getattr(pulling, "left", None)) is not None:
            if size > left:
                raise ValueError(f"an array of {size} bytes, where {left} were left")
            pulling.left = left - size
        return Array.inflate(object_content, children)


def _pull_objects(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """Flower's takes what there is of a reply, and waits with it for the rest. Here one that is not there in full is
    waited for with nothing of it in memory, and fetched once it is `wanted`; one that is too large never is.

    Raises:
        ObjectPullError: it is, or the rest did not come; Flower makes an error reply of it.
    """
    reply: PendingReply | None = getattr(pulling, "reply", None)
    if reply is None:
        return pull_objects(object_ids, pull_object_fn)
    # Flower sets up something for each of them before the first is fetched.
    if len(object_ids) > (most := _FEW + reply.most // _LEAST_CHUNK):
        raise ObjectPullError(object_ids[0], f"{TOO_LARGE} {most} objects")

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
                raise IncompleteError from None
            with lock:
                size += len(content)
            if size > reply.most:
                raise ObjectPullError(object_id, f"{TOO_LARGE} {reply.most} bytes")
            return content if keep else b""

        return pull_objects(object_ids, one)

    try:
        return fetch(patient=False, keep=True)
    except IncompleteError:
        reply.box.put(IncompleteError())  # a new one: what was fetched hangs on the traceback of the other
    fetch(patient=True, keep=False)
    reply.ready.set()
    reply.wanted.wait()
    return fetch(patient=True, keep=True)
