"""Drop-in for Torch2PC (Rosenbaum, 2022): its six functions, signatures, return lists and side effects.

    from pcfast.torch2pc import PCInfer      # instead of TorchSeq2PC
    vhat, Loss, dLdy, v, epsilon = PCInfer(model, LossFun, X, Y, "Strict", eta=0.1, n=20)
    optimizer.step()                          # .grad holds the updates

Each function takes ``backend=`` besides. Lists have L+1 entries, l = 0..L. ``.grad`` is assigned, never
accumulated. docs/torch2pc.md lists every deliberate difference. Tensors returned carry no autograd graph.
"""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from .errors import ArgumentError, ShapeError
from .model.describe import describe
from .problem.settings import Settings
from .problem.types import Wanted
from .relaxation.result import relax
from .relaxation.solve import solve, updates
from .support import differentiation

#: Torch2PC's ErrType -> method
_METHODS = {"Exact": "exact", "FixedPred": "fixed_prediction", "Strict": "strict"}
#: argument in the rest of pcfast -> the caller's word
_WORDS = {"x": "X", "y": "Y", "loss": "LossFun", "step_size": "eta", "num_steps": "n"}

__all__ = [
    "ExactPredErrs",
    "FixedPredPCPredErrs",
    "FwdPassPlus",
    "PCInfer",
    "SetPCGrads",
    "StrictPCPredErrs",
]


@contextlib.contextmanager
def _in_torch2pc_words():
    """Errors name the argument as the caller wrote it."""
    try:
        yield
    except ArgumentError as error:
        if error.argument not in _WORDS:
            raise
        raise type(error)(_WORDS[error.argument], error.given, error.needed, error.remedy) from None


@_in_torch2pc_words()
def FwdPassPlus(model: nn.Sequential, LossFun, X: Tensor, Y, *, backend: str = "auto"):
    """Forward pass: ``vhat, Loss, dLdy``.

    Returns:
        vhat_0..vhat_L (vhat_0 is X), the loss (0-dim), dLoss/dvhat_L.
    """
    settings = Settings(LossFun, "exact", backend=backend, check="sync")
    outcome, _ = solve(model, X, Y, settings, Wanted(gradients=False, activations=True))
    return outcome.activations, outcome.loss, outcome.output_gradient


@_in_torch2pc_words()
def FixedPredPCPredErrs(
    model: nn.Sequential,
    vhat: list[Tensor],
    dLdy: Tensor,
    eta: float = 1,
    n: int | None = None,
    *,
    backend: str = "auto",
):
    """Fixed-prediction relaxation round ``vhat``: ``v, epsilon``.

    Args:
        vhat: activations vhat_0..vhat_L. dLdy: error at the output. n: None means L iterations.

    Returns:
        v_0..v_L and eps_0..eps_L; v_0 moves too, eps_L is dLdy.
    """
    activations = _activations("vhat", vhat, model)
    if not isinstance(dLdy, Tensor) or dLdy.shape != activations[-1].shape:
        given = f"shape {tuple(dLdy.shape)}" if isinstance(dLdy, Tensor) else f"a {type(dLdy).__name__}"
        raise ShapeError("dLdy", given, f"a tensor of the output's shape {tuple(activations[-1].shape)}")
    num_steps = len(model) if n is None else n
    settings = Settings(None, "fixed_prediction", eta, num_steps, backend=backend, check="sync")
    outcome, _ = solve(
        model, activations[0], None, settings, Wanted(gradients=False, states=True, input_error=True),
        activations=activations, output_gradient=dLdy.detach(),
    )  # fmt: skip
    return outcome.beliefs, outcome.errors


@_in_torch2pc_words()
def StrictPCPredErrs(
    model: nn.Sequential, vinit: list[Tensor], LossFun, Y, eta: float, n: int, *, backend: str = "auto"
):
    """Strict relaxation from ``vinit``: ``v, epsilon``.

    Args:
        vinit: beliefs v_0..v_L to start from; v_0 is the clamped input.

    Returns:
        v_0..v_L (v_0 and v_L stay) and eps_0..eps_L (eps_0 is None).
    """
    start = _activations("vinit", vinit, model)
    result = relax(
        model,
        start[0],
        Y,
        loss=LossFun,
        method="strict",
        step_size=eta,
        num_steps=n,
        backend=backend,
        vinit=start,
        check="sync",
    )
    return result.beliefs, result.errors


@_in_torch2pc_words()
def ExactPredErrs(
    model: nn.Sequential, LossFun, X: Tensor, Y, vhat: list[Tensor] | None = None, *, backend: str = "auto"
):
    """Backpropagation's errors: ``v, epsilon`` with eps_l = dLoss/dvhat_l and v_l = vhat_l - eps_l.

    Returns:
        v_0..v_L and eps_0..eps_L; both begin with None.
    """
    settings = Settings(LossFun, "exact", backend=backend, check="sync")
    activations = None if vhat is None else _activations("vhat", vhat, model)
    outcome, _ = solve(model, X, Y, settings, Wanted(gradients=False, states=True), activations=activations)
    return [None, *outcome.beliefs[1:]], outcome.errors


@_in_torch2pc_words()
def SetPCGrads(
    model: nn.Sequential,
    epsilon: list[Tensor],
    X: Tensor,
    v: list[Tensor] | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Assign ``.grad`` of every parameter from errors and beliefs.

    dtheta_l = (df_l(v_{l-1})/dtheta_l)^T eps_l. Parameters not in use, or frozen, get None; a parameter shared
    by layers gets the sum.

    Args:
        epsilon: eps_0..eps_L (eps_0 is not read). v: beliefs v_0..v_L, None for a forward pass from X.
    """
    errors = _activations("epsilon", [X, *list(epsilon)[1:]], model)
    beliefs = None if v is None else _activations("v", v, model)
    _assign(model, updates(model, X, beliefs, errors, backend=backend))


@_in_torch2pc_words()
def PCInfer(
    model: nn.Sequential,
    LossFun,
    X: Tensor,
    Y,
    ErrType: str,
    eta: float = 0.1,
    n: int | None = 20,
    vinit: list[Tensor | None] | None = None,
    *,
    backend: str = "auto",
):
    """One predictive-coding step: ``vhat, Loss, dLdy, v, epsilon``; ``.grad`` holds the updates.

    Args:
        ErrType: "Exact", "FixedPred" or "Strict". eta, n: step size and number of steps (n=None: L steps for
            FixedPred). vinit: beliefs to start from (Strict only).

    Raises:
        ArgumentError and its kinds, BackendError, RelaxationDiverged; ``.grad`` is untouched then.
    """
    if not isinstance(ErrType, str) or ErrType not in _METHODS:
        raise ArgumentError("ErrType", repr(ErrType), f"one of {tuple(_METHODS)}")
    method = _METHODS[ErrType]
    if n is None and method == "fixed_prediction":
        n = describe(model).depth
    if method == "exact":
        eta, n = 0.0, 0  # not read, as documented
    settings = Settings(LossFun, method, eta, n, backend=backend, vinit=vinit, check="sync")
    outcome, _ = solve(model, X, Y, settings, Wanted(states=True, input_error=method == "fixed_prediction"))
    _assign(model, outcome.gradients)
    beliefs = outcome.beliefs
    if method == "exact":
        beliefs = [None, *beliefs[1:]]
    return outcome.activations, outcome.loss, outcome.output_gradient, beliefs, outcome.errors


def _assign(model: nn.Sequential, gradients: dict) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    for parameter, gradient in gradients.items():  # those too that a layer or the loss uses without the model
        differentiation.assign_gradient(parameter, gradient)


def _activations(name: str, values, model: nn.Sequential) -> list[Tensor]:
    """``values`` detached, checked to be one tensor for each of l = 0..L."""
    network = describe(model)
    if not isinstance(values, list | tuple) or len(values) != network.depth + 1:
        given = f"{len(values)} entries" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise ArgumentError(name, given, f"a list of {network.depth + 1} tensors, l = 0..{network.depth}")
    for index, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise ArgumentError(f"{name}[{index}]", f"a {type(value).__name__}", "a tensor")
    if values[0].dim() >= 2:  # X itself is checked later
        for l, shapes in enumerate(network.shapes(tuple(values[0].shape)), start=1):
            if shapes is not None and values[l].shape != shapes[-1]:
                raise ShapeError(
                    f"{name}[{l}]", f"shape {tuple(values[l].shape)}", f"{shapes[-1]}, as layer {l} gives"
                )
    return [value.detach() for value in values]
