"""Which precision a network computes in."""

from __future__ import annotations

import torch

from feddm_flwr.compute import precision

CPU = torch.device("cpu")


def test_a_precision_is_what_was_asked_for() -> None:
    assert precision.in_bf16("bf16", CPU)
    assert not precision.in_bf16("fp32", CPU)
    for name in ("bf16", "fp32"):
        with precision.autocast(name, CPU):
            assert torch.is_autocast_enabled("cpu") == (name == "bf16")
