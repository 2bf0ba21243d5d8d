"""What each node is sent: the weights of a round, given what it is known to hold, and what the run builds upon."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from feddm_flwr.config import RunConfig
from feddm_flwr.exchange.channel import fingerprint
from feddm_flwr.exchange.downlink import DownlinkSender
from feddm_flwr.exchange.partial import ALL, Split
from feddm_flwr.protocol.tasks import Frames, Scalar, TrainTask, asset_name
from feddm_flwr.server.federation.transport import arrays_of, content_of
from feddm_flwr.vector import Vector

_BROADCAST = "broadcast."


class Outgoing:
    """What the nodes hold, as far as the server knows, and what they get in addition."""

    def __init__(
        self, config: RunConfig, initial: Vector, split: Split, run_uuid: str, assets: Mapping[str, Path]
    ) -> None:
        """Begins with the `initial` weights, which all nodes have; `assets` are files that each node is sent once (see
        `models.pretrained`)."""
        self._config, self._split, self.run_uuid = config, split, run_uuid
        self._assets = {kind: path.read_bytes() for kind, path in assets.items()}
        self._fingerprints = {kind: sha256(content).hexdigest() for kind, content in self._assets.items()}
        self._downlink = DownlinkSender(config, initial, split.shared.layout.fingerprint)
        self._held: dict[str, int] = {}  # by node: the version of the shadow that it is known to hold
        self._acked: dict[tuple[str, str], int] = {}  # by node and part: the last round whose reply entered a mean
        self._durable = self._acked  # the same as of the round before, whose checkpoint is on the disk for sure
        self._private_steps: dict[str, int] = {}  # by node: its steps that entered a mean, where they are accounted for

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the vectors that `restore` takes."""
        return {f"{_BROADCAST}{name}": value for name, value in self._downlink.state().items()}

    def facts(self) -> dict[str, Any]:
        """Returns the other facts that `restore` takes."""
        return {
            "run-uuid": self.run_uuid,
            "held": dict(self._held),
            "acked": [[*key, number] for key, number in sorted(self._acked.items())],
            "private-steps": dict(self._private_steps),
        }

    def restore(self, tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's `tensors` and `facts`."""
        own = {n.removeprefix(_BROADCAST): value for n, value in tensors.items() if n.startswith(_BROADCAST)}
        self._downlink.restore(own)
        self.run_uuid, self._held = facts["run-uuid"], facts["held"]
        self._acked = {(name, part): number for name, part, number in facts["acked"]}
        self._durable = self._acked
        self._private_steps = facts.get("private-steps", {})

    def prepare(self, weights: Vector, number: int) -> Vector:
        """Codes the weights for round `number`; returns what the nodes will have decoded.

        Raises:
            ValueError: the weights cannot be coded.
        """
        return self._downlink.prepare(weights, number)

    def task(self, number: int, steps: int, repeat: int) -> TrainTask:
        """Returns what every node is asked in a round, after so many local steps, without what is its own; `repeat` is
        how often its training was drawn anew."""
        every, last = self._config.eval.every, number == self._config.num_server_rounds
        return TrainTask(
            run_uuid=self.run_uuid,
            round=number,
            steps_before=steps,
            evaluate=every > 0 and (last or (number - 1) % every == 0),
            part=ALL,
            acked=0,
            acked_any=0,
            durable=0,
            durable_any=0,
            assets=json.dumps(self._fingerprints),
            shadow=self._downlink.fingerprint,
            repeat=repeat,
        )

    def weights(self, received: Vector) -> str:
        """Returns the fingerprint of the shared weights that nodes `received`."""
        return self._downlink.fingerprint or fingerprint(received)

    def contents(
        self, task: TrainTask, part: Mapping[str, str], beside: Frames, secure: Callable[[str], str]
    ) -> Callable[[str, bool], RecordDict]:
        """Returns a function that says what each node is sent in a round, of which it is to cover a `part`, with the
        frames `beside`, and what its task says of a `secure` sum; frames that several get are held once."""
        arrays: dict[tuple[str, ...], ArrayRecord] = {}

        def content(name: str, whole: bool) -> RecordDict:
            frames = {**self._downlink.frames(None if whole else self._held.get(name, 0)), **beside}
            if whole or name not in self._held:
                frames |= {asset_name(kind): content for kind, content in self._assets.items()}
            kinds = tuple(frames)
            if kinds not in arrays:
                arrays[kinds] = arrays_of(frames)
            own, parts = part[name], self._split.sent
            own_task = replace(
                task,
                part=own,
                acked=self._acked.get((name, own), 0),
                acked_any=max(self._acked.get((name, p), 0) for p in parts),
                durable=self._durable.get((name, own), 0),
                durable_any=max(self._durable.get((name, p), 0) for p in parts),
                private_steps=self._private_steps.get(name, 0),
                secure=secure(name),
            )
            return content_of(arrays[kinds], own_task.to_record())

        return content

    def question(self, kind: str, frames: Frames, assets: Mapping[str, bytes]) -> Callable[[str, bool], RecordDict]:
        """Returns a function that says what each node is sent with a question of a `kind` beside the training; `assets`
        are sent beside those of the training, which a node has unless it says not."""
        fingerprints = self._fingerprints | {name: sha256(content).hexdigest() for name, content in assets.items()}
        task: dict[str, Scalar] = {"kind": kind, "assets": json.dumps(fingerprints)}

        def content(name: str, whole: bool) -> RecordDict:
            needed = assets if name in self._held and not whole else {**self._assets, **assets}
            sent = {**frames, **{asset_name(key): asset for key, asset in needed.items()}}
            return content_of(arrays_of(sent), task)

        return content

    def holds(self, name: str, number: int) -> None:
        """Notes that a node has the weights of round `number`."""
        self._held[name] = number

    def commit(self, acknowledged: Mapping[tuple[str, str], int], steps: Mapping[str, int]) -> None:
        """Notes whose replies entered the mean of a round, by node and part, and how many steps they were of."""
        self._durable = self._acked
        self._acked = {**self._acked, **acknowledged}
        if self._config.privacy.of_images:
            for name, count in steps.items():
                self._private_steps[name] = self._private_steps.get(name, 0) + count
