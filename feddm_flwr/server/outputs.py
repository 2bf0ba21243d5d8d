"""What a run leaves beside its checkpoints: figures, grids, the best model, the final one, the report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

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
from feddm_flwr.server.final_evaluation import Said, evaluate_at_nodes, held_out_losses
from feddm_flwr.server.strategy import FedDM
from feddm_flwr.storage.atomic import whole_folder
from feddm_flwr.vector import Vector

log = logging.getLogger(__name__)

_Found = TypeVar("_Found")
_REPORT_EVERY = 10.0  # seconds, at least, between reports of a run that goes on


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
        self._reported = -math.inf  # when the report was written last
        self._said: dict[float | None, Said] = {}  # by the nodes, of the averages of these widths

    def begin(self, feddm: FedDM) -> None:
        """Makes what a run that was killed still owes, and has the nodes sum the features of their images."""
        if self._evaluation:
            self._evaluation.refer(feddm, self._grid)
        self.after_round(feddm)

    def after_round(self, feddm: FedDM) -> None:
        """Makes what is due after a round, once its figures are written."""
        due = not self._run.is_evaluated()
        if chosen := self._run.chosen_average() if feddm.is_over else None:
            feddm.average.width, self._chosen_by = chosen
        elif self._chooses(feddm, "loss"):
            due |= self._choose_by_loss(feddm)
        if due or (not chosen and self._chooses(feddm, "fid")):
            self._evaluate(feddm)
        self._show(feddm)
        self._report(feddm)

    def _report(self, feddm: FedDM) -> None:
        """Writes the report while the run goes on, once a round is evaluated or drawn, but not all the time."""
        every = (self._config.eval.every, self._config.sample.every if self._draws else 0)
        due = feddm.round == 0 or any(self._is_due(feddm, rounds) for rounds in every)
        if due and not feddm.is_over and time.monotonic() - self._reported > _REPORT_EVERY:
            write_report(self._run)
            self._reported = time.monotonic()

    def finish(self, feddm: FedDM) -> str:
        """Writes the model, and what the nodes say of it; returns why there is none, "" where there is."""
        incomplete = self._incomplete or _never_sent(feddm)
        if incomplete:
            log.warning("no model/ is written: %s", incomplete)
            return incomplete
        power = None
        if self._config.stage == "autoencoder":
            power = self._said_by_nodes(feddm).latent_power
        self._write_model(feddm, "model", power)
        said = self._said.get(feddm.average.width)
        if self._config.eval.audit or self._config.eval.utility or self._config.privacy.canaries:
            try:
                recipe = self._evaluation.recipe if self._evaluation else None
                said = evaluate_at_nodes(feddm, self._grid, self._model, recipe)
            except RunFailedError as error:  # the model is there whatever they do
                log.warning("eval.audit, eval.utility, privacy.canaries: %s", error)
        if said:
            self._run.write_final(said.figures() | {"bytes_other": feddm.bytes_other})
        return ""

    def _is_due(self, feddm: FedDM, every: int) -> bool:
        """Tells whether a round was done for which there is to be what is made every so many rounds (0: none), and at
        the end."""
        return feddm.is_over or (feddm.round > 0 and every > 0 and feddm.round % every == 0)

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
        chosen = self._choose(feddm, "fid", self._of_each(feddm, lambda: evaluation.fid(feddm.averaged)))
        return evaluation.figures(feddm.averaged) | chosen

    def _chooses(self, feddm: FedDM, by: str) -> bool:
        """Tells whether it is time to choose the shipped average, by this figure."""
        several = feddm.average.width is not None
        return several and feddm.is_over and self._config.eval.average_by == by and not self._incomplete

    def _choose_by_loss(self, feddm: FedDM) -> bool:
        """Tells whether that was possible."""
        try:
            losses = held_out_losses(self._of_each(feddm, lambda: self._said_by_nodes(feddm)))
            self._run.add_figures(self._choose(feddm, "loss", losses))
        except (RunFailedError, ValueError) as error:
            log.warning("eval.average-by = 'loss': %s; the usual average is shipped", error)
            return False
        return True

    def _of_each(self, feddm: FedDM, find: Callable[[], _Found]) -> list[_Found]:
        """Returns what is found of each average, while it is the one that would be shipped."""
        usual, found = feddm.average.width, []
        try:
            for width in WIDTHS:
                feddm.average.width = width
                found.append(find())
        finally:
            feddm.average.width = usual
        return found

    def _choose(self, feddm: FedDM, by: str, values: list[float]) -> dict[str, Any]:
        """Makes that of the averages the one that is shipped whose value is the least; returns what is to be told.

        Raises:
            ValueError: one is not finite.
        """
        tried = dict(zip(WIDTHS, values, strict=True))
        for width, value in tried.items():
            if not math.isfinite(value):
                raise ValueError(f"the figure of the average of width {width:g} is {value}")
        width = min(tried, key=lambda one: tried[one])
        feddm.average.width, self._chosen_by = width, by
        log.info("average_width=%g best by %s", width, by)
        told = {f"{one:g}": value for one, value in tried.items()}
        return {"average_width": width, "average_by": by, "average_tried": told}

    def _said_by_nodes(self, feddm: FedDM) -> Said:
        """Returns what the nodes say of the averaged weights; they are asked once for each average."""
        if (width := feddm.average.width) not in self._said:
            self._said[width] = evaluate_at_nodes(feddm, self._grid, self._model, samples_too=False)
        return self._said[width]

    def _show(self, feddm: FedDM) -> None:
        """Draws the grids that the round is to have."""
        due = self._draws and self._is_due(feddm, self._config.sample.every)
        if not due or self._run.has_grid(feddm.round):
            return
        if feddm.is_over:
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
        average = feddm.average.width, self._chosen_by
        spent = self._run.epsilon()
        card = model_card.model_card(config, feddm.round, len(feddm.nodes), *average, spent, simulated=simulated)
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
