"""The server's side: configuration in, rounds, then a model, grids and a report out."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid

from feddm_flwr.config import ConfigError, RunConfig, expanded, flatten, parse
from feddm_flwr.config.resume import check_same_run
from feddm_flwr.evaluation import grids
from feddm_flwr.evaluation.global_model import GlobalModel
from feddm_flwr.exchange.extensions import check_extensions
from feddm_flwr.exchange.partial import Split, split_of
from feddm_flwr.models import networks, parameters, pipelines, pretrained
from feddm_flwr.protocol.failures import RunFailedError
from feddm_flwr.reporting import model_card, report, traffic
from feddm_flwr.reporting.progress import MARK, Sampling
from feddm_flwr.reporting.records import check_kind
from feddm_flwr.reporting.run_directory import RunDirectory
from feddm_flwr.server import cost
from feddm_flwr.server.evaluation import GlobalEvaluation, check_reference, final
from feddm_flwr.server.federation.dispatch import simulated
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.storage import checkpoint
from feddm_flwr.storage.atomic import whole_folder
from feddm_flwr.storage.state_folder import forget_run, state_root
from feddm_flwr.vector import Vector

log = logging.getLogger(__name__)


def main(grid: Grid, context: Context) -> None:
    """One run, from the run config to the report."""
    _log_to_stdout()
    config = parse(context.run_config)
    check_extensions(config)
    name = config.run_name or f"{config.strategy}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = expanded(config.out_dir).resolve() / name
    run = RunDirectory(path, resume=config.resume, simulated=simulated(grid))
    kept = replace(config, run_name="", resume=False)  # as another run would be started with it
    check_kind(run.path, simulated=run.simulated)
    found = checkpoint.newest(run.checkpoints) if config.resume else None
    if found:
        check_same_run(config, found.facts["config"], found.round)
        check_reference(config, run.path)
        log.info("resumed after round %d", found.round)
    with _accounted(run, new=not config.resume), checkpoint.Writer(run.checkpoints, config.keep_checkpoints) as writer:
        run.begin(flatten(kept), found.round if found else None, config.tracker)
        files = pretrained.fetch(config, run.path / "assets")
        network = networks.build(config, files)
        layout = parameters.layout(network)
        log.info("run=%s strategy=%s", run.path, config.strategy)
        parts = split_of(layout, config)
        frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
        log.info("parameters=%d rounds=%d %s", layout.size, config.num_server_rounds, cost.text(config, parts, frozen))
        incomplete = _personal(parts)
        undrawn = incomplete or ("an autoencoder draws none" if config.stage == "autoencoder" else "")
        if undrawn:
            log.warning("no samples are drawn: %s", undrawn)
        run_uuid = found.facts["run-uuid"] if found else uuid.uuid4().hex
        feddm = FedDM(config, parts.shared.take(parameters.to_vector(network)), parts, run_uuid, files)
        model_of = GlobalModel(network, config, files)
        judge = GlobalEvaluation(model_of, run.path) if config.eval.features != "none" and not undrawn else None
        if found:
            feddm.restore(found)
        else:
            _save(run, feddm, kept, writer)
            _durable(run, feddm, writer)  # what cannot be written is known before anybody trains
        del found
        if not undrawn:
            _show(run, model_of, feddm)  # what a run that was killed here still owes
        if judge:
            judge.refer(feddm, grid)
            if not run.is_judged():
                _judge(run, judge, model_of, feddm)
        for done in feddm.run(grid, lambda: _durable(run, feddm, writer)):
            _save(run, feddm, kept, writer, done.figures() | _psnr(config, done.eval_loss))
            if judge:
                _judge(run, judge, model_of, feddm)
            if not undrawn:
                _show(run, model_of, feddm)
        _durable(run, feddm, writer)
        last: dict[str, Any] = {}
        if incomplete := incomplete or _never_sent(feddm):
            log.warning("no model/ is written: %s", incomplete)
        else:
            if config.stage == "autoencoder":
                run.write_final(last := final(feddm, grid, model_of, None))
            _ship(run, model_of, feddm, last.get("latent_power"))
            if judge and config.eval.audit:
                _audit(run, model_of, feddm, grid, judge.recipe)
        for line in traffic.traffic(run.path):
            log.info("%s", line)
        if run.simulated and not config.keeps_personal:
            forget_run(state_root(None), run_uuid)
        run.finish("completed", incomplete)
    written = {"model": run.path / "model", "report": run.path / "report.html"}
    log.info("%s", " ".join(f"{what}={path}" for what, path in written.items() if path.exists()))


@contextmanager
def _accounted(run: RunDirectory, *, new: bool) -> Iterator[None]:
    """Whatever happens, the run's folder says what went wrong, and has a report; unless the configuration of a new run
    is wrong and nothing was done, which leaves nothing."""
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
            _report(run)


def _psnr(config: RunConfig, eval_loss: float) -> dict[str, Any]:
    """An autoencoder's, of pixels in [-1, 1]."""
    if config.stage != "autoencoder" or not math.isfinite(eval_loss):
        return {}
    return {"psnr": round(10 * math.log10(4 / max(eval_loss, 1e-12)), 3)}


def _is_due(feddm: FedDM, config: RunConfig, every: int) -> bool:
    """Whether a round was done for which there is to be what is made every so many rounds (0: none), and at the end."""
    number = feddm.round
    return number > 0 and (number == config.num_server_rounds or (every > 0 and number % every == 0))


def _judge(run: RunDirectory, judge: GlobalEvaluation, model_of: GlobalModel, feddm: FedDM) -> None:
    """Add the figures of the averaged weights to the round's, where it is to have them; the best model is kept. A
    round is not lost where that fails, and gets them when the run is resumed."""
    config = model_of.config
    if not _is_due(feddm, config, config.eval.every):
        return
    try:
        model_of.load(feddm.ema)
        figures, best = judge.figures(), config.eval.keep_best
        if best != "none" and figures[best] < run.best(best):
            log.info("round=%d best so far by %s = %.5g", feddm.round, best, figures[best])
            _write_model(run, model_of, feddm, "best")
            run.write_best(feddm.round, best, figures[best])
        run.add_figures(figures)
    except Exception as error:
        log.warning("round=%d not evaluated: %s: %s", feddm.round, type(error).__name__, error, exc_info=True)


def _save(
    run: RunDirectory,
    feddm: FedDM,
    config: RunConfig,
    writer: checkpoint.Writer,
    row: dict[str, Any] | None = None,
) -> None:
    """Write a round's figures, and begin to write a checkpoint: the next round is sent meanwhile."""
    state = feddm.checkpoint()
    state.facts["config"] = flatten(config)
    with _room(run, feddm):
        if row:
            run.log_nodes([asdict(node) for node in feddm.nodes])
            run.log_round(row)
        writer.begin(state)


def _durable(run: RunDirectory, feddm: FedDM, writer: checkpoint.Writer) -> None:
    """Wait until the last round's checkpoint is on the disk."""
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


def _personal(parts: Split) -> str:
    """Why the server has no whole model; empty where it has."""
    own = parts.personal.layout
    if not own.names:
        return ""
    return (
        f"{own.size} parameters stay on the nodes ({own.names[0]} … {own.names[-1]}); each node saves its own model "
        "in its state folder, see its log"
    )


def _never_sent(feddm: FedDM) -> str:
    parts = ", ".join(sorted(feddm.never_sent))
    return f"in no round did a node send the part {parts}" if parts else ""


def _show(run: RunDirectory, model_of: GlobalModel, feddm: FedDM) -> None:
    """Draw the grids that the round is to have."""
    config = model_of.config
    if run.has_grid(feddm.round) or not _is_due(feddm, config, config.sample.every):
        return
    if feddm.round == config.num_server_rounds:
        _sample(run, model_of, feddm.round, feddm.weights, "raw")
    _sample(run, model_of, feddm.round, feddm.ema)


def _sample(run: RunDirectory, model_of: GlobalModel, number: int, weights: Vector, kind: str = "") -> None:
    """A grid of the averaged weights, or one of the `raw` weights to set beside it."""
    s = model_of.config.sample
    log.info("%s", Sampling(number, s.count, s.steps, kind or "averaged"))
    model_of.load(weights)
    images = model_of.draw(s.count, s.guidance)
    log.info("round=%d grid=%s", number, run.save_grid(grids.grid(images), number, kind))


def _ship(run: RunDirectory, model_of: GlobalModel, feddm: FedDM, latent_power: float | None) -> None:
    """Write `model/`, with the averaged weights."""
    model_of.load(feddm.ema)
    _write_model(run, model_of, feddm, "model", latent_power)


def _write_model(
    run: RunDirectory, model_of: GlobalModel, feddm: FedDM, name: str, latent_power: float | None = None
) -> None:
    """A diffusers pipeline, or an autoencoder, with the weights that the model has now, and its card."""
    card = model_card.model_card(flatten(model_of.config), feddm.round, len(feddm.nodes), simulated=run.simulated)
    with whole_folder(run.path / name) as folder:
        pipelines.save(model_of.network, model_of.config, model_of.files, folder, card, latent_power)


def _audit(run: RunDirectory, model_of: GlobalModel, feddm: FedDM, grid: Grid, recipe: Path) -> None:
    """What the nodes say of the model that is shipped; it is there whatever they do."""
    try:
        run.write_final(final(feddm, grid, model_of, recipe))
    except RunFailedError as error:
        log.warning("eval.audit: %s", error)


def _report(run: RunDirectory) -> None:
    """Write the report; a run is not lost where that fails."""
    try:
        report.write(run.path)
    except Exception:
        log.exception("the report could not be written; try feddm report %s", run.path)


def _log_to_stdout() -> None:
    """Our lines, marked, on standard output: `flwr log` and `feddm run` read them there."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{MARK}%(message)s"))
    ours = logging.getLogger("feddm_flwr")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
