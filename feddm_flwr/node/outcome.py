"""What comes of a node's task."""

from __future__ import annotations

from dataclasses import dataclass

from feddm_flwr.protocol.tasks import Frames, Scalar


@dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    report: dict[str, Scalar]  # what the server is told
    frames: Frames  # by name; none where the node had lost what the server's frames add to
