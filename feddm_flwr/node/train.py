"""A node's part in a round: decode the weights, measure the held-out loss on them, train, encode what came of it."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from feddm_flwr.compute.device import prepare_process
from feddm_flwr.config import RunConfig
from feddm_flwr.data.node_data import NodeData
from feddm_flwr.exchange.downlink import DownlinkReceiver
from feddm_flwr.exchange.extras import ExtrasChannel
from feddm_flwr.exchange.node_state import NodeState, StateLostError
from feddm_flwr.exchange.partial import split_of
from feddm_flwr.exchange.uplink import UplinkSender
from feddm_flwr.models import parameters, pipelines
from feddm_flwr.node import kept
from feddm_flwr.node.account import Account
from feddm_flwr.node.assets import assets_of
from feddm_flwr.node.inherited import Own
from feddm_flwr.node.outcome import Outcome
from feddm_flwr.node.secure import SecureNode
from feddm_flwr.node.summed import Summed
from feddm_flwr.privacy.ledger import BudgetSpentError
from feddm_flwr.protocol.replies import TrainReply
from feddm_flwr.protocol.tasks import FRAME, SPENT, Frames, TrainTask
from feddm_flwr.training import loop
from feddm_flwr.training.build import build_objectives

log = logging.getLogger(__name__)


def do(
    config: RunConfig,
    name: str,
    data: NodeData,
    root: Path,
    task: TrainTask,
    frames: Frames,
    account: Account | None = None,
    secure: SecureNode | None = None,
) -> Outcome:
    """Does a task of the server's, with its frames, as node `name` whose state is below `root`. With an `account` it is
    paid for before the first step is taken, whatever becomes of the reply. As a `secure` node it tells of its update
    and its losses in a sum only.

    Raises:
        ConfigError: the account's ledger is lost or damaged.
        FrameError: a frame is corrupt.
        FloatingPointError: the training diverged.
        SecureSumError: the node cannot take part in the sum.
    """
    config = config.in_round(task.round)
    device = prepare_process(config.train)
    nothing = Outcome({"name": name, "round": task.round}, {})
    assets = assets_of(root, task.assets, frames)
    if assets is None:
        log.warning("what the run builds upon is not here; the server sends it")
        return nothing
    bench = kept.take(config, task.assets, assets, device)
    network = bench.network
    split = split_of(parameters.layout(network), config)
    private = config.privacy.of_images
    state = NodeState(root, task.run_uuid, name, private=private) if config.keeps_state else None
    try:
        received = DownlinkReceiver(config, split, task, state).receive(frames, bench.initial)
    except StateLostError as error:
        log.warning("%s", error)  # the server sends the whole of it
        return nothing
    parameters.load_vector(network, received)
    summed, base = None, task
    if secure:
        if secure.images(task) != len(data.train):  # the server asks anew what this node has
            return Outcome(TrainReply(len(data.train), 1, 0.0, None).to_record(name, task.round), {FRAME: b"outdated"})
        summed = Summed(config, split, name, task, frames, secure, received, data)
        base = replace(task, acked=secure.opened(task.acked))
    uplink = UplinkSender(config, split, name, base, state, summed.sender if summed else None)

    objective, unseen = build_objectives(config, data, assets, root, device)
    tells = task.evaluate and config.eval.every > 0 and not config.privacy.hides_losses
    held_out = unseen.held_out(network, config.eval.images if tells else 0, name)
    progress = loop.Progress(task.round, task.steps_before, task.repeat)
    extras = ExtrasChannel(config, split.shared.layout)
    own = Own(config, split, task, state, extras.decode(frames, task.round))
    inherited = own.inherited(parameters.layout(network), received, uplink.start(received))
    try:
        spent = account.spend(task) if account else None
    except BudgetSpentError as error:
        log.warning("%s", error)
        return Outcome(nothing.report | {SPENT: str(error)}, {})
    noise = account.noise if account else 0.0
    trained = loop.train(network, objective, config, name, progress, device, inherited, noise, data.groups, bench.step)
    seal = partial(summed.frame, figures=(trained.loss, held_out)) if summed else None
    sent = uplink.send(parameters.flat(network), received, seal)
    if state and split.personal.layout.names:
        fill = partial(pipelines.save, network, config, assets, card="")
        state.replace_folder("pipeline", "personal", task.round, fill)
    bench.step = trained.step
    if not private:
        kept.put_back(bench)
    reply = TrainReply(
        images=len(data.train),
        steps=trained.steps,
        train_loss=trained.loss,
        eval_loss=held_out.loss if math.isfinite(held_out.loss) else None,
        eval_levels=held_out.levels,
        coding_error=sent.error,
        state_lost=state is not None and state.lost,
        **asdict(spent) if spent else {},
    )
    if summed:  # the rest is in the sum
        reply = replace(reply, train_loss=0.0, coding_error=0.0, eval_loss=None, eval_levels=[])
        return Outcome(reply.to_record(name, task.round), {FRAME: sent.frame})
    beside = ExtrasChannel(config, split.shared.layout, task.round).encode(own.leave(trained), task.round)
    return Outcome(reply.to_record(name, task.round), {FRAME: sent.frame, **beside})
