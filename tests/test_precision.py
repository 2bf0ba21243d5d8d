"""Which precision a network computes in."""

from __future__ import annotations

import torch

from feddm_flwr import architecture, precision
from feddm_flwr.config import parse

CPU = torch.device("cpu")


def test_a_precision_is_what_was_asked_for() -> None:
    assert precision.in_bf16("bf16", CPU)
    assert not precision.in_bf16("fp32", CPU)
    for name in ("bf16", "fp32"):
        with precision.autocast(name, CPU):
            assert torch.is_autocast_enabled("cpu") == (name == "bf16")


def test_group_norms_in_bf16_change_a_network_by_no_more_than_bf16_does() -> None:
    network = architecture.build(parse({"model.preset": "tiny"}), {})
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 10, 100, 900])
    expected = network(x, t).sample
    with torch.autocast("cpu", torch.bfloat16), precision._NormsInBf16():
        found = network(x, t).sample
    assert (found.float() - expected).norm() < 0.02 * expected.norm()
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
