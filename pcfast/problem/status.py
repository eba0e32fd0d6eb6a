"""Divergence and bad values: found on the device, reported once the host can know.

On CPU, and with check="sync", problems raise at once. On CUDA the step ends with a 0-dim status word on the
device; it is copied to the host without waiting, and the next pcfast call that finds the copy finished raises,
as does :func:`synchronize`. The failed step's gradients were zeroed on the device.
"""

from __future__ import annotations

import cmath
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ..errors import ArgumentError, NonFiniteError, PcfastError, RelaxationDiverged
from .belief_optimizers import StepSize

CHECKS = ("auto", "sync", "deferred", "off")

_FINE = -1
SMALL = 4096  # elements: up to here one sum of a copy of many tensors costs less than a sum of each


@dataclass(frozen=True)
class Status:
    """How a step went, without waiting for it.

    Attributes:
        word: 0-dim int64 on the device: index into ``causes`` of the first that holds, -1 where none does.
        causes: per index, the exception for it, given the step size.
    """

    word: Tensor
    causes: tuple[Callable[[StepSize], PcfastError], ...]


def bad_input(step_size: StepSize = 0.0) -> PcfastError:
    """The input is not finite."""
    return NonFiniteError("x", "NaN or infinity", "finite values", "Clean or normalise the data.")


def bad_loss(step_size: StepSize = 0.0) -> PcfastError:
    """The loss or its gradient is not finite though the forward pass is."""
    return NonFiniteError(
        "loss",
        "NaN or infinity (in it or its gradient) at the forward pass's finite output",
        "finite values",
        "Check y, the loss function, and the scale of the parameters.",
    )


def bad_labels(step_size: StepSize = 0.0) -> PcfastError:
    """A label is no class."""
    return ArgumentError("y", "labels out of range", "labels from 0 to the number of classes - 1")


def _diverged(iteration: int | None, layer: int) -> Callable[[StepSize], PcfastError]:
    return functools.partial(RelaxationDiverged, iteration, layer)


def _values(tensor: Tensor) -> Tensor:
    """What ``tensor`` stores, with a norm: of a sparse gradient (an embedding's) its values."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.to(torch.float64)  # tokens
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each tensor, (len,): NaN or inf exactly where a tensor holds one."""
    result = torch._foreach_norm([_values(tensor) for tensor in tensors], float("inf"))
    if any(norm.dtype != result[0].dtype for norm in result):
        result = [norm.to(torch.float64) for norm in result]
    return torch.stack(result)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """True where no tensor holds NaN or infinity. Waits for the device."""
    filled = [_values(tensor) if tensor.is_sparse else tensor for tensor in tensors if tensor.numel()]
    small = [tensor for tensor in filled if tensor.numel() <= SMALL]
    looked_at = filled
    if len(small) > 1:
        looked_at = [tensor for tensor in filled if tensor.numel() > SMALL]
        looked_at.append(_flatten_dense_tensors(small))
    # it may overflow, though
    return all_of_finite_sums(map(sum_of, looked_at)) or bool(torch.isfinite(norms(filled)).all())


def sum_of(tensor: Tensor) -> Tensor:
    """A dense tensor's sum, 0-dim: finite only where all terms are, and much cheaper than a look at each."""
    return tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)


def all_of_finite_sums(sums: Iterable[Tensor]) -> bool:
    """Whether all of some :func:`sum_of` are finite. Waits for the device."""
    return all(cmath.isfinite(s.item()) for s in sums)


def first_non_finite(tensors: Sequence[Tensor]) -> int | None:
    """Index of the first tensor that holds NaN or infinity. Waits for the device."""
    bad = (~torch.isfinite(norms(tensors))).nonzero()
    return int(bad[0]) if len(bad) else None


class StatusBuilder:
    """Collects, on the device and without waiting, where values first became non-finite.

    Every operation here is a launch of a few microseconds in every step: hence few, and all norms at once.
    """

    def __init__(self) -> None:
        self._causes: list[Callable[[StepSize], PcfastError]] = []
        # tensors, to be looked at in the end, or the norms of what will have changed by then
        self._noted: list[Sequence[Tensor] | Tensor] = []

    def _note(self, causes: list, tensors: Sequence[Tensor] | Tensor) -> None:
        self._causes += causes
        self._noted.append(tensors)

    def begin(self, x: Tensor, activations: Sequence[Tensor], loss_values: Sequence[Tensor]) -> None:
        """Note the input, the forward pass's vhat_1..vhat_L, and the loss with its gradient there.

        They must keep their values until :meth:`build`.
        """
        self._note([bad_input], [x])
        self._note([_diverged(0, l) for l in range(1, len(activations) + 1)], activations)
        self._note([bad_loss] * len(loss_values), loss_values)

    def observe(self, iteration: int, states: dict[int, Tensor]) -> None:
        """Note one iteration's states, layer -> tensor."""
        if states:
            self._note([_diverged(iteration, l) for l in states], norms(list(states.values())))

    def observe_first(self, first_bad: Tensor, num_steps: int) -> None:
        """Note a loop's own record: ``first_bad`` (L-1,), the iteration that first found layer l's state not
        finite, larger than ``num_steps`` where none did.
        """
        iterations = torch.arange(1, num_steps + 1, device=first_bad.device)
        fine = first_bad.unsqueeze(0) > iterations.unsqueeze(1)
        causes = [_diverged(t, l) for t in range(1, num_steps + 1) for l in range(1, len(first_bad) + 1)]
        self._note(causes, fine.log().flatten())  # log 0 is infinite

    def build(
        self, label_flaw: Tensor | None, results: Sequence[tuple[int, Tensor]], iteration: int | None = None
    ) -> Status:
        """The status, with ``results`` noted last: (layer, tensor) for what the relaxation gave in the end.

        ``iteration``: the one they are of; None where they are the whole relaxation's.
        """
        by_layer = sorted(results, key=lambda result: result[0])
        self._note([_diverged(iteration, layer) for layer, _ in by_layer], [value for _, value in by_layer])
        magnitudes = self._magnitudes()
        differences = magnitudes - magnitudes  # zero, or NaN for what is not finite
        # the first NaN is the maximum
        word = differences.argmax().masked_fill_(differences.sum() == 0, _FINE)
        if label_flaw is not None:
            word.masked_fill_(label_flaw, len(self._causes))
            self._causes.append(bad_labels)
        return Status(word, tuple(self._causes))

    def _magnitudes(self) -> Tensor:
        """One number for each cause."""
        tensors = [tensor for noted in self._noted if not isinstance(noted, Tensor) for tensor in noted]
        result, parts, begin = norms(tensors), [], 0
        for noted in self._noted:
            if isinstance(noted, Tensor):
                parts.append(noted)
            else:
                parts.append(result[begin : begin + len(noted)])
                begin += len(noted)
        return torch.cat(parts)


def failed(status: Status) -> Tensor:
    """Whether ``status`` says that the step failed: 0-dim bool on its device."""
    return status.word != _FINE


def zeroed_if_bad(status: Status, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, zeroed on the device where ``status`` says that the step failed; parts of one tensor a dtype."""
    bad = failed(status)
    result = list(gradients)
    for i, gradient in enumerate(result):
        if gradient.is_sparse:
            whole = gradient.coalesce()
            values = whole.values().masked_fill(bad, 0)
            result[i] = torch.sparse_coo_tensor(
                whole.indices(), values, whole.shape, is_coalesced=True, check_invariants=False
            )
    for dtype in {gradient.dtype for gradient in result if not gradient.is_sparse}:
        own = [i for i, gradient in enumerate(result) if gradient.dtype == dtype and not gradient.is_sparse]
        together = torch.cat([result[i].reshape(-1) for i in own]).masked_fill_(bad, 0)
        parts = together.split([result[i].numel() for i in own])
        for i, part in zip(own, parts, strict=True):
            result[i] = part.view(result[i].shape)
    return result


@dataclass
class _Pending:
    status: Status  # the word on the host
    arrived: torch.cuda.Event | None  # None where the word was on the host from the start
    step_size: StepSize


_pending: list[_Pending] = []
_lock = threading.Lock()


def defer(status: Status, step_size: StepSize) -> None:
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
