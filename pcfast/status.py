"""Divergence and bad values: found on the device, reported once the host can know.

On CPU, and with check="sync", problems raise at once. On CUDA the step ends with a 0-dim status word on the
device; it is copied to the host without waiting, and the next pcfast call that finds the copy finished raises,
as does :func:`synchronize`. The failed step's gradients were zeroed on the device.
"""

from __future__ import annotations

import cmath
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import ArgumentError, NonFiniteError, PcfastError, RelaxationDiverged

CHECKS = ("auto", "sync", "deferred", "off")

_FINE = -1


@dataclass(frozen=True)
class Status:
    """How a step went, without waiting for it.

    Attributes:
        word: 0-dim int64 on the device: index into ``causes`` of the first that holds, -1 where none does.
        causes: per index, the exception for it, given the step size.
    """

    word: Tensor
    causes: tuple[Callable[[float], PcfastError], ...]


def _bad_input(step_size: float) -> PcfastError:
    return NonFiniteError("x", "NaN or infinity", "finite values", "Clean or normalise the data.")


def bad_loss(step_size: float = 0.0) -> PcfastError:
    """The loss or its gradient is not finite though the forward pass is."""
    return NonFiniteError(
        "loss",
        "NaN or infinity (in it or its gradient) at the forward pass's finite output",
        "finite values",
        "Check y, the loss function, and the scale of the parameters.",
    )


def _bad_labels(step_size: float) -> PcfastError:
    return ArgumentError("y", "labels out of range", "labels from 0 to the number of classes - 1")


def _diverged(iteration: int | None, layer: int) -> Callable[[float], PcfastError]:
    return functools.partial(RelaxationDiverged, iteration, layer)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each tensor, (len,): NaN or inf exactly where a tensor holds one."""
    return torch.stack(torch._foreach_norm(list(tensors), float("inf"))).to(torch.float64)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """True where no tensor holds NaN or infinity. Waits for the device."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    # A sum is finite only where all terms are, and much cheaper than a look at each; it may overflow, though.
    sums = [tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None) for tensor in filled]
    return all(cmath.isfinite(s) for s in sums) or bool(torch.isfinite(norms(filled)).all())


def first_non_finite(tensors: Sequence[Tensor]) -> int | None:
    """Index of the first tensor that holds NaN or infinity. Waits for the device."""
    bad = (~torch.isfinite(norms(tensors))).nonzero()
    return int(bad[0]) if len(bad) else None


class StatusBuilder:
    """Collects, on the device and without waiting, where values first became non-finite."""

    def __init__(self) -> None:
        self._causes: list[Callable[[float], PcfastError]] = []
        self._norms: list[Tensor] = []

    def _note(self, causes: list, tensors: Sequence[Tensor]) -> None:
        self._causes += causes
        self._norms.append(norms(tensors))

    def begin(self, x: Tensor, activations: Sequence[Tensor], loss_values: Sequence[Tensor]) -> None:
        """Note the input, the forward pass's vhat_1..vhat_L, and the loss with its gradient there."""
        self._note([_bad_input], [x])
        self._note([_diverged(0, l) for l in range(1, len(activations) + 1)], activations)
        self._note([bad_loss] * len(loss_values), loss_values)

    def observe(self, iteration: int, states: dict[int, Tensor]) -> None:
        """Note one iteration's states, layer -> tensor."""
        if states:
            self._note([_diverged(iteration, l) for l in states], list(states.values()))

    def observe_first(self, first_bad: Tensor, num_steps: int) -> None:
        """Note a loop's own record: ``first_bad`` (L-1,), the iteration that first found layer l's state not
        finite, larger than ``num_steps`` where none did.
        """
        iterations = torch.arange(1, num_steps + 1, device=first_bad.device)
        bad = first_bad.unsqueeze(0) <= iterations.unsqueeze(1)
        self._causes += [
            _diverged(t, l) for t in range(1, num_steps + 1) for l in range(1, len(first_bad) + 1)
        ]
        self._norms.append(torch.where(bad, float("inf"), 0.0).to(torch.float64).flatten())

    def build(self, label_flaw: Tensor | None, results: Sequence[tuple[int, Tensor]]) -> Status:
        """The status, with ``results`` noted last: (layer, tensor) for what the relaxation gave in the end."""
        by_layer = sorted(results, key=lambda result: result[0])
        self._note([_diverged(None, layer) for layer, _ in by_layer], [value for _, value in by_layer])
        bad = ~torch.isfinite(torch.cat(self._norms))
        word = torch.where(bad.any(), bad.to(torch.int8).argmax(), _FINE)
        if label_flaw is not None:
            word = torch.where(label_flaw, len(self._causes), word)
            self._causes.append(_bad_labels)
        return Status(word, tuple(self._causes))


def zero_if_bad(status: Status, gradients: Sequence[Tensor]) -> None:
    """Zero the gradients in place, on the device, where ``status`` says that the step failed."""
    failed = status.word != _FINE
    for gradient in gradients:
        gradient.masked_fill_(failed, 0)


@dataclass
class _Pending:
    status: Status  # the word on the host
    arrived: torch.cuda.Event | None  # None where the word was on the host from the start
    step_size: float


_pending: list[_Pending] = []
_lock = threading.Lock()


def defer(status: Status, step_size: float) -> None:
    """Copy a status to the host without waiting; a later call raises what it says.

    Not while the caller captures a CUDA graph: what a replay finds cannot be reported (its gradients are zeroed).
    """
    arrived = None
    if status.word.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return
        word = torch.empty((), dtype=torch.int64, pin_memory=True)
        word.copy_(status.word, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(status.word.device))
        status = replace(status, word=word)
    with _lock:
        _pending.append(_Pending(status, arrived, step_size))


def raise_arrived(*, wait: bool = False) -> None:
    """Raise the first problem among the status words that have arrived; with ``wait``, of all."""
    if not _pending or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    failure = None
    with _lock:
        while _pending and failure is None:
            arrived = _pending[0].arrived
            if arrived is not None and wait:
                arrived.synchronize()
            elif arrived is not None and not arrived.query():
                break
            entry = _pending.pop(0)
            word = int(entry.status.word)
            if word != _FINE:
                failure = entry.status.causes[word](entry.step_size)
        if failure is not None:
            _pending.clear()
    if failure is not None:
        raise failure


def synchronize() -> None:
    """Wait for all pcfast work on CUDA and raise what went wrong in it.

    Raises:
        RelaxationDiverged, NonFiniteError, ArgumentError: of the first failed step since the last report.
    """
    raise_arrived(wait=True)
