"""Divergence and bad values: found on the device, reported once the host can know.

On CPU, and with check="sync", problems raise at once. On CUDA the step ends with a 0-dim status word on the
device; it is copied to the host without waiting, and the next pcfast call that finds the copy finished raises,
as does :func:`synchronize`. The failed step's gradients were zeroed on the device.
"""

from __future__ import annotations

import cmath
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError, NonFiniteError, PcfastError, RelaxationDiverged

CHECKS = ("auto", "sync", "deferred", "off")

_FINE = -1
_BAD_INPUT = -2
_BAD_LABELS = -3
_BAD_RESULTS = -10  # minus the layer
_LAYERS = 1 << 20  # status = iteration * _LAYERS + layer


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
        self._rows: list[tuple[list[int], Tensor]] = []  # codes and norms

    def observe(self, iteration: int, states: dict[int, Tensor]) -> None:
        """Note one iteration's states, layer -> tensor."""
        if states:
            self._rows.append(
                ([iteration * _LAYERS + layer for layer in states], norms(list(states.values())))
            )

    def build(
        self,
        x: Tensor,
        label_flaw: Tensor | None,
        activations: Sequence[Tensor],
        results: Sequence[tuple[int, Tensor]],
    ) -> Tensor:
        """The status word, 0-dim int64. ``results``: (layer, tensor) for what the relaxation gave in the end."""
        rows = [([_BAD_INPUT], norms([x]))]
        rows.append((list(range(1, len(activations) + 1)), norms(activations)))
        rows += self._rows
        by_layer = sorted(results, key=lambda result: result[0])
        rows.append(
            ([_BAD_RESULTS - layer for layer, _ in by_layer], norms([value for _, value in by_layer]))
        )
        values = torch.cat([row for _, row in rows])
        codes = _codes(tuple(code for row_codes, _ in rows for code in row_codes), x.device)
        bad = ~torch.isfinite(values)
        # gather, since indexing with a 0-dim tensor would wait for the device
        first = codes.gather(0, bad.to(torch.int8).argmax().reshape(1)).reshape(())
        status = torch.where(bad.any(), first, _FINE)
        if label_flaw is not None:
            status = torch.where(label_flaw, _BAD_LABELS, status)
        return status


_code_tables: dict[tuple, Tensor] = {}


def _codes(codes: tuple[int, ...], device: torch.device) -> Tensor:
    """A constant table on the device: made once, since filling it from the host cannot be captured.

    Never dropped: recorded graphs read it at its address.
    """
    key = (device, codes)
    if key not in _code_tables:
        _code_tables[key] = torch.tensor(codes, dtype=torch.int64, device=device)
    return _code_tables[key]


def error_of(code: int, step_size: float) -> PcfastError | None:
    """The exception that a status word stands for, or None."""
    if code == _FINE:
        return None
    if code == _BAD_INPUT:
        return NonFiniteError("x", "NaN or infinity", "finite values", "Clean or normalise the data.")
    if code == _BAD_LABELS:
        return ArgumentError("y", "labels out of range", "labels from 0 to the number of classes - 1")
    if code <= _BAD_RESULTS:
        return RelaxationDiverged(None, _BAD_RESULTS - code, step_size)
    return RelaxationDiverged(code // _LAYERS, code % _LAYERS, step_size)


def zero_if_bad(status: Tensor, gradients: Sequence[Tensor]) -> None:
    """Zero the gradients in place, on the device, where ``status`` says that the step failed."""
    failed = status != _FINE
    for gradient in gradients:
        gradient.masked_fill_(failed, 0)


@dataclass
class _Pending:
    code: Tensor  # on the host
    arrived: torch.cuda.Event | None  # None where the status was on the host from the start
    step_size: float


_pending: list[_Pending] = []
_lock = threading.Lock()


def defer(status: Tensor, step_size: float) -> None:
    """Copy a status word to the host without waiting; a later call raises what it says.

    Not while the caller captures a CUDA graph: what a replay finds cannot be reported (its gradients are zeroed).
    """
    if status.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return
        code = torch.empty((), dtype=torch.int64, pin_memory=True)
        code.copy_(status, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(status.device))
    else:
        code, arrived = status.clone(), None
    with _lock:
        _pending.append(_Pending(code, arrived, step_size))


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
            failure = error_of(int(entry.code), entry.step_size)
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
