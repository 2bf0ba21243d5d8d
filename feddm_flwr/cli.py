"""`feddm`: run, sample, evaluate, data, report, certs. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from feddm_flwr import __version__
from feddm_flwr.config import SCHEDULERS, ConfigError, RunConfig, parse


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
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
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="feddm", description="Train diffusion models across sites that keep their images."
    )
    parser.add_argument("--version", action="version", version=f"feddm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    keys = argparse.ArgumentParser(add_help=False)
    keys.add_argument(
        "-c",
        "--run-config",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="run-config keys, as in flwr run (docs/configuration.md has them all); may be repeated",
    )

    run = commands.add_parser(
        "run", parents=[keys], help="train: a simulation on this machine, or on the nodes of a SuperLink"
    )
    run.add_argument(
        "superlink",
        nargs="?",
        help="SuperLink connection of Flower's config.toml; local is a simulation (default: its default, else local)",
    )
    run.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with the run in this folder: its configuration, its nodes, its newest good checkpoint",
    )
    run.add_argument("--num-supernodes", type=_positive, metavar="N", help="nodes of the simulation (default 4)")
    run.add_argument(
        "--client-cpus",
        type=_positive,
        default=1,
        metavar="N",
        help="cores reserved for each node that trains at a time (default 1)",
    )
    run.add_argument(
        "--client-gpus",
        type=_share,
        metavar="X",
        help="GPUs for each node that trains at a time; 0.25 puts four on one (default: 1 where there is one)",
    )
    run.add_argument(
        "--app", type=Path, help="folder of the app (default: this one, or where feddm_flwr was installed from)"
    )
    run.add_argument("--telemetry", action="store_true", help="let Flower and Ray report usage to their makers")
    run.add_argument("-v", "--verbose", action="store_true", help="print Flower's whole log")
    run.set_defaults(command=_run)

    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument(
        "model", type=Path, metavar="MODEL_OR_RUN", help="a run's folder, or a diffusers pipeline folder"
    )
    drawn.add_argument("--scheduler", choices=SCHEDULERS, default="ddim", help="how images are drawn (default ddim)")
    drawn.add_argument("--steps", type=_positive, default=50, metavar="N", help="steps of the scheduler (default 50)")
    drawn.add_argument("--seed", type=_seed, default=0, help="seed of the starting noise (default 0)")

    sample = commands.add_parser("sample", parents=[drawn], help="draw images from a trained model")
    sample.add_argument("-n", "--count", type=_positive, default=64, metavar="N", help="images (default 64)")
    sample.add_argument("--class", dest="of_class", metavar="CLASS", help="name or number (default: all, in turns)")
    sample.add_argument("--guidance", type=float, default=2.0, metavar="W", help="of a class; 1: none (default 2)")
    sample.add_argument(
        "-o",
        "--output",
        default="samples.png",
        help="a grid (x.png), an array (x.npz, key images: uint8 N,H,W,C) or a folder of PNGs (x/)",
    )
    sample.set_defaults(command=_sample)

    evaluate = commands.add_parser(
        "evaluate",
        parents=[drawn, keys],
        help="compare a model's samples with real images (by default those of the run, as the server finds them): FID, "
        "KID, and others",
    )
    evaluate.add_argument(
        "--features",
        choices=("classifier", "random", "dinov2", "inception"),
        default="classifier",
        help="network whose features are compared (default: a classifier, trained on the real images)",
    )
    evaluate.add_argument(
        "--features-from", default="", metavar="ID", help="folder or hub id of dinov2 (default: facebook/dinov2-base)"
    )
    evaluate.add_argument("-n", "--samples", type=_positive, default=2000, metavar="N", help="samples (default 2000)")
    evaluate.add_argument("--guidance", type=float, default=1.0, metavar="W", help="of classes; 1: none (default 1)")
    evaluate.add_argument("-o", "--output", type=Path, help="write the figures there, too (x.json)")
    evaluate.set_defaults(command=_evaluate)

    data = commands.add_parser(
        "data", parents=[keys], help="look at images before a run: counts, sizes, classes, a contact sheet"
    )
    data.add_argument(
        "path", metavar="PATH", help="a folder, a parquet file, or anything else that data.name may be (digits)"
    )
    data.add_argument(
        "--num-supernodes", type=_positive, default=0, metavar="N", help="show what each of N simulated nodes would get"
    )
    data.add_argument("-o", "--output", type=Path, default=Path("data.png"), help="the contact sheet (x.png)")
    data.set_defaults(command=_data)

    report = commands.add_parser("report", help="write a run's report.html again, or a page that compares several runs")
    report.add_argument("run", type=Path, nargs="+", help="a run's folder")
    report.add_argument(
        "-o", "--output", type=Path, default=Path("comparison.html"), help="the page of several runs (comparison.html)"
    )
    report.set_defaults(command=_report)

    compare = commands.add_parser(
        "compare", parents=[keys], help="several strategies, codecs, partitions and seeds side by side"
    )
    compare.add_argument(
        "comparison",
        metavar="COMPARISON",
        help="paper, codecs, non-iid, local-epochs, or a TOML file (docs/evaluation.md)",
    )
    compare.add_argument("--num-supernodes", type=_positive, metavar="N", help="nodes of each run (default 4)")
    compare.add_argument("--seeds", type=_positive, metavar="N", help="do every run with seeds 0 to N-1 (default 1)")
    compare.add_argument(
        "-o", "--output", type=Path, default=Path("comparison"), help="folder of runs, tables and plots (comparison)"
    )
    compare.set_defaults(command=_compare)

    certs = commands.add_parser("certs", help="make the keys and certificates of a federation of real nodes")
    certs.add_argument("folder", type=Path, help="where they go; those that are there are kept")
    certs.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="name or address of the SuperLink; may be repeated"
    )
    certs.add_argument("--node", action="append", default=[], metavar="NAME", help="a node's name; may be repeated")
    certs.add_argument(
        "--days", type=_positive, default=365, metavar="N", help="validity of the SuperLink's certificate (default 365)"
    )
    certs.set_defaults(command=_certs)
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 64:
        raise ValueError
    return float(text)


def _seed(text: str) -> int:
    if not 0 <= int(text) < 2**63:
        raise ValueError
    return int(text)


_seed.__name__ = "integer from 0 to 2^63 - 1"
_share.__name__ = "number of GPUs"  # argparse names these in its errors
_positive.__name__ = "positive integer"


def _run(options: argparse.Namespace) -> int:
    from feddm_flwr import launch, report, tracking

    app = launch.find_app(options.app)
    overrides = _overrides(options.run_config)
    if options.resume:
        overrides = _resumed(options) | overrides
    options.num_supernodes = options.num_supernodes or 4
    config = parse(overrides)
    place = launch.Simulation if launch.is_local(options.superlink) else launch.Remote
    overrides["run-name"] = config.run_name or f"{config.strategy}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.out_dir).expanduser().resolve() / overrides["run-name"]
    if place is launch.Simulation:
        overrides["out-dir"] = str(folder.parent)
        _check_simulation(config, options.num_supernodes, folder)
    environment = launch.environment(telemetry=options.telemetry)
    launch.end_by_signal()
    with place(options, environment) as federation:
        code = launch.follow(app, federation, overrides, config, verbose=options.verbose)
    if code == launch.STOPPED and place is launch.Simulation and folder.is_dir():
        tracking.write_status(folder, "stopped")
        print(f"  report  {report.write(folder)}")
    if code and (folder / "checkpoints").is_dir():
        print("  to go on:", *filter(None, ["feddm run", options.superlink]), "--resume", folder)
    return code


def _resumed(options: argparse.Namespace) -> dict[str, Any]:
    """The run-config keys of the run to go on with, and its nodes where it was a simulation."""
    from feddm_flwr.launch import is_local

    folder: Path = options.resume.resolve()
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"--resume {str(options.resume)!r}: not a run's folder (no config.toml)")
    nodes = folder / "nodes.json"
    if is_local(options.superlink) and not options.num_supernodes:
        if not nodes.is_file():
            raise ConfigError(f"--resume {str(options.resume)!r}: no round was done; --num-supernodes must be given")
        options.num_supernodes = len(json.loads(nodes.read_text(encoding="utf-8")))
    return _overrides([str(folder / "config.toml")]) | {
        "resume": True,
        "run-name": folder.name,
        "out-dir": str(folder.parent),
    }


def _check_simulation(config: RunConfig, nodes: int, folder: Path) -> None:
    """What would end a simulation is known before it starts.

    Raises:
        ConfigError: the run's folder exists (or does not, for one to resume), or there are too few nodes.
    """
    if folder.exists() and not config.resume:
        raise ConfigError(f"run-name = {config.run_name!r}: {folder} exists; choose another name")
    if config.resume and not folder.exists():
        raise ConfigError(f"run-name = {config.run_name!r} with resume = true: there is no {folder}")
    for key, value in (("min-nodes", config.min_nodes), ("min-replies", config.min_replies)):
        if value > nodes:
            raise ConfigError(f"{key} = {value} is not allowed: must be at most --num-supernodes = {nodes}")


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
            raise ConfigError(f"--run-config {argument!r} cannot be read: {why}") from error
        # Flower passes over what it does not understand.
        left = "" if argument.endswith(".toml") else re.sub(r"\S+?=('[^']*'|\"[^\"]*\"|\S+)", "", argument).strip()
        if left or not read:
            raise ConfigError(f"--run-config {argument!r}: must be 'key=value key=value' or a .toml file")
        merged |= read
    return merged


def _sample(options: argparse.Namespace) -> int:
    output, as_folder = Path(options.output), options.output.endswith(("/", os.sep)) or Path(options.output).is_dir()
    if not as_folder and output.suffix not in (".png", ".npz"):
        raise ConfigError(f"--output = {options.output!r}: must end in .png, .npz or /")
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
    run = options.model / "config.toml"
    if options.samples < 10:
        raise ConfigError(f"--samples = {options.samples}: must be at least 10, fewer cannot be compared")
    if options.features_from and options.features != "dinov2":
        raise ConfigError(f"--features-from = {options.features_from!r}: is for --features dinov2 only")
    if options.output and options.output.suffix != ".json":
        raise ConfigError(f"--output = {str(options.output)!r}: must end in .json")
    config = parse(_overrides([*([str(run)] if run.is_file() else []), *options.run_config]))
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
    if options.output.suffix != ".png":
        raise ConfigError(f"--output = {str(options.output)!r}: must end in .png")
    from feddm_flwr import survey

    keys = {**_overrides(options.run_config), "data.name": options.path}
    for line in survey.describe(keys, options.num_supernodes, options.output):
        print(line)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from feddm_flwr import comparison, comparison_tables

    cells = comparison.cells(options.comparison, _overrides(options.run_config), options.num_supernodes, options.seeds)
    folder: Path = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for i, cell in enumerate(cells, 1):
        print(f"{i} of {len(cells)}: {cell.name}", flush=True)
        if not comparison.do(cell, folder, main):
            print(f"feddm: {cell.name} did not complete; the same command goes on with it", file=sys.stderr)
            return 1
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
    try:
        print(report.write(runs[0]) if len(runs) == 1 else report.write_comparison(runs, options.output))
    except ValueError as error:
        raise ConfigError(f"RUN: {error}") from error
    return 0
