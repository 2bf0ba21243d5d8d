"""What a set of images amounts to for FID, KID and coverage: sums of features, which add up across nodes.

No image is among them; but sums over a few images tell much about these (see docs/evaluation.md), so nodes and classes
with few can be left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Doubles = NDArray[np.float64]

_CUBED = 128  # features up to this wide have their third moments summed, which KID needs
_ABSURD = 1e12  # products of features above this are a broken node's
_AT_A_TIME = 4096


@dataclass(frozen=True)
class Statistics:
    """Sums over the features x, shape (D,), of some images."""

    count: int
    first: Doubles  # of x, (D,)
    second: Doubles  # of x x^T, (D, D)
    third: Doubles  # of x x^T x, (D, D, D); empty for wide features
    itself: float  # of the kernel k(x, x)
    classes: Mapping[str, tuple[int, Doubles]]  # of each class: images, and their sum of x; 0 where that is not told

    @property
    def size(self) -> int:
        """D."""
        return len(self.first)

    def pack(self) -> bytes:
        """Returns as little-endian doubles; the classes in order of name."""
        parts = [[self.count], self.first, self.second.ravel(), self.third.ravel(), [self.itself]]
        for _, (count, first) in sorted(self.classes.items()):
            parts += [[count], first]
        return np.concatenate([np.asarray(part, "<f8") for part in parts]).tobytes()


def unpack(packed: bytes, size: int, classes: Sequence[str]) -> Statistics:
    """Returns what `pack` wrote, of features of that size and these classes.

    Raises:
        ValueError: it is something else.
    """
    cubed = size**3 if size <= _CUBED else 0
    wanted = 2 + size + size**2 + cubed + len(classes) * (1 + size)
    if len(packed) != 8 * wanted:
        raise ValueError(f"{len(packed)} bytes of statistics instead of {8 * wanted}")
    values = np.frombuffer(packed, "<f8")
    if not np.isfinite(values).all():
        raise ValueError("statistics that are not finite")
    count, first, second, third, itself, rest = np.split(values, np.cumsum([1, size, size**2, cubed, 1]), axis=0)
    of_class = rest.reshape(len(classes), 1 + size)
    if (
        not (np.abs(values) <= _ABSURD * count[0]).all()
        or itself[0] < 0
        or (np.diag(second.reshape(size, size)) * count[0] < first**2 * (1 - 1e-6)).any()
    ):
        raise ValueError("statistics that no images have")
    return Statistics(
        int(count[0]),
        first,
        second.reshape(size, size),
        third.reshape((size,) * 3 if cubed else 0),
        float(itself[0]),
        {name: (int(row[0]), row[1:]) for name, row in zip(sorted(classes), of_class, strict=True)},
    )


def statistics(features: Tensor, classes: Sequence[str] = (), least: int = 0) -> Statistics:
    """Returns the statistics of features (N, D), and of each class where the N `classes` are known. Classes of fewer
    images than `least` have no sums, nor have as many more that the sum of those without is over as many images."""
    x = features.double().numpy()
    size = x.shape[1]
    cubed = size <= _CUBED
    second, third = np.zeros((size, size)), np.zeros((size * size, size) if cubed else 0)
    for start in range(0, len(x), _AT_A_TIME):
        part = x[start : start + _AT_A_TIME]
        second += part.T @ part
        if cubed:
            third += (part[:, :, None] * part[:, None]).reshape(len(part), -1).T @ part
    named = np.asarray(classes)
    counts = Counter(classes)
    hidden: list[str] = []
    for name, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        if count < least or 0 < sum(counts[h] for h in hidden) < least:
            hidden.append(name)
    return Statistics(
        len(x),
        x.sum(0),
        second,
        third.reshape((size,) * 3) if cubed else third,
        float(_kernel((x * x).sum(1), size).sum()),
        {
            name: (0, np.zeros(size)) if name in hidden else (count, x[named == name].sum(0))
            for name, count in sorted(counts.items())
        },
    )


def total(parts: Iterable[Statistics]) -> Statistics:
    """Returns the statistics of all images together; its last bits depend on the order."""
    first, *rest = parts
    count, itself = first.count, first.itself
    sums = (first.first.copy(), first.second.copy(), first.third.copy())
    classes = dict(first.classes)
    for part in rest:
        count, itself = count + part.count, itself + part.itself
        for whole, more in zip(sums, (part.first, part.second, part.third), strict=True):
            whole += more
        for name, (n, x) in part.classes.items():
            before = classes.get(name, (0, np.zeros(part.size)))
            classes[name] = (before[0] + n, before[1] + x)
    return Statistics(count, *sums, itself=itself, classes=classes)


def fid(real: Statistics, fake: Statistics) -> float:
    """Returns the Fréchet distance (Heusel et al. 2017): |m - n|^2 + tr(A + B - 2 (A B)^(1/2)), of sums, which
    torchmetrics does not take; it agrees on features."""
    a, b = _covariance(real), _covariance(fake)
    apart = real.first / real.count - fake.first / fake.count
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real
    return float(apart @ apart + np.trace(a) + np.trace(b) - 2 * roots.sum())


def kid(real: Statistics, fake: Statistics) -> float | None:
    """Returns the unbiased estimate of the squared maximum mean discrepancy over all images (Binkowski et al. 2018),
    with k(x, y) = (x.y / D + 1)^3, whose mean over pairs is that of the moments; None for wide features."""
    if not real.third.size:
        return None
    return _mean_kernel(real) + _mean_kernel(fake) - 2 * _pairs(real, fake) / (real.count * fake.count)


def coverage(real: Statistics, counts: Mapping[str, int], features: Tensor) -> dict[str, float]:
    """Returns the share of each class among images, by the nearest mean of a class, over its share among the real ones,
    of which there are `counts`: 1 is as it should be, 0 is a class that never appears. Empty where no class is known.
    """
    names = [name for name, (count, _) in sorted(real.classes.items()) if count and counts.get(name)]
    if not names:
        return {}
    means = np.stack([real.classes[name][1] / real.classes[name][0] for name in names])
    nearest = torch.cdist(features.double(), torch.from_numpy(means)).argmin(1).numpy()
    everything = sum(counts[name] for name in names)
    return {name: float((nearest == i).mean() / (counts[name] / everything)) for i, name in enumerate(names)}


def covered(by_class: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Returns the overlap of the two distributions of classes, 0 to 1."""
    everything = sum(counts[name] for name in by_class)
    return sum(min(1.0, ratio) * counts[name] / everything for name, ratio in by_class.items())


def _covariance(a: Statistics) -> Doubles:
    covariance: Doubles = (a.second - np.outer(a.first, a.first) / a.count) / (a.count - 1)
    return covariance


def _kernel(products: Doubles, size: int) -> Doubles:
    cubes: Doubles = (products / size + 1) ** 3
    return cubes


def _pairs(a: Statistics, b: Statistics) -> float:
    """Returns the kernel summed over all pairs of an image of `a` and one of `b`: (1 + u)^3 = 1 + 3 u + 3 u^2 + u^3."""
    d = a.size
    return float(
        a.count * b.count
        + 3 / d * (a.first @ b.first)
        + 3 / d**2 * (a.second * b.second).sum()
        + 1 / d**3 * (a.third * b.third).sum()
    )


def _mean_kernel(a: Statistics) -> float:
    """Returns the mean of the kernel over pairs of different images."""
    return (_pairs(a, a) - a.itself) / (a.count * (a.count - 1))
