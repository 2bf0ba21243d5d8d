"""The node's side: introduce yourself, then train on what you hold and send the coded result.

torch and diffusers are imported where they are needed: a real node starts a fresh process for every
message. An introduction needs neither, and training is handed to a process that has them (see `worker`).
"""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from feddm_flwr import worker
from feddm_flwr.config import ConfigError, RunConfig, parse
from feddm_flwr.node_config import check_state, node_data, node_name, wants_worker

app = ClientApp()
log = logging.getLogger("feddm")


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Who this node is, how many images it has of which class, and what it finds wrong."""
    report = ConfigRecord({"name": "unnamed", "problem": "", "images": 0, "held-out": 0, "class-counts": "{}"})
    report["process"] = worker.process()
    if "probe" in message.content.config_records:  # nothing else is asked
        return Message(RecordDict({"report": report}), reply_to=message)
    try:
        report["name"] = node_name(context.node_config)
        config = parse(context.run_config)
        wants_worker(context.node_config)
        _check_installed(config)
        data = node_data(config, context.node_config)
        if config.keeps_state:
            check_state(context.node_config)
        report["images"], report["held-out"] = len(data.train), len(data.held_out)
        report["class-counts"], report["skipped"] = json.dumps(data.class_counts), data.skipped
        report["sizes"] = data.sizes
    except ConfigError as error:
        report["problem"] = str(error)
    except Exception as error:  # whatever it is, the run must hear of it before it starts
        log.exception("this node cannot take part")
        report["problem"] = f"{type(error).__name__}; the node's own log says more"  # it may name a file
    return Message(RecordDict({"report": report}), reply_to=message)


def _check_installed(config: RunConfig) -> None:
    """Find out whether the packages are here that only some runs need to train.

    Raises:
        ConfigError: one is not.
    """
    for asked, setting, package, extra in (
        (config.train.optimizer == "adamw8bit", "train.optimizer = 'adamw8bit'", "bitsandbytes", "8bit"),
        (config.model.lora_rank > 0, f"model.lora-rank = {config.model.lora_rank}", "peft", "lora"),
    ):
        if asked and not find_spec(package):
            raise ConfigError(f"{setting}: {package} is not installed: pip install 'feddm-flwr[{extra}]'")


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge a model, or sum features of the images, as the message says."""
    return train(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as the message says, and reply with the coded result."""
    job = worker.Job(
        run_config=dict(context.run_config),
        node_config=dict(context.node_config),
        task=dict(message.content.config_records["task"]),
        frames={key: array.data for key, array in message.content.array_records["weights"].items()},
    )
    report, frame = worker.do(job)
    content = RecordDict({"report" if frame else "lost": ConfigRecord(report)})
    if frame:
        array = Array("uint8", (len(frame),), "feddm.frame", frame)
        content["weights"] = ArrayRecord({"frame": array})
    return Message(content, reply_to=message)
