"""FedDM's round loop: ask nodes to train, take their replies in as they come, step, repeat.

Every strategy is a preset of this one loop (see `config.presets`). It checks, decodes, adds and
frees replies one by one, so that the server's memory does not grow with the number of nodes, and
the result does not depend on who answers first.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from flwr.app import MessageType, RecordDict
from flwr.serverapp import Grid

from feddm_flwr.aggregation import averages
from feddm_flwr.aggregation.outliers import Outliers
from feddm_flwr.aggregation.server_optimizers import server_optimizer
from feddm_flwr.config import ConfigError, RunConfig, derive_seed, least_replies, nodes_asked
from feddm_flwr.exchange.extras import Extras, ExtrasChannel
from feddm_flwr.exchange.partial import Split, assign
from feddm_flwr.exchange.sums import Scales
from feddm_flwr.exchange.uplink import UplinkReceiver
from feddm_flwr.protocol.failures import Failure, RunFailedError
from feddm_flwr.protocol.replies import Introduction
from feddm_flwr.protocol.tasks import SCALES, Frames, TrainTask
from feddm_flwr.reporting.progress import RoundBegun, RoundDone
from feddm_flwr.server.client_level import ClientLevel, FixedClip
from feddm_flwr.server.federation.dispatch import collect
from feddm_flwr.server.federation.liveness import Probes
from feddm_flwr.server.federation.roster import Roster
from feddm_flwr.server.federation.traffic import Traffic
from feddm_flwr.server.federation.transport import frame_of
from feddm_flwr.server.outgoing import Outgoing
from feddm_flwr.server.round import RoundInProgress, RoundResult
from feddm_flwr.server.secure_round import Courier, SecureRound
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
        self._outgoing = Outgoing(config, initial, split, run_uuid, assets or {})
        self._roster = Roster(config)
        self._begun = False  # whether nodes were heard that this process waited for
        self._client_level = ClientLevel(config.privacy, config.num_server_rounds) if config.privacy.of_nodes else None
        clip = FixedClip(config.privacy.clip_norm) if self._client_level else None
        self._outliers = clip or Outliers(s.norm_limit, s.clip_norm)
        self.round = 0  # the last one that was committed
        self.weights = initial
        self._step_norm = 0.0  # of the last round's step
        self._other = 0  # bytes of what was asked beside the training since the last round
        self._receiver = UplinkReceiver(config, split)
        self.never_sent = {*split.sent}  # parts that no node's reply has covered yet
        self.spent: set[str] = set()  # nodes whose privacy budget is spent; they still answer questions
        self._too_few = ""  # why the run ended, where that was found out while it waited for nodes
        sums = config.privacy.secure_aggregation
        self._scales = Scales(config, len(initial), split.shared.layout.fingerprint) if sums else None
        self._optimizer = server_optimizer(s.optimizer, s.learning_rate, s.momentum)
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Begins to train from the weights: those of the run, or of its finish, which goes on with what the nodes have
        not sent yet and with how long updates are."""
        s = self.config.server
        self.average = averages.average(s.average, s.ema_decay, self.weights)
        self._steps = 0  # local steps since then, by the weighted mean of the nodes
        self._extras: Extras = {}  # what the nodes' next round begins with beside the weights
        self._state = self._optimizer.init(self.weights)

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
        tensors = {f"optimizer.{name}": value for name, value in self._state.items()}
        tensors |= self._outgoing.tensors() | self._extras
        if self._scales:
            tensors[SCALES] = self._scales.values
        facts = self._outgoing.facts() | {
            "steps": self._steps,
            "step-norm": self._step_norm,
            "norms": self._outliers.state(),
            "never-sent": sorted(self.never_sent),
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
        own = "optimizer."
        self._state = {name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)}
        self._outgoing.restore(tensors, facts)
        self._extras = {name: tensors[name] for name in self._channel(self.round).sizes if name in tensors}
        self._steps, self._step_norm = facts["steps"], facts.get("step-norm", 0.0)
        self._outliers.restore(facts["norms"])
        self.never_sent = {*facts["never-sent"]}
        self.spent = {*facts.get("spent", ())}
        if self._client_level:
            self._client_level.restore(facts["client-level"])
        if self._scales:
            self._scales.values = tensors[SCALES]
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
            if number == self.config.before_finish + 1:
                self._begin_anew()
            repeat, progress = 0, None
            # What the nodes will hold: the base of their updates.
            received = self._outgoing.prepare(self.weights, number)
            for attempt in range(1 + self.config.max_round_retries):
                online = {} if self._begun and self.is_over else self._wait(grid)
                if not online or self.is_over:
                    return
                chosen = self._sample(sorted(online), number, attempt)
                task = self._outgoing.task(number, self._steps, repeat)
                progress = self._attempt(grid, task, online, chosen, received)
                earlier.add(progress.traffic)
                needed = least_replies(self.config, len(chosen))
                if progress.count >= needed:
                    break
                reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(progress.traffic.failures.items()))
                problem = (
                    f"round {number}: {progress.count} of {len(chosen)} nodes gave a good reply, "
                    f"{needed} are needed ({reasons})"
                )
                repeat, why = repeat + progress.is_told, progress.why
                progress = None  # before the next is made: each holds weights and sums as large as the model
                log.warning("%s; attempt %d of %d", problem, attempt + 1, 1 + self.config.max_round_retries)
            else:
                if self.is_over:
                    return
                tries = f"gave up after {1 + self.config.max_round_retries} attempts"
                raise RunFailedError(f"{problem}; {tries}; {why}".removesuffix("; "))
            progress.traffic = earlier
            before_step()
            yield self._commit(number, received, progress, len(chosen), len(online), time.monotonic() - start)

    def _channel(self, number: int, after: int = 0) -> ExtrasChannel:
        """Returns the way of what travels beside the weights in a round."""
        return ExtrasChannel(self.config.in_round(number), self._split.shared.layout, after)

    def _sample(self, names: list[str], number: int, attempt: int) -> list[str]:
        """Returns the nodes that train, by name and seed; a repeated round draws anew."""
        count = nodes_asked(self.config, len(names))
        if self._client_level:
            return self._client_level.choose(names, count)
        seed = derive_seed(self.config.seed, "sample", number, attempt)
        chosen = np.random.default_rng(seed).permutation(len(names))[:count]
        return sorted(names[i] for i in chosen)

    def _attempt(
        self, grid: Grid, task: TrainTask, online: dict[str, int], names: list[str], received: Vector
    ) -> RoundInProgress:
        """Sends the weights to nodes, by name, of those that are online, and takes in what comes back, one reply at a
        time."""
        number, nodes, timeout, traffic = task.round, self._roster.nodes, self.config.round_timeout, Traffic()
        probes = Probes(grid, self._roster.processes)
        frames = self._channel(number).encode(self._extras, number) if self._extras else {}
        secure = None
        if self._scales:
            secure = SecureRound(
                self.config, len(received), self._scales, task, Courier(grid, online, probes, traffic, timeout)
            )
            secure.begin(names, {name: nodes[name].images for name in online})
            names = secure.names
            frames |= {SCALES: secure.frame}
        chosen, part = {online[name]: name for name in names}, assign(self._split, names, self.config, number)
        extras, config = self._channel(number, after=number), self.config.in_round(number)
        progress = RoundInProgress(
            number, config, nodes, part, self._receiver, received, self._outliers, extras, secure
        )
        progress.traffic = traffic
        log.info("%s", RoundBegun(number, self.config.num_server_rounds, len(chosen)))
        content = self._outgoing.contents(task, part, frames, secure.said_to if secure else lambda name: "")
        freed = 0  # bytes of replies
        size, beside = len(received), sum(extras.sizes.values())
        for node_id, reply in collect(grid, chosen, content, traffic, size, timeout, probes, beside=beside):
            name = chosen[node_id]
            failure = reply if isinstance(reply, Failure) else progress.accept(name, reply)
            if failure:
                progress.fail(name, failure)
            else:
                self._outgoing.holds(name, number)
            del reply
            if traffic.up.total() - freed > _GARBAGE:
                freed = traffic.up.total()
                gc.collect()
        if secure:
            progress.open(self._outgoing.weights(received))
        for name in sorted(progress.spent - self.spent):
            if number < self.config.num_server_rounds:
                log.warning("node=%s has no privacy budget left: the run goes on without it", name)
        self.spent |= progress.spent
        for name in sorted(progress.outdated - self.spent):
            self._roster.introduce_again(name)
        return progress

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
        if self._scales:
            progress.teach(self._scales)
        self.average.update(weights, self._steps, steps)
        self._steps += steps
        self._outliers.commit(progress.lengths())
        self._outgoing.commit(progress.acknowledged(), progress.steps())
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
        content = self._outgoing.question(kind, frames, assets)
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
