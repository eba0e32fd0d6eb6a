"""Dtypes of a relaxation, and torch's numeric switches while it runs."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError
from .support.log import info_once

#: Precisions by name: float32 products in IEEE arithmetic, in TF32, under bfloat16 autocast; float64 parameters.
PRECISIONS = ("ieee", "tf32", "bf16", "fp64")


@dataclass(frozen=True)
class Precision:
    """Dtypes of a relaxation.

    Attributes:
        state: beliefs, errors, pre-activations, losses, sums.
        operand: what matrix products and convolutions read.
        autocast: dtype of the ambient autocast under which opaque modules run; None without autocast.
        note: what the user should know about the choice; "" where there is nothing to say.
    """

    state: torch.dtype
    operand: torch.dtype
    autocast: torch.dtype | None = None
    note: str = ""

    def to_operand(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.operand else tensor.to(self.operand)

    def to_state(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.state else tensor.to(self.state)


@dataclass(frozen=True)
class Operands:
    """What kernels' matrix products read: "ieee" (float32 as it is), "tf32" or "bf16".

    Attributes:
        linear, convolution: in linear layers and in convolutions, for which torch has a switch each.
    """

    linear: str
    convolution: str


def kernel_operands(device: torch.device, precision: Precision) -> Operands:
    """By ``precision`` and torch's switches; call it inside the relaxation's :func:`numerics`."""
    if precision.operand == torch.bfloat16:
        return Operands("bf16", "bf16")
    linear = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    if device.type != "cuda":  # no cuDNN whose switch there is
        return Operands(linear, linear)
    return Operands(linear, "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee")


def choose_precision(device_type: str, dtype: torch.dtype) -> Precision:
    """Dtypes for parameters of ``dtype`` under the ambient autocast (docs/behaviour.md)."""
    state = dtype if dtype == torch.float64 or dtype.is_complex else torch.float32
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if autocast == torch.bfloat16 and state == torch.float32:
        return Precision(state, torch.bfloat16, autocast)
    if autocast == torch.float16 and state == torch.float32:
        note = (
            "float16 autocast: float32 operands (TF32 on CUDA), since small deviations underflow in float16"
        )
        info_once(note)
        return Precision(state, state, autocast, note)
    operand = torch.bfloat16 if dtype == torch.bfloat16 else state
    return Precision(state, operand, autocast)


@contextlib.contextmanager
def numerics(device: torch.device, precision: Precision):
    """No autograd, dtypes as planned; on CUDA deterministic convolutions, and TF32 under float16 autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(switched(torch.backends.cudnn, "deterministic", True))
            if precision.autocast == torch.float16:
                stack.enter_context(switched(PRODUCTS, "state", PRODUCTS.of("tf32")))
        yield


_switch_lock = threading.Lock()
# (owner's id, name) -> (how many rely on it now, value before the first)
_switch_users: dict[tuple[int, str], tuple[int, object]] = {}


@contextlib.contextmanager
def switched(owner, name: str, value):
    """Set one of torch's process-wide switches; the last thread to leave puts it back."""
    key = (id(owner), name)
    with _switch_lock:
        users, before = _switch_users.get(key, (0, getattr(owner, name)))
        _switch_users[key] = (users + 1, before)
        setattr(owner, name, value)
    try:
        yield
    finally:
        with _switch_lock:
            users, before = _switch_users[key]
            _switch_users[key] = (users - 1, before)
            if users == 1:
                del _switch_users[key]
                setattr(owner, name, before)


class Products:
    """Precision of float32 matrix products on CUDA, by torch's newer switch and by the older one.

    Where the two differ torch raises as soon as the older one is read, which torch.compile does.
    """

    @property
    def state(self) -> tuple[str | None, str, str]:
        """The older switch (None: it differs already, and cannot be read), the newer, and the CPU's newer one."""
        newer = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        try:
            return torch.get_float32_matmul_precision(), *newer
        except RuntimeError:
            return None, *newer

    @state.setter
    def state(self, value: tuple[str | None, str, str]) -> None:
        older, on_cuda, on_cpu = value
        if older is not None:
            torch.set_float32_matmul_precision(older)  # sets the newer ones, too
        torch.backends.cuda.matmul.fp32_precision = on_cuda
        torch.backends.mkldnn.matmul.fp32_precision = on_cpu

    def of(self, precision: str) -> tuple[str | None, str, str]:
        """The state for "ieee" or "tf32"; the CPU's products stay as they are."""
        older, _, on_cpu = self.state
        return older and ("high" if precision == "tf32" else "highest"), precision, on_cpu


class Convolutions:
    """Precision of cuDNN: of convolutions and recurrent layers, and by the older switch of both.

    Where the three differ torch raises as soon as the older one is read, which torch.export and cudnn.flags do.
    """

    @property
    def state(self) -> tuple[bool | None, str, str]:
        """The older switch (None: as for :class:`Products`), that of convolutions, that of recurrent layers."""
        cudnn = torch.backends.cudnn
        newer = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        try:
            return cudnn.allow_tf32, *newer
        except RuntimeError:
            return None, *newer

    @state.setter
    def state(self, value: tuple[bool | None, str, str]) -> None:
        older, convolutions, recurrent = value
        if older is not None:
            torch.backends.cudnn.allow_tf32 = older  # sets the newer ones, too
        torch.backends.cudnn.conv.fp32_precision = convolutions
        torch.backends.cudnn.rnn.fp32_precision = recurrent

    def of(self, precision: str) -> tuple[bool | None, str, str]:
        """The state for "ieee" or "tf32"."""
        older = self.state[0]
        return None if older is None else precision == "tf32", precision, precision


PRODUCTS, CONVOLUTIONS = Products(), Convolutions()


def parameter_dtype(name: str) -> torch.dtype:
    """The dtype that a network's parameters and data have in the precision ``name``."""
    return torch.float64 if name == "fp64" else torch.float32


def check_precision(name: str, device: torch.device) -> None:
    """Raise ArgumentError for an unknown name, and for "tf32" off a CUDA device."""
    if name not in PRECISIONS:
        raise ArgumentError("precision", repr(name), f"one of {PRECISIONS}")
    if name == "tf32" and device.type != "cuda":
        raise ArgumentError(
            "precision", f"tf32 on {device.type}", "a CUDA device for tf32", "Use ieee or bf16 here."
        )


@contextlib.contextmanager
def use_precision(name: str, device: torch.device):
    """Torch's switches for a precision by name; what they were comes back afterwards.

    Args:
        name: "ieee": float32 products and convolutions without TF32. "tf32": with it. "bf16": autocast to
            bfloat16. "fp64": nothing to switch; parameters and data are float64 (:func:`parameter_dtype`).

    Raises:
        ArgumentError: as :func:`check_precision`.
    """
    check_precision(name, device)
    products = "tf32" if name == "tf32" else "ieee"
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            for switch in (PRODUCTS, CONVOLUTIONS):
                stack.enter_context(switched(switch, "state", switch.of(products)))
        if name == "bf16":
            stack.enter_context(_bfloat16_autocast(device.type))
        yield


@contextlib.contextmanager
def _bfloat16_autocast(device_type: str):
    """As torch.autocast, which without CUDA leaves that of "cuda" off: what is planned for a GPU needs none."""
    if device_type != "cuda" or torch.cuda.is_available():
        with torch.autocast(device_type, torch.bfloat16):
            yield
        return
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
