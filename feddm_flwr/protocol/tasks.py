"""What the server asks of a node, and how the frames beside it are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

Scalar = str | int | float | bool

#: Names of the records, and of what a reply is about.
TASK, WEIGHTS_RECORD, REPORT, LOST, PROBE, FRAME = "task", "weights", "report", "lost", "probe", "frame"
#: What a report has instead of a reply where the node's privacy budget is spent: why.
SPENT = "spent"
#: Kinds of what is asked beside the training.
REFERENCE, FINAL = "reference", "final"
#: Stages of a secure sum that are asked for beside the training.
KEYS, SHARES, CONFIRM, OPEN = "keys", "shares", "confirm", "open"
SUMS = "query.sums"  # the kind of their messages
#: What a report has where a node does not answer such a question: why.
PROBLEM = "problem"
#: What an answer has in place of shares: nodes whose keys are wrong, and why.
REFUSED = "refused"
#: What an answer with keys says of sums of the same training that the node told of masks for: whose.
OPENED = "opened"
#: The frame of the expected scales of an update, where nodes send sums.
SCALES = "scales"
#: Frames of the final evaluation.
WEIGHTS, SAMPLES = "weights", "samples"
#: The frame of a whole shadow, and what coded frames and assets have before their number or kind.
SHADOW = "shadow"
#: Those of second moments, of Muon's momentum and of control variates, both ways.
MOMENTS, MOMENTUM, CONTROL = "moments", "momentum", "control"
_CODED, _ASSET = "frame-", "asset-"

#: Frames by name.
Frames = Mapping[str, bytes]


def coded_name(version: int) -> str:
    """Returns the name of the frame that leads to a version of the weights."""
    return f"{_CODED}{version}"


def coded_frames(frames: Frames) -> dict[int, bytes]:
    """Returns the coded frames by the version that they lead to."""
    return {int(name.removeprefix(_CODED)): frame for name, frame in frames.items() if name.startswith(_CODED)}


def asset_name(kind: str) -> str:
    """Returns the name of the frame that is an asset of that kind."""
    return f"{_ASSET}{kind}"


def is_asset(name: str) -> bool:
    """Tells whether a frame of that name is an asset."""
    return name.startswith(_ASSET)


def asset_frames(frames: Frames) -> dict[str, bytes]:
    """Returns the assets among the frames, by kind."""
    return {name.removeprefix(_ASSET): frame for name, frame in frames.items() if is_asset(name)}


@dataclass(frozen=True)
class _Task:
    """What the server asks; the fields, with - for _, are the keys of its message."""

    def to_record(self) -> dict[str, Scalar]:
        """Returns the task as a record of scalars."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Scalar]) -> Self:
        """Reads what `to_record` made.

        Raises:
            TypeError: a field is missing, is of another type, or there is another.
        """
        found = cls(**{key.replace("-", "_"): value for key, value in record.items()})
        for field in fields(found):
            if type(getattr(found, field.name)).__name__ != field.type:
                raise TypeError(f"{field.name} must be of type {field.type}")
        return found


@dataclass(frozen=True)
class TrainTask(_Task):
    """What the server says of a round."""

    run_uuid: str
    round: int
    steps_before: int  # local steps in all earlier rounds; in a finish, of its own
    evaluate: bool  # whether the held-out loss is asked for
    part: str  # which parameters the reply is to cover
    acked: int  # the last round whose reply of this node, of that part, entered a mean; 0: none
    acked_any: int  # the same of any part
    durable: int  # `acked`, had the server to go back to the last checkpoint that is on its disk for sure
    durable_any: int  # the same of any part
    assets: str  # JSON: SHA-256 of what the run builds upon, by kind
    shadow: str  # fingerprint of what the nodes are to hold; empty where weights are sent
    private_steps: int = 0  # steps of this node that entered a mean so far, where privacy is accounted for
    repeat: int = 0  # how often the round's training was drawn anew, after a sum that could not be had
    secure: str = ""  # JSON: the session of a secure sum, its nodes, their images, and their sealed shares

    def facts(self) -> dict[str, Scalar]:
        """Returns what is the same of every node that is asked in a round."""
        return {
            "run": self.run_uuid,
            "round": self.round,
            "steps-before": self.steps_before,
            "evaluate": self.evaluate,
            "assets": self.assets,
            "repeat": self.repeat,
        }


@dataclass(frozen=True)
class SecureTask(_Task):
    """What the server asks of a node about a secure sum."""

    stage: str
    run_uuid: str
    round: int
    repeat: int  # as in `TrainTask`
    session: str  # which attempt
    content: str = "{}"  # JSON
