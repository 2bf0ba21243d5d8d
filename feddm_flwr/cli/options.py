"""The options of the `feddm` commands."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TypeAlias

from feddm_flwr import __version__
from feddm_flwr.config import FLOW_SCHEDULERS, SCHEDULERS, parse

#: What commands are added to.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parser() -> argparse.ArgumentParser:
    """Returns what the command line takes; `command` is the name of the one that was given."""
    whole = argparse.ArgumentParser(
        prog="feddm", description="Train diffusion models across sites that keep their images."
    )
    whole.add_argument("--version", action="version", version=f"feddm {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    keys, drawn = _keys(), _drawn()
    _add_run(commands, keys)
    _add_sample(commands, drawn)
    _add_evaluate(commands, drawn, keys)
    _add_data(commands, keys)
    _add_report(commands)
    _add_status(commands)
    _add_compare(commands, keys)
    _add_certs(commands)
    _add_new(commands)
    return whole


def _keys() -> argparse.ArgumentParser:
    """Returns the option for run-config keys, which several commands take."""
    keys = argparse.ArgumentParser(add_help=False)
    keys.add_argument(
        "-c",
        "--run-config",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="run-config keys, as in flwr run, or a .toml file of them (docs/configuration.md has them all); may be "
        "repeated",
    )
    return keys


def _drawn() -> argparse.ArgumentParser:
    """Returns the options of commands that draw samples of a model."""
    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument(
        "model", type=Path, metavar="MODEL_OR_RUN", help="a run's folder, or a diffusers pipeline folder"
    )
    usual = parse({}).sample
    drawn.add_argument(
        "--scheduler",
        choices=(*SCHEDULERS, *FLOW_SCHEDULERS),
        default="",
        help=f"how images are drawn (default {SCHEDULERS[0]}; {FLOW_SCHEDULERS[0]} of a model of flows)",
    )
    drawn.add_argument(
        "--steps", type=_positive, default=usual.steps, metavar="N", help=f"steps of it (default {usual.steps})"
    )
    drawn.add_argument("--seed", type=_seed, default=0, help="seed of the starting noise (default 0)")
    return drawn


def _add_run(commands: Commands, keys: argparse.ArgumentParser) -> None:
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
        metavar="N",
        help="cores reserved for each node that trains at a time (default: train.threads, else 1)",
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


def _add_sample(commands: Commands, drawn: argparse.ArgumentParser) -> None:
    sample = commands.add_parser("sample", parents=[drawn], help="draw images from a trained model")
    sample.add_argument("-n", "--count", type=_positive, default=64, metavar="N", help="images (default 64)")
    sample.add_argument("--class", dest="of_class", metavar="CLASS", help="name or number (default: all, in turns)")
    sample.add_argument("--guidance", type=_guidance, metavar="W", help="of a class; 1: none (default 2)")
    sample.add_argument(
        "-o",
        "--output",
        default="samples.png",
        help="a grid (x.png), an array (x.npz, key images: uint8 N,H,W,C) or a folder of PNGs (x/)",
    )


def _add_evaluate(commands: Commands, drawn: argparse.ArgumentParser, keys: argparse.ArgumentParser) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        parents=[drawn, keys],
        help="compare a model's samples with real images (by default those of the run, as the server finds them): FID, "
        "KID, and others",
    )
    evaluate.add_argument(
        "--features",
        choices=("classifier", "random", "dinov2", "inception"),
        default="",
        help="network whose features are compared (default: a classifier, trained on the real images; random with "
        "--against where these have no classes)",
    )
    evaluate.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="compare with images of your own: a folder or a table. Says also how many samples are copies of one",
    )
    evaluate.add_argument(
        "--features-from", default="", metavar="ID", help="folder or hub id of dinov2 (default: facebook/dinov2-base)"
    )
    evaluate.add_argument("-n", "--samples", type=_positive, default=2000, metavar="N", help="samples (default 2000)")
    evaluate.add_argument(
        "--guidance", type=_guidance, default=1.0, metavar="W", help="of classes; 1: none (default 1)"
    )
    evaluate.add_argument("-o", "--output", type=Path, help="write the figures there, too (x.json)")


def _add_data(commands: Commands, keys: argparse.ArgumentParser) -> None:
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


def _add_report(commands: Commands) -> None:
    report = commands.add_parser("report", help="write a run's report.html again, or a page that compares several runs")
    report.add_argument("run", type=Path, nargs="+", help="a run's folder")
    report.add_argument("-o", "--output", type=Path, help="the page of several runs (x.html; default comparison.html)")


def _add_new(commands: Commands) -> None:
    new = commands.add_parser("new", help="write the app into a folder of your own, to extend it")
    new.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder")


def _add_status(commands: Commands) -> None:
    status = commands.add_parser("status", help="say how far a run is, or what goes on at a SuperLink")
    status.add_argument(
        "of",
        nargs="?",
        default="",
        metavar="RUN|SUPERLINK",
        help="a run's folder, or a connection of Flower's config.toml (default: the newest run in runs/)",
    )


def _add_compare(commands: Commands, keys: argparse.ArgumentParser) -> None:
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


def _add_certs(commands: Commands) -> None:
    certs = commands.add_parser("certs", help="make the keys and certificates of a federation of real nodes")
    certs.add_argument("folder", type=Path, help="where they go; those that are there are kept")
    certs.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="name or address of the SuperLink; may be repeated"
    )
    certs.add_argument("--node", action="append", default=[], metavar="NAME", help="a node's name; may be repeated")
    certs.add_argument(
        "--days", type=_positive, default=365, metavar="N", help="validity of the SuperLink's certificate (default 365)"
    )


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


def _guidance(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


_guidance.__name__ = "number that is not negative"
_seed.__name__ = "integer from 0 to 2^63 - 1"
_share.__name__ = "number of GPUs"  # argparse names these in its errors
_positive.__name__ = "positive integer"
