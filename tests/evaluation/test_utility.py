"""What samples are good for: laws of the figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from feddm_flwr.evaluation import utility
from feddm_flwr.protocol.failures import Failure
from feddm_flwr.protocol.replies import FinalReply, Utility


def images(labels: NDArray[Any], seed: int) -> NDArray[np.uint8]:
    """Of class i the i-th quarter is bright, in noise."""
    made = np.random.default_rng(seed).integers(0, 80, (len(labels), 1, 8, 8)).astype(np.uint8)
    for image, label in zip(made, labels, strict=True):
        image[0, 4 * (label // 2) :][:4, 4 * (label % 2) :][:, :4] += 100
    return made


def test_a_classifier_of_good_samples_is_right_and_one_of_bad_samples_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "_STEPS", 100)
    labels = np.arange(64) % 4
    test, names = images(labels, 1), ("a", "b", "c", "d")
    good = utility.classifier(images(labels, 0), labels, names)
    bad = utility.classifier(images(labels[::-1].copy(), 0), labels, names)
    assert utility.right(good, test, labels) > 60
    assert utility.right(bad, test, labels) < 10
    again = utility.classifier(images(labels, 0), labels, names)
    assert all((a == b).all() for a, b in zip(good.tensors.values(), again.tensors.values(), strict=True))


def test_an_image_is_covered_where_a_sample_is_among_its_neighbours() -> None:
    real = torch.cat([torch.arange(20.0), 1000 + torch.arange(20.0)])[:, None]
    assert utility.covered(real, torch.arange(0, 20, 0.5)[:, None]) == 20  # one of two modes
    assert utility.covered(real, real) == 40
    assert utility.covered(real, torch.full((5, 1), 500.0)) == 0
    assert utility.covered(real[:1], real) == 0  # nothing is to be said of one


@pytest.mark.parametrize(
    "said",
    ["[5, 6, 0, 0, 0]", "[5, 1, 1, 2, 3]", "[50, 1, 1, 0, 0]", "[5, 1.0, 1, 0, 0]", "[5]", "{", "[-1, 0, 0, 0, 0]",
     "[0, 0, 0, 0, 0]", "[5, 1, 1, 0, 0, 0]", "[" * 150, 7],
)  # fmt: skip
def test_counts_that_no_node_has_are_none(said: object) -> None:
    reply = FinalReply.from_record({"eval-loss": 0.1, "utility": said}, 0, 20)
    assert not isinstance(reply, Failure)
    assert reply.utility is None


def test_counts_come_as_they_were_told() -> None:
    told = FinalReply(0.1, None, None, None, Utility(20, 3, 20, 10, 4))
    assert FinalReply.from_record(told.to_record(), 0, 20) == told
