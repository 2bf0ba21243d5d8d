"""Work of a GPU that is launched at once, as a CUDA graph.

A U-Net is some thousand small kernels. A GPU has done most of them before Python has launched the next, so that it
idles half of the time, and more with small batches.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_BEFORE = 1  # calls: memory that runs out is found in them, and what is made at first use is there
_failed: list[str] = []  # recordings in this process, which is left alone then


class CudaGraph:
    """Of a function of tensors that is called again and again. On a GPU it is recorded after the first calls, and
    replayed for all inputs of the shapes of the first. It must be called within `side_stream`, do its work on the GPU
    only, and may read and change other tensors if these stay where they are."""

    def __init__(self, device: torch.device, may: bool = True) -> None:
        """`may`: whether it can be recorded."""
        self._left = _BEFORE if may and device.type == "cuda" and not _failed else -1
        self._shapes: list[torch.Size] = []
        self._inputs: tuple[Tensor, ...] = ()
        self._output = torch.zeros(())
        self._graph: Any = None

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Returns what the function, always the same, returns, which the next call may overwrite."""
        shapes = [tensor.shape for tensor in inputs]
        self._shapes = self._shapes or shapes
        if self._left < 0 or shapes != self._shapes:
            return function(*inputs)
        if self._left > 0:
            self._left -= 1
            return function(*inputs)
        if self._graph is None and not self._record(function, inputs):
            return function(*inputs)
        torch._foreach_copy_(self._inputs, inputs)
        self._graph.replay()
        return self._output

    def _record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> bool:
        """Records the function, which does not run it."""
        graph, stream, collects = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), gc.isenabled()
        gc.disable()  # an earlier graph that is garbage would be freed, which spoils the recording
        try:
            self._inputs = tuple(tensor.clone() for tensor in inputs)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._output = function(*self._inputs)
        except RuntimeError as error:
            log.warning("no CUDA graph, which is slower: %s", str(error.__context__ or error).partition("\n")[0])
            self._stop()
            if not isinstance(error, torch.OutOfMemoryError):  # which is cleared away; anything else may not be
                _failed.append(str(error))
                random = torch.cuda.default_generators[stream.device_index]
                random.graphsafe_set_state(random.clone_state())  # or it would go on as if it were recorded
            return False
        finally:
            if collects:
                gc.enable()
        self._graph = graph
        return True

    @property
    def recorded(self) -> bool:
        """Tells whether the function is."""
        return self._graph is not None

    def drop(self) -> bool:
        """Gives up what is recorded, and its memory, for good; returns False where nothing is."""
        if self._graph is None:
            return False
        self._stop()
        return True

    def _stop(self) -> None:
        self._left, self._graph, self._inputs, self._output = -1, None, (), torch.zeros(())


@contextmanager
def side_stream(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Works on a stream of its own: there is no recording on the usual one."""
    if device.type != "cuda" or not wanted:
        yield
        return
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)


@lru_cache
def _stream(device: int) -> torch.cuda.Stream:
    """Returns one stream for all of the process: with each, cuBLAS keeps memory for ever."""
    return torch.cuda.Stream(device)


def is_recording(device: torch.device) -> bool:
    """Tells whether what is done now is recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def release_memory() -> None:
    """Leaves a GPU's memory that is not in use to other processes."""
    with suppress(RuntimeError):  # after a recording that failed, some versions of torch refuse
        torch.cuda.empty_cache()  # nothing where there is no GPU
