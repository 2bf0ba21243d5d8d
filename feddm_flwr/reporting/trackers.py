"""Where a run's figures and grids go beside its folder: TensorBoard always, Weights & Biases or MLflow where asked for.

A service that cannot be reached costs its own figures, never the run.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from feddm_flwr.config.fields import ConfigError
from feddm_flwr.config.plugins import is_plugin, load_class

log = logging.getLogger(__name__)

_PROJECT = "feddm"
_ENOUGH = 3  # failures on end


class Tracker(ABC):
    """One of them. An extension's is made as `Tracker(run, identity, config)`: the run's folder, a text that stays the
    same when it is resumed, and its flat configuration without places."""

    @abstractmethod
    def log(self, figures: Mapping[str, float], number: int) -> None:
        """Takes the figures of a round."""

    @abstractmethod
    def image(self, path: Path, number: int) -> None:
        """Takes a grid of a round."""

    @abstractmethod
    def finish(self, *, completed: bool) -> None:
        """Ends; the run is over."""


class TensorBoard(Tracker):
    """Event files in the run's folder, written here and now: tensorboardX's SummaryWriter has a thread, which one error
    of the disk ends, and a queue, which then holds up the run for ever."""

    def __init__(self, folder: Path, after: int | None) -> None:
        """Events of rounds later than `after`, which are made again, are forgotten."""
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        if after is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=after + 1, wall_time=time.time(), session_log=start))

    def log(self, figures: Mapping[str, float], number: int) -> None:
        """Writes and flush."""
        for key, value in figures.items():
            self._events.write_event(Event(step=number, wall_time=time.time(), summary=scalar(key, value)))
        self._events.flush()

    def image(self, path: Path, number: int) -> None:
        """Leaves it in its file: events with images are large."""

    def finish(self, *, completed: bool) -> None:
        """Closes the file."""
        self._events.close()


class WeightsAndBiases(Tracker):
    """wandb; its environment variables say where to."""

    def __init__(self, run: Path, identity: str, config: Mapping[str, object]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=_PROJECT, name=run.name, id=identity, resume="allow", dir=str(run), config=dict(config)
        )

    def log(self, figures: Mapping[str, float], number: int) -> None:
        """Logs them; of a resumed run, wandb passes over rounds that it has already."""
        self._run.log(dict(figures), step=number)

    def image(self, path: Path, number: int) -> None:
        """Uploads it as the step's samples."""
        key = "samples of the raw weights" if path.stem.endswith("-raw") else "samples"
        self._run.log({key: self._wandb.Image(str(path))}, step=number)

    def finish(self, *, completed: bool) -> None:
        """Uploads what is left."""
        self._run.finish(exit_code=0 if completed else 1)


class MLflow(Tracker):
    """mlflow; its environment variables say where to."""

    def __init__(self, run: Path, identity: str, config: Mapping[str, object]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(_PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(_PROJECT)
        before = self._client.search_runs([experiment], f"tags.feddm = '{identity}'")
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        self._id = self._client.create_run(experiment, run_name=run.name, tags={"feddm": identity}).info.run_id
        from mlflow.entities import Param

        self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in config.items()])

    def log(self, figures: Mapping[str, float], number: int) -> None:
        """Logs them in one request."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(key, value, now, number) for key, value in figures.items()])

    def image(self, path: Path, number: int) -> None:
        """Uploads it as an artifact."""
        self._client.log_artifact(self._id, str(path), "samples")

    def finish(self, *, completed: bool) -> None:
        """Sets the run's status."""
        self._client.set_terminated(self._id, "FINISHED" if completed else "FAILED")


class Unfailing(Tracker):
    """A tracker whose errors cost nothing else; after a few on end it is left alone, since each may take minutes."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._failed = 0

    def log(self, figures: Mapping[str, float], number: int) -> None:
        """Does as the tracker."""
        self._try(self._tracker.log, figures, number)

    def image(self, path: Path, number: int) -> None:
        """Does as the tracker."""
        self._try(self._tracker.image, path, number)

    def finish(self, *, completed: bool) -> None:
        """Does as the tracker, which is tried once more."""
        self._failed = 0
        self._try(self._tracker.finish, completed=completed)

    def _try(self, method: Any, *arguments: Any, **named: Any) -> None:
        if self._failed >= _ENOUGH:
            return
        try:
            method(*arguments, **named)
            self._failed = 0
        except Exception as error:  # whatever a service does
            self._failed += 1
            left = "; it is left alone from here on" if self._failed == _ENOUGH else ""
            log.warning("tracker = %r: %s: %s; the run goes on%s", self._name, type(error).__name__, error, left)


def make(kind: str, run: Path, identity: str, config: Mapping[str, object], after: int | None) -> list[Tracker]:
    """Returns TensorBoard and the tracker of a `kind`, of a run that goes on `after` a round or is new; `identity`
    tells it from others.

    Raises:
        ConfigError: the tracker's package is not installed, or it takes no runs.
    """
    trackers: list[Tracker] = [Unfailing("tensorboard", TensorBoard(run / "tensorboard", after))]
    if kind != "none":
        try:
            service: Tracker = tracker_class(kind)(run, identity, config)  # type: ignore[call-arg]
        except ConfigError:
            raise
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracker = {kind!r}: {error.name} is not installed: pip install 'feddm-flwr[{kind}]'"
            ) from error
        except Exception as error:  # the services raise many kinds
            raise ConfigError(
                f"tracker = {kind!r}: {type(error).__name__}: {error}; its environment variables say where it is"
            ) from error
        trackers.append(Unfailing(kind, service))
    return trackers


def tracker_class(kind: str) -> type[Tracker]:
    """Returns the class of `tracker`, which is not "none".

    Raises:
        ConfigError: an extension's is no tracker.
    """
    if is_plugin(kind):
        return load_class("tracker", kind, Tracker)  # type: ignore[type-abstract]
    return {"wandb": WeightsAndBiases, "mlflow": MLflow}[kind]
