"""What a node's process keeps between tasks changes no bit, and holds no image."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from local_grid import config, run

from feddm_flwr.config import RunConfig
from feddm_flwr.models import networks, parameters
from feddm_flwr.node import kept
from feddm_flwr.server.round import RoundResult
from feddm_flwr.training import loop
from feddm_flwr.training.examples import Pixels
from feddm_flwr.training.objectives import Denoising

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_of_other_tests() -> None:
    kept._kept.clear()


def bits(results: list[RoundResult]) -> list[tuple[bytes, float, float]]:
    return [(one.weights.tobytes(), one.train_loss, one.eval_loss) for one in results]


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "feddm-vanilla", "model__dropout": 0.2},
        {"strategy": "feddm-prox", "train__mu": 0.1},
        {"strategy": "feddm-lean"},
        {"strategy": "feddm-slow-link", "train__alignment": 0.5},
        {"train__moments": "server", "train__alignment": 0.5, "train__optimizer": "muon"},
        {"train__moments": "server"},
        {"train__moments": "node", "train__optimizer": "muon"},
        {"train__control": "scaffold"},
        {"train__optimizer": "sgd", "train__learning_rate": 0.01},
        {"exchange__parts": "usplit"},
        {"model__class_conditional": True},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_a_kept_network_and_its_steps_give_the_bits_of_new_ones(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    c, built, again = config(**keys, num_server_rounds=3, round_timeout=600.0), [], []
    monkeypatch.setattr(kept.networks, "build", lambda *a, old=networks.build: built.append(1) or old(*a))
    begun = loop.Step.begin_again
    monkeypatch.setattr(loop.Step, "begin_again", lambda *a: again.append(begun(*a)) or again[-1])
    with_kept = bits(run(c))
    assert sum(built) <= 2  # the server's, and one of the nodes
    assert again.count(True) >= 7  # of 12 trainings; there is no momentum to go on with in the first round
    monkeypatch.setattr(kept, "put_back", lambda bench: None)
    kept._kept.clear()
    assert bits(run(c)) == with_kept
    assert len(built) > 12


def bench_of(c: RunConfig) -> kept.Bench:
    return kept.take(c, "{}", {}, CPU)


def test_another_run_s_network_is_its_own_and_one_of_a_training_that_failed_is_not_used_again() -> None:
    first, second = config(), config(seed=1)
    bench = bench_of(first)
    kept.put_back(bench)
    assert bench_of(first) is bench
    assert bench_of(first) is not bench  # which somebody has
    kept.put_back(bench)
    assert bench_of(second).initial.tobytes() != bench.initial.tobytes()
    with pytest.raises(FloatingPointError):
        run(config(train__learning_rate=1e25, train__precision="fp32"))
    assert kept._kept == []


def test_no_image_is_kept() -> None:
    c = config()
    bench = bench_of(c)
    pixels = Pixels(np.zeros((9, 1, 8, 8), np.uint8), False, CPU)
    gone = weakref.ref(pixels)
    objective = Denoising(c, pixels, np.zeros(9, np.int64), CPU)
    bench.step = loop.train(bench.network, objective, c, "node", loop.Progress(1, 0), CPU).step
    kept.put_back(bench)
    del objective, pixels
    gc.collect()
    assert gone() is None
    assert parameters.to_vector(bench.network).tobytes() != bench.initial.tobytes()
