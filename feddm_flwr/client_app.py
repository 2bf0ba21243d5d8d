"""The node's side: introduce yourself, then train on what you hold and send the coded result.

torch and diffusers are imported where they are needed: a real node starts a fresh process for every
message. An introduction needs neither, and training is handed to a process that has them (see `node.worker`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from feddm_flwr.config import ConfigError, RunConfig, parse
from feddm_flwr.node import worker
from feddm_flwr.node.account import Account, allowed_data, check_allowed
from feddm_flwr.node.secure import SecureNode, identity
from feddm_flwr.node.settings import check_state, node_name, node_state_root, wants_worker
from feddm_flwr.privacy.secure_sum import SecureSumError
from feddm_flwr.protocol.replies import Introduction
from feddm_flwr.protocol.tasks import LOST, PROBE, PROBLEM, REPORT, SPENT, TASK, WEIGHTS_RECORD, SecureTask

app = ClientApp()
log = logging.getLogger(__name__)


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Says who this node is, how many images it has of which class, and what it finds wrong."""
    who, problem = Introduction("unnamed", 0, 0, {}), ""
    if PROBE not in message.content.config_records:  # which asks for nothing but the process
        try:
            who = replace(who, name=node_name(context.node_config))
            who = _introduction(who.name, parse(context.run_config), context.node_config)
        except ConfigError as error:
            problem = str(error)
        except Exception as error:  # whatever it is, the run must hear of it before it starts
            log.exception("this node cannot take part")
            problem = f"{type(error).__name__}; the node's own log says more"  # it may name a file
    report = ConfigRecord({**who.to_record(problem), "process": worker.process()})
    return Message(RecordDict({REPORT: report}), reply_to=message)


def _introduction(name: str, config: RunConfig, own: Mapping[str, object]) -> Introduction:
    """Looks at what the node has.

    Raises:
        ConfigError: it cannot take part in a run of that configuration.
    """
    wants_worker(own)
    log.info("budget: %s; policy: %s", own.get("dp-epsilon", "none"), own.get("policy", "none"))
    _check_installed(config)
    data = allowed_data(config, own, name)
    if config.keeps_state or config.privacy.of_images:
        check_state(own)
    if config.privacy.secure_aggregation:
        identity(own, name)
    if config.privacy.of_images:
        Account(config, own, name, data, node_state_root(own)).check()
    if config.privacy.hides_figures:
        return Introduction(name, len(data.train), len(data.held_out), {}, groups=len(data.groups))
    told = data.class_counts, data.skipped, data.sizes, dict(data.remarks)
    return Introduction(name, len(data.train), len(data.held_out), *told, len(data.groups))


def _check_installed(config: RunConfig) -> None:
    """Finds out whether the packages are here that only some runs need to train.

    Raises:
        ConfigError: one is not.
    """
    for asked, setting, package, extra in (
        (config.train.optimizer == "adamw8bit", "train.optimizer = 'adamw8bit'", "bitsandbytes", "8bit"),
        (config.privacy.of_images, f"privacy.mechanism = {config.privacy.mechanism!r}", "dp_accounting", "dp"),
        (config.model.lora_rank > 0, f"model.lora-rank = {config.model.lora_rank}", "peft", "lora"),
    ):
        if asked and not find_spec(package):
            raise ConfigError(f"{setting}: {package} is not installed: pip install 'feddm-flwr[{extra}]'")


@app.query("sums")
def sums(message: Message, context: Context) -> Message:
    """Answers what the server asks about a secure sum."""
    try:
        task, config = SecureTask.from_record(_scalars(message)), parse(context.run_config)
        check_allowed(config, context.node_config)
        node = SecureNode(config, context.node_config, node_name(context.node_config), task.run_uuid)
        report: dict[str, Any] = {"answer": json.dumps(node.answer(task))}
    except (ConfigError, SecureSumError) as error:
        log.warning("%s", error)
        report = {PROBLEM: str(error)}
    except Exception as error:
        log.exception("this node cannot answer")
        report = {PROBLEM: f"{type(error).__name__}; the node's own log says more"}
    return Message(RecordDict({REPORT: ConfigRecord(report)}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates a model, or sums features of the images, as the message says."""
    return train(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains as the message says, and replies with the coded result."""
    job = worker.Job(
        run_config=dict(context.run_config),
        node_config=dict(context.node_config),
        task=_scalars(message),
        frames={key: array.data for key, array in message.content.array_records[WEIGHTS_RECORD].items()},
    )
    report, frames = worker.do(job)
    content = RecordDict({REPORT if frames or SPENT in report else LOST: ConfigRecord(report)})
    if frames:
        arrays = {name: Array("uint8", (len(frame),), "feddm.frame", frame) for name, frame in frames.items()}
        content[WEIGHTS_RECORD] = ArrayRecord(arrays)
    return Message(content, reply_to=message)


def _scalars(message: Message) -> dict[str, Any]:
    """Returns the task that a message brings."""
    return dict(message.content.config_records[TASK])
