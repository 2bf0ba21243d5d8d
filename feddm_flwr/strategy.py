"""FedDM's round loop: ask nodes to train, take their replies in as they come, step, repeat.

`feddm-vanilla`, `feddm-prox` and `feddm-quant` are presets of this one loop (see
`config.STRATEGIES`). Flower's own strategies collect all replies of a round before they aggregate;
this one pulls, checks, decodes, adds and frees them one by one, so that the server's memory does
not grow with the number of nodes, and the result does not depend on who answers first.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from feddm_flwr.aggregation import StreamingMean, ema_factor, ema_update, server_optimizer
from feddm_flwr.config import ConfigError, RunConfig, derive_seed
from feddm_flwr.exchange import FrameError, Values, channel

log = logging.getLogger("feddm")

#: Flower's error codes, in words that go to `metrics.jsonl`; 0 and 8: the process that trained died.
_ERRORS = {0: "process-died", 8: "process-died", 5: "node-offline", 2: "exception", 1: "app-not-loaded"}


class RunFailedError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Node:
    """What a node said of itself before it was first asked to train."""

    name: str
    images: int
    held_out: int
    class_counts: dict[str, int]


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


@dataclass
class _Tally:
    """The running sums of one attempt at a round."""

    mean: StreamingMean
    loss: list[tuple[str, float, int]] = field(default_factory=list)
    eval: list[tuple[str, float, int]] = field(default_factory=list)
    steps: list[tuple[str, int, int]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    bytes_up: int = 0
    bytes_down: int = 0
    frames_up: int = 0
    frames_down: int = 0

    def add_traffic(self, other: _Tally) -> None:
        """Count another attempt's bytes and frames as well: what was sent was paid for."""
        self.bytes_up += other.bytes_up
        self.bytes_down += other.bytes_down
        self.frames_up += other.frames_up
        self.frames_down += other.frames_down


class FedDM:
    """The server's side of a run."""

    def __init__(self, config: RunConfig, initial: Values, layout: str) -> None:
        self.config = config
        self.nodes: dict[str, Node] = {}
        self._weights, self._ema = initial, initial.copy()
        self._ids: dict[int, str] = {}  # Flower's node id -> name; "" for a node that is left out
        self._sent = 0  # messages so far, repetitions included
        self._steps = 0  # local steps so far, by the weighted mean of the nodes
        c, s = config.codec, config.server
        self._down = channel(c.downlink, c.block_size, c.clip_search, layout, len(initial))
        self._up = channel(c.uplink, c.block_size, c.clip_search, layout, len(initial))
        self._optimizer = server_optimizer(s.optimizer, s.learning_rate, s.momentum)
        self._state = self._optimizer.init(initial)

    def run(self, grid: Grid) -> Iterator[Round]:
        """Train for `num-server-rounds` rounds, yielding each when it is done.

        Raises:
            ConfigError: before round 1, a node finds the configuration or its data wrong.
            RunFailedError: nodes stay away longer than `wait-timeout`, or a round has too few good
                replies however often it is repeated.
        """
        for number in range(1, self.config.num_server_rounds + 1):
            start = time.monotonic()
            wasted = _Tally(StreamingMean(0))
            for attempt in range(1 + self.config.max_round_retries):
                online = self._wait_for_nodes(grid, number)
                chosen = self._sample(sorted(online), number)
                frame = self._down.encode(self._weights, number)
                # What the nodes will hold: the base of their updates and of the step.
                received = self._down.decode(frame, number)
                tally = self._attempt(grid, number, {online[n]: n for n in chosen}, frame, received)
                needed = self._needed(len(chosen))
                if tally.mean.count >= needed:
                    break
                reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(tally.failures.items()))
                problem = (
                    f"round {number}: {tally.mean.count} of {len(chosen)} nodes gave a good reply, "
                    f"{needed} are needed ({reasons})"
                )
                wasted.add_traffic(tally)
                log.warning("%s; attempt %d of %d", problem, attempt + 1, 1 + self.config.max_round_retries)
            else:
                raise RunFailedError(f"{problem}; gave up after {1 + self.config.max_round_retries} attempts")
            tally.add_traffic(wasted)
            yield self._commit(number, received, tally, len(chosen), time.monotonic() - start)

    def _needed(self, asked: int) -> int:
        needed = self.config.min_replies or asked // 2 + 1
        if needed > asked:
            raise ConfigError(
                f"min-replies = {needed} is not allowed: only {asked} nodes are asked in a round; "
                "lower it, raise fraction-train or add nodes"
            )
        return needed

    def _wait_for_nodes(self, grid: Grid, number: int) -> dict[str, int]:
        """Name -> id of the nodes that are online, at least `min-nodes` of them, all introduced."""
        deadline = time.monotonic() + self.config.wait_timeout
        said = -1
        while True:
            ids = sorted(grid.get_node_ids())
            if len(ids) >= self.config.min_nodes:
                self._introduce(grid, [i for i in ids if i not in self._ids], first=number == 1)
                online = {self._ids[i]: i for i in ids if self._ids.get(i)}
                if len(online) >= self.config.min_nodes:
                    return online
            if time.monotonic() > deadline:
                raise RunFailedError(
                    f"{len(ids)} of min-nodes = {self.config.min_nodes} nodes were there after "
                    f"wait-timeout = {self.config.wait_timeout:g} s; start more nodes or lower min-nodes"
                )
            if len(ids) != said:
                said = len(ids)
                log.info("waiting for nodes: %d of %d", said, self.config.min_nodes)
            time.sleep(0.5)

    def _introduce(self, grid: Grid, ids: list[int], *, first: bool) -> None:
        """Ask new nodes for their name, image counts and configuration errors."""
        problems: list[str] = []
        introduced: list[Node] = []
        messages = {i: RecordDict() for i in ids}
        for node_id, reply in self._replies(grid, messages, MessageType.QUERY, {}):
            self._ids[node_id] = ""
            if isinstance(reply, str):
                log.warning("a node did not introduce itself and is left out: %s", reply)
                continue
            try:
                node, problem = _introduction(reply)
            except (KeyError, TypeError, ValueError) as error:
                log.warning("a node's introduction is malformed and it is left out: %r", error)
                continue
            if problem:
                problems += [f"{node.name}: {line}" for line in problem.splitlines()]
            elif any(self._ids.get(i) == node.name for i in grid.get_node_ids()):
                problems.append(f"{node.name}: two nodes have this name; give each its own node-name")
            else:  # the name may have been another id's, which is gone: a node that was restarted
                self._ids = {i: "" if n == node.name else n for i, n in self._ids.items()}
                self._ids[node_id] = node.name
                self.nodes[node.name] = node
                introduced.append(node)
        for node in sorted(introduced, key=lambda n: n.name):
            log.info(
                "node %s: %d images, %d held out, classes %s",
                node.name,
                node.images,
                node.held_out,
                " ".join(f"{c}:{n}" for c, n in node.class_counts.items()) or "unknown",
            )
        if problems and first:
            raise ConfigError("\n".join(dict.fromkeys(sorted(problems))))
        for problem in problems:
            log.warning("left out: %s", problem)

    def _sample(self, names: list[str], number: int) -> list[str]:
        count = max(1, round(self.config.fraction_train * len(names)))
        random = np.random.default_rng(derive_seed(self.config.seed, "sample", number))
        return sorted(random.choice(names, size=count, replace=False).tolist())

    def _attempt(self, grid: Grid, number: int, chosen: dict[int, str], frame: bytes, received: Values) -> _Tally:
        """Send the weights to the chosen nodes and take in what comes back, one reply at a time."""
        tally = _Tally(StreamingMean(len(received)))
        evaluate = self.config.eval.every > 0 and (number - 1) % self.config.eval.every == 0
        arrays = ArrayRecord({"frame": Array("uint8", (len(frame),), "feddm.frame", frame)})
        task = ConfigRecord({"round": number, "steps-before": self._steps, "evaluate": evaluate})
        messages = {i: RecordDict({"weights": arrays, "task": task}) for i in chosen}
        log.info("round=%d/%d asked=%d", number, self.config.num_server_rounds, len(chosen))
        sent_before = self._sent
        for node_id, reply in self._replies(grid, messages, MessageType.TRAIN, chosen):
            problem = reply if isinstance(reply, str) else self._take(tally, number, chosen[node_id], reply, received)
            if problem:
                tally.failures[problem.split(":")[0]] += 1
                log.warning("round=%d node=%s dropped: %s", number, chosen[node_id], problem)
            del reply
        tally.frames_down = self._sent - sent_before
        tally.bytes_down = len(frame) * tally.frames_down
        return tally

    def _take(self, tally: _Tally, number: int, name: str, reply: RecordDict, received: Values) -> str:
        """Check a reply and add its update to the mean; returns what is wrong with it, or ""."""
        try:
            frame = reply.array_records["weights"]["frame"].data
            said = reply.config_records["report"]
            steps, held_out = said["steps"], said["held-out"]
            train_loss, eval_loss = said["train-loss"], said["eval-loss"]
            if said["name"] != name or said["round"] != number:
                return f"stale: the reply is of {said['name']!r}, round {said['round']!r}"
            if not (isinstance(steps, int) and isinstance(held_out, int)):
                return "malformed: counts must be integers"
            if not (isinstance(train_loss, float) and isinstance(eval_loss, float)):
                return "malformed: losses must be numbers"
        except (KeyError, TypeError) as error:
            return f"malformed: {error!r}"
        tally.bytes_up += len(frame)
        tally.frames_up += 1
        images = self.nodes[name].images  # as introduced: a reply cannot raise its own weight
        try:
            tally.mean.add(self._up.decode(frame, number) - received, images)
        except FrameError as error:
            return f"bad-frame: {error}"
        except ValueError as error:
            return f"bad-update: {error}"
        tally.loss.append((name, train_loss, images))
        tally.steps.append((name, steps, images))
        if held_out > 0 and np.isfinite(eval_loss):
            tally.eval.append((name, eval_loss, held_out))
        log.info("round=%d node=%s done=%d loss=%.4f up=%d", number, name, tally.mean.count, train_loss, len(frame))
        return ""

    def _replies(
        self, grid: Grid, messages: dict[int, RecordDict], kind: str, names: dict[int, str]
    ) -> Iterator[tuple[int, RecordDict | str]]:
        """The replies as they come, one pulled at a time; a text where a node failed or was late.

        A node whose process died is asked again for as long as others get through: in a simulation
        the dead process stays in Flower's pool and fails whatever it is handed.
        """
        deadline = time.monotonic() + self.config.round_timeout
        again = list(messages)
        last: dict[int, str] = {}
        while again:
            pending = self._push(grid, {i: messages[i] for i in again}, kind)
            again, through, pause = [], 0, 0.05
            while pending and time.monotonic() < deadline:
                time.sleep(pause)
                pause = min(pause * 1.2, 1.0)
                for message_id, node_id in list(pending.items()):
                    for reply in grid.pull_messages([message_id]):
                        del pending[message_id]
                        pause = 0.05
                        if not reply.has_error():
                            through += 1
                            yield node_id, reply.content
                        elif _ERRORS.get(reply.error.code) == "process-died":
                            last[node_id] = f"process-died: {_gist(reply.error)}"
                            again.append(node_id)
                        else:
                            code = _ERRORS.get(reply.error.code, f"error-{reply.error.code}")
                            yield node_id, f"{code}: {_gist(reply.error)}"
            for node_id in pending.values():
                yield node_id, f"timeout: no reply within round-timeout = {self.config.round_timeout:g} s"
            if not through or time.monotonic() >= deadline:
                break
            for node_id in again:
                log.warning("%s: %s; asked again", names.get(node_id, "a node"), last[node_id])
        for node_id in again:
            yield node_id, last[node_id]

    def _push(self, grid: Grid, messages: dict[int, RecordDict], kind: str) -> dict[str, int]:
        """Send each node its message; message id -> node id."""
        pending: dict[str, int] = {}
        for node_id, content in messages.items():
            message = Message(content, node_id, kind, ttl=self.config.round_timeout)
            self._sent += 1
            for message_id in grid.push_messages([message]):
                pending[message_id] = node_id
        return pending

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
            failures=dict(sorted(tally.failures.items())),
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
            bytes_up_fp32=4 * len(delta) * tally.frames_up,
            bytes_down_fp32=4 * len(delta) * tally.frames_down,
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


def _introduction(reply: RecordDict) -> tuple[Node, str]:
    """What a node said of itself, and what it found wrong ("" if nothing)."""
    said = reply.config_records["report"]
    name, problem, images, held_out = said["name"], said["problem"], said["images"], said["held-out"]
    counts = json.loads(str(said["class-counts"]))
    if not (isinstance(images, int) and isinstance(held_out, int) and isinstance(counts, dict)):
        raise TypeError("counts must be integers")
    if images < 1 and not problem:
        raise ValueError(f"images = {images}")
    return Node(str(name), images, held_out, counts), str(problem)


def _weighted(values: Iterable[tuple[str, float, int]]) -> float:
    """The mean weighted by the third entry, summed in order of name so that its bits are fixed."""
    ordered = sorted(values)
    return sum(v * w for _, v, w in ordered) / sum(w for _, _, w in ordered)


def _gist(error: Error) -> str:
    """The line that tells: the last of a traceback, else the first."""
    lines = str(error.reason).strip().strip("<'>").splitlines() or ["no reason given"]
    last = _ERRORS.get(error.code) == "exception"
    return lines[-1 if last else 0].strip().rpartition("ClientAppException: ")[2][:300]
