"""Sums of features: they add up across nodes, and tell what all images together would."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from feddm_flwr.evaluation import scores
from feddm_flwr.evaluation.statistics import Statistics, coverage, covered, fid, kid, statistics, total, unpack


def some(seed: int, count: int, size: int = 16) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.standard_normal((count, size)) @ random.standard_normal((size, size))).float()


def shared_out(x: torch.Tensor, classes: list[str]) -> Statistics:
    nodes = ((0, 40), (40, 300), (300, len(x)))
    return total(statistics(x[a:b], classes[a:b]) for a, b in nodes)


def test_a_federation_s_figures_are_those_of_the_pooled_images() -> None:
    real, fake = some(0, 500), some(1, 300)
    classes = [str(i % 3) for i in range(500)]
    pooled, shared, made = statistics(real, classes), shared_out(real, classes), statistics(fake)
    assert fid(shared, made) == pytest.approx(fid(pooled, made), rel=1e-9)
    field_s = FrechetInceptionDistance(scores.Features(16)).set_dtype(torch.float64)
    field_s.update(real.double(), real=True)
    field_s.update(fake.double(), real=False)
    assert fid(shared, made) == pytest.approx(float(field_s.compute()), rel=1e-6)
    assert kid(shared, made) == pytest.approx(kid(pooled, made), rel=1e-6)
    assert coverage(shared, Counter(classes), fake) == pytest.approx(coverage(pooled, Counter(classes), fake))
    assert {name: n for name, (n, _) in shared.classes.items()} == {"0": 167, "1": 167, "2": 166}


def test_kid_is_the_unbiased_estimate_over_all_pairs() -> None:
    a, b = some(0, 90).double().numpy(), some(1, 70).double().numpy()
    kernels = [(p @ q.T / 16 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b))]
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2])
    made = (statistics(torch.from_numpy(x).float()) for x in (a, b))
    assert kid(*made) == pytest.approx(within - 2 * kernels[2].mean(), rel=1e-4)
    wide = statistics(some(0, 200, 130))
    assert kid(wide, wide) is None


def test_coverage_tells_which_class_never_appears() -> None:
    real = torch.cat([some(0, 200) + 50, some(0, 100) - 50])
    whole = statistics(real, ["cat"] * 200 + ["dog"] * 100)
    counts = {"cat": 200, "dog": 100}
    assert coverage(whole, counts, real) == pytest.approx({"cat": 1, "dog": 1})
    only_cats = coverage(whole, counts, real[:200])
    assert only_cats == pytest.approx({"cat": 1.5, "dog": 0})
    assert covered(only_cats, counts) == pytest.approx(2 / 3)


def test_statistics_travel_exactly_and_anything_else_is_refused() -> None:
    before = statistics(some(0, 50), ["b", "a"] * 25)
    after = unpack(before.pack(), 16, ["a", "b"])
    assert after.pack() == before.pack()
    assert fid(after, statistics(some(1, 50))) == fid(before, statistics(some(1, 50)))
    with pytest.raises(ValueError, match="bytes of statistics instead of"):
        unpack(before.pack(), 16, ["a"])
    with pytest.raises(ValueError, match="not finite"):
        unpack(statistics(some(0, 5) * np.nan).pack(), 16, [])
    with pytest.raises(ValueError, match="that no images have"):
        unpack(statistics(some(0, 5) * 1e20).pack(), 16, [])
    with pytest.raises(ValueError, match="that no images have"):
        unpack(np.negative(np.frombuffer(before.pack())).tobytes(), 16, ["a", "b"])


def test_no_sum_is_over_few_images_also_not_as_a_difference() -> None:
    x = some(0, 100)
    classes = ["one"] * 1 + ["few"] * 4 + ["some"] * 15 + ["many"] * 80
    told = {name: n for name, (n, _) in statistics(x, classes, 10).classes.items()}
    assert told == {"one": 0, "few": 0, "some": 0, "many": 80}  # else "some" would leave 5 as the difference
    assert {n for n, _ in statistics(x, classes).classes.values()} == {1, 4, 15, 80}
