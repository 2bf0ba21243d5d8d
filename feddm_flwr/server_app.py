"""The server's side: configuration in, rounds, then a model, grids and a report out."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from feddm_flwr import evaluation, model, report
from feddm_flwr.config import RunConfig, flatten, parse
from feddm_flwr.parts import Parts, parts_of
from feddm_flwr.state_folder import forget_run, state_root
from feddm_flwr.strategy import FedDM, Round
from feddm_flwr.tracking import RunDirectory, read_metrics

app = ServerApp()
log = logging.getLogger("feddm")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the run config to the report."""
    _log_to_stdout()
    config = parse(context.run_config)
    network = model.build(config)
    layout = model.layout(network)
    name = config.run_name or f"{config.strategy}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = RunDirectory(Path(config.out_dir).expanduser().resolve() / name, flatten(replace(config, run_name="")))
    log.info(
        "run=%s strategy=%s parameters=%d rounds=%d", run.path, config.strategy, layout.size, config.num_server_rounds
    )
    run_uuid = uuid.uuid4().hex
    try:
        parts = parts_of(layout, config)
        incomplete = _personal(parts)
        if incomplete:
            log.warning("no samples are drawn: %s", incomplete)
        feddm = FedDM(config, parts.shared.take(model.to_vector(network)), parts, run_uuid)
        for done in feddm.run(grid):
            run.log_nodes([asdict(node) for node in feddm.nodes])
            run.log_round(done.figures())
            last = done.round == config.num_server_rounds
            if last and not incomplete:
                _sample(run, network, config, done, "raw")
            if not incomplete and (last or (config.sample.every and done.round % config.sample.every == 0)):
                _sample(run, network, config, done)
        if incomplete := incomplete or _never_sent(feddm):
            log.warning("no model/ is written: %s", incomplete)
        else:
            _ship(run, network, config, done, len(feddm.nodes))
        for line in report.traffic(read_metrics(run.path)):
            log.info("%s", line)
        run.finish("completed", incomplete)
    except BaseException as error:
        run.finish("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        page = _report(run)
        if not config.keeps_personal:
            forget_run(state_root(None), run_uuid)  # of simulated nodes, which share this machine
    written = {"model": run.path / "model", "report": page}
    log.info("%s", " ".join(f"{what}={path}" for what, path in written.items() if path and path.exists()))


def _personal(parts: Parts) -> str:
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


def _sample(run: RunDirectory, network: UNet2DModel, config: RunConfig, done: Round, kind: str = "") -> None:
    """A grid of the averaged weights, or one of the `raw` weights to set beside it."""
    s = config.sample
    log.info("round=%d sampling=%d steps=%d weights=%s", done.round, s.count, s.steps, kind or "averaged")
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    model.load_vector(network, done.weights if kind else done.ema)
    images = evaluation.sample(network, model.noise_scheduler(config).config, s.count, s.steps, config.seed)
    log.info("round=%d grid=%s", done.round, run.save_grid(evaluation.grid(images), done.round, kind))


def _ship(run: RunDirectory, network: UNet2DModel, config: RunConfig, done: Round, nodes: int) -> None:
    """Write `model/`: a diffusers pipeline with the averaged weights, and its card."""
    model.load_vector(network, done.ema)
    with tempfile.TemporaryDirectory(dir=run.path) as folder:
        written = Path(folder) / "model"
        model.save_pipeline(network, config, written, report.model_card(flatten(config), done.round, nodes))
        run.replace_folder("model", written)


def _report(run: RunDirectory) -> Path | None:
    """Write the report; a run is not lost where that fails."""
    try:
        return report.write(run.path)
    except Exception:
        log.exception("the report could not be written; try feddm report %s", run.path)
        return None


def _log_to_stdout() -> None:
    """Our lines, marked, on standard output: `flwr log` and `feddm run` read them there."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("feddm: %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
