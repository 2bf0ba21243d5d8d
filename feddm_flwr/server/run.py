"""A run on the server: configuration in, rounds, then a model, grids and a report out."""

from __future__ import annotations

import logging
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid

from feddm_flwr.config import ConfigError, RunConfig, expanded, flatten, parse
from feddm_flwr.config.resume import check_same_run
from feddm_flwr.evaluation.global_model import GlobalModel
from feddm_flwr.exchange.partial import split_of
from feddm_flwr.extensions import check_extensions
from feddm_flwr.models import networks, parameters, pretrained
from feddm_flwr.reporting import traffic
from feddm_flwr.reporting.progress import MARK
from feddm_flwr.reporting.records import check_kind
from feddm_flwr.reporting.run_directory import RunDirectory, reserve
from feddm_flwr.server import cost
from feddm_flwr.server.evaluation import check_reference
from feddm_flwr.server.federation.dispatch import simulated
from feddm_flwr.server.outputs import Outputs, psnr, write_report
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.storage import checkpoint
from feddm_flwr.storage.state_folder import forget_run, state_root

log = logging.getLogger(__name__)


def main(grid: Grid, context: Context) -> None:
    """Does one run, from the run config to the report."""
    _log_to_stdout()
    config = parse(context.run_config)
    check_extensions(config)
    out_dir, name = expanded(config.out_dir).resolve(), config.run_name
    path = out_dir / name if name else reserve(out_dir, name, config.strategy)
    run = RunDirectory(path, resume=config.resume, simulated=simulated(grid))
    check_kind(run.path, simulated=run.simulated)
    found = checkpoint.newest(run.checkpoints) if config.resume else None
    if found:
        check_same_run(config, found.facts["config"], found.round)
        check_reference(config, run.path)
        log.info("resumed after round %d", found.round)
    with _accounted(run, new=not config.resume), checkpoint.Writer(run.checkpoints, config.keep_checkpoints) as writer:
        _train(grid, config, run, found, writer)
    written = {"model": run.path / "model", "report": run.path / "report.html"}
    log.info("%s", " ".join(f"{what}={path}" for what, path in written.items() if path.exists()))


def _train(
    grid: Grid,
    config: RunConfig,
    run: RunDirectory,
    found: checkpoint.Checkpoint | None,
    writer: checkpoint.Writer,
) -> None:
    """Trains from the start, or from the checkpoint that was `found`, to the end."""
    kept = replace(config, run_name="", resume=False)  # as another run would be started with it
    run.begin(flatten(kept), found.round if found else None, config.tracker)
    files = pretrained.fetch(config, run.path / "assets")
    network = networks.build(config, files)
    layout = parameters.layout(network)
    log.info("run=%s strategy=%s", run.path, config.strategy)
    split = split_of(layout, config)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    log.info("parameters=%d rounds=%d %s", layout.size, config.num_server_rounds, cost.text(config, split, frozen))
    if config.finish.rounds:
        of_them = cost.text(config.in_round(config.num_server_rounds), split, frozen)
        log.info("the last %d rounds are short: %s", config.finish.rounds, of_them)
    run_uuid = found.facts["run-uuid"] if found else uuid.uuid4().hex
    feddm = FedDM(config, split.shared.take(parameters.to_vector(network)), split, run_uuid, files)
    outputs = Outputs(run, GlobalModel(network, config, files), split, grid)
    if found:
        feddm.restore(found)
    else:
        _save(run, feddm, kept, writer)
        _durable(run, feddm, writer)  # what cannot be written is known before anybody trains
    del found
    outputs.begin(feddm)
    for done in feddm.run(grid, lambda: _durable(run, feddm, writer)):
        row = done.figures()
        if config.stage == "autoencoder" and (decibels := psnr(done.eval_loss)) is not None:
            row["psnr"] = decibels
        _save(run, feddm, kept, writer, row)
        outputs.after_round(feddm)
    if feddm.ended_early:
        log.warning("%s", feddm.ended_early)
        outputs.after_round(feddm)  # which is the last, as nobody knew
    _durable(run, feddm, writer)
    incomplete = outputs.finish(feddm)
    for line in traffic.traffic(run.path):
        log.info("%s", line)
    if (spent := run.epsilon()) is not None:
        unit = "image, at the node that spent most" if config.privacy.of_images else "node, in the model"
        log.info("epsilon = %.3g at delta = %g for each %s", spent, config.privacy.delta, unit)
    if run.simulated and not config.keeps_personal:
        forget_run(state_root(None), run_uuid)
    run.finish("completed", "\n".join(filter(None, [feddm.ended_early, incomplete])))


@contextmanager
def _accounted(run: RunDirectory, *, new: bool) -> Iterator[None]:
    """Sees to it that the run's folder says what went wrong, whatever that is, and has a report; unless the
    configuration of a new run is wrong and nothing was done, which leaves nothing."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk must not hide what went wrong
            run.finish("failed", f"{type(error).__name__}: {error}")
        if new and isinstance(error, ConfigError) and not (run.path / "metrics.jsonl").exists():
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        if run.path.is_dir():
            write_report(run)


def _save(
    run: RunDirectory,
    feddm: FedDM,
    config: RunConfig,
    writer: checkpoint.Writer,
    row: dict[str, Any] | None = None,
) -> None:
    """Writes a round's figures, and begins to write a checkpoint: the next round is sent meanwhile."""
    state = feddm.checkpoint()
    state.facts["config"] = flatten(config)
    with _room(run, feddm):
        if row:
            run.log_nodes([asdict(node) for node in feddm.nodes])
            run.log_round(row)
        writer.begin(state)


def _durable(run: RunDirectory, feddm: FedDM, writer: checkpoint.Writer) -> None:
    """Waits until the last round's checkpoint is on the disk."""
    with _room(run, feddm):
        writer.wait()


@contextmanager
def _room(run: RunDirectory, feddm: FedDM) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"the checkpoint of round {feddm.round} cannot be written ({error.strerror}); "
            f"make room in {run.checkpoints}, then resume the run"
        ) from error


def _log_to_stdout() -> None:
    """Puts our lines, marked, on standard output: `flwr log` and `feddm run` read them there."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{MARK}%(message)s"))
    ours = logging.getLogger("feddm_flwr")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
