"""A round: what comes in while it goes on, and what it came to."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from feddm_flwr.aggregation.base import Aggregator, aggregator_class
from feddm_flwr.aggregation.mean import StreamingMean
from feddm_flwr.aggregation.outliers import Lengths, Outliers
from feddm_flwr.aggregation.robust import RobustMean
from feddm_flwr.codecs.framing import Frame, FrameError
from feddm_flwr.config import NOISE_LEVELS, RunConfig, expanded, local_steps
from feddm_flwr.config.plugins import is_plugin
from feddm_flwr.exchange.extras import Extras, ExtrasChannel, mean_of_nodes
from feddm_flwr.exchange.partial import ALL
from feddm_flwr.exchange.sums import Scales
from feddm_flwr.exchange.uplink import UplinkReceiver
from feddm_flwr.privacy.secure_sum import SecureSumError
from feddm_flwr.protocol.failures import Failure, clean
from feddm_flwr.protocol.replies import Introduction, TrainReply
from feddm_flwr.protocol.tasks import CONTROL, MOMENTS, REPORT, SPENT
from feddm_flwr.reporting.progress import NodeDone
from feddm_flwr.server.federation.traffic import Traffic, most_bytes
from feddm_flwr.server.federation.transport import frame_of
from feddm_flwr.server.means import spread, weighted, weighted_levels
from feddm_flwr.server.secure_round import Opened, SecureRound
from feddm_flwr.vector import Vector, euclidean_norm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """What a round came to."""

    round: int
    weights: Vector
    train_loss: float
    eval_loss: float  # of the weights that the round started from; NaN where not evaluated
    eval_levels: list[float]  # the same by noise level, from the least noise to the most; empty where not evaluated
    eval_losses: dict[str, float]  # the same by node
    eval_spread: float  # how unequally the model serves the nodes: standard deviation of these; NaN where not known
    connected: int  # nodes that Flower had when it began
    clients_ok: int
    clients_failed: int
    failures: dict[str, int]
    bytes_up: int
    bytes_down: int
    bytes_full: int  # of bytes_down: whole shadows, for nodes that had lost theirs or were far behind
    bytes_up_fp32: int  # what the same messages would have been as plain float32
    bytes_down_fp32: int
    bytes_data_parallel: int  # each way, had the nodes exchanged float32 gradients after every step
    bytes_other: int  # both ways, of what is not training: models that the run builds upon, evaluations
    nodes: dict[str, dict[str, int]]  # by name: bytes up and down
    state_lost: int  # nodes whose residual was gone: the run is then not bit for bit that without
    coding_error: float  # norm of what the uplink lost over that of what was to be sent
    local_steps: int
    update_norm: float
    drift: float  # spread of the nodes' updates around their mean, over its norm; NaN where it is not known
    contraction: float  # norm of this round's step of the weights over that of the round before; NaN for the first
    seconds: float
    epsilon: float = math.nan  # spent in the run, by the node that spent most, or of nodes; NaN where it does not count
    epsilons: dict[str, tuple[float, float]] = field(default_factory=dict)  # by node: in the run, and in all runs

    def figures(self) -> dict[str, Any]:
        """Returns the round as a line of `metrics.jsonl`: everything but the vectors."""
        own = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weights", "eval_losses", "epsilons")
        }
        of_nodes: dict[str, dict[str, float]] = {name: {**of} for name, of in self.nodes.items()}
        for name, loss in self.eval_losses.items():
            of_nodes[name]["eval_loss"] = loss
        for name, spent in self.epsilons.items():
            of_nodes[name]["epsilon"], of_nodes[name]["epsilon_total"] = spent
        return own | {"nodes": of_nodes}


@dataclass(frozen=True)
class _Accepted:
    """A good reply, without its update."""

    node: Introduction
    reply: TrainReply
    norm: float  # of the update, before it was shortened
    scale: float  # by which it was shortened

    @property
    def evaluated(self) -> bool:
        """Whether the node measured the held-out loss."""
        return self.node.held_out > 0 and self.reply.eval_loss is not None


class RoundInProgress:
    """One attempt at a round: it checks replies one by one, adds their updates and lets go of them."""

    def __init__(
        self,
        number: int,
        config: RunConfig,
        nodes: Mapping[str, Introduction],
        part: Mapping[str, str],
        receiver: UplinkReceiver,
        received: Vector,
        outliers: Outliers,
        extras: ExtrasChannel,
        secure: SecureRound | None = None,
    ) -> None:
        """Begins with no replies. `part` says, for each of the nodes that are asked, what its reply is to cover;
        `received` are the weights that all of them get; `extras` says what is asked for beside. With `secure` replies
        are terms of a sum, which `open` learns."""
        self.number, self.part, self.traffic = number, part, Traffic()
        self.outdated: set[str] = set()  # nodes that have other images than they said at their introduction
        self.spent: set[str] = set()  # nodes that have no privacy budget left for another round
        self.why = ""  # the last failure
        self._config, self._nodes, self._receiver, self._received = config, nodes, receiver, received
        self._outliers, self._extras = outliers, extras
        self._secure = secure
        self.opened: Opened | None = None
        self._means: list[tuple[str, int, Vector]] = []  # by node: what it weighs, and its second moments
        total = sum(self._weight(nodes[name]) for name in part)
        self._aggregators = {
            name: _aggregator(config, receiver.size(name), total, receiver.decoder(name, number, received))
            for name in receiver.parts
            if not secure
        }
        self._beside = {
            name: _aggregator(config, size, total, partial(extras.chunks, name, number=number))
            for name, size in extras.sizes.items()
            if name != MOMENTS  # which are small, and whose median is another rule's
        }
        self._accepted: list[_Accepted] = []

    @property
    def is_told(self) -> bool:
        """Whether another attempt at the round must not be made of the same training, see `secure_round`."""
        return bool(self._secure and self._secure.is_told)

    @property
    def count(self) -> int:
        """Good replies."""
        return len(self._accepted)

    def accept(self, name: str, reply: RecordDict) -> Failure | None:
        """Checks a node's reply and adds its update to the aggregate; returns what is wrong with it, if anything is.

        The weights of a mean are what the node said at its introduction: a reply cannot raise them.
        """
        private = self._config.privacy.of_images
        if private and SPENT in (refusal := reply.config_records.get(REPORT, ConfigRecord())):
            self.spent.add(name)
            return Failure(SPENT, clean(str(refusal[SPENT])))
        node, part = self._nodes[name], self.part[name]
        size = self._receiver.size(part)
        try:
            frame = frame_of(reply)
            own = {kind: frame_of(reply, kind) for kind in self._extras.sizes}
            self.traffic.up[name] += len(frame) + sum(map(len, own.values()))
            self.traffic.float32_up += 4 * size
            said = TrainReply.from_record(reply.config_records[REPORT], name, self.number)
        except (KeyError, TypeError, AttributeError) as error:
            return Failure("malformed", clean(repr(error)))
        if isinstance(said, Failure):
            return said
        if said.images != node.images:
            self.outdated.add(name)
        if said.steps > (most := local_steps(self._config, node.images)):
            return Failure("malformed", f"{said.steps} steps; {most} are all of the {node.images} images that it had")
        if len(frame) > most_bytes(size):
            return Failure("oversized", f"a frame of {len(frame)} bytes for {size} values")
        if self._secure:
            return self._accept_term(self._secure, node, said, frame)
        try:
            extras = self._extras.decode(own, self.number)
            update = self._receiver.update(part, frame, self.number, self._received)
        except FrameError as error:
            return Failure("bad-frame", clean(str(error)))
        try:
            norm, scale = self._outliers.check(part, update, said.steps, self._expected(size, said.steps))
        except ValueError as error:
            return Failure("outlier", str(error))
        if scale < 1:
            update *= np.float32(scale)
            log.info("round=%d node=%s: norm %.3g shortened to %.3g", self.number, name, norm, norm * scale)
        try:  # all of the reply, or nothing
            for kind, aggregator in self._beside.items():
                aggregator.check(extras[kind])
            self._aggregators[part].add(update, self._weight(node), frame, scale)
            for kind, aggregator in self._beside.items():
                aggregator.add(extras[kind], self._weight(node), own[kind], 1.0)
        except ValueError as error:
            return Failure("bad-update", str(error))
        if MOMENTS in extras:
            self._means.append((name, self._weight(node), extras[MOMENTS]))
        self._note(_Accepted(node, said, norm, scale), len(frame))
        return None

    def _accept_term(self, secure: SecureRound, node: Introduction, said: TrainReply, frame: bytes) -> Failure | None:
        """Adds a node's reply to a sum that is not open yet."""
        if node.name in self.outdated:
            return Failure("outdated", "the node has other images than it said")
        try:
            secure.add(node.name, frame)
        except FrameError as error:
            return Failure("bad-frame", clean(str(error)))
        self._note(_Accepted(node, said, math.nan, 1.0), len(frame))
        return None

    def _note(self, accepted: _Accepted, size: int) -> None:
        """Notes a good reply, whose frame had so many bytes."""
        name, said = accepted.node.name, accepted.reply
        self._accepted.append(accepted)
        if self._config.privacy.of_images and not said.goes_on:
            self.spent.add(name)
        if said.state_lost:
            log.warning("round=%d node=%s had lost what it had kept and began anew", self.number, name)
        log.info("%s", NodeDone(self.number, name, self.count, math.nan if self._secure else said.train_loss, size))

    def open(self, weights: str) -> None:
        """Learns the sum of the replies, of nodes that trained from `weights` with this fingerprint. If it cannot be
        had none of them counts."""
        assert self._secure
        for name, failure in self._secure.failures.items():
            self.fail(name, failure)
        if self.count < self._secure.needed:
            return
        try:
            self.opened = self._secure.open(weights)
        except SecureSumError as error:
            self._accepted.clear()
            self.why = clean(str(error))
            self.traffic.failures["secure-sum"] += 1
            log.warning("round=%d: no sum: %s", self.number, self.why)

    def teach(self, scales: Scales) -> None:
        """Tells what the sum says of the scales of updates."""
        if self.opened and self._secure:
            scales.learn(self._secure.grid, self.opened.octaves)

    def fail(self, name: str, failure: Failure) -> None:
        """Notes that a node gave no good reply, and why."""
        self.traffic.failures[failure.reason] += 1
        self.why = f"{name}: {failure.text}"
        log.warning("round=%d node=%s dropped: %s", self.number, name, failure)

    def _expected(self, size: int, steps: int) -> float:
        """Returns a norm that an update of so many values and steps may have, whatever earlier ones had: in a finish,
        what AdamW's steps come to, since the steps before may have ended at nothing."""
        if self.number <= self._config.before_finish:
            return 0.0
        return self._config.train.learning_rate * steps * math.sqrt(size)

    def _weight(self, node: Introduction) -> int:
        """Returns what an update of a node weighs in the mean; where nodes are protected, as much as any."""
        return 1 if self._config.privacy.of_nodes or self._config.server.weights == "equal" else node.images

    def aggregates(self) -> dict[str, tuple[Vector, int]]:
        """Returns the aggregated update of each part, and how many replies are in it; once, for its sums are as large
        as two models, and freed one by one."""
        if self.opened:
            return {ALL: (self.opened.mean, self.count)}
        found = {}
        for name in [*self._aggregators]:
            aggregator = self._aggregators.pop(name)
            found[name] = aggregator.mean(), aggregator.count
            del aggregator
        return found

    def extras(self, before: Extras) -> Extras:
        """Returns what the nodes' extras come to, once, given those `before` the round."""
        found = {name: self._beside.pop(name).mean() for name in [*self._beside]}
        if self._means:
            found[MOMENTS] = mean_of_nodes(self._means, robust=self._config.server.robust)
        if CONTROL in found:  # nodes tell how theirs changed; those of others stay as they are
            # What a node claims to have counts nothing under a robust rule.
            count = (lambda node: 1) if self._config.server.robust else self._weight
            share = sum(count(a.node) for a in self._accepted) / sum(map(count, self._nodes.values()))
            control = before.get(CONTROL, np.float32(0)) + np.float32(share) * found[CONTROL]
            # A mean of clipped gradients is no longer than they are, whatever the nodes say.
            longest = self._config.train.max_grad_norm
            found[CONTROL] = control * np.float32(min(1.0, longest / max(euclidean_norm(control), longest)))
        return found

    def acknowledged(self) -> dict[tuple[str, str], int]:
        """Returns the round by node and part of each good reply."""
        return {(a.node.name, self.part[a.node.name]): self.number for a in self._accepted}

    def steps(self) -> dict[str, int]:
        """Returns the local steps of each good reply, by node."""
        return {a.node.name: a.reply.steps for a in self._accepted}

    def lengths(self) -> dict[str, Lengths]:
        """Returns the norms and local steps of the accepted updates, by part, as `Outliers.commit` takes them."""
        found: dict[str, Lengths] = {}
        for a in self._accepted if not self._secure else ():
            found.setdefault(self.part[a.node.name], []).append((a.norm, a.reply.steps))
        return found

    def typical_steps(self) -> int:
        """Returns the local steps of a node, by the rule of the aggregation: one node's number of images, which it may
        have made up, decides nothing where that is a robust one."""
        if self._config.server.robust:
            return round(median(a.reply.steps for a in self._accepted))
        return round(self._mean(lambda a: a.reply.steps))

    def result(
        self,
        *,
        weights: Vector,
        delta: Vector,
        asked: int,
        connected: int,
        bytes_other: int,
        contraction: float,
        seconds: float,
        client_level: float,
    ) -> RoundResult:
        """Returns what the round came to, given the global weights after its step, the aggregated update `delta`, and
        what the round cannot know."""
        traffic, evaluated = self.traffic, [a for a in self._accepted if a.evaluated]
        losses = {a.node.name: a.reply.eval_loss for a in evaluated if a.reply.eval_loss is not None}
        epsilons = {
            a.node.name: (a.reply.epsilon, a.reply.epsilon_total)
            for a in self._accepted
            if math.isfinite(a.reply.epsilon + a.reply.epsilon_total) and self._config.privacy.of_images
        }
        norm = euclidean_norm(delta)
        result = RoundResult(
            round=self.number,
            weights=weights,
            train_loss=self._mean(lambda a: a.reply.train_loss),
            eval_loss=weighted((a.node.name, losses[a.node.name], a.node.held_out) for a in evaluated),
            eval_levels=weighted_levels(
                (a.node.name, a.reply.eval_levels, a.node.held_out) for a in evaluated if a.reply.eval_levels
            ),
            eval_losses=dict(sorted(losses.items())),
            eval_spread=spread([losses[a.node.name] for a in evaluated if a.node.held_out >= NOISE_LEVELS]),
            connected=connected,
            clients_ok=self.count,
            clients_failed=asked - self.count,
            failures=dict(sorted(traffic.failures.items())),
            bytes_up=traffic.up.total(),
            bytes_down=traffic.down.total(),
            bytes_full=traffic.full,
            bytes_up_fp32=traffic.float32_up,
            bytes_down_fp32=traffic.float32_down,
            bytes_other=traffic.other + bytes_other,
            bytes_data_parallel=4 * len(delta) * sum(a.reply.steps for a in self._accepted),
            nodes={name: {"up": traffic.up[name], "down": traffic.down[name]} for name in sorted(traffic.down)},
            state_lost=sum(a.reply.state_lost for a in self._accepted),
            coding_error=self._mean(lambda a: a.reply.coding_error),
            local_steps=sum(a.reply.steps for a in self._accepted),
            update_norm=norm,
            drift=self._drift(norm),
            contraction=contraction,
            seconds=round(seconds, 3),
            epsilon=max((spent for spent, _ in epsilons.values()), default=client_level),
            epsilons=epsilons,
        )
        return replace(result, **asdict(self.opened.figures)) if self.opened else result

    def _mean(self, figure: Callable[[_Accepted], float]) -> float:
        """Returns the mean of a figure, weighted by the nodes' images."""
        return weighted((a.node.name, figure(a), a.node.images) for a in self._accepted)

    def _drift(self, norm: float) -> float:
        """Returns how far the nodes' updates d_k are from their weighted mean d, over its `norm`:
        sum w_k |d_k - d|^2 = sum w_k |d_k|^2 - |d|^2; NaN where updates are of parts, or weighted otherwise."""
        alike = self._config.server.robust or self._config.server.weights == "equal"
        if not norm or len({*self._receiver.parts}) > 1 or alike or self._secure:
            return math.nan
        return math.sqrt(max(0.0, self._mean(lambda a: (a.norm * a.scale) ** 2) - norm**2)) / norm


def _aggregator(config: RunConfig, size: int, total: int, decode: Callable[[Frame], Iterator[Vector]]) -> Aggregator:
    """Returns the running aggregate of a part of so many values, by `server.aggregation`."""
    s = config.server
    if is_plugin(s.aggregation):
        return aggregator_class(s.aggregation).make(size, decode, expanded(config.out_dir))
    if not s.robust:
        return StreamingMean(size, total)
    return RobustMean(size, 0.5 if s.aggregation == "median" else s.trim_share, decode, expanded(config.out_dir))
