"""What a run leaves beside its checkpoints: figures, grids, the best model, the final one, the report."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from flwr.serverapp import Grid

from feddm_flwr.aggregation.averages import WIDTHS
from feddm_flwr.config import flatten
from feddm_flwr.evaluation import grids
from feddm_flwr.evaluation.global_model import GlobalModel
from feddm_flwr.exchange.partial import Split
from feddm_flwr.models import pipelines
from feddm_flwr.protocol.failures import RunFailedError
from feddm_flwr.reporting import model_card, report
from feddm_flwr.reporting.progress import Sampling
from feddm_flwr.reporting.run_directory import RunDirectory
from feddm_flwr.server.evaluation import GlobalEvaluation
from feddm_flwr.server.final_evaluation import evaluate_at_nodes
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.storage.atomic import whole_folder
from feddm_flwr.vector import Vector

log = logging.getLogger(__name__)


class Outputs:
    """Makes them of the global model, when they are due."""

    def __init__(self, run: RunDirectory, model: GlobalModel, split: Split, grid: Grid) -> None:
        """Reads or makes the feature network where the run has one.

        Raises:
            ConfigError: it cannot be had.
        """
        self._run, self._model, self._grid, self._config = run, model, grid, model.config
        self._incomplete = _personal(split)
        self._draws = not self._incomplete and self._config.stage != "autoencoder"
        if not self._draws:
            log.warning("no samples are drawn: %s", self._incomplete or "an autoencoder draws none")
        evaluates = self._draws and self._config.eval.features != "none"
        self._evaluation = GlobalEvaluation(model, run.path) if evaluates else None
        self._chosen_by = ""  # the figure that the shipped average is the best by, once it is chosen
        self._said: dict[float | None, dict[str, Any]] = {}  # by the nodes, of the averages of these widths

    def begin(self, feddm: FedDM) -> None:
        """Makes what a run that was killed still owes, and has the nodes sum the features of their images."""
        if self._evaluation:
            self._evaluation.refer(feddm, self._grid)
        self.after_round(feddm)

    def after_round(self, feddm: FedDM) -> None:
        """Makes what is due after a round, once its figures are written."""
        width = self._run.average_width(feddm.round)
        if width is not None:
            feddm.average.width, self._chosen_by = width, self._config.eval.average_by
        elif self._chooses(feddm, "loss"):
            self._choose_by_loss(feddm)
        if not self._run.is_evaluated():
            self._evaluate(feddm)
        self._show(feddm)

    def finish(self, feddm: FedDM) -> str:
        """Writes the model, and what the nodes say of it; returns why there is none, "" where there is."""
        incomplete = self._incomplete or _never_sent(feddm)
        if incomplete:
            log.warning("no model/ is written: %s", incomplete)
            return incomplete
        power = None
        if self._config.stage == "autoencoder":
            last = self._said_by_nodes(feddm)
            self._run.write_final(last)
            power = last["latent_power"]
        self._write_model(feddm, "model", power)
        if self._evaluation and self._config.eval.audit:
            try:
                self._run.write_final(evaluate_at_nodes(feddm, self._grid, self._model, self._evaluation.recipe))
            except RunFailedError as error:  # the model is there whatever they do
                log.warning("eval.audit: %s", error)
        return ""

    def _is_due(self, feddm: FedDM, every: int) -> bool:
        """Tells whether a round was done for which there is to be what is made every so many rounds (0: none), and at
        the end."""
        number = feddm.round
        return number > 0 and (number == self._config.num_server_rounds or (every > 0 and number % every == 0))

    def _evaluate(self, feddm: FedDM) -> None:
        """Adds the figures of the averaged weights to the round's, where it is to have them; the best model is kept. A
        round is not lost where that fails, and gets them when the run is resumed."""
        if not self._evaluation or not self._is_due(feddm, self._config.eval.every):
            return
        try:
            figures, best = self._figures(feddm, self._evaluation), self._config.eval.keep_best
            if best != "none" and figures[best] < self._run.best(best):
                log.info("round=%d best so far by %s = %.5g", feddm.round, best, figures[best])
                self._write_model(feddm, "best")
                self._run.write_best(feddm.round, best, figures[best])
            self._run.add_figures(figures)
        except Exception as error:
            log.warning("round=%d not evaluated: %s: %s", feddm.round, type(error).__name__, error, exc_info=True)

    def _figures(self, feddm: FedDM, evaluation: GlobalEvaluation) -> dict[str, Any]:
        """Returns those of the averaged weights; at the end, of the average of least FID, which is then the one."""
        if not self._chooses(feddm, "fid"):
            return evaluation.figures(feddm.averaged)
        tried: dict[float, float] = {}
        for width in WIDTHS:
            feddm.average.width = width
            tried[width] = evaluation.fid(feddm.averaged)
        chosen = self._choose(feddm, tried)
        return evaluation.figures(feddm.averaged) | chosen

    def _chooses(self, feddm: FedDM, by: str) -> bool:
        """Tells whether it is time to choose the shipped average, by this figure."""
        at_end = feddm.round == self._config.num_server_rounds and feddm.average.width is not None
        return at_end and self._config.eval.average_by == by and not self._incomplete

    def _choose_by_loss(self, feddm: FedDM) -> None:
        losses: dict[float, float] = {}
        usual = feddm.average.width
        try:
            for width in WIDTHS:
                feddm.average.width = width
                said = self._said_by_nodes(feddm)["eval_loss"]
                losses[width] = math.inf if said is None else said
        except RunFailedError as error:
            feddm.average.width = usual
            log.warning("eval.average-by = 'loss': %s; the usual average is shipped", error)
        else:
            self._run.add_figures(self._choose(feddm, losses))

    def _choose(self, feddm: FedDM, tried: Mapping[float, float]) -> dict[str, Any]:
        """Makes the best of the averages that were tried the one that is shipped; returns what is to be told of it."""
        width = min(tried, key=lambda one: tried[one])
        feddm.average.width, self._chosen_by = width, self._config.eval.average_by
        told = {f"{one:g}": worth for one, worth in tried.items()}
        log.info("average_width=%g best by %s", width, self._chosen_by)
        return {"average_width": width, "average_tried": told}

    def _said_by_nodes(self, feddm: FedDM) -> dict[str, Any]:
        """Returns what the nodes say of the averaged weights; they are asked once for each average."""
        if (width := feddm.average.width) not in self._said:
            self._said[width] = evaluate_at_nodes(feddm, self._grid, self._model, None)
        return self._said[width]

    def _show(self, feddm: FedDM) -> None:
        """Draws the grids that the round is to have."""
        due = self._draws and self._is_due(feddm, self._config.sample.every)
        if not due or self._run.has_grid(feddm.round):
            return
        if feddm.round == self._config.num_server_rounds:
            self._draw_grid(feddm.round, feddm.weights, "raw")
        self._draw_grid(feddm.round, feddm.averaged)

    def _draw_grid(self, number: int, weights: Vector, kind: str = "") -> None:
        """Draws a grid of the averaged weights, or one of the `raw` weights to set beside it."""
        s = self._config.sample
        log.info("%s", Sampling(number, s.count, s.steps, kind or "averaged"))
        images = self._model.draw(weights, s.count, s.guidance)
        log.info("round=%d grid=%s", number, self._run.save_grid(grids.grid(images), number, kind))

    def _write_model(self, feddm: FedDM, name: str, latent_power: float | None = None) -> None:
        """Writes a diffusers pipeline, or an autoencoder, with the averaged weights, and its card."""
        config, simulated = flatten(self._config), self._run.simulated
        card = model_card.model_card(
            config, feddm.round, len(feddm.nodes), feddm.average.width, self._chosen_by, simulated=simulated
        )
        network = self._model.at(feddm.averaged)
        with whole_folder(self._run.path / name) as folder:
            pipelines.save(network, self._config, self._model.files, folder, card, latent_power)


def psnr(eval_loss: float) -> float | None:
    """Returns the peak signal-to-noise ratio in dB of pixels in [-1, 1] with that squared error; None of NaN."""
    return round(10 * math.log10(4 / max(eval_loss, 1e-12)), 3) if math.isfinite(eval_loss) else None


def write_report(run: RunDirectory) -> None:
    """Writes the report; a run is not lost where that fails."""
    try:
        report.write(run.path)
    except Exception:
        log.exception("the report could not be written; try feddm report %s", run.path)


def _personal(split: Split) -> str:
    """Returns why the server has no whole model; "" where it has."""
    own = split.personal.layout
    if not own.names:
        return ""
    return (
        f"{own.size} parameters stay on the nodes ({own.names[0]} … {own.names[-1]}); each node saves its own model "
        "in its state folder, see its log"
    )


def _never_sent(feddm: FedDM) -> str:
    parts = ", ".join(sorted(feddm.never_sent))
    return f"in no round did a node send the part {parts}" if parts else ""
