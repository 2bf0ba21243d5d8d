"""Did anything get slower? A few quick measurements, as ratios to plain ones in the same run, against those kept.

    python benchmarks/guard.py            # make bench; under five minutes
    python benchmarks/guard.py --keep     # these are the ratios from now on

Ratios of one run hardly depend on how busy a machine is; they do depend on its kind, so each kind has its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import machine
import numpy as np
import torch
from codec import one_core, seconds
from throughput import measure

from feddm_flwr.aggregation.mean import StreamingMean
from feddm_flwr.config import parse
from feddm_flwr.exchange.channel import channel

KEPT = Path(__file__).parent / "results" / "guard.json"
_VALUES = 4_000_000
_MOVED = 0.15  # a change of a ratio that is worth a look


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep these ratios for this kind of machine")
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    kind, found = machine.kind(), {**training(), **coding()}
    before = kept.get(kind, {}).get("ratios", {})
    print(f"{kind}\n{'':44s} {'now':>7s} {'kept':>7s}")
    for name, ratio in found.items():
        was = before.get(name)
        change = "" if was is None else f"  {100 * (ratio / was - 1):+.0f} %"
        moved = was is not None and abs(ratio / was - 1) > _MOVED
        print(f"{name:44s} {ratio:7.3f} {'–' if was is None else f'{was:.3f}':>7s}{change}{' moved' if moved else ''}")
    if options.keep:
        kept[kind] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "ratios": {k: round(v, 4) for k, v in found.items()}}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def training() -> dict[str, float]:
    """Our local loop over a plain one."""
    options = argparse.Namespace(batch=32, steps=4, times=5, precision="fp32", threads=1, compile=False)
    return {"training, over a plain loop": measure("fashionmnist-28-small", options)["over plain"]["ours"]}


def coding() -> dict[str, float]:
    """Bytes of float32 a second through a codec, over those of adding two vectors, on one core."""
    one_core()
    vector = torch.randn(_VALUES, generator=torch.Generator().manual_seed(0)) * 1e-3
    plain, out = vector.numpy(), np.empty(_VALUES, np.float32)

    def over_adding(run: Callable[[], object]) -> float:
        """Both in turns: how fast memory is changes by the second where a machine is shared."""
        times = [(seconds(lambda: np.add(plain, plain, out=out)), seconds(run)) for _ in range(15)]
        return statistics.median(add / own for add, own in times)

    found = {}
    for name in ("int8", "int4", "int2", "budget"):
        one = channel(name, parse({}).codec, "guard", _VALUES)
        frame, mean = one.encode(vector, "delta", 1), StreamingMean(_VALUES, 10**9)
        found[f"{name}: encoding, over adding"] = over_adding(partial(one.encode, vector, "delta", 1))
        found[f"{name}: decoding into the mean, over adding"] = over_adding(
            lambda o=one, f=frame, m=mean: m.add(o.decode(f, "delta", 1), 100)
        )
    return found


if __name__ == "__main__":
    main()
