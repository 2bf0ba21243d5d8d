"""What a node remembers between rounds, in files of its own: never in Flower's context, which loses
large state silently, and never at a path that the run configuration names.

    <state-path>/<run-uuid>/shadow-<version>-<fingerprint>.frame   shared by the nodes of a machine
    <state-path>/<run-uuid>/<node>/residual-<round>.frame, received-…, optimizer-…
    <state-path>/<run-uuid>/<node>/personal-<round>.frame, pipeline/

Every file is a frame (see `codecs.framing`), so one that is truncated, corrupt or of another run, node or
model is noticed. Files are put in place whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from feddm_flwr.exchange.channel import Channel, FrameError, exact
from feddm_flwr.protocol.tasks import SHADOW
from feddm_flwr.storage.atomic import forget_unfinished, whole_file, whole_folder
from feddm_flwr.storage.state_folder import node_folder
from feddm_flwr.vector import Layout, Vector

log = logging.getLogger(__name__)

_UNFINISHED_AFTER = 24 * 3600.0  # seconds: nothing is written for as long


class StateLostError(RuntimeError):
    """What the node should hold is not there; the message says what."""


class NodeState:
    """The files of one node in one run."""

    def __init__(self, root: Path, run: str, node: str, *, private: bool = False) -> None:
        """Create the node's folder; remove what runs left that nobody touched for two weeks. What a training with
        differential privacy kept is of no use to one without, and the other way round.

        Raises:
            ValueError, OSError: as `node_folder`.
        """
        self.path = node_folder(root, run, node)
        self._run, self.owner = root / run, f"{run}/{node}{'/private' if private else ''}"
        self.lost = False  # whether what this node had kept was gone
        for folder in (self._run, self.path):
            forget_unfinished(folder, _UNFINISHED_AFTER)

    def shadows(self, whole: Channel, first: int, last: int) -> Iterator[tuple[int, Vector]]:
        """Yields the shadows that are here of versions first..last, with their versions, the newest first; `whole` is
        how they are written."""
        found = [(number, path) for number, path in _numbered(self._run, SHADOW) if first <= number <= last]
        for number, path in reversed(found):
            try:
                yield number, whole.decode(path.read_bytes(), SHADOW, number)
            except (OSError, FrameError) as error:
                log.warning("%s: %s is of no use: %s", self.owner, path.name, error)

    def write_shadow(self, version: int, name: str, vector: Vector, whole: Channel) -> None:
        """Keeps a shadow, for all nodes of this machine, under its fingerprint as `name`."""
        path = self._run / f"{SHADOW}-{version}-{name}.frame"
        _write(path, whole.encode(vector, SHADOW, version))
        for number, old in _numbered(self._run, SHADOW):
            if number < version - 1:  # not the last but one: the server may repeat a round
                old.unlink(missing_ok=True)

    def recall(self, kind: str, acked: int, layout: Layout) -> Vector | None:
        """Returns what was kept as of the round that was acknowledged; None where there was none, or it is lost, which
        `lost` says then."""
        if acked == 0:
            return None
        try:
            return self.read(kind, acked, layout)
        except StateLostError as error:
            log.warning("%s; it begins anew", error)
            self.lost = True
            return None

    def read(self, kind: str, number: int, layout: Layout) -> Vector:
        """Returns what was kept as of round `number`: a `residual`, the `personal` parameters, the shared
        ones that were `received`, what the `optimizer` goes on with, or the `control` variate.

        Raises:
            StateLostError: it is not there, or of another run, node or model, or corrupt.
        """
        path = self.path / f"{kind}-{number}.frame"
        try:
            return self._own(layout).decode(path.read_bytes(), kind, number)
        except (OSError, FrameError) as error:
            raise StateLostError(f"{path.name}: {error}") from error

    def write(self, kind: str, number: int, vector: Vector, layout: Layout, still: Collection[int]) -> None:
        """Keeps a vector as of round `number`, and of those kept before only those of rounds that may `still` be asked
        for and the two newest, of which the server may have heard meanwhile. Later ones stay:
        a job that was overtaken must not take anything from those that overtook it."""
        _write(self.path / f"{kind}-{number}.frame", self._own(layout).encode(vector, kind, number))
        earlier = [one for one in _numbered(self.path, kind) if one[0] < number]
        for other, path in earlier[:-2]:
            if other not in still:
                path.unlink(missing_ok=True)

    def replace_folder(self, name: str, kind: str, number: int, fill: Callable[[Path], None]) -> None:
        """Puts a folder that `fill` writes in place of an earlier one of that name, whole or not at all; not where
        vectors of that `kind` are of later rounds than `number`: the job was overtaken."""
        if _numbered(self.path, kind)[-1][0] > number:
            return
        with whole_folder(self.path / name) as folder:
            fill(folder)
        log.info("this node's own model as of round %d: %s", number, self.path / name)

    def _own(self, layout: Layout) -> Channel:
        """Returns how this node's files are written: those of others are not taken for its own."""
        return exact(f"{layout.fingerprint}/{self.owner}", layout.size)


def _numbered(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """Returns the files `<kind>-<number>[-…].frame` of a folder by number."""
    matches = ((re.fullmatch(rf"{kind}-(\d{{1,9}})(-\w+)?\.frame", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_file())


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)
