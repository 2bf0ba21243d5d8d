"""What a node remembers between rounds, in files of its own: never in Flower's context, which loses
large state silently, and never at a path that the run configuration names.

    <state-path>/<run-uuid>/shadow-<version>-<fingerprint>.frame   shared by the nodes of a machine
    <state-path>/<run-uuid>/<node>/residual-<round>.frame
    <state-path>/<run-uuid>/<node>/personal-<round>.frame, pipeline/

Every file is a frame (see `wire`), so one that is truncated, corrupt or of another run, node or
model is noticed. Files are put in place whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from feddm_flwr.exchange import Channel, FrameError, Values, exact, fingerprint
from feddm_flwr.state_folder import RUN_UUID, forget_old
from feddm_flwr.whole_file import forget_unfinished, whole_file, whole_folder

log = logging.getLogger("feddm")

_UNFINISHED_AFTER = 24 * 3600.0  # seconds: nothing is written for as long


class StateLostError(RuntimeError):
    """What the node should hold is not there; the message says what."""


class NodeState:
    """The files of one node in one run."""

    def __init__(self, root: Path, run: str, node: str) -> None:
        """Create the node's folder; remove what runs left that nobody touched for two weeks.

        Raises:
            ValueError: `run` is not a run-uuid (it is the server's word, and becomes a path).
            OSError: the folder cannot be made.
        """
        if not re.fullmatch(RUN_UUID, run):
            raise ValueError(f"run-uuid = {run!r} is not 32 hex digits")
        self._run, self._owner = root / run, f"{run}/{node}"
        self.path = self._run / node
        if not self.path.is_dir():
            self._run.mkdir(mode=0o700, parents=True, exist_ok=True)  # a model tells of the images
            self.path.mkdir(exist_ok=True)
            forget_old(root, run)
        for folder in (self._run, self.path):
            forget_unfinished(folder, _UNFINISHED_AFTER)

    def shadow(
        self, version: int, wanted: str, frames: Mapping[int, bytes], full: bytes | None, down: Channel, initial: Values
    ) -> Values:
        """What the server says that nodes hold at a version, whose fingerprint is `wanted`: the whole of
        it, or what this machine has, or the `initial` weights (version 0), plus the frames since.

        Raises:
            FrameError: a frame is corrupt.
            StateLostError: neither is here what the frames add to, nor do they begin at version 0.
        """
        whole = exact(down.layout, down.size)
        if full is not None:
            vector = whole.decode(full, "shadow", version)
            if fingerprint(vector) != wanted:
                raise FrameError("the whole shadow has another fingerprint than the server says")
            self._write_shadow(version, wanted, vector, whole)
            return vector
        first = min(frames) - 1
        for held, start in self._shadows(whole, first, version, initial):
            vector = start.copy()
            for number in range(held + 1, version + 1):
                vector += down.decode(frames[number], "delta", number)
            if fingerprint(vector) == wanted:
                if held != version:
                    self._write_shadow(version, wanted, vector, whole)
                return vector
            log.warning("%s: the shadow made from version %d is not the server's", self._owner, held)
        raise StateLostError(f"no shadow of version {first} to {version}")

    def _shadows(self, whole: Channel, first: int, last: int, initial: Values) -> Iterator[tuple[int, Values]]:
        """What is here of versions first..last, the newest first, and at last the initial weights."""
        found = [(number, path) for number, path in _numbered(self._run, "shadow") if first <= number <= last]
        for number, path in reversed(found):
            try:
                yield number, whole.decode(path.read_bytes(), "shadow", number)
            except (OSError, FrameError) as error:
                log.warning("%s: %s is of no use: %s", self._owner, path.name, error)
        if first == 0:
            yield 0, initial

    def _write_shadow(self, version: int, name: str, vector: Values, whole: Channel) -> None:
        path = self._run / f"shadow-{version}-{name}.frame"
        _write(path, whole.encode(vector, "shadow", version))
        for number, old in _numbered(self._run, "shadow"):
            if number < version - 1:  # not the last but one: the server may repeat a round
                old.unlink(missing_ok=True)

    def read(self, kind: str, number: int, layout: str, size: int) -> Values:
        """What was kept as of round `number`: a `residual` or the `personal` parameters.

        Raises:
            StateLostError: it is not there, or of another run, node or model, or corrupt.
        """
        path = self.path / f"{kind}-{number}.frame"
        try:
            return self._own(layout, size).decode(path.read_bytes(), kind, number)
        except (OSError, FrameError) as error:
            raise StateLostError(f"{path.name}: {error}") from error

    def write(self, kind: str, number: int, vector: Values, layout: str, still: Collection[int]) -> None:
        """Keep a vector as of round `number`, and of those kept before only those of rounds that may `still` be asked
        for and the two newest, of which the server may have heard meanwhile. Later ones stay:
        a job that was overtaken must not take anything from those that overtook it."""
        _write(self.path / f"{kind}-{number}.frame", self._own(layout, len(vector)).encode(vector, kind, number))
        earlier = [one for one in _numbered(self.path, kind) if one[0] < number]
        for other, path in earlier[:-2]:
            if other not in still:
                path.unlink(missing_ok=True)

    def replace_folder(self, name: str, kind: str, number: int, fill: Callable[[Path], None]) -> None:
        """Put a folder that `fill` writes in place of an earlier one of that name, whole or not at all; not where
        vectors of that `kind` are of later rounds than `number`: the job was overtaken."""
        if _numbered(self.path, kind)[-1][0] > number:
            return
        with whole_folder(self.path / name) as folder:
            fill(folder)
        log.info("this node's own model as of round %d: %s", number, self.path / name)

    def _own(self, layout: str, size: int) -> Channel:
        """How this node's files are written: those of others are not taken for its own."""
        return exact(f"{layout}/{self._owner}", size)


def _numbered(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """The files `<kind>-<number>[-…].frame` of a folder by number."""
    matches = ((re.fullmatch(rf"{kind}-(\d{{1,9}})(-\w+)?\.frame", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_file())


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)
