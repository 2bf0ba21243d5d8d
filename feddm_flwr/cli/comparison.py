"""Several runs that differ in one thing each, under several conditions and seeds: what is run, and what came of it.

A comparison is a TOML file or one of the presets below:

    num-supernodes = 10
    seeds = [0, 1, 2]
    common = { num-server-rounds = 20, "data.partition" = "dirichlet" }    # run-config keys of every run
    [runs.vanilla]
    [runs.lean]
    strategy = "feddm-lean"
    [runs.centralized]
    centralized = true            # one node that has all images, and takes as many steps as the others together
    [runs.data-parallel]
    data-parallel = true          # one node that has all images, and takes as many steps as each, of all their batches
    [conditions.skewed]           # where there are any, every run is done under each
    data.alpha = 0.1
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from feddm_flwr.config import PARTITION_OF, ConfigError, flatten, nodes_asked, parse
from feddm_flwr.reporting.records import flat, nest, read_rounds, status_of, total_bytes, without_places
from feddm_flwr.storage.atomic import whole_file

Keys = dict[str, Any]

#: Runs on all images in one place: the keys of a run that ask for them.
POOLED = ("centralized", "data-parallel")

# Nobody is to be protected from a simulation: all runs are compared with all images.
_EVALUATED: Keys = {"eval.features": "classifier", "eval.samples": 2000, "eval.min-images": 0}
_STRATEGIES: dict[str, Keys] = {
    "centralized": {"centralized": True},
    "data-parallel": {"data-parallel": True},
    "vanilla": {},
    "prox 0.01": {"strategy": "feddm-prox", "train.mu": 0.01},
    "quant": {"strategy": "feddm-quant"},
    "lean": {"strategy": "feddm-lean"},
    "slow-link": {"strategy": "feddm-slow-link"},
}
_PARTITIONS: dict[str, Keys] = {
    "iid": {"data.partition": "iid"},
    "dirichlet 0.3": {"data.partition": "dirichlet", "data.alpha": 0.3},
    "pathological 2": {"data.partition": "pathological", "data.classes-per-node": 2},
}
#: Comparisons that are known by name; the paper's, with settings of ours.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "runs": {
            **{name: _STRATEGIES[name] for name in ("centralized", "data-parallel", "vanilla")},
            **{f"prox {mu}": {"strategy": "feddm-prox", "train.mu": mu} for mu in (0.001, 0.01, 0.1)},
            "quant": _STRATEGIES["quant"],
        },
        "conditions": {name: _PARTITIONS[name] for name in ("iid", "dirichlet 0.3")},
    },
    "codecs": {
        "common": {"train.optimizer": "adamw"},  # of all, so that what differs is the coding
        "runs": {
            "float32": {},
            "quant": _STRATEGIES["quant"],
            **{
                f"{bits} deltas": {"strategy": "feddm-quant", "codec.uplink": bits, "codec.downlink": bits}
                | {"codec.target": "delta"}
                for bits in ("int8", "int4", "int2")
            },
            "lean": _STRATEGIES["lean"],
            "slow-link": _STRATEGIES["slow-link"],
        },
        "conditions": {"dirichlet 0.3": _PARTITIONS["dirichlet 0.3"]},
    },
    "non-iid": {"runs": _STRATEGIES, "conditions": _PARTITIONS},
    "local-epochs": {
        "runs": {name: _STRATEGIES[name] for name in ("vanilla", "lean")},
        "conditions": {
            f"E = {epochs}": {"train.local-steps": 0, "train.local-epochs": epochs} | _PARTITIONS["dirichlet 0.3"]
            for epochs in (1, 5)
        },
    },
}


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    condition: str
    run: str
    seed: int
    nodes: int
    keys: Keys
    pooled: str = ""  # which of `POOLED` it is; "" where there are nodes
    shared: str = ""  # the folder of an earlier cell that is the same run: one on all images knows no partition

    @property
    def name(self) -> str:
        """Of its folder."""
        if self.shared:
            return self.shared
        parts = (self.condition, self.run, f"seed {self.seed}")
        return re.sub(r"[^\w.-]+", "-", " ".join(part for part in parts if part)).strip("-")


def cells(name: str, common: Mapping[str, Any], nodes: int | None, seeds: int | None) -> list[Cell]:
    """Returns the runs of a preset or a TOML file, seed by seed, so that the first seed's are done first. `common`
    keys, `nodes` and the number of `seeds` win over those of the file.

    Raises:
        ConfigError: there is no such preset or file, or it, or one of its runs, is wrong.
    """
    chosen = PRESETS.get(name) or _file(name)
    if unknown := {*chosen} - {"num-supernodes", "seeds", "common", "runs", "conditions"}:
        raise ConfigError(
            f"{name}: {sorted(unknown)[0]!r} is not allowed: must be num-supernodes, seeds, common, runs or conditions"
        )
    count = nodes or chosen.get("num-supernodes", 4)
    numbers = [*range(seeds)] if seeds else chosen.get("seeds", [0])
    if type(count) is not int or count < 1:
        raise ConfigError(f"{name}: num-supernodes = {count!r} is not allowed: must be an integer at least 1")
    if not isinstance(numbers, list) or not numbers or not all(type(seed) is int for seed in numbers):
        raise ConfigError(f"{name}: seeds = {numbers!r} is not allowed: must be a list of integers, such as [0, 1]")
    tables = [chosen.get(key, {}) for key in ("common", "runs", "conditions")]
    if (
        not all(isinstance(table, dict) for table in tables)
        or not tables[1]
        or not all(isinstance(of, dict) for table in tables[1:] for of in table.values())
    ):
        raise ConfigError(
            f"{name}: common must be a table, runs and conditions tables of tables, with one run at least"
        )
    for what, table in (("condition", tables[2]), ("run", tables[1])):
        for own_name, own in table.items():
            if twice := sorted({*flat(own)} & {*common}):
                raise ConfigError(
                    f"{twice[0]} = {common[twice[0]]!r}: the {what} {own_name!r} of {name} sets it; leave it out"
                )
    found: list[Cell] = []
    for seed in numbers:
        for condition, under in (tables[2] or {"": {}}).items():
            for run, own in tables[1].items():
                keys = {**_EVALUATED, **flat(tables[0]), **common, **flat(under), **flat(own)}
                alone = any(keys.get(kind) for kind in POOLED)
                cell = _cell(condition, run, seed, count, keys)
                same = (c.name for c in found if alone and (c.nodes, c.keys) == (cell.nodes, cell.keys))
                found.append(replace(cell, shared=next(same, "")))
    for cell_name, times in Counter(cell.name for cell in found if not cell.shared).items():
        if times > 1:
            raise ConfigError(f"{name}: two of its runs would have the same name, {cell_name!r}")
    return found


def _file(name: str) -> dict[str, Any]:
    if not name.endswith(".toml"):
        raise ConfigError(f"COMPARISON = {name!r}: must be {', '.join(PRESETS)} or a .toml file")
    try:
        return tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"COMPARISON = {name!r}: cannot be read ({error})") from error


def _cell(condition: str, run: str, seed: int, nodes: int, keys: Keys) -> Cell:
    if own := {"run-name", "out-dir", "resume", "seed"} & {*keys}:
        raise ConfigError(
            f"run {run!r}: {sorted(own)[0]} is not allowed: the comparison decides it (--seeds, --output)"
        )
    keys["seed"] = seed
    asks = {kind: keys.pop(kind, False) for kind in POOLED}
    if wrong := [kind for kind, value in asks.items() if not isinstance(value, bool)]:
        raise ConfigError(f"run {run!r}: {wrong[0]} = {asks[wrong[0]]!r} is not allowed: must be true or false")
    if all(asks.values()):
        raise ConfigError(f"run {run!r}: {' and '.join(POOLED)} are two runs: must be one of them")
    pooled = next((kind for kind, value in asks.items() if value), "")
    if pooled:
        keys, nodes = _on_all_images(run, pooled, nodes, keys), 1
    cell = Cell(condition, run, seed, nodes, keys, pooled)
    try:
        parse({**keys, "run-name": cell.name})
    except ConfigError as error:
        raise ConfigError("\n".join(f"run {run!r}: {line}" for line in str(error).splitlines())) from error
    return cell


def _on_all_images(run: str, pooled: str, nodes: int, keys: Keys) -> Keys:
    """Returns the keys of a run on one node that sees as many images as those of a round together: one batch after the
    other (centralized), or all in one step (data-parallel). Its optimizer keeps its memory, unless the keys say."""
    config = parse(keys)
    if config.train.local_epochs:
        raise ConfigError(f"run {run!r}: {pooled} = true needs train.local-steps, not train.local-epochs")
    asked = nodes_asked(config, nodes)
    of_many = (*PARTITION_OF, "server.aggregation", "server.trim-share")
    keys = {key: value for key, value in keys.items() if key not in of_many}
    keys |= {"data.partition": "iid", "min-nodes": 1, "min-replies": 0, "fraction-train": 1.0}
    keys |= {"train.max-seconds": 0.0, "round-timeout": asked * config.round_timeout}
    protected = config.privacy.mechanism != "none" or config.privacy.secure_aggregation
    if config.train.has_moments and not protected:
        keys.setdefault("train.moments", "node")  # its rounds are a federation's; in one place nothing begins anew
    if pooled == "data-parallel":
        return keys | {"train.batch-size": asked * config.train.batch_size}
    if config.server.average == "exponential":
        keys["server.ema-decay"] = config.server.ema_decay ** (1 / asked)  # an average over as much of the run
    if config.finish.rounds:
        keys["finish.local-steps"] = asked * config.finish.local_steps
    return keys | {"train.local-steps": asked * config.train.local_steps}


def do(cell: Cell, folder: Path, feddm: Callable[[list[str]], int]) -> int:
    """Does a run in `folder`, or goes on with it, unless it is done; `feddm` is the command line. Returns its exit
    code.

    Raises:
        ConfigError: the folder has a run of that name with other keys, or with unknown ones.
    """
    run, asked = folder / cell.name, folder / f"{cell.name}.json"
    wanted = {"nodes": cell.nodes, "keys": flatten(parse(cell.keys))}
    if run.is_dir():
        now, was = flat(wanted), _asked(run, asked)
        if names := sorted(key for key in {*now, *was} if now.get(key) != was.get(key)):
            changed = "".join(f"\n  {k.removeprefix('keys.')} = {now.get(k)!r}, was {was.get(k)!r}" for k in names)
            raise ConfigError(f"{run}: was run with other keys; choose another --output, or remove it{changed}")
    else:
        with whole_file(asked) as file:
            file.write(json.dumps(wanted, sort_keys=True).encode())
    if status_of(run) == "completed":
        return 0
    if run.is_dir() and not any(run.glob("checkpoints/round-*")):  # it ended before there was anything to go on with
        shutil.rmtree(run)
    if run.is_dir():
        code = feddm(["run", "local", "--resume", str(run), "--num-supernodes", str(cell.nodes)])
    else:
        threads = {"train.threads": os.cpu_count() or 1} if cell.nodes == 1 else {}  # nobody else needs the cores
        keys = {**threads, **cell.keys, "run-name": cell.name, "out-dir": str(folder)}
        with tempfile.TemporaryDirectory(prefix="feddm-") as place:
            chosen = Path(place, "run.toml")
            chosen.write_text(tomli_w.dumps(nest(keys)), encoding="utf-8")
            code = feddm(["run", "local", "--num-supernodes", str(cell.nodes), "-c", str(chosen)])
    return code or (0 if status_of(run) == "completed" else 1)


def _asked(run: Path, file: Path) -> Keys:
    """Returns what a run was started with, by its file; keys that are newer have their defaults."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return flat({**found, "keys": flatten(parse(found["keys"]))})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{run}: {file.name}, the keys that it was run with, is missing or damaged; choose another --output, or "
            "remove the run"
        ) from error


def result(cell: Cell, folder: Path) -> dict[str, Any]:
    """Returns what came of a run that is done."""
    rounds = read_rounds(folder / cell.name)
    evaluated = [r for r in rounds if r.fid is not None]
    config = parse(cell.keys)
    facts = folder / cell.name / "reference" / "facts.json"
    known = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
    return {
        "condition": cell.condition,
        "run": cell.run,
        "seed": cell.seed,
        "nodes": cell.nodes,
        "pooled": cell.pooled,
        "rounds": rounds[-1].round,
        "images": sum(r.local_steps for r in rounds) * config.train.batch_size,
        **{
            key: evaluated[-1].figure(key) if evaluated else None for key in ("fid", "kid", "coverage", "average_width")
        },
        "eval_loss": rounds[-1].eval_loss,
        "fid_by_round": [[r.round, r.fid] for r in evaluated],
        **total_bytes(rounds),
        "seconds": round(sum(r.seconds for r in rounds), 1),
        "samples": config.eval.samples,
        "features": known.get("features"),
        "real": [known.get("images"), len(known.get("classes", []))],  # images and classes that were compared with
        "keys": without_places(cell.keys),
    }
