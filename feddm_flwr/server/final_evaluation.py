"""What the nodes say of the model that is shipped, once the last round is over."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from feddm_flwr.config.privacy import Privacy
from feddm_flwr.evaluation import grids, utility
from feddm_flwr.evaluation.features import Recipe
from feddm_flwr.evaluation.global_model import GlobalModel
from feddm_flwr.evaluation.memorization import near_by_chance
from feddm_flwr.exchange.channel import exact
from feddm_flwr.models.parameters import layout
from feddm_flwr.models.pretrained import FEATURES, UTILITY
from feddm_flwr.privacy.audit import epsilon_at_least
from feddm_flwr.protocol.failures import Failure
from feddm_flwr.protocol.replies import CanaryGuesses, FinalReply, Introduction, Utility
from feddm_flwr.protocol.tasks import FINAL, REPORT, SAMPLES, WEIGHTS
from feddm_flwr.server.strategy import FedDM

log = logging.getLogger(__name__)

_AUDITED = 256  # samples that nodes compare with their images


@dataclass(frozen=True)
class Said:
    """What the nodes say of the averaged weights."""

    losses: dict[str, tuple[int, float]]  # held-out images and loss, by node
    latent_power: float | None  # of an autoencoder: the median of the nodes, which a few cannot move far
    audit: dict[str, dict[str, float]]  # by node, where it was asked for
    samples: int  # that the nodes compared with their images
    canaries: dict[str, dict[str, float]]  # by node, where there are some: what it guessed, and what that proves
    utility: dict[str, Utility]  # by node, where it was asked for

    def figures(self) -> dict[str, Any]:
        """Returns the lines of `final.json`."""
        found: dict[str, Any] = {"eval_loss": _mean(self.losses.values()), "latent_power": self.latent_power}
        found["sites"] = {
            name: {"eval_loss": loss, **(asdict(self.utility[name]) if name in self.utility else {})}
            for name, (_, loss) in sorted(self.losses.items())
        }
        found |= {"audit": self.audit, "audit_samples": self.samples} if self.audit else {}
        return found | ({"canaries": self.canaries} if self.canaries else {})


def evaluate_at_nodes(
    feddm: FedDM, grid: Grid, model: GlobalModel, recipe: Path | None = None, *, samples_too: bool = True
) -> Said:
    """Returns what the nodes say of the averaged weights, and with `samples_too` of samples. `recipe` is the file of
    the feature network, which the audit and coverage take; without one there are none.

    Raises:
        ConfigError, RunFailedError: as `FedDM.ask`.
    """
    own = layout(model.network)
    frame = exact(own.fingerprint, own.size).encode(feddm.averaged, "weights", model.config.num_server_rounds, 0)
    frames, assets = {WEIGHTS: frame}, dict[str, bytes]()
    asked = model.config.eval
    samples = min(_AUDITED, asked.samples)
    if samples_too and recipe is not None and (asked.audit or asked.utility):
        frames[SAMPLES] = model.draw(feddm.averaged, samples, 1.0).tobytes()
        assets[FEATURES] = recipe.read_bytes()
    if samples_too and asked.utility:
        assets[UTILITY] = _classifier(feddm, model).bytes()
    said: list[tuple[Introduction, FinalReply]] = []
    for node, answer in feddm.ask(grid, FINAL, frames, assets):
        reply = _reply(answer, samples, node.held_out)
        if isinstance(reply, Failure):
            log.warning("node=%s: no final evaluation: %s", node.name, reply)
        else:
            said.append((node, reply))
    losses = {node.name: (node.held_out, reply.eval_loss) for node, reply in said if reply.eval_loss is not None}
    powers = [reply.latent_power for _, reply in said if reply.latent_power is not None]
    audited = {node.name: _audit(node, reply, samples) for node, reply in said if reply.audit}
    guessed = {node.name: _proven(reply.canaries, model.config.privacy) for node, reply in said if reply.canaries}
    power = median(powers) if powers else None
    use = {node.name: reply.utility for node, reply in said if reply.utility}
    found = Said(losses, power, dict(sorted(audited.items())), samples, dict(sorted(guessed.items())), use)
    if images := sum(one.images for one in use.values()):
        told, known = (sum(getattr(one, by) for one in use.values()) for by in ("by_samples", "by_own"))
        shares = 100 * told / images, 100 * known / images
        log.info("utility: %.1f%% right by samples alone, %.1f%% by the nodes' own images", *shares)
    log.info("final held-out loss of the averaged weights: %s", _mean(losses.values()))
    return found


def _classifier(feddm: FedDM, model: GlobalModel) -> Recipe:
    """Returns a classifier of samples alone, of which there are as many of each class as the nodes' images are."""
    names, counts = model.config.taught_classes, Counter[str]()
    for node in feddm.nodes:
        counts.update({name: node.class_counts.get(name, 0) for name in names})
    labels = grids.labels_like(counts, names, model.config.eval.samples)
    images = model.draw(feddm.averaged, len(labels), 1.0, labels)
    return utility.classifier(images, np.array(labels), names)


def held_out_losses(said: Sequence[Said]) -> list[float]:
    """Returns the held-out loss of each of several models, over the nodes that gave one of all of them; NaN of none."""
    common = set.intersection(*({*one.losses} for one in said))
    means = (_mean([one.losses[name] for name in sorted(common)]) for one in said)
    return [math.nan if mean is None else mean for mean in means]


def _mean(losses: Collection[tuple[int, float]]) -> float | None:
    """Returns the mean of losses, weighted by the images; None of none."""
    weight = sum(n for n, _ in losses)
    return sum(n * loss for n, loss in losses) / weight if weight else None


def _reply(answer: RecordDict | Failure, samples: int, held_out: int) -> FinalReply | Failure:
    if isinstance(answer, Failure):
        return answer
    if REPORT not in answer.config_records:
        return Failure("malformed", "no report")
    return FinalReply.from_record(answer.config_records[REPORT], samples, held_out)


def _proven(found: CanaryGuesses, privacy: Privacy) -> dict[str, float]:
    """Returns what a node guessed of its canaries, and the epsilon that this proves at least."""
    delta = privacy.delta if privacy.of_images else 0.0
    proven = epsilon_at_least(privacy.canaries, found.made, found.right, delta)
    return {"guesses": found.made, "right": found.right, "epsilon_at_least": round(proven, 3)}


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
