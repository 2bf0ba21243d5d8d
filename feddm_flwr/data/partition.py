"""Which images each node of a simulation has."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from feddm_flwr.config import ConfigError, derive_seed
from feddm_flwr.config.data import Data
from feddm_flwr.data.source import Source

log = logging.getLogger(__name__)

_LEAST = 2  # images of a node: one to train on, one to hold out
_NAMED = 3  # nodes in a message
_FACTORS = (2, 4, 8, 16, 32, 64, 128)  # of data.alpha, which are tried for a message

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner


def partition_rows(data: Data, seed: int, source: Source, index: int, count: int) -> list[int]:
    """Returns the rows of partition `index` of `count`, through flwr-datasets' partitioners but for `iid` and
    `pathological`. Images that belong together are all in one.

    Raises:
        ConfigError: the images cannot be shared out like that.
    """
    if data.group_column or source.together:
        return _whole(data, seed, source, count)[index]
    return _rows(data, seed, source, index, count)


def _rows(data: Data, seed: int, source: Source, index: int, count: int) -> list[int]:
    chosen: list[int] = _partitioner(data, seed, source, count).load_partition(index)["row"][:]
    return chosen


@lru_cache(maxsize=1)  # as below
def _whole(d: Data, seed: int, source: Source, count: int) -> list[list[int]]:
    """Returns the rows of each partition. One group after the other, in random order, goes to where most of it would
    be, of those that are not yet as large as they would be; where chance alone deals, to the one that lacks most."""
    groups = source.groups(d.group_column)
    by_chance = d.partition == "iid" or (d.partition == "natural" and not d.natural_column)
    if by_chance:
        shares = [[*range(i, len(groups), count)] for i in range(count)]
    else:
        shares = [_rows(d, seed, source, i, count) for i in range(count)]
    own: dict[str, list[list[int]]] = {}  # of each group the rows that each partition would have
    for i, share in enumerate(shares):
        for row in share:
            own.setdefault(groups[row], [[] for _ in shares])[i].append(row)
    dealt: list[list[int]] = [[] for _ in shares]
    names = sorted(own)
    for k in np.random.default_rng(derive_seed(seed, "partition") % 2**32).permutation(len(names)):
        parts = own[names[k]]
        lacking = [len(share) - len(has) for share, has in zip(shares, dealt, strict=True)]
        best = max(range(count), key=lambda i: (lacking[i] > 0, not by_chance and len(parts[i]), lacking[i], -i))
        dealt[best] += [row for part in parts for row in part]
    if empty := [f"node-{i}" for i, rows in enumerate(dealt) if not rows]:
        raise ConfigError(
            f"{_problem(d, source, count)}: {len(names)} groups of images that stay together leave none for "
            f"{', '.join(empty[:_NAMED])}{' …' if len(empty) > _NAMED else ''}; use fewer nodes"
        )
    return dealt


@lru_cache(maxsize=1)  # it shares out all images at once, and the nodes of a simulation ask one after the other
def _partitioner(d: Data, run_seed: int, source: Source, count: int) -> Partitioner | _Even | _Pathological:
    from datasets import Dataset

    seed = derive_seed(run_seed, "partition") % 2**32
    makers: dict[str, tuple[str, Callable[[], Partitioner | _Even | _Pathological]]] = {
        "iid": ("", lambda: _Even(count)),
        "dirichlet": (
            d.label_column,
            lambda: _dirichlet(d, seed, count),
        ),
        "pathological": (d.label_column, lambda: _Pathological(count, d.classes_per_node, seed)),
        "shard": (
            d.label_column,
            lambda: _flower().ShardPartitioner(count, "by", num_shards_per_partition=d.shards_per_node, seed=seed),
        ),
        "natural": (d.natural_column, lambda: _flower().NaturalIdPartitioner("by")),
    }
    column, make = makers[d.partition]
    rows = len(source.table)
    if count > rows:
        problem = _problem(d, source, count)
        raise ConfigError(f"{problem}: more partitions than images; use at most {rows} nodes")
    if column and column not in source.table.column_names:
        key = "data.natural-column" if d.partition == "natural" else "data.label-column"
        there = source.table.column_names
        hint = "; subfolders would be the classes" if there == ["file"] else ""
        raise ConfigError(f"{key} = {column!r}: no such column; {source.origin} has {there}{hint}")
    # The partitioners see the label alone, in shuffled order: nothing is decoded for other nodes.
    order = np.random.default_rng(seed).permutation(rows)
    columns: dict[str, Any] = {"row": order}
    if column:
        values = source.table[column][:]
        if None in values:  # which has no order
            values = source.classes(column)
        columns["by"] = [values[i] for i in order]
    partitions, dataset = make(), Dataset.from_dict(columns)
    if d.partition == "dirichlet":
        if not _shared_out(partitions, dataset):
            raise ConfigError(
                f"{_problem(d, source, count)}: data.alpha = {d.alpha:g} leaves a node fewer than {_LEAST} images"
                f"{_would_do(d, seed, count, dataset)}"
            )
        return partitions
    partitions.dataset = dataset
    try:
        if d.partition == "natural" and partitions.num_partitions != count:
            raise ValueError(f"{column!r} has {partitions.num_partitions} different values; use as many nodes")
        partitions.load_partition(0)  # deals all of them; one that failed must not be kept
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{_problem(d, source, count)}: {error}") from error
    return partitions


def _flower() -> Any:
    # It imports pyplot: a second, where nothing else is slow; and Jupyter's backend is not in every environment.
    os.environ["MPLBACKEND"] = "agg"
    from flwr_datasets import partitioner

    return partitioner


def _dirichlet(d: Data, seed: int, count: int, alpha: float | None = None) -> Partitioner:
    made: Partitioner = _flower().DirichletPartitioner(
        count, "by", alpha or d.alpha, min_partition_size=_LEAST, seed=seed
    )
    return made


def _shared_out(partitions: Partitioner | _Even | _Pathological, dataset: Dataset) -> bool:
    """Deals all partitions; tells whether that could be done."""
    partitions.dataset = dataset
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that are none here
            partitions.load_partition(0)
    except ValueError:
        return False
    return True


def _would_do(d: Data, seed: int, count: int, dataset: Dataset) -> str:
    """Returns which values would give every node enough images."""
    found = []
    for alpha in (factor * d.alpha for factor in _FACTORS):
        if _shared_out(_dirichlet(d, seed, count, alpha), dataset):
            found.append(f"data.alpha = {alpha:g} would do")
            break
    fewer = count
    while (fewer := fewer * 2 // 3) > 1:
        if _shared_out(_dirichlet(d, seed, fewer), dataset):
            found.append(f"{fewer} nodes would do")
            break
    return "".join(f"; {text}" for text in found)


def _problem(d: Data, source: Source, count: int) -> str:
    """Returns what could not be done."""
    return f"data.partition = {d.partition!r} for {count} nodes and {len(source.table)} images ({source.origin})"


class _Even:
    """As many images for each node as for the next, give or take one."""

    dataset: Dataset

    def __init__(self, count: int) -> None:
        self.num_partitions = count

    def load_partition(self, index: int) -> Dataset:
        return self.dataset.shard(self.num_partitions, index, contiguous=True)


class _Pathological:
    """Few classes on each node (McMahan et al. 2017). Flower's own partitioner leaves out classes that it dealt to no
    node; here classes are dealt like cards, so that no class has more than one node more than another."""

    dataset: Dataset

    def __init__(self, count: int, classes_per_node: int, seed: int) -> None:
        self.num_partitions, self._each, self._seed = count, classes_per_node, seed
        self._rows: list[list[int]] = []  # of each node, once they are dealt

    def load_partition(self, index: int) -> Dataset:
        self._rows = self._rows or self._deal()
        return self.dataset.select(self._rows[index])

    def _deal(self) -> list[list[int]]:
        labels = self.dataset["by"][:]
        classes = sorted({*labels})
        if self._each > len(classes):
            raise ValueError(f"data.classes-per-node = {self._each}, but there are {len(classes)} classes")
        random, deck = np.random.default_rng(self._seed), list[Any]()
        hands: list[list[Any]] = []
        for _ in range(self.num_partitions):
            hand: list[Any] = []
            while len(hand) < self._each:
                if not {*deck} - {*hand}:
                    deck += [classes[i] for i in random.permutation(len(classes))]
                hand.append(deck.pop(next(i for i, c in enumerate(deck) if c not in hand)))
            hands.append(hand)
        if left := {*classes} - {c for hand in hands for c in hand}:
            log.warning(
                "data.classes-per-node = %d: %d nodes hold %d of %d classes; the images of the others are left out",
                *(self._each, self.num_partitions, len(classes) - len(left), len(classes)),
            )
        own = {c: [row for row, label in enumerate(labels) if label == c] for c in classes}
        holders = {c: [node for node, hand in enumerate(hands) if c in hand] for c in classes}
        return [
            [row for c in hand for row in own[c][holders[c].index(node) :: len(holders[c])]]
            for node, hand in enumerate(hands)
        ]
