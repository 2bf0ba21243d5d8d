"""A node's part in a round: decode the weights, measure the held-out loss on them, train, encode what came of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from feddm_flwr import model, training
from feddm_flwr.config import RunConfig
from feddm_flwr.data import NodeData
from feddm_flwr.node_link import NodeLink, Task
from feddm_flwr.node_state import StateLostError
from feddm_flwr.parts import parts_of

log = logging.getLogger("feddm")

#: What the server is told of a round, beside the frame.
Report = dict[str, str | int | float | bool]


@dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    report: Report
    frame: bytes  # empty where the node had lost what the server's frames add to


def do(config: RunConfig, name: str, data: NodeData, root: Path, said: Report, frames: Mapping[str, bytes]) -> Outcome:
    """Do the task that the server `said`, with its frames, as node `name` whose state is below `root`.

    Raises:
        FrameError: a frame is corrupt.
        FloatingPointError: the training diverged.
    """
    task = Task(**{key.replace("-", "_"): value for key, value in said.items()})  # type: ignore[arg-type]
    device = training.prepare_process(config)
    network = model.build(config)
    parts = parts_of(model.layout(network), config)
    link = NodeLink(config, parts, name, root, task)
    try:
        received = link.receive(frames, model.to_vector(network))
    except StateLostError as error:
        log.warning("%s", error)  # the server sends the whole of it
        return Outcome({"name": name, "round": task.round}, b"")
    model.load_vector(network.to(device), received)

    held_out = data.held_out[: config.eval.images] if task.evaluate else data.held_out[:0]
    eval_loss = training.held_out_loss(network, held_out, config, name, device)
    progress, start = training.Progress(task.round, task.steps_before), link.start(received)
    trained = training.train(network, data.train, config, name, progress, device, start)
    sent = link.send(model.flat(network), received)
    if link.state and parts.personal.layout.names:
        path = link.state.replace_folder("pipeline", lambda folder: model.save_pipeline(network, config, folder, ""))
        log.info("this node's own model as of round %d: %s", task.round, path)
    report: Report = {
        "name": name,
        "round": task.round,
        "steps": trained.steps,
        "train-loss": trained.loss,
        "eval-loss": eval_loss,
        "coding-error": sent.error,
        "state-lost": link.state_lost,
    }
    return Outcome(report, sent.frame)
