"""How near generated images are to real ones, with everything that a figure depends on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from feddm_flwr.evaluation.statistics import coverage, covered, fid, statistics

#: Below this, FID is dominated by its bias (Chong and Forsyth 2020).
FEW = 10_000
_KID_SUBSETS, _KID_SIZE = 100, 1000
_NEIGHBOURS = 3
_AT_A_TIME = 1024


class Features(nn.Module):
    """Hands on features that were extracted before."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, x: Tensor) -> Tensor:
        return x


def compare(
    real: Tensor,
    fake: Tensor,
    seed: int,
    classes: Sequence[str] = (),
    logits: Callable[[Tensor], Tensor] | None = None,
    *,
    memorization: bool = False,
) -> dict[str, Any]:
    """Returns the figures for features (N, D) of real and of generated images.

    `fid` (Heusel et al. 2017), `kid` and `kid_std` (Binkowski et al. 2018, over subsets), `precision` and `recall`
    (Kynkäänniemi et al. 2019), and `fid_floor`, the FID of as many real images against the rest, where there are
    enough: a little above what a perfect model would get, which is compared with all. Where the real images' classes
    are known, the coverage of each (see `evaluation.statistics`); with `memorization`, `mifid`, the FID divided by how
    far samples are from their nearest real image where that is suspiciously near (Bai et al. 2021), by a threshold for
    Inception's features; where the network has classes of its own, the `inception_score` (Salimans et al. 2016).
    """
    random = np.random.default_rng(seed)
    figures: dict[str, Any] = {"fid": frechet(real, fake)}
    if len(real) >= 2 * len(fake):
        chosen, rest = np.split(random.permutation(len(real)), [len(fake)])
        figures["fid_floor"] = frechet(real[rest], real[chosen])
    size = min(_KID_SIZE, len(real), len(fake))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save", UserWarning)
        torch.manual_seed(seed)
        kid = KernelInceptionDistance(Features(real.shape[1]), subsets=_KID_SUBSETS, subset_size=size)
        kid.update(real, real=True)
        kid.update(fake, real=False)
        mean, std = kid.compute()
    # Where each subset has all samples, their spread is not in it.
    figures |= {"kid": float(mean), "kid_std": float(std) if size < len(fake) else None}
    count = min(len(real), len(fake), FEW)
    some = (of[torch.from_numpy(random.permutation(len(of))[:count])] for of in (real, fake))
    figures["precision"], figures["recall"] = precision_and_recall(*some)
    if memorization:
        mifid = MemorizationInformedFrechetInceptionDistance(Features(real.shape[1]), normalize=False)
        mifid.set_dtype(torch.float64)
        # torchmetrics looks for the nearest of the second kind for each of the first: the samples.
        mifid.update(fake.double(), real=True)
        mifid.update(real.double(), real=False)
        figures["mifid"] = float(mifid.compute())
    if classes:
        reference = statistics(real, classes)
        figures["coverage_by_class"] = coverage(reference, Counter(classes), fake)
        figures["coverage"] = covered(figures["coverage_by_class"], Counter(classes))
    if logits:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it keeps what it gets, and has no spread of one split
            score = InceptionScore(Features(real.shape[1]), splits=1)
            score.update(logits(fake))
            figures["inception_score"] = float(score.compute()[0])
    return figures


def frechet(real: Tensor, fake: Tensor) -> float:
    """Returns the Fréchet distance of two sets of features (N, D)."""
    return fid(statistics(real), statistics(fake))


def precision_and_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Returns the share of generated images within the real ones' manifold, and the other way round (Kynkäänniemi et
    al. 2019): within the distance of some image to its third nearest neighbour."""
    return _covered(fake, real), _covered(real, fake)


def _covered(points: Tensor, by: Tensor) -> float:
    points, by = points.double(), by.double()  # by matrix products, float32 would lose small distances
    nearest = torch.cat([torch.cdist(part, by).kthvalue(_NEIGHBOURS + 1).values for part in by.split(_AT_A_TIME)])
    inside = [(torch.cdist(part, by) <= nearest).any(1) for part in points.split(_AT_A_TIME)]
    return float(torch.cat(inside).double().mean())


def _copies_lines(result: dict[str, Any]) -> list[str]:
    if "copies" not in result:
        return []
    return [
        f"copies     {result['copies']} samples are near to an image; by chance {result['copies_by_chance']:.0f} are"
    ]


def _coverage_lines(result: dict[str, Any]) -> list[str]:
    by_class = result.get("coverage_by_class")
    if not by_class:
        return []
    each = ", ".join(f"{name} {ratio:.2f}" for name, ratio in by_class.items())
    return [f"coverage   {result['coverage']:.3f} (share of each class over its share among the real: {each})"]


def lines(result: dict[str, Any]) -> list[str]:
    """Returns the figures as they are printed."""
    spread = " (no spread: too few samples)" if result["kid_std"] is None else f" ± {result['kid_std']:.5f}"
    floor = f"   (as many real images: {result['fid_floor']:.3f})" if "fid_floor" in result else ""
    guidance = f"guidance {result['guidance']:g}, " if result["guidance"] != 1 else ""
    said = [
        f"FID        {result['fid']:.3f}{floor}",
        f"KID        {result['kid']:.5f}{spread}",
        f"precision  {result['precision']:.3f}, recall {result['recall']:.3f}",
        *([f"MIFID      {result['mifid']:.3f}"] if "mifid" in result else []),
        *([f"IS         {result['inception_score']:.3f}"] if "inception_score" in result else []),
        *_coverage_lines(result),
        *_copies_lines(result),
        f"features   {result['features']}; resized: {result['resize']}",
        f"samples    {result['samples']} (seed {result['seed']}, {result['steps']} steps of {result['scheduler']}, "
        f"{guidance}{result['weights']} weights)",
        f"real       {result['real']} of {result['data']}, split {result['split']}",
    ]
    if result["samples"] < FEW:
        said.append(
            f"warning    FID of fewer than {FEW} samples depends on their number: compare equal numbers, or KID"
        )
    return said
