"""`feddm run`: a simulation on this machine, or a run on the nodes of a SuperLink."""

from __future__ import annotations

import argparse
import secrets
import shlex
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from feddm_flwr.cli.arguments import check_folder, run_config_keys
from feddm_flwr.config import (
    KEYS,
    ConfigError,
    RunConfig,
    expanded,
    flatten,
    least_replies,
    local_path,
    nodes_asked,
    parse,
)
from feddm_flwr.config.plugins import is_plugin, look_first_in
from feddm_flwr.storage.state_folder import state_root


def run_command(options: argparse.Namespace) -> int:
    from feddm_flwr.cli import launch
    from feddm_flwr.reporting import records, report
    from feddm_flwr.reporting.run_directory import usual_name

    if app := launch.find_app(options.app):
        look_first_in(app / "feddm_flwr" / "contrib")
    overrides = run_config_keys(options.run_config)
    if options.resume:
        overrides = resumed_keys(options) | overrides
    config, local = parse(overrides), launch.is_local(options.superlink)
    if any(KEYS[key].plugin and is_plugin(str(value)) for key, value in flatten(config).items()):
        from feddm_flwr.extensions import check_extensions  # which takes torch

        check_extensions(config)
    for name in ("num_supernodes", "client_cpus", "client_gpus"):
        if not local and (value := getattr(options, name)) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} = {value}: is for a simulation; a SuperLink has its nodes")
    options.num_supernodes = options.num_supernodes or 4
    options.client_cpus = options.client_cpus or config.train.threads or 1
    place = (launch.Simulation if local else launch.Remote)(options, launch.environment(telemetry=options.telemetry))
    out_dir = expanded(config.out_dir).resolve()
    if local:
        overrides["out-dir"] = str(out_dir)
        if not config.resume and (path := local_path(config.data.name)):  # it is resumed from anywhere
            overrides["data.name"] = str(path.resolve())
        _check_simulation(config, options.num_supernodes, out_dir / config.run_name)
    _check_text(overrides)
    if config.resume:
        folder = out_dir / config.run_name
    elif local:
        folder = _reserved(out_dir, config)
    else:  # on another machine; two may begin in the same second there
        name = config.run_name or f"{usual_name(config.strategy)}-{secrets.token_hex(2)}"
        folder = out_dir / name
    overrides["run-name"], before = folder.name, records.read_status(folder)
    launch.end_by_signal()
    try:
        with place as federation:
            code = launch.follow(app, federation, overrides, config, verbose=options.verbose)
    finally:
        if local and not config.resume:
            with suppress(OSError):  # the run began
                folder.rmdir()
    # A run that was over, and one that another process has open, stay what they are.
    if code == launch.STOPPED and local and records.status_of(folder) in ("stopped", "failed"):
        records.write_status(folder, "stopped")
        print(f"  report  {report.write(folder)}")
    if code and _can_go_on(folder, before, stopped=code == launch.STOPPED):
        # What the simulation's rounds tell as soon as there is one.
        nodes = f" --num-supernodes {options.num_supernodes}" if local and not _nodes_before(folder) else ""
        command = " ".join(filter(None, ["feddm run", options.superlink, "--resume", shlex.quote(str(folder))]))
        print(f"  to go on: {command}{nodes}")
    return code


def _check_text(keys: Mapping[str, object]) -> None:
    """Checks that every node can be sent the keys.

    Raises:
        ConfigError: one has bytes that are not UTF-8, as a file name may.
    """
    for key, value in keys.items():
        if isinstance(value, str) and value.encode(errors="replace").decode() != value:
            raise ConfigError(f"{key} = {value!r}: has bytes that are not UTF-8; rename the file or folder")


def _reserved(out_dir: Path, config: RunConfig) -> Path:
    from feddm_flwr.reporting.run_directory import reserve

    try:
        return reserve(out_dir, config.run_name, config.strategy)
    except FileExistsError as error:
        raise ConfigError(f"run-name = {config.run_name!r}: {error.filename} exists; choose another name") from error


def _can_go_on(folder: Path, before: Mapping[str, object], *, stopped: bool) -> bool:
    """Tells whether a run that this command began, or resumed, may end otherwise when it is resumed: not one that did
    not come to anything, was left as it was, or whose keys are wrong."""
    from feddm_flwr.reporting.records import read_status

    now = read_status(folder)
    return (
        any(folder.glob("checkpoints/*.safetensors"))
        and now.get("status") in ("stopped", "failed")
        and (stopped or now != before)
        and not str(now.get("reason")).startswith("ConfigError")
    )


def resumed_keys(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the run-config keys of the run to go on with, and its nodes where it was a simulation."""
    from feddm_flwr.cli.launch import is_local
    from feddm_flwr.reporting.records import check_kind

    folder: Path = options.resume.resolve()
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"--resume {str(options.resume)!r}: not a run's folder (no config.toml)")
    check_kind(folder, simulated=(local := is_local(options.superlink)))
    if local and not options.num_supernodes:
        options.num_supernodes = _nodes_before(folder)
        if not options.num_supernodes:
            raise ConfigError(f"--resume {str(options.resume)!r}: no round was done; --num-supernodes must be given")
    return run_config_keys([str(folder / "config.toml")]) | {
        "resume": True,
        "run-name": folder.name,
        "out-dir": str(folder.parent),
    }


def _nodes_before(folder: Path) -> int:
    """Returns how many nodes the simulation had that is in a run's folder; 0 where no round was done."""
    from feddm_flwr.reporting.records import read_rounds, simulated_nodes

    try:
        return simulated_nodes(read_rounds(folder))
    except ValueError as error:  # a damaged line
        raise ConfigError(str(error)) from error


def _check_simulation(config: RunConfig, nodes: int, folder: Path) -> None:
    """Checks what would end a simulation, before it starts.

    Raises:
        ConfigError: the run's folder exists (or does not, for one to resume) or cannot be made, there are too few
            nodes, or what the run builds upon is not there.
    """
    if config.run_name and folder.exists() and not config.resume:
        raise ConfigError(f"run-name = {config.run_name!r}: {folder} exists; choose another name")
    if config.resume and not folder.exists():
        raise ConfigError(f"run-name = {config.run_name!r} with resume = true: there is no {folder}")
    if config.min_nodes > nodes:
        raise ConfigError(f"min-nodes = {config.min_nodes} is not allowed: must be at most --num-supernodes = {nodes}")
    if (least := least_replies(config)) > (asked := nodes_asked(config, nodes)):
        rule = f"server.aggregation = {config.server.aggregation!r}"
        if config.min_replies:
            rule = f"min-replies = {least}"
        elif config.privacy.secure_aggregation:
            rule = "privacy.secure-aggregation = true"
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
    if (tracker := config.tracker) in ("wandb", "mlflow") and not find_spec(tracker):
        raise ConfigError(f"tracker = {tracker!r}: {tracker} is not installed: pip install 'feddm-flwr[{tracker}]'")
    check_folder(expanded(config.out_dir), f"out-dir = {config.out_dir!r}")
    try:
        root = state_root(None)
    except OSError as error:
        raise ConfigError(str(error.strerror)) from error
    check_folder(root, f"the nodes' state in {str(root)!r} (set XDG_STATE_HOME to another folder)")
