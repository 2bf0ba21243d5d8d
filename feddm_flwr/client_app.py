"""The node's side: introduce yourself, then train on what you hold and send the coded result.

torch and diffusers are imported where they are needed: a real node starts a fresh process for every
message, and an introduction needs neither.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from feddm_flwr.config import NODE_NAME, ConfigError, RunConfig, parse
from feddm_flwr.data import NodeData, load_node
from feddm_flwr.state_folder import check_writable, state_root

app = ClientApp()
log = logging.getLogger("feddm")


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Who this node is, how many images it has of which class, and what it finds wrong."""
    report = ConfigRecord({"name": "unnamed", "problem": "", "images": 0, "held-out": 0, "class-counts": "{}"})
    try:
        report["name"] = node_name(context)
        config = parse(context.run_config)
        data = _data(config, context)
        if config.keeps_state:
            _check_state(_state_root(context))
        report["images"], report["held-out"] = len(data.train), len(data.held_out)
        report["class-counts"] = json.dumps(data.class_counts)
    except ConfigError as error:
        report["problem"] = str(error)
    except Exception as error:  # whatever it is, the run must hear of it before it starts
        log.exception("this node cannot take part")
        report["problem"] = f"{type(error).__name__}: {error}"
    return Message(RecordDict({"report": report}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Decode the weights, measure the held-out loss on them, train, encode what came of it."""
    from feddm_flwr import model, training
    from feddm_flwr.node_link import NodeLink, Task
    from feddm_flwr.node_state import StateLostError
    from feddm_flwr.parts import parts_of

    config, name = parse(context.run_config), node_name(context)
    data = _data(config, context)
    task = Task(**{key.replace("-", "_"): value for key, value in message.content.config_records["task"].items()})  # type: ignore[arg-type]
    frames = {key: array.data for key, array in message.content.array_records["weights"].items()}

    device = training.prepare_process(config)
    network = model.build(config)
    parts = parts_of(model.layout(network), config)
    link = NodeLink(config, parts, name, _state_root(context), task)
    try:
        received = link.receive(frames, model.to_vector(network))
    except StateLostError as error:
        log.warning("%s", error)  # the server sends the whole of it
        return Message(RecordDict({"lost": ConfigRecord({"name": name, "round": task.round})}), reply_to=message)
    model.load_vector(network.to(device), received)

    held_out = data.held_out[: config.eval.images] if task.evaluate else data.held_out[:0]
    eval_loss = training.held_out_loss(network, held_out, config, name, device)
    progress, start = training.Progress(task.round, task.steps_before), link.start(received)
    trained = training.train(network, data.train, config, name, progress, device, start)
    sent = link.send(model.flat(network), received)
    report = ConfigRecord(
        {
            "name": name,
            "round": task.round,
            "steps": trained.steps,
            "train-loss": trained.loss,
            "eval-loss": eval_loss,
            "coding-error": sent.error,
            "state-lost": link.state_lost,
        }
    )
    if link.state and parts.personal.layout.names:
        path = link.state.replace_folder("pipeline", lambda folder: model.save_pipeline(network, config, folder, ""))
        log.info("this node's own model as of round %d: %s", task.round, path)
    frame = Array("uint8", (len(sent.frame),), "feddm.frame", sent.frame)
    content = RecordDict({"weights": ArrayRecord({"frame": frame}), "report": report})
    return Message(content, reply_to=message)


def node_name(context: Context) -> str:
    """`node-name` of the node config, else `node-<partition-id>`: Flower's own ids are random.

    Raises:
        ConfigError: the node config has neither, or the name has characters that a name may not have.
    """
    own = context.node_config
    name = str(own.get("node-name", f"node-{own['partition-id']}" if "partition-id" in own else ""))
    if re.fullmatch(NODE_NAME, name):
        return name
    if name:
        raise ConfigError(f"node-name = {name!r} is not allowed: must be 1 to 64 letters, digits, '.', '_' or '-'")
    raise ConfigError("node-name is missing: start the SuperNode with --node-config 'node-name=\"site-a\" …'")


def _data(config: RunConfig, context: Context) -> NodeData:
    own = context.node_config
    partition = None
    if "partition-id" in own and "num-partitions" in own:
        partition = (int(own["partition-id"]), int(own["num-partitions"]))
    path = own.get("data-path")
    return load_node(config, partition, str(path) if path is not None else None)


def _check_state(root: Path) -> None:
    try:
        check_writable(root)
    except OSError as error:
        raise ConfigError(
            f"state-path = {str(root)!r} cannot be written to ({error.strerror}); this run's codec needs it: set "
            "state-path in the --node-config to a folder of this node's own"
        ) from error


def _state_root(context: Context) -> Path:
    path = context.node_config.get("state-path")
    return state_root(str(path) if path is not None else None)
