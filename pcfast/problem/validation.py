"""Checks at the boundary: every message says what was given, what is needed, and what to do."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import checked_number
from ..errors import ArgumentError, ArgumentTypeError, ModelError, NonFiniteError, ShapeError, TransformError
from ..model.placement import DTYPES
from ..model.spec import Network
from . import status
from .belief_optimizers import StepSize
from .plan import METHODS, canonical, in_words


def checked_method(method: str, *, moves: bool = False) -> str:
    """``method`` by its own name: :data:`pcfast.problem.plan.ALIASES` are the field's other words.

    Args:
        moves: something moves the parameters in every iteration, which "incremental" needs.

    Raises:
        ArgumentError: none whose updates are one relaxation's.
    """
    method = canonical(method)
    if method == "incremental":
        if moves:
            return method
        raise ArgumentError(
            "method",
            "'incremental', which moves the parameters in every iteration",
            f"a method whose updates are one relaxation's: one of {METHODS}",
            "Use pcfast.incremental_step.",
        )
    if method not in METHODS:
        raise ArgumentError(
            "method", repr(method), f"one of {METHODS}", f"Other words for them: {in_words()}."
        )
    return method


def fixed_settings(method: str, depth: int, step_size, num_steps):
    """(step_size, num_steps) as the method runs: "zero_divergence" fixes both, step size 1 and L iterations."""
    return (1.0, depth) if method == "zero_divergence" else (step_size, num_steps)


def check_choice(check: str) -> None:
    if check not in status.CHECKS:
        raise ArgumentError("check", repr(check), f"one of {status.CHECKS}")


def checked_steps(num_steps: int) -> int:
    """``num_steps`` as an int >= 0."""
    try:
        if isinstance(num_steps, bool):
            raise TypeError
        num_steps = operator.index(num_steps)
    except TypeError:
        raise ArgumentTypeError(
            "num_steps", f"{num_steps!r} ({type(num_steps).__name__})", "an int >= 0"
        ) from None
    if num_steps < 0:
        raise ArgumentError("num_steps", str(num_steps), "an int >= 0")
    return num_steps


def checked_step_size(step_size: float) -> float:
    """``step_size`` as a finite float >= 0."""
    if isinstance(step_size, bool) or not isinstance(step_size, numbers.Real):
        raise ArgumentTypeError("step_size", f"{step_size!r} ({type(step_size).__name__})", "a number >= 0")
    try:
        step_size = float(step_size)
    except OverflowError:
        step_size = math.inf
    if not math.isfinite(step_size) or step_size < 0:
        raise ArgumentError("step_size", repr(step_size), "a finite number >= 0")
    return step_size


def checked_step_sizes(step_size, num_steps: int) -> StepSize:
    """``step_size`` as a finite float >= 0; a sequence or a 1-d array as a tuple of ``num_steps`` of them."""
    if isinstance(step_size, Tensor | np.ndarray) and step_size.ndim == 1:
        step_size = step_size.tolist()
    if not isinstance(step_size, list | tuple):
        return checked_step_size(step_size)
    sizes = tuple(map(checked_step_size, step_size))
    if len(sizes) != num_steps:
        raise ArgumentError(
            "step_size", f"a schedule of {len(sizes)} numbers", f"one number, or one an iteration: {num_steps}",
            "Iteration t uses step_size[t-1].",
        )  # fmt: skip
    return sizes


def check_step_fits(step_size: StepSize, dtype: torch.dtype) -> None:
    """Raise ArgumentError where a step size is no finite number of the state's ``dtype``."""
    largest = max(step_size, default=0.0) if isinstance(step_size, tuple) else step_size
    limit = torch.finfo(dtype).max
    if largest > limit:
        raise ArgumentError(
            "step_size", f"{largest!r}, infinite in {dtype}", f"at most {limit:.3g}",
            "Relaxation diverges long before: docs/guide.md says what is safe (step sizes).",
        )  # fmt: skip


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ArgumentError where ``value`` is no int >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(name, f"{value!r} ({type(value).__name__})", f"an int >= {least}")
    if value < least:
        raise ArgumentError(name, str(value), f"an int >= {least}")


def checked_device(device: torch.device | str) -> torch.device:
    """``device`` as a device that this machine has.

    Raises:
        ArgumentError: no device's name, or one that is not here.
    """
    needed = "cpu, cuda, or cuda:NUMBER"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError("device", repr(device), needed) from error
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).cpu()
        except Exception as error:  # each kind of device has its own
            raise ArgumentError("device", str(device), f"{needed}, or another one that is here") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ArgumentError(
                "device", str(device), "cpu: torch sees no CUDA device here", "See `pcfast info`."
            )
        if device.index is not None and device.index >= count:
            raise ArgumentError("device", str(device), f"cuda:0 to cuda:{count - 1}")
    return device


def check_no_transform() -> None:
    """Raise inside ``torch.func`` (grad, vmap, jvp ...), whose tensors carry a transformation of their own."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise TransformError(
            "pcfast does not run inside torch.func.grad, vmap, jvp and their kin: updates come from a relaxation, "
            "which they cannot transform. Call pc_loss(...).backward(), or torch.autograd.grad; "
            "torch.func.functional_call is fine."
        )


_TOKENS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def check_input(
    x: Tensor, network: Network | None, placement: tuple[torch.device, torch.dtype] | None
) -> torch.dtype:
    """Check x against the model's device and dtype; returns the dtype of the parameters (or of x).

    Integers are taken where layer 1 begins with a module that pcfast does not know.

    Args:
        network: the model's; None: integers are not taken.
        placement: of the model (:func:`pcfast.model.placement.common_placement`).
    """
    if not isinstance(x, Tensor):
        raise ArgumentTypeError("x", f"a {type(x).__name__}", "a torch.Tensor of shape (batch, ...)")
    _check_kind(x)
    real = x.dtype in DTYPES
    if not (real or x.dtype in DTYPES.values()):
        tokens = x.dtype in _TOKENS
        if not tokens or network is None or not network.takes_integers:
            raise ArgumentTypeError(
                "x",
                f"dtype {x.dtype}",
                "a floating dtype",
                "Convert with x.to(torch.float32), or let layer 1 begin with what embeds it (nn.Embedding)."
                if tokens
                else f"One of {[str(dtype).removeprefix('torch.') for dtype in DTYPES]}, or complex.",
            )
    least = 1 if x.dtype in _TOKENS else 2
    if x.dim() < least:
        raise ShapeError(
            "x",
            f"shape {tuple(x.shape)}",
            f"(batch, ...) with at least {least} dimensions",
            "x.unsqueeze(0)?",
        )
    if x.shape[0] == 0 or x.numel() == 0:
        raise ShapeError("x", f"shape {tuple(x.shape)}, an empty batch", "at least one row")
    if x.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            "x",
            "a tensor that requires grad",
            "data without grad: predictive coding clamps its input",
            "Pass x.detach().",
        )
    if placement is None:
        return x.dtype if real or x.is_complex() else torch.get_default_dtype()
    device, dtype = placement
    if x.device != device:
        raise ArgumentError(
            "x", f"a tensor on {x.device}", f"{device}, where the model is", f"x.to('{device}')"
        )
    if x.is_meta:
        raise ArgumentError(
            "x", "a tensor on the meta device, without values, as the model's", "tensors with values"
        )
    if x.dtype == dtype or x.dtype in _TOKENS or torch.is_autocast_enabled(x.device.type):
        return dtype
    if DTYPES.get(x.dtype) == dtype and network is not None and network.opaque:
        return dtype  # a complex network that may well take real inputs: its own modules decide
    if x.is_complex() and not dtype.is_complex:
        remedy = "Pass torch.view_as_real(x), or x.real."
    else:
        remedy = f"Convert x with x.to({dtype}), or use autocast."
    raise ArgumentTypeError("x", f"dtype {x.dtype}", f"the model's dtype {dtype}", remedy)


def _check_kind(x: Tensor) -> None:
    if x.is_nested:
        raise ArgumentTypeError("x", "a nested tensor", "a dense tensor", "Call x.to_padded_tensor(padding).")
    if x.layout != torch.strided:
        raise ArgumentTypeError("x", f"layout {x.layout}", "a dense tensor", "Call x.to_dense().")
    if hasattr(x, "has_names") and x.has_names():  # torch 2.13 has none
        raise ArgumentTypeError("x", "a tensor with named dimensions", "one without", "Call x.rename(None).")


def check_target_placement(x: Tensor, y, *, by_rows: bool) -> None:
    """y, where it is a tensor, lies with x and, with ``by_rows``, has as many rows."""
    if not isinstance(y, Tensor):
        return
    if y.device != x.device:
        raise ArgumentError("y", f"a tensor on {y.device}", f"{x.device}, where x is", f"y.to('{x.device}')")
    if by_rows and y.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            "y",
            "a tensor that requires grad",
            "data without grad",
            "Pass y.detach(), or a loss of your own, which is differentiated by y too.",
        )
    if by_rows and y.dim() and y.shape[0] != x.shape[0]:
        raise ShapeError("y", f"{y.shape[0]} rows", f"{x.shape[0]} rows, as x has", "Mismatched batch.")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise where ``tensor`` (rows, ...) holds NaN or infinity. Waits for the device."""
    # a sum that is finite says enough; one that is not may have overflown
    fine = tensor.is_floating_point() and math.isfinite(tensor.sum().item())
    if not fine and not status.all_finite([tensor]):
        rows = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            name, f"NaN or infinity in row {rows[0]}" + (f" and {len(rows) - 1} more" if rows[1:] else ""),
            "finite values", "Clean or normalise the data.",
        )  # fmt: skip


def checked_start(vinit, depth: int, x: Tensor, method: str) -> list[Tensor | float | None] | None:
    """``vinit`` as a list of L+1 entries of which the first is x; None where there is none.

    A number stands for all units of all hidden layers.

    Raises:
        ArgumentError and its kinds: naming vinit or its entry.
    """
    if vinit is None:
        return None
    if method != "strict":
        raise ArgumentError("vinit", f"beliefs with method {method!r}", 'None, or method="strict"')
    if isinstance(vinit, numbers.Real) and not isinstance(vinit, bool):
        most = torch.finfo(x.dtype if x.is_floating_point() else torch.float32).max
        needed = f"a finite number of at most {most:.3g}, or a list of beliefs"
        number = checked_number("vinit", vinit, lambda v: abs(v) <= most, needed)
        return [x, *[number] * (depth - 1), None]
    if not isinstance(vinit, list | tuple) or len(vinit) != depth + 1:
        given = f"{len(vinit)} entries" if isinstance(vinit, list | tuple) else f"a {type(vinit).__name__}"
        raise ArgumentError(
            "vinit",
            given,
            f"a number, or a list of {depth + 1} beliefs v_0..v_{depth} (entries may be None)",
        )
    for index, entry in enumerate(vinit):
        if entry is None:
            continue
        if not isinstance(entry, Tensor):
            raise ArgumentTypeError(f"vinit[{index}]", f"a {type(entry).__name__}", "a tensor or None")
        if entry.device != x.device:
            raise ArgumentError(f"vinit[{index}]", f"a tensor on {entry.device}", f"{x.device}, where x is")
        if index and entry.shape[:1] != x.shape[:1]:
            raise ShapeError(f"vinit[{index}]", f"shape {tuple(entry.shape)}", f"{len(x)} rows, as x has")
    first = vinit[0]
    if first is not None and first is not x and not (first.shape == x.shape and bool((first == x).all())):
        raise ArgumentError(
            "vinit[0]", "values that differ from x", "x itself or None", "Strict relaxation clamps the input."
        )
    return [x, *(None if entry is None else entry.detach() for entry in vinit[1:])]


def check_start_of_all(vinit, method: str) -> None:
    """Raise where ``vinit`` is no number for the hidden beliefs of every batch, or goes with another method."""
    if vinit is None:
        return
    if not isinstance(vinit, numbers.Real) or isinstance(vinit, bool):
        raise ArgumentTypeError(
            "vinit", f"a {type(vinit).__name__}", "a number for all hidden beliefs, or None"
        )
    checked_start(vinit, 1, torch.empty(0, dtype=torch.float64), method)


def check_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """``optimizer`` moves some of ``parameters``, the model's, and nothing else, and needs no closure."""
    if not isinstance(optimizer, Optimizer):
        raise ArgumentTypeError("optimizer", f"a {type(optimizer).__name__}", "an optimiser of torch.optim")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ArgumentError("optimizer", "LBFGS", "an optimiser whose step() needs no closure", "E.g. Adam.")
    known = {id(p) for p in parameters}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ArgumentError(
            "optimizer", "parameters that the model does not have", "parameters of this model"
        )


def check_moving_precision(device_type: str, dtype: torch.dtype) -> None:
    """ "incremental" needs parameters and products of float32 or float64 (docs/methods.md says why)."""
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    if dtype in (torch.bfloat16, torch.float16) or autocast == torch.bfloat16:
        given = f"parameters of {dtype}" if dtype in (torch.bfloat16, torch.float16) else "bfloat16 autocast"
        raise ArgumentTypeError(
            "model",
            f"{given} with method 'incremental'",
            "float32 or float64",
            "Beliefs follow predictions that the optimiser moves: their small difference, the error, is lost in "
            "16 bits.",
        )


def check_trainable(model: nn.Sequential) -> None:
    """Raise for a Sequential without any parameter (an empty one has its own error)."""
    if isinstance(model, nn.Sequential) and len(model) and next(model.parameters(), None) is None:
        raise ModelError(
            "model",
            "a model without parameters",
            "at least one parameter to train",
            "Use pcfast.relax to only infer.",
        )
