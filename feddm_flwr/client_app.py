"""The node's side: introduce yourself, then train on what you hold and send the coded result.

torch and diffusers are imported where they are needed: a real node starts a fresh process for every
message, and an introduction needs neither.
"""

from __future__ import annotations

import json

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from feddm_flwr.config import ConfigError, RunConfig, parse
from feddm_flwr.data import NodeData, load_node

app = ClientApp()


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Who this node is, how many images it has of which class, and what it finds wrong."""
    report = ConfigRecord({"problem": "", "images": 0, "held-out": 0, "class-counts": "{}"})
    try:
        report["name"] = node_name(context)
        data = _data(parse(context.run_config), context)
        report["images"], report["held-out"] = len(data.train), len(data.held_out)
        report["class-counts"] = json.dumps(data.class_counts)
    except ConfigError as error:
        report.setdefault("name", f"node id {context.node_id}")
        report["problem"] = str(error)
    return Message(RecordDict({"report": report}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Decode the weights, measure the held-out loss on them, train, encode the result."""
    from feddm_flwr import model, training
    from feddm_flwr.exchange import channel

    config, name = parse(context.run_config), node_name(context)
    data = _data(config, context)
    task = message.content.config_records["task"]
    number, steps_before = task["round"], task["steps-before"]
    assert isinstance(number, int)
    assert isinstance(steps_before, int)

    device = training.prepare_process(config)
    network = model.build(config)
    layout, c = model.layout(network), config.codec
    down = channel(c.downlink, c.block_size, c.clip_search, layout.fingerprint, layout.size)
    up = channel(c.uplink, c.block_size, c.clip_search, layout.fingerprint, layout.size)
    model.load_vector(network, down.decode(message.content.array_records["weights"]["frame"].data, number))

    held_out = data.held_out[: config.eval.images] if task["evaluate"] else data.held_out[:0]
    eval_loss = training.held_out_loss(network, held_out, config, name, device)
    trained = training.train(network, data.train, config, name, training.Progress(number, steps_before), device)
    frame = up.encode(model.to_vector(network), number)
    report = ConfigRecord(
        {
            "name": name,
            "round": number,
            "steps": trained.steps,
            "train-loss": trained.loss,
            "eval-loss": eval_loss,
            "held-out": len(held_out),
        }
    )
    content = RecordDict(
        {
            "weights": ArrayRecord({"frame": Array("uint8", (len(frame),), "feddm.frame", frame)}),
            "report": report,
        }
    )
    return Message(content, reply_to=message)


def node_name(context: Context) -> str:
    """`node-name` of the node config, else `node-<partition-id>`: Flower's own ids are random.

    Raises:
        ConfigError: the node config has neither.
    """
    own = context.node_config
    if "node-name" in own:
        return str(own["node-name"])
    if "partition-id" in own:
        return f"node-{own['partition-id']}"
    raise ConfigError("node-name is missing: start the SuperNode with --node-config 'node-name=\"site-a\" …'")


def _data(config: RunConfig, context: Context) -> NodeData:
    own = context.node_config
    partition = None
    if "partition-id" in own and "num-partitions" in own:
        partition = (int(own["partition-id"]), int(own["num-partitions"]))
    path = own.get("data-path")
    return load_node(config, partition, str(path) if path is not None else None)
