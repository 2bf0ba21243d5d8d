"""FedDM's round loop: ask nodes to train, take their replies in as they come, step, repeat.

Every strategy is a preset of this one loop (see `presets.STRATEGIES`). It checks, decodes, adds and
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
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid

from feddm_flwr import node_report
from feddm_flwr.aggregation import Aggregate, StreamingMean, ema_factor, ema_update, euclidean_norm, server_optimizer
from feddm_flwr.broadcast import Broadcast
from feddm_flwr.checkpoint import Checkpoint
from feddm_flwr.collection import Traffic, collect, most_bytes
from feddm_flwr.config import RunConfig, derive_seed, expanded, least_replies, local_steps, nodes_asked
from feddm_flwr.exchange import FrameError, Values, channel
from feddm_flwr.messages import Failure, clean, frame_of
from feddm_flwr.nodes import Node, Roster, RunFailedError
from feddm_flwr.outliers import Outliers
from feddm_flwr.parts import Parts, assign
from feddm_flwr.probes import Probes
from feddm_flwr.robust import RobustMean
from feddm_flwr.tally import Round, Tally, weighted, weighted_levels

log = logging.getLogger("feddm")

_GARBAGE = 1 << 26  # bytes of replies until they are collected: Flower's messages are in cycles


class FedDM:
    """The server's side of a run."""

    def __init__(
        self, config: RunConfig, initial: Values, parts: Parts, run_uuid: str, assets: Mapping[str, Path] | None = None
    ) -> None:
        """`initial` has the shared parameters; `run_uuid`, 32 hex digits, tells the nodes which run's state is which;
        `assets` are files that each node is sent once (see `assets`)."""
        self.config = config
        c, s = config.codec, config.server
        self._parts = parts
        self._run_uuid = run_uuid
        self._assets = {kind: path.read_bytes() for kind, path in (assets or {}).items()}
        self._fingerprints = {kind: sha256(content).hexdigest() for kind, content in self._assets.items()}
        self._roster = Roster(config)
        self._begun = False  # whether nodes were heard that this process waited for
        self._outliers = Outliers(s.norm_limit, s.clip_norm)
        self.round = 0  # the last one that was committed
        self.weights, self.ema = initial, initial.copy()
        self._step_norm = 0.0  # of the last round's step
        self._other = 0  # bytes of what was asked beside the training since the last round
        self._steps = 0  # local steps so far, by the weighted mean of the nodes
        self._broadcast = Broadcast(config, initial, parts.shared.layout.fingerprint)
        self._up = {
            name: channel(c.uplink, c, part.layout.fingerprint, part.layout.size) for name, part in parts.sent.items()
        }
        self.never_sent = {*parts.sent}  # parts that no node's reply has covered yet
        self._held: dict[str, int] = {}  # by node: the version of the shadow that it is known to hold
        self._acked: dict[tuple[str, str], int] = {}  # by node and part: the last round whose reply entered a mean
        self._durable = self._acked  # the same as of the round before, whose checkpoint is on the disk for sure
        self._optimizer = server_optimizer(s.optimizer, s.learning_rate, s.momentum)
        self._state = self._optimizer.init(initial)

    @property
    def nodes(self) -> list[Node]:
        """Every node that has taken part so far, by name."""
        return [node for _, node in sorted(self._roster.nodes.items())]

    def checkpoint(self) -> Checkpoint:
        """Everything that `restore` needs to go on after the last round as if nothing had happened; later rounds
        do not change it.

        Until it is durable, the next round must not be committed: nodes keep what they need to go back to it or to
        the one before, and no more.
        """
        tensors = {
            **{f"optimizer.{name}": value for name, value in self._state.items()},
            **{f"broadcast.{name}": value for name, value in self._broadcast.state().items()},
        }
        facts = {
            "run-uuid": self._run_uuid,
            "steps": self._steps,
            "step-norm": self._step_norm,
            "held": dict(self._held),
            "acked": [[*key, number] for key, number in sorted(self._acked.items())],
            "norms": self._outliers.state(),
            "never-sent": sorted(self.never_sent),
            "nodes": [asdict(node) for node in self.nodes],
        }
        return Checkpoint(self.round, {"weights": self.weights, "ema": self.ema, **tensors}, facts)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of a run with the same configuration."""
        facts, tensors = checkpoint.facts, checkpoint.tensors
        self.round, self.weights, self.ema = checkpoint.round, tensors["weights"], tensors["ema"]
        groups = {
            group: {name.removeprefix(group): value for name, value in tensors.items() if name.startswith(group)}
            for group in ("optimizer.", "broadcast.")
        }
        self._state = groups["optimizer."]
        self._broadcast.restore(groups["broadcast."])
        self._run_uuid, self._steps, self._held = facts["run-uuid"], facts["steps"], facts["held"]
        self._step_norm = facts.get("step-norm", 0.0)
        self._acked = {(name, part): number for name, part, number in facts["acked"]}
        self._durable = self._acked
        self._outliers.restore(facts["norms"])
        self.never_sent = {*facts["never-sent"]}
        self._roster.expect([Node(**node) for node in facts["nodes"]])

    def run(self, grid: Grid, before_step: Callable[[], None] = lambda: None) -> Iterator[Round]:
        """Train up to round `num-server-rounds`, yielding each round when it is done. `before_step` is called when
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
            received = self._broadcast.prepare(self.weights, number)
            for attempt in range(1 + self.config.max_round_retries):
                online = self._roster.wait(grid, first=not self._begun)
                self._begun = True
                chosen = {online[name]: name for name in self._sample(sorted(online), number, attempt)}
                tally = self._attempt(grid, number, chosen, received)
                earlier.add(tally.traffic)
                needed = least_replies(self.config, len(chosen))
                if tally.count >= needed:
                    break
                reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(tally.traffic.failures.items()))
                problem = (
                    f"round {number}: {tally.count} of {len(chosen)} nodes gave a good reply, "
                    f"{needed} are needed ({reasons})"
                )
                log.warning("%s; attempt %d of %d", problem, attempt + 1, 1 + self.config.max_round_retries)
            else:
                raise RunFailedError(f"{problem}; gave up after {1 + self.config.max_round_retries} attempts")
            tally.traffic = earlier
            before_step()
            yield self._commit(number, received, tally, len(chosen), time.monotonic() - start)

    def _sample(self, names: list[str], number: int, attempt: int) -> list[str]:
        """The nodes that train, by name and seed; a repeated round draws anew."""
        seed = derive_seed(self.config.seed, "sample", number, attempt)
        chosen = np.random.default_rng(seed).permutation(len(names))[: nodes_asked(self.config, len(names))]
        return sorted(names[i] for i in chosen)

    def _attempt(self, grid: Grid, number: int, chosen: dict[int, str], received: Values) -> Tally:
        """Send the weights to the chosen nodes and take in what comes back, one reply at a time."""
        total = sum(self._roster.nodes[name].images for name in chosen.values())
        part = assign(self._parts, sorted(chosen.values()), self.config, number)
        tally = Tally({name: self._aggregate(name, total, number, received) for name in self._parts.sent}, part)
        log.info("round=%d/%d asked=%d", number, self.config.num_server_rounds, len(chosen))
        content = self._contents(number, part)
        timeout, probes = self.config.round_timeout, Probes(grid, self._roster.processes)
        freed = 0  # bytes of replies
        for node_id, reply in collect(grid, chosen, content, tally.traffic, len(received), timeout, probes):
            name = chosen[node_id]
            failure = reply if isinstance(reply, Failure) else self._take(tally, number, name, reply, received)
            if failure:
                tally.traffic.failures[failure.reason] += 1
                log.warning("round=%d node=%s dropped: %s", number, name, failure)
            del reply
            if tally.traffic.up.total() - freed > _GARBAGE:
                freed = tally.traffic.up.total()
                gc.collect()
        return tally

    def _aggregate(self, part: str, total: int, number: int, received: Values) -> Aggregate:
        """The running aggregate of a part, by `server.aggregation`."""
        s, size = self.config.server, self._parts.sent[part].layout.size
        if not s.robust:
            return StreamingMean(size, total)

        base_of_all = cache(lambda: self._base(part, received))  # one copy, made when it is needed

        def updates(frame: memoryview) -> Iterator[Values]:
            start, base = 0, base_of_all()
            for chunk in self._up[part].decode_chunks(frame, self.config.codec.target, number):
                yield chunk if base is None else chunk - base[start : start + len(chunk)]
                start += len(chunk)

        trim = 0.5 if s.aggregation == "median" else s.trim_share
        return RobustMean(size, trim, updates, expanded(self.config.out_dir))

    def _base(self, part: str, received: Values) -> Values | None:
        """What is subtracted from what nodes send to have their update."""
        return self._parts.sent[part].take(received) if self.config.codec.target == "weights" else None

    def _contents(self, number: int, part: dict[str, str]) -> Callable[[str, bool], RecordDict]:
        """What each node is sent in a round; frames that several get are held once."""
        arrays: dict[tuple[str, ...], ArrayRecord] = {}
        every, last = self.config.eval.every, number == self.config.num_server_rounds
        evaluate = every > 0 and (last or (number - 1) % every == 0)

        def content(name: str, whole: bool) -> RecordDict:
            frames = self._broadcast.frames(None if whole else self._held.get(name, 0))
            if whole or name not in self._held:
                frames |= {f"asset-{kind}": content for kind, content in self._assets.items()}
            kinds = tuple(frames)
            if kinds not in arrays:
                arrays[kinds] = ArrayRecord({k: Array("uint8", (len(f),), "feddm.frame", f) for k, f in frames.items()})
            task: dict[str, Any] = {
                "run-uuid": self._run_uuid,
                "round": number,
                "steps-before": self._steps,
                "evaluate": evaluate,
                "part": part[name],
                "assets": json.dumps(self._fingerprints),
                "shadow": self._broadcast.fingerprint,
            }
            for key, rounds in (("acked", self._acked), ("durable", self._durable)):
                task[key] = rounds.get((name, part[name]), 0)
                task[f"{key}-any"] = max(rounds.get((name, p), 0) for p in self._parts.sent)
            return RecordDict({"weights": arrays[kinds], "task": ConfigRecord(task)})

        return content

    def _take(self, tally: Tally, number: int, name: str, reply: RecordDict, received: Values) -> Failure | None:
        """Check a reply and add its update to the mean, or say what is wrong with it.

        The weights of a mean are what the node said at its introduction: a reply cannot raise them.
        """
        node = self._roster.nodes[name]
        try:
            frame = frame_of(reply)
            tally.traffic.up[name] += len(frame)
            tally.traffic.float32_up += 4 * self._up[tally.part[name]].size
            said = node_report.checked(reply.config_records["report"], name, number)
        except (KeyError, TypeError, AttributeError) as error:
            return Failure("malformed", clean(repr(error)))
        if isinstance(said, Failure):
            return said
        if said.images != node.images:
            self._roster.introduce_again(name)
        if said.steps > (most := local_steps(self.config, node.images)):
            return Failure("malformed", f"{said.steps} steps; {most} are all of the {node.images} images that it had")
        part = tally.part[name]
        if len(frame) > most_bytes(self._up[part].size):
            return Failure("oversized", f"a frame of {len(frame)} bytes for {self._up[part].size} values")
        try:
            update = self._up[part].decode(frame, self.config.codec.target, number)
        except FrameError as error:
            return Failure("bad-frame", clean(str(error)))
        if (base := self._base(part, received)) is not None:
            update -= base
        try:
            norm, scale = self._outliers.judge(part, update, said.steps)
        except ValueError as error:
            return Failure("outlier", str(error))
        if scale < 1:
            update *= np.float32(scale)
            log.info("round=%d node=%s: norm %.3g shortened to %.3g", number, name, norm, norm * scale)
        try:
            tally.means[part].add(update, node.images, frame, scale)
        except ValueError as error:
            return Failure("bad-update", str(error))
        tally.norms.setdefault(part, []).append((norm, said.steps))
        tally.add(name, said, norm * scale, node.images, node.held_out)
        self._held[name] = number
        if said.state_lost:
            log.warning("round=%d node=%s had lost what it had kept and began anew", number, name)
        log.info("round=%d node=%s done=%d loss=%.4f up=%d", number, name, tally.count, said.train_loss, len(frame))
        return None

    def _commit(self, number: int, received: Values, tally: Tally, asked: int, seconds: float) -> Round:
        """Apply the server step to the mean update."""
        means: dict[str, Values] = {}
        for name in self._parts.sent:
            aggregate = tally.means.pop(name)  # its sums are as large as two models, and freed one by one
            means[name] = aggregate.mean()
            if aggregate.count:
                self.never_sent.discard(name)
            else:
                log.warning("round=%d: no reply covers the part %r; only momentum moves it", number, name)
            del aggregate
        delta, whole = self._parts.join(means), len(means) == 1
        del means
        # Where weights are coded, what the server's coding lost is gone: the step starts from what the
        # nodes had. Where differences are, it is still owed to them: the step starts from the model.
        base = received if self.config.codec.target == "weights" else self.weights
        weights, state = self._optimizer.update(base, delta, self._state)
        before, step = self._step_norm, euclidean_norm(weights, base)
        if not math.isfinite(step):
            raise RunFailedError(f"round {number}: the server step made weights that are not finite")
        self._step_norm = step
        # One node's number of images, which it may have made up, decides nothing where the rule is a robust one.
        robust = self.config.server.robust
        steps = round(median(s for _, s, _ in tally.steps) if robust else weighted(tally.steps))
        factor = ema_factor(self.config.server.ema_decay, self._steps, steps)
        self.round, self.weights, self._state = number, weights, state
        self.ema = ema_update(self.ema, weights, factor)
        self._steps += steps
        self._outliers.commit(tally.norms)
        self._durable = self._acked
        self._acked = self._acked | {(name, tally.part[name]): number for name, _, _ in tally.steps}
        traffic = tally.traffic
        done = Round(
            round=number,
            weights=self.weights,
            ema=self.ema,
            train_loss=weighted(tally.loss),
            eval_loss=weighted(tally.eval) if tally.eval else float("nan"),
            eval_levels=weighted_levels(tally.levels),
            eval_losses={name: loss for name, loss, _ in sorted(tally.eval)},
            eval_spread=tally.spread(),
            connected=self._roster.connected,
            clients_ok=tally.count,
            clients_failed=asked - tally.count,
            failures=dict(sorted(traffic.failures.items())),
            bytes_up=traffic.up.total(),
            bytes_down=traffic.down.total(),
            bytes_full=traffic.full,
            bytes_up_fp32=traffic.float32_up,
            bytes_down_fp32=traffic.float32_down,
            bytes_other=traffic.other + self._other,
            bytes_data_parallel=4 * len(delta) * sum(s for _, s, _ in tally.steps),
            nodes={name: {"up": traffic.up[name], "down": traffic.down[name]} for name in sorted(traffic.down)},
            state_lost=tally.lost,
            coding_error=weighted(tally.error),
            local_steps=sum(s for _, s, _ in tally.steps),
            update_norm=(norm := euclidean_norm(delta)),
            drift=tally.drift(norm) if whole and not robust else math.nan,
            contraction=step / before if before else math.nan,
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
        self._other = 0
        return done

    def ask(
        self, grid: Grid, kind: str, frames: Mapping[str, bytes], assets: dict[str, bytes], least: int = 0
    ) -> Iterator[tuple[Node, RecordDict | Failure]]:
        """Ask every node with at least so many images something beside the training (see `node_evaluation`): their
        replies as they come. `assets` are sent beside those of the training, which a node has unless it says not.

        Raises:
            ConfigError, RunFailedError: as `run`.
        """
        online = self._roster.wait(grid, first=not self._begun)
        self._begun = True
        chosen = {i: name for name, i in online.items() if self._roster.nodes[name].images >= least}
        fingerprints = self._fingerprints | {name: sha256(content).hexdigest() for name, content in assets.items()}
        task = ConfigRecord({"kind": kind, "assets": json.dumps(fingerprints)})

        def content(name: str, whole: bool) -> RecordDict:
            needed = assets if name in self._held and not whole else self._assets | assets
            sent = {**frames, **{f"asset-{key}": asset for key, asset in needed.items()}}
            arrays = {key: Array("uint8", (len(f),), "feddm.frame", f) for key, f in sent.items()}
            return RecordDict({"weights": ArrayRecord(arrays), "task": task})

        traffic, probes = Traffic(), Probes(grid, self._roster.processes)
        timeout = self.config.round_timeout
        for i, reply in collect(grid, chosen, content, traffic, 0, timeout, probes, MessageType.EVALUATE):
            if not isinstance(reply, Failure):
                with suppress(
                    KeyError, TypeError, AttributeError
                ):  # whoever makes use of it sees what is wrong with it
                    traffic.other += len(frame_of(reply))
            yield self._roster.nodes[chosen[i]], reply
            del reply
            gc.collect()
        self._other += traffic.other + traffic.down.total()

    @property
    def bytes_other(self) -> int:
        """What was asked beside the training since the last round, in bytes both ways."""
        return self._other
