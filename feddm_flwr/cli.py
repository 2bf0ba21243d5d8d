"""`feddm`: run, sample, evaluate, data, report, compare, certs. A command imports the heavy libraries that it needs."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from feddm_flwr.config import ConfigError, RunConfig, expanded, least_replies, local_path, nodes_asked, parse
from feddm_flwr.options import parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    options = parser().parse_args(arguments)
    commands = {
        "run": _run,
        "sample": _sample,
        "evaluate": _evaluate,
        "data": _data,
        "report": _report,
        "compare": _compare,
        "certs": _certs,
    }
    try:
        code = commands[options.command](options)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"feddm: {line}", file=sys.stderr)
        return 2
    except OSError as error:  # an output that cannot be written, say
        print(f"feddm: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(
            f"feddm: {error.name} is not installed: pip install -c constraints.txt -e . (uv pip needs --no-config)",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _run(options: argparse.Namespace) -> int:
    from feddm_flwr import launch, report, tracking

    app = launch.find_app(options.app)
    overrides = _overrides(options.run_config)
    if options.resume:
        overrides = _resumed(options) | overrides
    config, local = parse(overrides), launch.is_local(options.superlink)
    for name in ("num_supernodes", "client_cpus", "client_gpus"):
        if not local and (value := getattr(options, name)) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} = {value}: is for a simulation; a SuperLink has its nodes")
    options.num_supernodes = options.num_supernodes or 4
    options.client_cpus = options.client_cpus or config.train.threads or 1
    place = (launch.Simulation if local else launch.Remote)(options, launch.environment(telemetry=options.telemetry))
    overrides["run-name"] = config.run_name or f"{config.strategy}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = expanded(config.out_dir).resolve() / overrides["run-name"]
    if local:
        overrides["out-dir"] = str(folder.parent)
        _check_simulation(config, options.num_supernodes, folder)
        if not config.resume and (path := local_path(config.data.name)):  # it is resumed from anywhere
            overrides["data.name"] = str(path.resolve())
    launch.end_by_signal()
    with place as federation:
        code = launch.follow(app, federation, overrides, config, verbose=options.verbose)
    # A run that was over, and one that another process has open, stay what they are.
    if code == launch.STOPPED and local and tracking.status_of(folder) in ("stopped", "failed"):
        tracking.write_status(folder, "stopped")
        print(f"  report  {report.write(folder)}")
    if code and (folder / "checkpoints").is_dir():
        # What the simulation's rounds tell as soon as there is one.
        nodes = f" --num-supernodes {options.num_supernodes}" if local and not _nodes_before(folder) else ""
        command = " ".join(filter(None, ["feddm run", options.superlink, "--resume", shlex.quote(str(folder))]))
        print(f"  to go on: {command}{nodes}")
    return code


def _resumed(options: argparse.Namespace) -> dict[str, Any]:
    """The run-config keys of the run to go on with, and its nodes where it was a simulation."""
    from feddm_flwr.launch import is_local
    from feddm_flwr.tracking import check_kind

    folder: Path = options.resume.resolve()
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"--resume {str(options.resume)!r}: not a run's folder (no config.toml)")
    check_kind(folder, simulated=(local := is_local(options.superlink)))
    if local and not options.num_supernodes:
        options.num_supernodes = _nodes_before(folder)
        if not options.num_supernodes:
            raise ConfigError(f"--resume {str(options.resume)!r}: no round was done; --num-supernodes must be given")
    return _overrides([str(folder / "config.toml")]) | {
        "resume": True,
        "run-name": folder.name,
        "out-dir": str(folder.parent),
    }


def _nodes_before(folder: Path) -> int:
    """How many nodes the simulation had that is in a run's folder; 0 where no round was done."""
    from feddm_flwr.tracking import read_metrics, simulated_nodes

    try:
        return simulated_nodes(read_metrics(folder))
    except ValueError as error:  # a damaged line
        raise ConfigError(str(error)) from error


def _check_simulation(config: RunConfig, nodes: int, folder: Path) -> None:
    """What would end a simulation is known before it starts.

    Raises:
        ConfigError: the run's folder exists (or does not, for one to resume) or cannot be made, there are too few
            nodes, or what the run builds upon is not there.
    """
    if folder.exists() and not config.resume:
        raise ConfigError(f"run-name = {config.run_name!r}: {folder} exists; choose another name")
    if config.resume and not folder.exists():
        raise ConfigError(f"run-name = {config.run_name!r} with resume = true: there is no {folder}")
    if config.min_nodes > nodes:
        raise ConfigError(f"min-nodes = {config.min_nodes} is not allowed: must be at most --num-supernodes = {nodes}")
    if (least := least_replies(config)) > (asked := nodes_asked(config, nodes)):
        rule = f"min-replies = {least}" if config.min_replies else f"server.aggregation = {config.server.aggregation!r}"
        raise ConfigError(
            f"{rule} is not allowed: a round needs {least} replies and asks {asked} nodes "
            f"(fraction-train = {config.fraction_train} of --num-supernodes = {nodes})"
        )
    before = _nodes_before(folder) if config.resume else nodes
    if before not in (0, nodes):
        raise ConfigError(
            f"--num-supernodes = {nodes}: the run to resume has {before}; its images would be shared out anew"
        )
    models = {
        "model.autoencoder": config.model.autoencoder,
        "model.init-from": config.model.init_from,
        "autoencoder.perceptual": config.autoencoder.perceptual,
    }
    # Of these a run that is resumed keeps what it has read.
    for key, name in {"data.name": config.data.name, **({} if config.resume else models)}.items():
        if (path := local_path(name)) and not path.exists():
            raise ConfigError(f"{key} = {name!r}: no such file or folder")
    if (path := local_path(config.data.name)) and folder.is_relative_to(path.resolve()):
        raise ConfigError(f"out-dir = {config.out_dir!r}: lies in data.name = {config.data.name!r}; grids are images")
    if (tracker := config.tracker) != "none" and not find_spec(tracker):
        raise ConfigError(f"tracker = {tracker!r}: {tracker} is not installed: pip install 'feddm-flwr[{tracker}]'")
    _check_folder(folder.parent, f"out-dir = {config.out_dir!r}")


def _check_folder(folder: Path, origin: str) -> None:
    """What cannot be written is known before the work.

    Raises:
        ConfigError: no file can be put in the folder, or it cannot be made; `origin` says who asked for it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{origin}: nothing can be written there ({error.strerror})") from error


def _check_output(output: Path, *endings: str) -> None:
    """A file to write, as `_check_folder`.

    Raises:
        ConfigError: the name has another ending, is a folder's, or nothing can be written there.
    """
    origin = f"--output = {str(output)!r}"
    if output.suffix not in endings:
        raise ConfigError(f"{origin}: must end in {', '.join(endings[:-1])}{' or ' * (len(endings) > 1)}{endings[-1]}")
    if output.is_dir():
        raise ConfigError(f"{origin}: is a folder")
    _check_folder(output.parent, origin)


def _overrides(arguments: list[str]) -> dict[str, Any]:
    """The run-config keys of every `-c`, later ones winning.

    Flower itself merges several `-c` by table: of two that set keys of one table it loses the first.
    """
    from flwr.common.config import parse_config_args

    merged: dict[str, Any] = {}
    for argument in arguments:
        try:
            read = parse_config_args([argument])
        except Exception as error:  # Flower raises many kinds here
            why = error if argument.endswith(".toml") else "text needs quotes, as in 'strategy=\"feddm-prox\"'"
            if "overwrite" in str(error.__cause__):
                why = "a key is there twice"
            raise ConfigError(f"--run-config {argument!r} cannot be read: {why}") from error
        # Flower passes over what it does not understand.
        left = "" if argument.endswith(".toml") else re.sub(r"\S+?=('[^']*'|\"[^\"]*\"|\S+)", "", argument).strip()
        if left or not read:
            raise ConfigError(f"--run-config {argument!r}: must be 'key=value key=value' or a .toml file")
        merged |= read
    return merged


def _sample(options: argparse.Namespace) -> int:
    output, as_folder = Path(options.output), options.output.endswith(("/", os.sep)) or Path(options.output).is_dir()
    if as_folder:
        _check_folder(output, f"--output = {options.output!r}")
        if any(output.glob("*.png")):
            raise ConfigError(f"--output = {options.output!r}: has images already; choose another folder")
    else:
        _check_output(output, ".png", ".npz", "/")
    import numpy as np

    from feddm_flwr import evaluation, finished

    how = finished.How(options.scheduler, options.steps, options.guidance, options.seed)
    images = finished.draw(finished.find(options.model), how, options.count, options.of_class)
    (output if as_folder else output.parent).mkdir(parents=True, exist_ok=True)
    if as_folder:
        for i, image in enumerate(images):
            evaluation.to_image(image).save(output / f"{i:05d}.png")
    elif output.suffix == ".npz":
        np.savez_compressed(output, images=images.transpose(0, 2, 3, 1))
    else:
        evaluation.grid(images).save(output)
    print(f"{len(images)} images: {output}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    places = (options.model, options.model.parent)  # a run's folder, or its model/ or best/
    run = next((file for place in places if (file := place / "config.toml").is_file()), None)
    if options.samples < 10:
        raise ConfigError(f"--samples = {options.samples}: must be at least 10, fewer cannot be compared")
    if options.features_from and options.features != "dinov2":
        raise ConfigError(f"--features-from = {options.features_from!r}: is for --features dinov2 only")
    if options.output:
        _check_output(options.output, ".json")
    config = parse(_overrides([*([str(run)] if run else []), *options.run_config]))
    from feddm_flwr import finished, scores

    result = finished.evaluate(
        finished.find(options.model),
        config,
        finished.How(options.scheduler, options.steps, options.guidance, options.seed),
        options.samples,
        options.features,
        options.features_from,
    )
    print("\n".join(scores.lines(result)))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _data(options: argparse.Namespace) -> int:
    _check_output(options.output, ".png")
    from feddm_flwr import survey

    keys = {**_overrides(options.run_config), "data.name": options.path}
    for line in survey.describe(keys, options.num_supernodes, options.output):
        print(line)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from feddm_flwr import comparison, comparison_tables

    cells = comparison.cells(options.comparison, _overrides(options.run_config), options.num_supernodes, options.seeds)
    folder: Path = options.output.resolve()
    _check_folder(folder, f"--output = {str(options.output)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)  # until this process ends
    except Timeout:
        raise ConfigError(f"--output = {str(options.output)!r}: another comparison is writing there") from None
    done = []
    for i, cell in enumerate(cells, 1):
        print(f"{i} of {len(cells)}: {cell.name}", flush=True)
        if code := comparison.do(cell, folder, main):
            more = "" if code == 2 else "; the same command goes on with it"
            print(f"feddm: {cell.name} did not complete{more}", file=sys.stderr)
            return code
        done.append(comparison.result(cell, folder))
        for name, text in (
            ("results.json", json.dumps(done, indent=1) + "\n"),
            ("results.csv", comparison_tables.table(done)),
            ("results.md", comparison_tables.markdown(done)),
        ):
            (folder / name).write_text(text, encoding="utf-8")
    print(comparison_tables.markdown(done))
    for path in (folder / "results.json", folder / "results.csv", folder / "results.md"):
        print(path)
    for path in comparison_tables.plots(done, folder):
        print(path)
    return 0


def _certs(options: argparse.Namespace) -> int:
    from feddm_flwr import certificates

    if not options.host and not options.node:
        raise ConfigError("certs: name the SuperLink with --host, and nodes with --node")
    written = certificates.make(options.folder, options.host, options.node, options.days)
    for path in written:
        print(path)
    if not written:
        print("nothing to make: all of them are there")
    return 0


def _report(options: argparse.Namespace) -> int:
    from feddm_flwr import report

    for run in options.run:
        if not (run / "config.toml").is_file():
            raise ConfigError(f"RUN = {str(run)!r}: not a run's folder (no config.toml)")
    runs = [run.resolve() for run in options.run]
    page, several = options.output or Path("comparison.html"), len(runs) > 1
    if options.output and not several:
        raise ConfigError(f"--output = {str(options.output)!r}: is for several runs; one has its report in its folder")
    if several:
        _check_output(page, ".html")
    try:
        print(report.write_comparison(runs, page) if several else report.write(runs[0]))
    except ValueError as error:
        raise ConfigError(f"RUN: {error}") from error
    return 0
