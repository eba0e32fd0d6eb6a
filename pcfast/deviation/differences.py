"""f(a + d) - f(a) of a module that pcfast does not know, to more digits than subtraction leaves.

Two nearly equal outputs of float32 differ in few digits. Three ways, by cost on the device at hand:

- "float64": the module is evaluated in float64 (:class:`Widening`), where its difference has digits enough, at relu's
  kinks too. On CPUs it costs twice the time, and as much on GPUs whose float64 is fast.
- "tangents": the difference is the integral over s in 0..1 of J(a + s d) d, by two Gauss-Legendre points in forward
  mode. Rows whose difference is large, or passes a kink, take the plain difference: it has the digits then.
- "plain": subtraction, where neither runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..precision import switched

WAYS = ("float64", "tangents", "plain")
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_GAUSS = 0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5
#: Times eps |f|, by rows: tangents that differ by less from the plain difference differ by its rounding.
_ROUNDING = 64.0

_switched_on = os.environ.get("PCFAST_PRECISE_DEVIATIONS", "1") != "0"


def use_precise_deviations(flag: bool) -> None:
    """Switch precise deviations of modules that pcfast does not know on or off for this process.

    On at first, unless PCFAST_PRECISE_DEVIATIONS=0. Off, they are differences of outputs: fewer digits, less time.
    """
    global _switched_on
    _switched_on = bool(flag)


def ways(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The ways to try for modules of ``dtype``, the cheapest first."""
    if not _switched_on or dtype not in _NARROW:
        return ("plain",)
    if device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_FLOAT64
    ):
        return WAYS
    return WAYS[1:]


class Widening(TorchFunctionMode):
    """In here every operation of this thread reads float64 in place of narrower floating tensors.

    Parameters stay what they are, and the output's graph still begins with them. What is written in place stays
    narrow.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        """The parameters have moved: cast them anew."""
        self._casts.clear()

    def start(self) -> None:
        """Cast the module's parameters once for all evaluations."""
        if not self._casts:
            for tensor in self._module.parameters():
                if tensor.dtype in _NARROW:
                    self._casts[id(tensor)] = tensor, tensor.to(torch.float64)

    def _wide(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _NARROW:
            return tensor
        known = self._casts.get(id(tensor))
        return tensor.to(torch.float64) if known is None else known[1]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__set__" or (name == "__get__" and func not in _VIEWS):
            result = func(*args, **kwargs)
            return torch.float64 if func == _DTYPE and result in _NARROW else result
        kept = 1 if _in_place(name) else 0  # arguments that are written
        wide = (*args[:kept], *tree_map_only(Tensor, self._wide, args[kept:]))
        named = {
            key: v if key == "out" else tree_map_only(Tensor, self._wide, v) for key, v in kwargs.items()
        }
        result = func(*wide, **named)
        narrowed = name in _CASTS and isinstance(result, Tensor) and result.dtype in _NARROW
        return wide[0].to(device=result.device, dtype=torch.float64) if narrowed else result


_DTYPE = torch.Tensor.dtype.__get__
_CASTS = {"to", "float", "half", "bfloat16", "type", "type_as"}
_VIEWS = {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "data")}


def _in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
        )
    return name.endswith("_")


def uncompiled(module: nn.Module):
    """Parts that torch.compile has compiled run as they are in here: compiled code has its dtypes built in."""
    if any(
        m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in module.modules()
    ):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def _differentiable_forwards():
    """Attention and recurrent layers take the kernels that have forward-mode rules."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(switched(torch.backends.mkldnn, "enabled", False))
        stack.enter_context(switched(torch.backends.cudnn, "enabled", False))
        stack.enter_context(torch.no_grad())
        yield


@functools.cache
def _load_forward_rules() -> None:
    """Import what torch imports in the first use of forward mode, without the warnings of its own making."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def tangent(evaluate, base: Tensor, d: Tensor) -> Tensor:
    """The integral of J(base + s d) d over s in 0..1 by two points; ``evaluate`` maps one tensor to one."""
    _load_forward_rules()
    total = None
    for share in _GAUSS:
        with _differentiable_forwards(), forward_ad.dual_level():
            out = forward_ad.unpack_dual(evaluate(forward_ad.make_dual(base + share * d, d))).tangent
        if out is None:
            raise NotImplementedError("no tangent arrives")
        total = out if total is None else total + out
    return total / len(_GAUSS)


def by_rows(tangents: Tensor, plain: Tensor, out: Tensor, eps: float) -> Tensor:
    """``tangents``, and ``plain`` in the rows where they differ by more than the rounding of ``out``."""
    if out.dim() == 0:
        return tangents

    def norms(tensor: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tensor.reshape(len(tensor), -1), dim=1)

    close = norms(tangents - plain) <= _ROUNDING * eps * norms(out)
    return torch.where(close.view(-1, *[1] * (out.dim() - 1)), tangents, plain)


def check_same(wide: Tensor, narrow: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where a module gives in float64 what rounding in ``dtype`` does not explain (seen on CPUs)."""
    if wide.shape != narrow.shape:
        raise ValueError("it gives another shape in float64")
    if wide.device.type == "cpu":
        away, size = (torch.linalg.vector_norm(t) for t in (wide - narrow, wide))
        if not away <= 3 * torch.finfo(dtype).eps ** 0.5 * size:
            raise ValueError("it gives other values in float64")
