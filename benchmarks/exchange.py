"""The same federated job under every codec: bytes each way against held-out loss.

    python benchmarks/exchange.py --train fashion_mnist_train.parquet --test fashion_mnist_test.parquet

Every setting trains the same model on the same shares of the same images in the same order, with the
real strategy, client app and frames. The loss is that of the final weights on images of the test set
that no node has, with noise that is the same for all. Results are added to a JSON file one by one:
a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pool_grid import PoolGrid, pool

from feddm_flwr.config import RunConfig, parse
from feddm_flwr.data.node_data import load_all
from feddm_flwr.exchange.partial import split_of
from feddm_flwr.models import networks, parameters
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.storage.state_folder import forget_run, state_root
from feddm_flwr.training.examples import Pixels
from feddm_flwr.training.objectives import Denoising

JOB: dict[str, Any] = {
    "data.image-size": 28,
    "data.channels": 1,
    "data.flip": True,
    "data.partition": "dirichlet",
    "data.alpha": 0.3,
    "model.block-channels": "16,32,64",
    "model.attention": "0,0,0",
    "model.attention-head-dim": 8,
    "num-server-rounds": 20,
    "train.local-steps": 15,
    "train.batch-size": 16,
    "train.precision": "fp32",
    "train.threads": 1,
    "eval.every": 0,
}


NESTEROV = {"server.optimizer": "nesterov"}  # step 0.7, momentum 0.6
LEAN_STEP = {"server.optimizer": "nesterov", "server.learning-rate": 1.0, "server.momentum": 0.4}


def both(codec: str, **keys: Any) -> dict[str, Any]:
    """A codec in both directions: differences with error feedback, averaged unless told otherwise."""
    return {"strategy": "feddm-quant", "codec.uplink": codec, "codec.downlink": codec, **keys}


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32 averaging": {},
    "fp32 averaging, lr 0.004": {"train.learning-rate": 0.004},
    "fp32 Nesterov 0.7, 0.6": NESTEROV,
    "fp32 Nesterov 1.0, 0.4": LEAN_STEP,
    "int8 weights (feddm-quant)": {"strategy": "feddm-quant"},
    "int8 averaging": both("int8"),
    "int4 averaging": both("int4"),
    "int2 averaging": both("int2"),
    "int2 Nesterov 0.7, 0.6": both("int2", **NESTEROV),
    "int2 Nesterov 1.0, 0.4 (feddm-lean)": {"strategy": "feddm-lean", "train.optimizer": "adamw"},
    "budget up, int2 down (feddm-slow-link)": {"strategy": "feddm-slow-link", "train.optimizer": "adamw"},
    "int8 Nesterov 1.0, 0.4": both("int8", **LEAN_STEP),
    "int4 Nesterov 1.0, 0.4": both("int4", **LEAN_STEP),
    "int3 Nesterov 1.0, 0.4": both("int3", **LEAN_STEP),
    "sign Nesterov 1.0, 0.4": both("sign", **LEAN_STEP),
    "fp16 Nesterov 1.0, 0.4": both("fp16", **LEAN_STEP),
    "bf16 Nesterov 1.0, 0.4": both("bf16", **LEAN_STEP),
    "topk up, int2 down, Nesterov 1.0, 0.4": {**both("int2", **LEAN_STEP), "codec.uplink": "topk"},
}


def settings(extra: list[str]) -> dict[str, dict[str, Any]]:
    """The settings, and those of the command line: `name: key=value key=value`."""
    result = dict(SETTINGS)
    for text in extra:
        name, _, keys = text.partition(":")
        pairs = (pair.split("=", 1) for pair in keys.split())
        result[name] = {key: _value(value) for key, value in pairs}
    return result


def _value(text: str) -> Any:
    """A number or truth value, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def final_loss(config: RunConfig, weights: np.ndarray, images: np.ndarray) -> float:
    """Denoising loss on images that no node has."""
    network = networks.build(config, {})
    parameters.load_vector(network, weights)
    larger = replace(config, train=replace(config.train, batch_size=128))
    cpu = torch.device("cpu")
    objective = Denoising(larger, Pixels(images, False, cpu), np.zeros(len(images), np.int64), cpu)
    return objective.held_out(network, len(images), "benchmark").loss


def run(config: RunConfig, processes: ProcessPoolExecutor, nodes: int, images: np.ndarray) -> dict[str, Any]:
    """Train once; what it cost and how good it became."""
    network = networks.build(config, {})
    run_uuid, start = uuid.uuid4().hex, time.monotonic()
    feddm = FedDM(config, parameters.to_vector(network), split_of(parameters.layout(network), config), run_uuid)
    rounds = list(feddm.run(PoolGrid(processes, config, nodes)))
    forget_run(state_root(None), run_uuid)
    total = {k: sum(getattr(r, k) for r in rounds) for k in ("bytes_up", "bytes_down", "bytes_full")}
    fp32 = {k: sum(getattr(r, f"{k}_fp32") for r in rounds) for k in ("bytes_up", "bytes_down")}
    return {
        "loss": final_loss(config, rounds[-1].weights, images),
        "loss_ema": final_loss(config, rounds[-1].ema, images),
        "train_loss": [r.train_loss for r in rounds],
        **total,
        "ratio_up": fp32["bytes_up"] / total["bytes_up"],
        "ratio_down": fp32["bytes_down"] / total["bytes_down"],
        "coding_error": statistics.fmean(r.coding_error for r in rounds),
        "parameters": len(rounds[-1].weights),
        "seconds": round(time.monotonic() - start, 1),
    }


def table(results: dict[str, Any], speeds: dict[str, dict[str, float]]) -> str:
    """For each setting the loss of seed 0, which all have, and, as means over its seeds, what it is to that of both
    float32 runs on the same seeds.

    `speeds` has what `benchmarks/codec.py` measured, by codec.
    """
    runs = {(r["setting"], r["seed"]): r for r in results["runs"]}
    names = list(dict.fromkeys(r["setting"] for r in results["runs"]))
    averaging = [name for name in names if name.startswith("fp32 averaging")]
    tuned = min(averaging, key=lambda name: runs[name, 0]["loss"])
    lines = [
        "| setting | seeds | bytes up | bytes down | held-out loss, seed 0 | least to most "
        f"| against tuned fp32 ({tuned}) | against fp32 with the same step "
        "| lost by coding | encode, decode (uplink) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        mine = {seed: r for (n, seed), r in runs.items() if n == name}
        config = parse({**JOB, "data.name": "digits", **mine[0]["keys"]})
        step = (config.server.learning_rate, config.server.momentum)
        same = {
            (1.0, 0.0): averaging[0],
            (0.7, 0.6): "fp32 Nesterov 0.7, 0.6",
            (1.0, 0.4): "fp32 Nesterov 1.0, 0.4",
        }.get(step, "")

        def mean(key: str, of: dict[int, Any] = mine) -> float:
            return statistics.fmean(r[key] for r in of.values())

        def ratio(other: str, of: dict[int, Any] = mine) -> str:
            pairs = [(r["loss"], runs[other, seed]["loss"]) for seed, r in of.items() if (other, seed) in runs]
            return f"{statistics.fmean(a / b for a, b in pairs):.4f}" if other and pairs else ""

        losses = [r["loss"] for r in mine.values()]
        measured = speeds.get(config.codec.uplink)
        speed = f"{measured['encode']:.0f}, {measured['decode']:.0f} MB/s" if measured else ""
        lines.append(
            f"| {name} | {len(mine)} | {mean('ratio_up'):.1f}x fewer | {mean('ratio_down'):.1f}x fewer "
            f"| {mine[0]['loss']:.4f} | {min(losses):.4f} to {max(losses):.4f} | {ratio(tuned)} | {ratio(same)} "
            f"| {100 * mean('coding_error'):.1f} % | {speed} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Held-out loss over that of float32 averaging with the same seed, against how many times fewer bytes, up and down
    together."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.transforms import Bbox

    names = list(dict.fromkeys(r["setting"] for r in results["runs"]))
    base = {r["seed"]: r["loss"] for r in results["runs"] if r["setting"] == "fp32 averaging"}
    places: list[tuple[float, float, str]] = []
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for name in names:
        mine = [r for r in results["runs"] if r["setting"] == name]
        fewer = statistics.fmean(2 / (1 / r["ratio_up"] + 1 / r["ratio_down"]) for r in mine)
        losses = [r["loss"] / base[r["seed"]] for r in mine]
        loss = statistics.fmean(losses)
        colour = "C1" if "Nesterov" in name or "slow" in name else "C0"
        spread = [[loss - min(losses)], [max(losses) - loss]]
        axes.errorbar(fewer, loss, yerr=spread, fmt="o", color=colour, capsize=3)
        places.append((fewer, loss, name))
    axes.set_xscale("log")
    axes.set_xlim(0.9, 200)  # room for names
    figure.draw_without_rendering()  # then places on the paper are known
    taken: list[Bbox] = []
    for fewer, loss, name in sorted(places, key=lambda place: -place[1]):
        for below in (-4, 12, 22, 32):  # points
            text = axes.annotate(name, (fewer, loss), xytext=(6, -below), textcoords="offset points", fontsize=8)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        taken.append(box)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("times fewer bytes than float32, both ways together")
    axes.set_ylabel("held-out loss over that of fp32 averaging, same seed")
    axes.set_title("blue: averaging, orange: Nesterov server step; bars: range over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is not in the results yet, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="data.name of the images that are shared out")
    parser.add_argument("--test", required=True, help="data.name of the images that no node has")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="settings to run, separated by semicolons; default: all")
    parser.add_argument("--setting", action="append", default=[], help="another one: 'name: key=value …'")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/exchange.json"), help="also a .png beside it"
    )
    options = parser.parse_args()
    logging.getLogger("feddm_flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    job = {**JOB, "data.name": options.train}
    images, _, _ = load_all(parse({**job, "data.name": options.test, "data.partition": "iid"}).data)
    images = images[:2048]
    results = json.loads(options.out.read_text()) if options.out.exists() else {"job": JOB, "runs": []}
    results |= machine.facts(options.processes)
    done = {(r["setting"], r["seed"]) for r in results["runs"]}
    chosen = {n: k for n, k in settings(options.setting).items() if not options.only or n in options.only.split(";")}
    with pool(options.processes) as processes:
        for seed in map(int, options.seeds.split(",")):
            for name, keys in chosen.items():
                if (name, seed) in done:
                    continue
                result = run(parse({**job, **keys, "seed": seed}), processes, options.nodes, images)
                results["runs"].append({"setting": name, "seed": seed, "keys": keys, **result})
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1))
                print(
                    f"{name:28s} seed {seed}: loss {result['loss']:.4f} ema {result['loss_ema']:.4f} "
                    f"up {result['ratio_up']:.1f}x down {result['ratio_down']:.1f}x {result['seconds']:.0f} s",
                    flush=True,
                )
    beside = options.out.parent / "codec.json"
    measured = json.loads(beside.read_text())["rows"] if beside.exists() else []
    print(table(results, {row["codec"]: row for row in measured}))
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
