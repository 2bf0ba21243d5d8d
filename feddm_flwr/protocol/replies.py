"""What a node says of itself, its training and the final model, checked in one place: it may be broken, or lie."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Self

from feddm_flwr.config import MOST_CLASS_TEXT, MOST_CLASSES, NODE_NAME, NOISE_LEVELS
from feddm_flwr.protocol.failures import Failure, clean
from feddm_flwr.protocol.tasks import Scalar

#: Losses and errors above this are a broken node's.
ABSURD = 1e6
_MAX_IMAGES = 10_000_000  # keeps the exact sum of a thousand such nodes within 64 bits, at updates up to 0.1
_MAX_REMARKS = 50


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself before it is first asked to train."""

    name: str
    images: int
    held_out: int
    class_counts: dict[str, int]
    skipped: int = 0  # images that it cannot read
    sizes: str = ""  # the smallest and the largest, before they were resized
    remarks: dict[str, int] = field(
        default_factory=dict, compare=False
    )  # what else is to be known of its images, in counts
    groups: int = 0  # of images that belong together, among those that it trains on; 0 where none do

    def to_record(self, problem: str = "") -> dict[str, Scalar]:
        """Returns the introduction, and what the node finds wrong, as a record of scalars."""
        return {
            "name": self.name,
            "problem": problem,
            "images": self.images,
            "held-out": self.held_out,
            "class-counts": json.dumps(self.class_counts),
            "skipped": self.skipped,
            "sizes": self.sizes,
            "remarks": json.dumps(self.remarks),
            "groups": self.groups,
        }

    @classmethod
    def from_record(cls, said: Mapping[str, object]) -> tuple[Self, str] | Failure:
        """Returns what a node said of itself, and what it found wrong ("" if nothing), or what is wrong with that."""
        try:
            name, images, held_out = said["name"], said["images"], said["held-out"]
            lines = [clean(line, 500) for line in str(said["problem"])[:10_000].splitlines()]
            problem = "\n".join(filter(None, lines))
            skipped = said.get("skipped", 0)
            counts = json.loads(str(said["class-counts"])[:MOST_CLASS_TEXT])
            if not (isinstance(images, int) and isinstance(held_out, int) and isinstance(counts, dict)):
                raise TypeError("counts must be integers")
            if not isinstance(name, str) or not re.fullmatch(NODE_NAME, name):
                raise ValueError(f"name = {name!r}")
            if not problem and not (1 <= images <= _MAX_IMAGES and 0 <= held_out <= _MAX_IMAGES):
                raise ValueError(f"images = {images}, held-out = {held_out}")
            if type(skipped) is not int or not 0 <= skipped <= _MAX_IMAGES:
                raise ValueError(f"skipped = {skipped!r}")
            most = 2 * _MAX_IMAGES
            if len(counts) > MOST_CLASSES or not all(type(n) is int and 0 <= n <= most for n in counts.values()):
                raise ValueError("class counts")
            remarks = json.loads(str(said.get("remarks", "{}"))[:10_000])  # a node of an older version has none
            if not isinstance(remarks, dict) or len(remarks) > _MAX_REMARKS:
                raise ValueError("remarks")
            if not all(type(n) is int and 0 <= n <= most for n in remarks.values()):
                raise ValueError("remarks")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            return Failure("malformed", clean(repr(error)))
        groups = said.get("groups", 0)
        if type(groups) is not int or not 0 <= groups <= images:
            return Failure("malformed", clean(f"groups = {groups!r}"))
        remarks = {clean(what, 100): n for what, n in remarks.items()}
        sizes = clean(str(said.get("sizes", "")), 50)
        counts = {clean(c, 100): n for c, n in counts.items()}
        return cls(name, images, held_out, counts, skipped, sizes, remarks, groups), problem


@dataclass(frozen=True)
class TrainReply:
    """What came of a node's part of a round, beside its weights."""

    images: int  # that it trains on now
    steps: int
    train_loss: float
    eval_loss: float | None  # of the weights that it got; None where they were not evaluated
    eval_levels: list[float] = field(default_factory=list)  # the same by noise level; empty where it does not say
    coding_error: float = 0.0  # norm of what the coding lost over that of what was to be sent
    state_lost: bool = False  # whether what the node had kept was gone
    epsilon: float = math.nan  # that the node has spent in this run; NaN where it does not count
    epsilon_total: float = math.nan  # the same in all runs on its images
    goes_on: bool = True  # whether it has enough left for another such round

    def to_record(self, name: str, number: int) -> dict[str, Scalar]:
        """Returns the reply of the node of that name on a round as a record of scalars."""
        return {
            "name": name,
            "round": number,
            "images": self.images,
            "steps": self.steps,
            "train-loss": self.train_loss,
            "eval-loss": math.nan if self.eval_loss is None else self.eval_loss,
            "eval-levels": json.dumps(self.eval_levels),
            "coding-error": self.coding_error,
            "state-lost": self.state_lost,
            "epsilon": self.epsilon,
            "epsilon-total": self.epsilon_total,
            "goes-on": self.goes_on,
        }

    @classmethod
    def from_record(cls, said: Mapping[str, object], name: str, number: int) -> Self | Failure:
        """Returns the reply of the node of that name on a round, or what is wrong with it.

        Raises:
            KeyError: something is missing.
        """
        if (said["name"], said["round"]) != (name, number):
            return Failure("stale", clean(f"the reply is of {said['name']!r}, round {said['round']!r}"))
        images, steps, train_loss, eval_loss = said["images"], said["steps"], said["train-loss"], said["eval-loss"]
        coding_error, lost = said["coding-error"], said["state-lost"]
        if not (isinstance(train_loss, float) and 0 <= train_loss <= ABSURD and isinstance(eval_loss, float)):
            return Failure("malformed", clean(f"losses {train_loss!r} and {eval_loss!r}"))
        if not (isinstance(coding_error, float) and 0 <= coding_error <= ABSURD and isinstance(lost, bool)):
            return Failure("malformed", clean(f"coding-error = {coding_error!r}, state-lost = {lost!r}"))
        if type(steps) is not int or steps < 1 or type(images) is not int:
            return Failure("malformed", clean(f"steps = {steps!r}, images = {images!r}"))
        evaluated = eval_loss if 0 <= eval_loss <= ABSURD else None  # NaN where it was not
        levels = levels_of(said.get("eval-levels"))
        spent = (_epsilon(said.get("epsilon")), _epsilon(said.get("epsilon-total")))
        goes_on = said.get("goes-on") is not False
        return cls(images, steps, train_loss, evaluated, levels, coding_error, lost, *spent, goes_on)


@dataclass(frozen=True)
class Audit:
    """What a node found in samples of the final model, and in the model's losses."""

    near: int  # samples that are near to its training images
    members_auc: float  # how well a low loss tells its training images from its held-out ones: 0.5 is chance
    unseen: int  # held-out images that this was measured with


@dataclass(frozen=True)
class CanaryGuesses:
    """What a node found of its canaries in the final model."""

    made: int
    right: int


@dataclass(frozen=True)
class Utility:
    """What samples are good for at a node, in numbers of its held-out images."""

    images: int
    by_samples: int  # that a classifier gets right which the server trained on samples alone
    by_own: int  # that one gets right which the node trained on its own images
    looked_at: int = 0  # for what follows
    covered: int = 0  # that have a sample near them


@dataclass(frozen=True)
class FinalReply:
    """What a node says of the weights that are shipped."""

    eval_loss: float | None  # None where it has no held-out images
    latent_power: float | None  # an autoencoder's: the mean square of its latents
    audit: Audit | None = None  # None where it was not asked for one
    canaries: CanaryGuesses | None = None  # the same
    utility: Utility | None = None  # the same

    def to_record(self) -> dict[str, Scalar]:
        """Returns the reply as a record of scalars."""
        said: dict[str, Scalar] = {
            "eval-loss": math.nan if self.eval_loss is None else self.eval_loss,
            "latent-power": math.nan if self.latent_power is None else self.latent_power,
        }
        if self.audit:
            said |= {"near": self.audit.near, "members-auc": self.audit.members_auc, "unseen": self.audit.unseen}
        if self.canaries:
            said |= {"guesses": self.canaries.made, "right": self.canaries.right}
        if self.utility:
            said["utility"] = json.dumps(astuple(self.utility))
        return said

    @classmethod
    def from_record(cls, said: Mapping[str, object], samples: int, held_out: int) -> Self | Failure:
        """Returns what a node with `held_out` images said, given that it got so many `samples`; a figure that no honest
        node has counts as none."""
        loss, power = said.get("eval-loss"), said.get("latent-power")
        if not isinstance(loss, float):
            return Failure("malformed", f"eval-loss = {clean(repr(loss))}")
        near, auc, unseen = said.get("near"), said.get("members-auc"), said.get("unseen")
        audit = None
        if type(near) is int and 0 <= near <= samples and type(unseen) is int and 0 < unseen <= held_out:
            audit = Audit(near, auc, unseen) if isinstance(auc, float) and 0 <= auc <= 1 else None
        made, right = said.get("guesses"), said.get("right")
        found = None
        if type(made) is int and type(right) is int and 0 <= right <= made <= _MAX_IMAGES:
            found = CanaryGuesses(made, right)
        return cls(
            loss if 0 <= loss <= ABSURD else None,
            power if isinstance(power, float) and 0 < power <= ABSURD else None,
            audit,
            found,
            _utility(said.get("utility"), held_out),
        )


def _utility(said: object, held_out: int) -> Utility | None:
    try:
        counts = json.loads(str(said)[:200])
        found = Utility(*counts)
    except (ValueError, TypeError, RecursionError):
        return None
    if not all(type(count) is int and 0 <= count <= held_out for count in counts):
        return None
    fits = max(found.by_samples, found.by_own) <= found.images and found.covered <= found.looked_at
    return found if fits and found.images else None


def _epsilon(said: object) -> float:
    return said if isinstance(said, float) and 0 <= said <= ABSURD else math.nan


def levels_of(text: object) -> list[float]:
    """Returns losses by noise level, from JSON; none where they are not that."""
    try:
        values = json.loads(str(text)[:1000])
        if isinstance(values, list) and len(values) == NOISE_LEVELS and all(0 <= float(v) <= ABSURD for v in values):
            return [float(v) for v in values]
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    return []
