"""One optimizer step of the local loop: from what was drawn for a batch to the new weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feddm_flwr.compute.cuda_graph import CudaGraph, is_recording, release_memory
from feddm_flwr.config.keys import Train
from feddm_flwr.models.parameters import split_like
from feddm_flwr.training.gradient_terms import Control, GradientTerm
from feddm_flwr.training.moments import Memory
from feddm_flwr.training.objectives import Drawn, Objective
from feddm_flwr.training.optimizers import Optimizers

log = logging.getLogger(__name__)

_LEAST = 1e-3  # of the largest norm of a parameter's gradient: smaller ones are rounding
_ALIKE = 2.0  # the most that norms differ by, for other dropout


class Step:
    """The steps of one training; they change the parameters in place."""

    may_record = True  # as a CUDA graph: a step neither waits for the GPU nor depends on values

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        t: Train,
        parameters: list[Tensor],
        terms: Sequence[GradientTerm] = (),
        memory: Memory | None = None,
        along: Tensor | None = None,
    ) -> None:
        """Takes steps on the objective and on the `terms`, which have been started, from what is in the `memory` or
        anew; every step adds `along` to the parameters, of which it has the layout."""
        self._device = parameters[0].device
        self._model, self._objective, self._train = model, objective, t
        self._read: Objective | None = None  # by what is recorded
        self._parameters, self._terms = parameters, terms
        self._micro = t.micro_batch or t.batch_size
        # Checkpointing asks for the state of the random numbers, which a recording must not; bitsandbytes works on the
        # usual stream, whatever the current one is.
        records = self.may_record and t.cuda_graph and t.optimizer in ("adamw", "muon") and not t.checkpointing
        self.records = records and self._device.type == "cuda"
        self.optimizers = Optimizers(t, parameters, memory, self.records)
        self._flat_along, self._along = along, [] if along is None else split_like(along, parameters)
        self._compiled = _compiled(model, t, self._device)
        self._checked = self._compiled is None
        self._recording = CudaGraph(self._device, self.records)

    @property
    def control(self) -> Control | None:
        """Returns the control variates among the terms."""
        return next((term for term in self._terms if isinstance(term, Control)), None)

    def begin_again(
        self, objective: Objective, memory: Memory | None, correction: Tensor | None, along: Tensor | None
    ) -> bool:
        """Begins another training of the same network, whose weights are in place, to the same bits as new steps would,
        with what was recorded; returns False, and does nothing, where new ones are needed."""
        control, before = self.control, self._flat_along
        same = (control is None, before is None) == (correction is None, along is None)
        if not (same and self.optimizers.fit(memory)):
            return False
        if self._recording.recorded and self._read is None:
            self._read = self._objective
        self._objective = objective
        for old, new in ((control.correction if control else None, correction), (before, along)):
            if old is not None and new is not None:
                old.copy_(new)
        for term in self._terms:
            term.start(self._parameters)
        self.optimizers.begin_again(memory)
        return True

    def rest(self) -> None:
        """Lets go of the examples."""
        self._objective = self._objective.without_examples()

    def __call__(self, drawn: Drawn, rate: float) -> Tensor:
        """Takes one step with this learning rate; returns its mean loss, on the device, which the next step may
        overwrite.

        Raises:
            torch.OutOfMemoryError: not even one image fits into memory.
        """
        self.optimizers.set_rate(rate)
        if not self._checked:
            self._check(drawn)
        return self._recording(self._step, *drawn)

    def _step(self, *drawn: Tensor) -> Tensor:
        loss = self._backward(drawn)
        for term in self._terms:
            term.add(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._train.max_grad_norm, foreach=True)
        self.optimizers.step()
        if self._along:
            with torch.no_grad():
                torch._foreach_add_(self._parameters, self._along)
        self.optimizers.zero_grad()
        return loss

    def _backward(self, drawn: Drawn) -> Tensor:
        """Leaves the gradients of the mean loss in the parameters, whatever was there, from pieces of so many images as
        fit into memory; returns that loss."""
        self.optimizers.zero_grad()  # of a recording that failed half-way, or a check
        while True:
            try:
                return self._accumulate(drawn)
            except torch.OutOfMemoryError:
                if is_recording(self._device):
                    raise
                if self._recording.drop():
                    log.warning("out of memory: from here on without a CUDA graph, which holds that of a step")
                elif self._micro == 1:
                    raise
                else:
                    self._micro = (min(self._micro, len(drawn[0])) + 1) // 2
                    log.warning(
                        "out of memory: from here on %d images at a time; gradients are accumulated", self._micro
                    )
            self.optimizers.zero_grad()
            release_memory()

    def _accumulate(self, drawn: Drawn) -> Tensor:
        """Adds up the gradients of the pieces; returns the mean loss."""
        loss, size = torch.zeros((), device=self._device), len(drawn[0])
        for piece in zip(*(tensor.split(self._micro) for tensor in drawn), strict=True):
            # Every other size would be compiled by itself.
            usual = len(piece[0]) == min(self._micro, self._train.batch_size)
            network = self._compiled if self._compiled is not None and usual else self._model
            part = self._objective.losses(network, piece).sum() / size
            part.backward()
            loss += part.detach()
        return loss

    def _check(self, drawn: Drawn) -> None:
        """Goes on without the compiled network where it can't be had, or is wrong: on a CPU, torch 2.13's gave
        gradients of 0 without a word."""
        self._checked, compiled, self._compiled = True, self._compiled, None
        expected = self._norms(drawn)
        self._compiled = compiled
        try:
            found = self._norms(drawn)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, for one
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            large = expected > _LEAST * expected.max()
            ratio = (found / expected)[large]
            if bool(((ratio < _ALIKE) & (ratio > 1 / _ALIKE)).all()):
                return
            why = f"its gradients are {float(ratio.min()):.2g} to {float(ratio.max()):.2g} times what they should be"
        log.warning("train.compile: the network is not compiled (%s)", why)
        self._compiled = None

    def _norms(self, drawn: Drawn) -> Tensor:
        """Returns the gradient norm of every parameter."""
        self._backward(drawn)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return torch.stack(torch._foreach_norm(gradients))


def _compiled(model: nn.Module, t: Train, device: torch.device) -> Any:
    """Returns the network with its operations fused, where that is asked for; on a CPU it would be no faster."""
    return torch.compile(model, dynamic=False) if t.compile and device.type == "cuda" else None
