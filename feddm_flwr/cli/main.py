"""The `feddm` commands. Each imports the heavy libraries that it needs."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from feddm_flwr.cli.arguments import check_folder, check_output, run_config_keys
from feddm_flwr.cli.options import parser
from feddm_flwr.cli.run import run_command
from feddm_flwr.config import ConfigError, expanded, parse


def main(arguments: list[str] | None = None) -> int:
    """Does what the command line says; returns the exit code: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that knows no ö shows another character
            stream.reconfigure(errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"  # plots are files, whatever a notebook says
    options = parser().parse_args(arguments)
    commands = {
        "run": run_command,
        "sample": _sample,
        "evaluate": _evaluate,
        "data": _data,
        "report": _report,
        "status": _status,
        "compare": _compare,
        "certs": _certs,
        "new": _new,
    }
    try:
        code = commands[options.command](options)
        sys.stdout.flush()
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"feddm: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left has nowhere to go
        return 1
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


def _sample(options: argparse.Namespace) -> int:
    output, as_folder = Path(options.output), options.output.endswith(("/", os.sep)) or Path(options.output).is_dir()
    if as_folder:
        check_folder(output, f"--output = {options.output!r}")
        if any(output.glob("*.png")):
            raise ConfigError(f"--output = {options.output!r}: has images already; choose another folder")
    else:
        check_output(output, ".png", ".npz", "/")
    import numpy as np

    from feddm_flwr.cli import trained_model
    from feddm_flwr.evaluation import grids

    how = trained_model.How(options.scheduler, options.steps, options.guidance, options.seed)
    images = trained_model.draw(trained_model.find(options.model), how, options.count, options.of_class)
    (output if as_folder else output.parent).mkdir(parents=True, exist_ok=True)
    if as_folder:
        for i, image in enumerate(images):
            grids.to_image(image).save(output / f"{i:05d}.png")
    elif output.suffix == ".npz":
        np.savez_compressed(output, images=images.transpose(0, 2, 3, 1))
    else:
        grids.grid(images).save(output)
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
        check_output(options.output, ".json")
    if (against := options.against) and not against.exists():
        raise ConfigError(f"--against = {str(against)!r}: no such file or folder")
    config = parse(run_config_keys([*([str(run)] if run else []), *options.run_config]))
    from feddm_flwr.cli import trained_model
    from feddm_flwr.evaluation import scores

    result, nearest = trained_model.evaluate(
        trained_model.find(options.model),
        replace(config.data, name=str(against.resolve())) if against else config.data,
        trained_model.How(options.scheduler, options.steps, options.guidance, options.seed),
        options.samples,
        options.features,
        options.features_from,
        copies=bool(against),
    )
    print("\n".join(scores.lines(result)))
    if nearest is not None:
        sheet = options.output.with_suffix(".png") if options.output else Path("nearest.png")
        sheet.parent.mkdir(parents=True, exist_ok=True)
        nearest.save(sheet)
        print(f"{sheet}: the samples nearest to an image, each above it")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _data(options: argparse.Namespace) -> int:
    check_output(options.output, ".png")
    from feddm_flwr.cli import inspect_data

    keys = {**run_config_keys(options.run_config), "data.name": options.path}
    for line in inspect_data.describe(keys, options.num_supernodes, options.output):
        print(line)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from feddm_flwr.cli import comparison, comparison_tables

    cells = comparison.cells(
        options.comparison, run_config_keys(options.run_config), options.num_supernodes, options.seeds
    )
    folder: Path = options.output.resolve()
    check_folder(folder, f"--output = {str(options.output)!r}")
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
    from feddm_flwr.cli import certificates

    if not options.host and not options.node:
        raise ConfigError("certs: name the SuperLink with --host, and nodes with --node")
    written = certificates.make(options.folder, options.host, options.node, options.days)
    for path in written:
        print(path)
    if not written:
        print("nothing to make: all of them are there")
    return 0


def _new(options: argparse.Namespace) -> int:
    from feddm_flwr.cli import app

    print("\n".join(app.new(options.folder)))
    return 0


def _status(options: argparse.Namespace) -> int:
    from feddm_flwr.cli import launch, status

    usual = expanded(parse({}).out_dir)
    run = Path(options.of) if options.of else status.newest_run(usual)
    if run is None:
        raise ConfigError(f"no run in {usual}/; name a run's folder, or a SuperLink")
    if (run / "config.toml").is_file():
        lines = status.of_run(run)
    elif run.exists() or launch.is_local(options.of):
        raise ConfigError(f"RUN|SUPERLINK = {options.of!r}: not a run's folder (no config.toml)")
    else:
        place = argparse.Namespace(superlink=options.of)
        lines = status.of_superlink(launch.Remote(place, launch.environment(telemetry=False)))
    print("\n".join(lines))
    return 0


def _report(options: argparse.Namespace) -> int:
    from feddm_flwr.reporting import comparison_page, report

    for run in options.run:
        if not (run / "config.toml").is_file():
            raise ConfigError(f"RUN = {str(run)!r}: not a run's folder (no config.toml)")
    runs = [run.resolve() for run in options.run]
    page, several = options.output or Path("comparison.html"), len(runs) > 1
    if options.output and not several:
        raise ConfigError(f"--output = {str(options.output)!r}: is for several runs; one has its report in its folder")
    if several:
        check_output(page, ".html")
    try:
        print(comparison_page.write_comparison(runs, page) if several else report.write(runs[0]))
    except ValueError as error:
        raise ConfigError(f"RUN: {error}") from error
    return 0
