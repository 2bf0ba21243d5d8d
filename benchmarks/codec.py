"""Speed and error of every codec on one core.

    python benchmarks/codec.py

A vector of the size of a small U-Net, normally distributed with a scale of its own for every 1000
values. MB/s are of float32; encoding includes packing and zstd, decoding the checks; "and add" is
decoding and adding to the server's exact mean. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import psutil
import torch

from feddm_flwr.aggregation.mean import StreamingMean
from feddm_flwr.config import CODECS, parse
from feddm_flwr.exchange.channel import channel


def one_core() -> None:
    """Keep this process, and what it starts, to one core."""
    torch.set_num_threads(1)
    psutil.Process().cpu_affinity([psutil.Process().cpu_affinity()[0]])


def seconds(work: Callable[[], object]) -> float:
    """The time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after one that does not count."""
    work()
    return statistics.median(seconds(work) for _ in range(repeats))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=8, help="values in the vector, in millions (default 8)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="where the vector is; decoding is always on the CPU")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    one_core()
    size = round(options.millions * 1e6)
    random = torch.Generator().manual_seed(0)
    scale = torch.exp(torch.randn(-(-size // 1000), generator=random) * 0.5).repeat_interleave(1000)[:size]
    vector = (torch.randn(size, generator=random) * scale * 1e-3).to(options.device)
    rows = []
    print(f"{'codec':24s} {'ratio':>7s} {'error':>8s} {'encode':>12s} {'decode':>12s} {'and add':>12s}")
    searched = {f"{name}, clip search": name for name in ("int8", "int4", "int3")}
    for title, name in {**dict.fromkeys(CODECS), **searched}.items():
        name = name or title
        codec = channel(name, replace(parse({}).codec, clip_search=title in searched), "benchmark", size)
        frame = codec.encode(vector, "delta", 1)
        error = float((torch.from_numpy(codec.decode(frame, "delta", 1)) - vector.cpu()).norm() / vector.norm())
        megabytes = 4 * size / 1e6
        encode = megabytes / median_seconds(lambda c=codec: c.encode(vector, "delta", 1), options.repeats)
        decode = megabytes / median_seconds(lambda c=codec, f=frame: c.decode(f, "delta", 1), options.repeats)
        mean = StreamingMean(size, 10**9)

        def take(c: Any = codec, f: bytes = frame, m: StreamingMean = mean) -> None:
            m.add(c.decode(f, "delta", 1), 1000)

        add = megabytes / median_seconds(take, options.repeats)
        row = {"codec": title, "ratio": 4 * size / len(frame), "error": error, "encode": encode, "decode": decode}
        row["decode and add"] = add
        rows.append({key: value if isinstance(value, str) else float(f"{value:.4g}") for key, value in row.items()})
        print(
            f"{title:24s} {row['ratio']:6.2f}x {error:8.4f} {encode:7.0f} MB/s {decode:7.0f} MB/s {add:7.0f} MB/s",
            flush=True,
        )
    if options.out:
        result = {**machine.facts(1), "values": size, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
