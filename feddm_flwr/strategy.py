"""FedDM's round loop: ask nodes to train, take their replies in as they come, step, repeat.

`feddm-vanilla`, `feddm-prox` and `feddm-quant` are presets of this one loop (see
`config.STRATEGIES`). Flower's own strategies collect all replies of a round before they aggregate;
this one pulls, checks, decodes, adds and frees them one by one, so that the server's memory does
not grow with the number of nodes, and the result does not depend on who answers first.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid

from feddm_flwr.aggregation import StreamingMean, ema_factor, ema_update, server_optimizer
from feddm_flwr.config import RunConfig, derive_seed, local_steps
from feddm_flwr.exchange import FrameError, Values, channel
from feddm_flwr.messages import Failure, clean, pull, push
from feddm_flwr.nodes import Node, Roster, RunFailedError

log = logging.getLogger("feddm")

_PAUSE = 0.05  # seconds between polls at first; they grow to a second


@dataclass(frozen=True)
class Round:
    """What a round came to."""

    round: int
    weights: Values
    ema: Values
    train_loss: float
    eval_loss: float  # of the weights that the round started from; NaN where not evaluated
    clients_ok: int
    clients_failed: int
    failures: dict[str, int]
    bytes_up: int
    bytes_down: int
    bytes_up_fp32: int  # what the same frames would have been as plain float32
    bytes_down_fp32: int
    local_steps: int
    update_norm: float
    seconds: float

    def figures(self) -> dict[str, Any]:
        """The round as a line of `metrics.jsonl`: everything but the vectors."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weights", "ema")}


@dataclass
class _Traffic:
    """What went over the wire, and what came back that was of no use."""

    bytes_up: int = 0
    bytes_down: int = 0
    frames_up: int = 0
    frames_down: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: _Traffic) -> None:
        """Count another attempt's as well: what was sent was paid for."""
        self.bytes_up += other.bytes_up
        self.bytes_down += other.bytes_down
        self.frames_up += other.frames_up
        self.frames_down += other.frames_down
        self.failures += other.failures


@dataclass
class _Tally:
    """The running sums of one attempt at a round."""

    mean: StreamingMean
    traffic: _Traffic = field(default_factory=_Traffic)
    loss: list[tuple[str, float, int]] = field(default_factory=list)
    eval: list[tuple[str, float, int]] = field(default_factory=list)
    steps: list[tuple[str, int, int]] = field(default_factory=list)


class FedDM:
    """The server's side of a run."""

    def __init__(self, config: RunConfig, initial: Values, layout: str) -> None:
        self.config = config
        self._roster = Roster(config)
        self._weights, self._ema = initial, initial.copy()
        self._steps = 0  # local steps so far, by the weighted mean of the nodes
        c, s = config.codec, config.server
        self._down = channel(c.downlink, c.block_size, c.clip_search, layout, len(initial))
        self._up = channel(c.uplink, c.block_size, c.clip_search, layout, len(initial))
        self._optimizer = server_optimizer(s.optimizer, s.learning_rate, s.momentum)
        self._state = self._optimizer.init(initial)

    @property
    def nodes(self) -> list[Node]:
        """Every node that has taken part so far, by name."""
        return [node for _, node in sorted(self._roster.nodes.items())]

    def run(self, grid: Grid) -> Iterator[Round]:
        """Train for `num-server-rounds` rounds, yielding each when it is done.

        Raises:
            ConfigError: before round 1, a node finds the configuration or its data wrong.
            RunFailedError: nodes stay away longer than `wait-timeout`, or a round has too few good
                replies however often it is repeated.
        """
        for number in range(1, self.config.num_server_rounds + 1):
            start = time.monotonic()
            earlier = _Traffic()
            for attempt in range(1 + self.config.max_round_retries):
                online = self._roster.wait(grid, first=number == 1 and attempt == 0)
                chosen = {online[name]: name for name in self._sample(sorted(online), number, attempt)}
                frame = self._down.encode(self._weights, number)
                # What the nodes will hold: the base of their updates and of the step.
                received = self._down.decode(frame, number)
                tally = self._attempt(grid, number, chosen, frame, received)
                earlier.add(tally.traffic)
                needed = self.config.min_replies or len(chosen) // 2 + 1
                if tally.mean.count >= needed:
                    break
                reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(tally.traffic.failures.items()))
                problem = (
                    f"round {number}: {tally.mean.count} of {len(chosen)} nodes gave a good reply, "
                    f"{needed} are needed ({reasons})"
                )
                log.warning("%s; attempt %d of %d", problem, attempt + 1, 1 + self.config.max_round_retries)
            else:
                raise RunFailedError(f"{problem}; gave up after {1 + self.config.max_round_retries} attempts")
            tally.traffic = earlier
            yield self._commit(number, received, tally, len(chosen), time.monotonic() - start)

    def _sample(self, names: list[str], number: int, attempt: int) -> list[str]:
        """The nodes that train, by name and seed; a repeated round draws anew."""
        seed = derive_seed(self.config.seed, "sample", number, attempt)
        chosen = np.random.default_rng(seed).permutation(len(names))[: self._roster.asked(len(names))]
        return sorted(names[i] for i in chosen)

    def _attempt(self, grid: Grid, number: int, chosen: dict[int, str], frame: bytes, received: Values) -> _Tally:
        """Send the weights to the chosen nodes and take in what comes back, one reply at a time."""
        total = sum(self._roster.nodes[name].images for name in chosen.values())
        tally = _Tally(StreamingMean(len(received), total))
        evaluate = self.config.eval.every > 0 and (number - 1) % self.config.eval.every == 0
        arrays = ArrayRecord({"frame": Array("uint8", (len(frame),), "feddm.frame", frame)})
        task = ConfigRecord({"round": number, "steps-before": self._steps, "evaluate": evaluate})
        content = RecordDict({"weights": arrays, "task": task})
        log.info("round=%d/%d asked=%d", number, self.config.num_server_rounds, len(chosen))
        for node_id, reply in self._replies(grid, content, chosen, tally.traffic):
            name = chosen[node_id]
            failure = reply if isinstance(reply, Failure) else self._take(tally, number, name, reply, received)
            if failure:
                tally.traffic.failures[failure.reason] += 1
                log.warning("round=%d node=%s dropped: %s", number, name, failure)
            del reply
        tally.traffic.bytes_down = len(frame) * tally.traffic.frames_down
        return tally

    def _take(self, tally: _Tally, number: int, name: str, reply: RecordDict, received: Values) -> Failure | None:
        """Check a reply and add its update to the mean, or say what is wrong with it.

        The weights of a mean are what the node said at its introduction: a reply cannot raise them.
        """
        node = self._roster.nodes[name]
        try:
            frame = reply.array_records["weights"]["frame"].data
            tally.traffic.bytes_up += len(frame)
            tally.traffic.frames_up += 1
            said = reply.config_records["report"]
            steps, train_loss, eval_loss = said["steps"], said["train-loss"], said["eval-loss"]
            if (said["name"], said["round"]) != (name, number):
                return Failure("stale", clean(f"the reply is of {said['name']!r}, round {said['round']!r}"))
        except (KeyError, TypeError, AttributeError) as error:
            return Failure("malformed", clean(repr(error)))
        if not (isinstance(train_loss, float) and math.isfinite(train_loss) and isinstance(eval_loss, float)):
            return Failure("malformed", clean(f"losses {train_loss!r} and {eval_loss!r}"))
        if type(steps) is not int or not 0 < steps <= local_steps(self.config, node.images):
            return Failure("malformed", clean(f"steps = {steps!r}"))
        try:
            tally.mean.add(self._up.decode(frame, number) - received, node.images)
        except FrameError as error:
            return Failure("bad-frame", clean(str(error)))
        except ValueError as error:
            return Failure("bad-update", clean(str(error)))
        tally.loss.append((name, train_loss, node.images))
        tally.steps.append((name, steps, node.images))
        if math.isfinite(eval_loss):
            tally.eval.append((name, eval_loss, min(node.held_out, self.config.eval.images)))
        log.info("round=%d node=%s done=%d loss=%.4f up=%d", number, name, tally.mean.count, train_loss, len(frame))
        return None

    def _replies(
        self, grid: Grid, content: RecordDict, names: dict[int, str], traffic: _Traffic
    ) -> Iterator[tuple[int, RecordDict | Failure]]:
        """Ask the nodes to train; their replies as they come, one pulled at a time.

        A node whose process died is asked again for as long as others get through: in a simulation
        the dead process stays in Flower's pool and fails whatever it is handed.
        """
        timeout = self.config.round_timeout
        deadline = time.monotonic() + timeout
        died: dict[int, Failure] = {}
        again = list(names)
        while again:
            pending: dict[str, int] = {}
            for node_id in again:
                if message := push(grid, content, node_id, MessageType.TRAIN, timeout):
                    pending[message] = node_id
                    traffic.frames_down += 1
                else:
                    yield node_id, Failure("not-sent", "Flower did not take the message")
            again, through, pause = [], 0, _PAUSE
            while pending and time.monotonic() < deadline:
                time.sleep(pause)
                pause = min(pause * 1.2, 1.0)
                for message, node_id in list(pending.items()):
                    if (reply := pull(grid, message)) is None:
                        continue
                    del pending[message]
                    pause = _PAUSE
                    if isinstance(reply, Failure) and reply.reason == "process-died":
                        died[node_id] = reply
                        again.append(node_id)
                        continue
                    through += not isinstance(reply, Failure)
                    yield node_id, reply
            for node_id in pending.values():
                yield node_id, Failure("timeout", f"no reply within round-timeout = {timeout:g} s")
            if not through or time.monotonic() >= deadline:
                break
            for node_id in again:
                log.warning("%s: %s; asked again", names[node_id], died[node_id])
        for node_id in again:
            yield node_id, died[node_id]

    def _commit(self, number: int, received: Values, tally: _Tally, asked: int, seconds: float) -> Round:
        """Apply the server step to the mean update."""
        delta = tally.mean.mean()
        self._weights, self._state = self._optimizer.update(received, delta, self._state)
        if not np.isfinite(self._weights).all():
            raise RunFailedError(f"round {number}: the server step made weights that are not finite")
        steps = round(_weighted(tally.steps))
        factor = ema_factor(self.config.server.ema_decay, self._steps, steps)
        self._ema = ema_update(self._ema, self._weights, factor)
        self._steps += steps
        done = Round(
            round=number,
            weights=self._weights,
            ema=self._ema,
            train_loss=_weighted(tally.loss),
            eval_loss=_weighted(tally.eval) if tally.eval else float("nan"),
            clients_ok=tally.mean.count,
            clients_failed=asked - tally.mean.count,
            failures=dict(sorted(tally.traffic.failures.items())),
            bytes_up=tally.traffic.bytes_up,
            bytes_down=tally.traffic.bytes_down,
            bytes_up_fp32=4 * len(delta) * tally.traffic.frames_up,
            bytes_down_fp32=4 * len(delta) * tally.traffic.frames_down,
            local_steps=sum(s for _, s, _ in tally.steps),
            update_norm=float(np.linalg.norm(delta.astype(np.float64))),
            seconds=round(seconds, 3),
        )
        log.info(
            "round=%d/%d loss=%.4f eval=%.4f ok=%d failed=%d up=%d down=%d seconds=%.1f",
            number,
            self.config.num_server_rounds,
            done.train_loss,
            done.eval_loss,
            done.clients_ok,
            done.clients_failed,
            done.bytes_up,
            done.bytes_down,
            seconds,
        )
        return done


def _weighted(values: Iterable[tuple[str, float, int]]) -> float:
    """The mean weighted by the third entry, summed in order of name so that its bits are fixed."""
    ordered = sorted(values)
    return sum(v * w for _, v, w in ordered) / sum(w for _, _, w in ordered)
