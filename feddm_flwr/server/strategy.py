"""FedDM's round loop: ask nodes to train, take their replies in as they come, step, repeat.

Every strategy is a preset of this one loop (see `config.presets`). It checks, decodes, adds and
frees replies one by one, so that the server's memory does not grow with the number of nodes, and
the result does not depend on who answers first.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, MessageType, RecordDict
from flwr.serverapp import Grid

from feddm_flwr.aggregation import averages
from feddm_flwr.aggregation.outliers import Outliers
from feddm_flwr.aggregation.server_optimizers import server_optimizer
from feddm_flwr.config import ConfigError, RunConfig, derive_seed, least_replies, nodes_asked
from feddm_flwr.exchange.downlink import DownlinkSender
from feddm_flwr.exchange.extras import Extras, ExtrasChannel
from feddm_flwr.exchange.partial import Split, assign
from feddm_flwr.exchange.uplink import UplinkReceiver
from feddm_flwr.protocol.failures import Failure, RunFailedError
from feddm_flwr.protocol.replies import Introduction
from feddm_flwr.protocol.tasks import Frames, Scalar, TrainTask, asset_name
from feddm_flwr.reporting.progress import RoundBegun, RoundDone
from feddm_flwr.server.client_level import ClientLevel, FixedClip
from feddm_flwr.server.federation.dispatch import collect
from feddm_flwr.server.federation.liveness import Probes
from feddm_flwr.server.federation.roster import Roster
from feddm_flwr.server.federation.traffic import Traffic
from feddm_flwr.server.federation.transport import arrays_of, content_of, frame_of
from feddm_flwr.server.round import RoundInProgress, RoundResult
from feddm_flwr.storage.checkpoint import Checkpoint
from feddm_flwr.vector import Vector, euclidean_norm

log = logging.getLogger(__name__)

_GARBAGE = 1 << 26  # bytes of replies until they are collected: Flower's messages are in cycles


class FedDM:
    """The server's side of a run."""

    def __init__(
        self, config: RunConfig, initial: Vector, split: Split, run_uuid: str, assets: Mapping[str, Path] | None = None
    ) -> None:
        """`initial` has the shared parameters; `run_uuid`, 32 hex digits, tells the nodes which run's state is which;
        `assets` are files that each node is sent once (see `models.pretrained`)."""
        self.config = config
        s = config.server
        self._split = split
        self._run_uuid = run_uuid
        self._assets = {kind: path.read_bytes() for kind, path in (assets or {}).items()}
        self._fingerprints = {kind: sha256(content).hexdigest() for kind, content in self._assets.items()}
        self._roster = Roster(config)
        self._begun = False  # whether nodes were heard that this process waited for
        self._client_level = ClientLevel(config.privacy, config.num_server_rounds) if config.privacy.of_nodes else None
        clip = FixedClip(config.privacy.clip_norm) if self._client_level else None
        self._outliers = clip or Outliers(s.norm_limit, s.clip_norm)
        self.round = 0  # the last one that was committed
        self.weights, self.average = initial, averages.average(s.average, s.ema_decay, initial)
        self._step_norm = 0.0  # of the last round's step
        self._other = 0  # bytes of what was asked beside the training since the last round
        self._steps = 0  # local steps so far, by the weighted mean of the nodes
        self._downlink = DownlinkSender(config, initial, split.shared.layout.fingerprint)
        self._receiver = UplinkReceiver(config, split)
        self._extras_channel = ExtrasChannel(config, split.shared.layout)
        self._extras: Extras = {}  # what the nodes' next round begins with beside the weights
        self.never_sent = {*split.sent}  # parts that no node's reply has covered yet
        self._held: dict[str, int] = {}  # by node: the version of the shadow that it is known to hold
        self._acked: dict[tuple[str, str], int] = {}  # by node and part: the last round whose reply entered a mean
        self._durable = self._acked  # the same as of the round before, whose checkpoint is on the disk for sure
        self._private_steps: dict[str, int] = {}  # by node: its steps that entered a mean, where they are accounted for
        self.spent: set[str] = set()  # nodes whose privacy budget is spent; they still answer questions
        self._too_few = ""  # why the run ended, where that was found out while it waited for nodes
        self._optimizer = server_optimizer(s.optimizer, s.learning_rate, s.momentum)
        self._state = self._optimizer.init(initial)

    @property
    def averaged(self) -> Vector:
        """The average of the global weights that is evaluated and shipped."""
        return self.average.value(self.weights)

    @property
    def nodes(self) -> list[Introduction]:
        """Every node that has taken part so far, by name."""
        return [node for _, node in sorted(self._roster.nodes.items())]

    @property
    def is_over(self) -> bool:
        """Whether the last round was done: that of the configuration, or that after which the privacy that may be spent
        is."""
        return self.round == self.config.num_server_rounds or bool(self.ended_early)

    @property
    def ended_early(self) -> str:
        """Why the run is over before the round of the configuration; "" where it is not."""
        if not 0 < self.round < self.config.num_server_rounds:
            return ""
        if self._client_level and self._client_level.is_spent():
            return self._ended("another would cost more than privacy.epsilon")
        return self._too_few or self._shortage({*self._roster.nodes})

    def _shortage(self, names: set[str]) -> str:
        """Returns why the run ends where no others than these nodes are there; "" where they are enough."""
        left = names - self.spent
        if not self.spent or len(left) >= self._roster.needed:
            return ""
        return self._ended(f"{len(left)} nodes have privacy budget left, {self._roster.needed} are needed")

    def _ended(self, why: str) -> str:
        return f"ended after round {self.round} of {self.config.num_server_rounds}: {why}"

    def _wait(self, grid: Grid) -> dict[str, int]:
        """Returns name -> id of the nodes that may train, none where the run is over, as `ended_early` says then.

        Raises:
            ConfigError, RunFailedError: as `Roster.wait`.
        """
        try:
            online = self._roster.wait(grid, first=not self._begun)
        except (ConfigError, RunFailedError):
            if not (self.round and self.spent):
                raise
            online = {}
        self._begun = True
        self.spent -= self._roster.take_admitted()  # they found that they have some left
        self._too_few = self._shortage({*online})
        if self._too_few and not self.round:
            raise RunFailedError(self._too_few)
        return {} if self._too_few else {name: i for name, i in online.items() if name not in self.spent}

    def checkpoint(self) -> Checkpoint:
        """Returns everything that `restore` needs to go on after the last round as if nothing had happened.

        Until it is durable, the next round must not be committed: nodes keep what they need to go back to it or to
        the one before, and no more. That changes the averages in it.
        """
        tensors = {
            **{f"optimizer.{name}": value for name, value in self._state.items()},
            **{f"broadcast.{name}": value for name, value in self._downlink.state().items()},
        }
        tensors |= self._extras
        facts = {
            "run-uuid": self._run_uuid,
            "steps": self._steps,
            "step-norm": self._step_norm,
            "held": dict(self._held),
            "acked": [[*key, number] for key, number in sorted(self._acked.items())],
            "norms": self._outliers.state(),
            "never-sent": sorted(self.never_sent),
            "private-steps": dict(self._private_steps),
            "spent": sorted(self.spent),
            "client-level": self._client_level.state() if self._client_level else {},
            "nodes": [asdict(node) for node in self.nodes],
        }
        return Checkpoint(self.round, {"weights": self.weights, **self.average.tensors(), **tensors}, facts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint of a run with the same configuration."""
        facts, tensors = checkpoint.facts, checkpoint.tensors
        self.round, self.weights = checkpoint.round, tensors["weights"]
        self.average = averages.restored(tensors, self.config.server.ema_decay)
        groups = {
            group: {name.removeprefix(group): value for name, value in tensors.items() if name.startswith(group)}
            for group in ("optimizer.", "broadcast.")
        }
        self._state = groups["optimizer."]
        self._downlink.restore(groups["broadcast."])
        self._extras = {name: tensors[name] for name in self._extras_channel.sizes if name in tensors}
        self._run_uuid, self._steps, self._held = facts["run-uuid"], facts["steps"], facts["held"]
        self._step_norm = facts.get("step-norm", 0.0)
        self._acked = {(name, part): number for name, part, number in facts["acked"]}
        self._durable = self._acked
        self._outliers.restore(facts["norms"])
        self.never_sent = {*facts["never-sent"]}
        self._private_steps, self.spent = facts.get("private-steps", {}), {*facts.get("spent", ())}
        if self._client_level:
            self._client_level.restore(facts["client-level"])
        self._roster.expect([Introduction(**node) for node in facts["nodes"]])

    def run(self, grid: Grid, before_step: Callable[[], None] = lambda: None) -> Iterator[RoundResult]:
        """Trains up to round `num-server-rounds`, yielding each round when it is done. `before_step` is called when
        the replies of a round are in, before anything is made of them.

        Raises:
            ConfigError: before the first round, a node finds the configuration or its data wrong.
            RunFailedError: nodes stay away longer than `wait-timeout`, or a round has too few good
                replies however often it is repeated.
        """
        gc.freeze()  # what is there stays: collecting the replies' cycles need not walk it
        for number in range(self.round + 1, self.config.num_server_rounds + 1):
            start = time.monotonic()
            earlier = Traffic()
            # What the nodes will hold: the base of their updates.
            received = self._downlink.prepare(self.weights, number)
            for attempt in range(1 + self.config.max_round_retries):
                online = {} if self._begun and self.is_over else self._wait(grid)
                if not online or self.is_over:
                    return
                chosen = {online[name]: name for name in self._sample(sorted(online), number, attempt)}
                progress = self._attempt(grid, number, chosen, received)
                earlier.add(progress.traffic)
                needed = least_replies(self.config, len(chosen))
                if progress.count >= needed:
                    break
                reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(progress.traffic.failures.items()))
                problem = (
                    f"round {number}: {progress.count} of {len(chosen)} nodes gave a good reply, "
                    f"{needed} are needed ({reasons})"
                )
                log.warning("%s; attempt %d of %d", problem, attempt + 1, 1 + self.config.max_round_retries)
            else:
                if self.is_over:
                    return
                tries = f"gave up after {1 + self.config.max_round_retries} attempts"
                raise RunFailedError(f"{problem}; {tries}; {progress.why}".removesuffix("; "))
            progress.traffic = earlier
            before_step()
            yield self._commit(number, received, progress, len(chosen), len(online), time.monotonic() - start)

    def _sample(self, names: list[str], number: int, attempt: int) -> list[str]:
        """Returns the nodes that train, by name and seed; a repeated round draws anew."""
        count = nodes_asked(self.config, len(names))
        if self._client_level:
            return self._client_level.choose(names, count)
        seed = derive_seed(self.config.seed, "sample", number, attempt)
        chosen = np.random.default_rng(seed).permutation(len(names))[:count]
        return sorted(names[i] for i in chosen)

    def _attempt(self, grid: Grid, number: int, chosen: dict[int, str], received: Vector) -> RoundInProgress:
        """Sends the weights to the chosen nodes and takes in what comes back, one reply at a time."""
        part = assign(self._split, sorted(chosen.values()), self.config, number)
        nodes, timeout = self._roster.nodes, self.config.round_timeout
        extras = ExtrasChannel(self.config, self._split.shared.layout, number)
        progress = RoundInProgress(number, self.config, nodes, part, self._receiver, received, self._outliers, extras)
        log.info("%s", RoundBegun(number, self.config.num_server_rounds, len(chosen)))
        content, probes = self._contents(number, part), Probes(grid, self._roster.processes)
        freed = 0  # bytes of replies
        size, beside = len(received), sum(extras.sizes.values())
        for node_id, reply in collect(grid, chosen, content, progress.traffic, size, timeout, probes, beside=beside):
            name = chosen[node_id]
            failure = reply if isinstance(reply, Failure) else progress.accept(name, reply)
            if failure:
                progress.traffic.failures[failure.reason] += 1
                progress.why = f"{name}: {failure.text}"
                log.warning("round=%d node=%s dropped: %s", number, name, failure)
            else:
                self._held[name] = number
            del reply
            if progress.traffic.up.total() - freed > _GARBAGE:
                freed = progress.traffic.up.total()
                gc.collect()
        for name in sorted(progress.spent - self.spent):
            if number < self.config.num_server_rounds:
                log.warning("node=%s has no privacy budget left: the run goes on without it", name)
        self.spent |= progress.spent
        for name in sorted(progress.outdated - self.spent):
            self._roster.introduce_again(name)
        return progress

    def _contents(self, number: int, part: Mapping[str, str]) -> Callable[[str, bool], RecordDict]:
        """Returns a function that says what each node is sent in a round; frames that several get are held once."""
        arrays: dict[tuple[str, ...], ArrayRecord] = {}
        extras = self._extras_channel.encode(self._extras, number) if self._extras else {}
        every, last = self.config.eval.every, number == self.config.num_server_rounds
        evaluate = every > 0 and (last or (number - 1) % every == 0)

        def content(name: str, whole: bool) -> RecordDict:
            frames = self._downlink.frames(None if whole else self._held.get(name, 0)) | extras
            if whole or name not in self._held:
                frames |= {asset_name(kind): content for kind, content in self._assets.items()}
            kinds = tuple(frames)
            if kinds not in arrays:
                arrays[kinds] = arrays_of(frames)
            own = part[name]
            task = TrainTask(
                run_uuid=self._run_uuid,
                round=number,
                steps_before=self._steps,
                evaluate=evaluate,
                part=own,
                acked=self._acked.get((name, own), 0),
                acked_any=max(self._acked.get((name, p), 0) for p in self._split.sent),
                durable=self._durable.get((name, own), 0),
                durable_any=max(self._durable.get((name, p), 0) for p in self._split.sent),
                assets=json.dumps(self._fingerprints),
                shadow=self._downlink.fingerprint,
                private_steps=self._private_steps.get(name, 0),
            )
            return content_of(arrays[kinds], task.to_record())

        return content

    def _commit(
        self, number: int, received: Vector, progress: RoundInProgress, asked: int, online: int, seconds: float
    ) -> RoundResult:
        """Applies the server step to the aggregated update of those of the online nodes that were asked."""
        found = progress.aggregates()
        for name, (_, count) in found.items():
            if count:
                self.never_sent.discard(name)
            else:
                log.warning("round=%d: no reply covers the part %r; only momentum moves it", number, name)
        delta = self._split.join({name: mean for name, (mean, _) in found.items()})
        del found
        if self._client_level:
            delta = self._client_level.protect(delta, progress.count, asked, online)
        # Where weights are coded, what the server's coding lost is gone: the step starts from what the
        # nodes had. Where differences are, it is still owed to them: the step starts from the model.
        base = received if self.config.codec.target == "weights" else self.weights
        weights, state = self._optimizer.update(base, delta, self._state)
        before, step = self._step_norm, euclidean_norm(weights, base)
        if not math.isfinite(step):
            raise RunFailedError(f"round {number}: the server step made weights that are not finite")
        self._step_norm = step
        steps = progress.typical_steps()
        self.round, self.weights, self._state = number, weights, state
        self._extras = progress.extras(self._extras)
        if self.config.privacy.of_images:
            for name, count in progress.steps().items():
                self._private_steps[name] = self._private_steps.get(name, 0) + count
        self.average.update(weights, self._steps, steps)
        self._steps += steps
        self._outliers.commit(progress.lengths())
        self._durable = self._acked
        self._acked = self._acked | progress.acknowledged()
        done = progress.result(
            weights=self.weights,
            delta=delta,
            asked=asked,
            connected=self._roster.connected,
            bytes_other=self._other,
            contraction=step / before if before else math.nan,
            seconds=seconds,
            client_level=self._client_level.epsilon() if self._client_level else math.nan,
        )
        figures = (
            done.train_loss,
            done.eval_loss,
            done.clients_ok,
            done.clients_failed,
            done.bytes_up,
            done.bytes_down,
        )
        log.info("%s", RoundDone(number, self.config.num_server_rounds, *figures, seconds))
        self._other = 0
        return done

    def ask(
        self, grid: Grid, kind: str, frames: Frames, assets: dict[str, bytes], least: int = 0
    ) -> Iterator[tuple[Introduction, RecordDict | Failure]]:
        """Asks every node with at least so many images something beside the training (see `node.evaluate`); yields
        their replies as they come. `assets` are sent beside those of the training, which a node has unless it says not.

        Raises:
            ConfigError, RunFailedError: as `run`.
        """
        online = self._roster.wait(grid, first=not self._begun)
        self._begun = True
        chosen = {i: name for name, i in online.items() if self._roster.nodes[name].images >= least}
        fingerprints = self._fingerprints | {name: sha256(content).hexdigest() for name, content in assets.items()}
        task: dict[str, Scalar] = {"kind": kind, "assets": json.dumps(fingerprints)}

        def content(name: str, whole: bool) -> RecordDict:
            needed = assets if name in self._held and not whole else self._assets | assets
            sent = {**frames, **{asset_name(key): asset for key, asset in needed.items()}}
            return content_of(arrays_of(sent), task)

        traffic, probes = Traffic(), Probes(grid, self._roster.processes)
        timeout = self.config.round_timeout
        for i, reply in collect(grid, chosen, content, traffic, 0, timeout, probes, MessageType.EVALUATE):
            if not isinstance(reply, Failure):
                # Whoever makes use of it sees what is wrong with it.
                with suppress(KeyError, TypeError, AttributeError):
                    traffic.other += len(frame_of(reply))
            yield self._roster.nodes[chosen[i]], reply
            del reply
            gc.collect()
        self._other += traffic.other + traffic.down.total()

    @property
    def bytes_other(self) -> int:
        """What was asked beside the training since the last round, in bytes both ways."""
        return self._other
