"""What secure sums cost: a node's digits and masks, and the server's adding and opening.

    python benchmarks/secure_sum.py --out benchmarks/results/secure_sum.json

The model's size and the number of nodes are those of a large pixel model and a consortium. One core; medians. A node's
part is coding a random update, its own mask and one with each of the others. The server's is adding one node's words,
and taking off the masks of a node that is in the sum, or that was lost after its shares were handed out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import machine
import numpy as np

from feddm_flwr.config import parse
from feddm_flwr.exchange.sums import SumGrid, read_words, shares_of, write_words
from feddm_flwr.privacy.secure_sum import add_pairwise_masks, context, join, new_key, own_mask, public_key, split

LAYOUT = "0" * 32


def seconds(work: Callable[[], object], times: int) -> float:
    """The median time of some work."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def measure(size: int, nodes: int, times: int) -> dict[str, float]:
    """Seconds and bytes of one node's part and of the server's, for a model of so many values."""
    config = parse({"strategy": "feddm-secure"})
    names = [f"node-{i}" for i in range(nodes)]
    grid = SumGrid(config, size, 2, shares_of(config, dict.fromkeys(names, 100)))
    vector = np.random.default_rng(0).standard_normal(size, np.float32) * np.float32(1e-3)
    scales = np.full(len(grid.sent), 8e-4, np.float32)
    words, _ = grid.encode(vector, scales, names[0])
    words = np.concatenate([words, np.zeros(grid.words - len(words), np.uint64)])
    private, about = {name: new_key() for name in names}, context({})
    publics = {name: public_key(key) for name, key in private.items()}
    own, others = new_key(), {name: publics[name] for name in names[1:]}

    def mask() -> None:
        nonlocal words
        words = words + own_mask(own, about, len(words))
        add_pairwise_masks(words, names[0], private[names[0]], others, about)

    mask()
    frame, total = write_words(words, LAYOUT, 2), np.zeros(grid.words, np.uint64)

    def add() -> None:
        nonlocal total
        total += read_words(frame, LAYOUT, 2, grid.words)

    shares = split(own, names, nodes // 2 + 1)
    plain = np.zeros(grid.words, np.uint64)
    parts = {
        "code": seconds(lambda: grid.encode(vector, scales, names[0]), times),
        "mask": seconds(mask, times),
        "frame": seconds(lambda: write_words(words, LAYOUT, 2), times),
        "share secrets": seconds(lambda: [split(own, names, nodes // 2 + 1) for _ in range(2)], times),
        "server adds": seconds(add, times),
        "server takes one off": seconds(
            lambda: own_mask(join(shares, names, nodes // 2 + 1), about, grid.words), times
        ),
        "server takes a lost one's off": seconds(
            lambda: add_pairwise_masks(total, names[0], private[names[0]], others, about), times
        ),
        "server decodes": seconds(lambda: grid.decode(plain + 0, scales, {names[0]: 100}), times),
    }
    node = sum(parts[part] for part in ("code", "mask", "frame", "share secrets"))
    print({name: round(value, 3) for name, value in parts.items()})
    print(
        f"{size:,} values, {nodes} nodes: {node:.2f} s a node; {len(frame):,} bytes, {4 * size / len(frame):.1f}x fewer"
    )
    return {"size": size, "nodes": nodes, "node": node, "bytes": len(frame), "fewer": 4 * size / len(frame), **parts}


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=36_000_000)
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 10, 30])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = [measure(given.size, nodes, given.times) for nodes in given.nodes]
    if given.out:
        given.out.write_text(json.dumps({"machine": machine.facts(), "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
