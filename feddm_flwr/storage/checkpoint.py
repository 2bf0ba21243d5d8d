"""A run's checkpoints: one file for each of its newest rounds, whole or absent, verified by checksum.

A checkpoint is a safetensors file; its metadata have the other facts as JSON, and a checksum over
everything. It is written straight from the arrays, tensor by tensor, without a second copy of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from feddm_flwr.storage.atomic import whole_file

log = logging.getLogger(__name__)

Tensors = Mapping[str, NDArray[Any]]

FORMAT = 2
_MOST = 100_000_000  # bytes of a header that safetensors reads
_DTYPES = {"float32": "F32", "uint8": "U8"}


class NoCheckpointError(RuntimeError):
    """There is no checkpoint to resume from; the message says where it was looked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A run as of the end of a round."""

    round: int
    tensors: dict[str, NDArray[Any]]  # float32 or uint8
    facts: dict[str, Any]  # whatever JSON can hold


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and remove all but the `keep` newest.

    Raises:
        OSError: the disk is full, say; those written before are untouched then.
    """
    folder.mkdir(exist_ok=True)
    facts = json.dumps({"format": FORMAT, "round": checkpoint.round, **checkpoint.facts}, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": {"feddm": facts, "sha256": _checksum(facts, checkpoint.tensors)}}
    end = 0
    for name, tensor in _ordered(checkpoint.tensors):
        span = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    if len(text) > _MOST:
        raise OSError(errno.EFBIG, f"what there is to say of its nodes has {len(text)} bytes, more than can be read")
    path = folder / f"round-{checkpoint.round:05d}.safetensors"
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in _ordered(checkpoint.tensors):
            file.write(_bytes(tensor))
    for _, old in _numbered(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


class Writer:
    """Writes checkpoints beside whatever goes on, one at a time."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None

    def begin(self, checkpoint: Checkpoint) -> None:
        """Begins to write one, once the last is durable.

        Raises:
            OSError: the last one could not be written.
        """
        self.wait()
        self._writing = self._thread.submit(save, self._folder, checkpoint, self._keep)

    def wait(self) -> None:
        """Waits until the last one is durable, and let go of its arrays.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error and self._writing and (failed := self._writing.exception()):
            log.warning("the last checkpoint could not be written: %s", failed)


def newest(folder: Path) -> Checkpoint:
    """Returns the newest checkpoint that is intact; others are passed over with a warning.

    Raises:
        NoCheckpointError: there is none.
    """
    found = _numbered(folder)
    for number, path in reversed(found):
        try:
            return _read(path, number)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is of no use: %s", path, error)
    raise NoCheckpointError(f"{folder}: " + (f"none of its {len(found)} checkpoints is intact" if found else "empty"))


def _read(path: Path, number: int) -> Checkpoint:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    facts = json.loads(metadata["feddm"])
    if facts["format"] != FORMAT:
        raise ValueError(f"its format is {facts['format']!r}; this software reads {FORMAT}")
    if metadata["sha256"] != _checksum(metadata["feddm"], tensors):
        raise ValueError("its checksum is wrong")
    if facts["round"] != number:
        raise ValueError(f"it is of round {facts['round']}")
    return Checkpoint(number, tensors, facts)


def _checksum(facts: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in _ordered(tensors):
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _ordered(tensors: Tensors) -> Iterator[tuple[str, NDArray[Any]]]:
    yield from sorted(tensors.items())


def _bytes(tensor: NDArray[Any]) -> memoryview:
    """Returns the bytes of a contiguous array, little-endian as the format has them, not copied."""
    return np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Returns the checkpoints of a folder by round, none where there is no folder."""
    paths = folder.glob("round-*.safetensors")
    matches = ((re.fullmatch(r"round-(\d{5,9})\.safetensors", path.name), path) for path in paths)
    return sorted((int(match[1]), path) for match, path in matches if match)
