"""What the nodes say of the model that is shipped, once the last round is over."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from statistics import median
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from feddm_flwr.evaluation.global_model import GlobalModel
from feddm_flwr.evaluation.memorization import near_by_chance
from feddm_flwr.exchange.channel import exact
from feddm_flwr.models.parameters import layout
from feddm_flwr.models.pretrained import FEATURES
from feddm_flwr.protocol.failures import Failure
from feddm_flwr.protocol.replies import FinalReply, Introduction
from feddm_flwr.protocol.tasks import FINAL, REPORT, SAMPLES, WEIGHTS
from feddm_flwr.server.strategy import FedDM

log = logging.getLogger(__name__)

_AUDITED = 256  # samples that nodes compare with their images


def evaluate_at_nodes(feddm: FedDM, grid: Grid, model: GlobalModel, recipe: Path | None) -> dict[str, Any]:
    """Returns what the nodes say of the averaged weights: the held-out loss, the power of an autoencoder's latents (the
    median of the nodes, which a few cannot move far) and, where asked for, the audit. `recipe` is the file of the
    feature network, which the audit takes.

    Raises:
        ConfigError, RunFailedError: as `FedDM.ask`.
    """
    own = layout(model.network)
    frame = exact(own.fingerprint, own.size).encode(feddm.averaged, "weights", model.config.num_server_rounds, 0)
    frames, assets = {WEIGHTS: frame}, dict[str, bytes]()
    samples = min(_AUDITED, model.config.eval.samples)
    if recipe is not None and model.config.eval.audit:
        frames[SAMPLES] = model.draw(feddm.averaged, samples, 1.0).tobytes()
        assets[FEATURES] = recipe.read_bytes()
    said: list[tuple[Introduction, FinalReply]] = []
    for node, answer in feddm.ask(grid, FINAL, frames, assets):
        reply = _reply(answer, samples, node.held_out)
        if isinstance(reply, Failure):
            log.warning("node=%s: no final evaluation: %s", node.name, reply)
        else:
            said.append((node, reply))
    losses = [(node.held_out, reply.eval_loss) for node, reply in said if reply.eval_loss is not None]
    powers = [reply.latent_power for _, reply in said if reply.latent_power is not None]
    weight = sum(n for n, _ in losses)
    found: dict[str, Any] = {
        "eval_loss": sum(n * loss for n, loss in losses) / weight if weight else None,
        "latent_power": median(powers) if powers else None,
        "bytes_other": feddm.bytes_other,
    }
    if audited := {node.name: _audit(node, reply, samples) for node, reply in said if reply.audit}:
        found |= {"audit": dict(sorted(audited.items())), "audit_samples": samples}
    log.info("final held-out loss of the averaged weights: %s", found["eval_loss"])
    return found


def _reply(answer: RecordDict | Failure, samples: int, held_out: int) -> FinalReply | Failure:
    if isinstance(answer, Failure):
        return answer
    if REPORT not in answer.config_records:
        return Failure("malformed", "no report")
    return FinalReply.from_record(answer.config_records[REPORT], samples, held_out)


def _audit(node: Introduction, reply: FinalReply, samples: int) -> dict[str, float]:
    """Returns a node's audit as the report has it."""
    assert reply.audit
    pairs = min(node.images, reply.audit.unseen)
    return {
        "near": reply.audit.near,
        "by_chance": near_by_chance(samples, reply.audit.unseen),
        "members_auc": reply.audit.members_auc,
        "members_auc_error": 0.5 / math.sqrt(pairs),  # the most that its standard error can be
    }
