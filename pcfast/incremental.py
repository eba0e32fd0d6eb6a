"""Incremental predictive coding (iPC): parameters move after every iteration of the relaxation.

Salvatori et al., "A stable, fast, and fully automatic learning algorithm for predictive coding networks", ICLR 2024;
docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ArgumentError
from .losses import LossLike
from .model.graph import Graph
from .problem import reductions, validation
from .problem.belief_optimizers import BeliefOptimizer
from .problem.plan import canonical
from .problem.settings import Precisions, Settings, StepSizes
from .problem.types import Wanted
from .relaxation import on_graphs
from .relaxation.solve import loss_without_updates, prepare, solve
from .support import differentiation


def incremental_step(
    model: nn.Sequential | Graph,
    x: Tensor | Mapping[str, Tensor] | None,
    y: Tensor | Mapping[str, Tensor] | None,
    optimizer: Optimizer,
    *,
    loss: LossLike | Mapping[str, LossLike] = "cross_entropy",
    method: str = "incremental",
    step_size: StepSizes = 0.1,
    num_steps: int = 20,
    belief_optimizer: BeliefOptimizer | None = None,
    backend: str = "auto",
    reduction: str = "sum",
    update_scale: float = 1.0,
    normalizer: int | None = None,
    check: str = "auto",
    clamp: Mapping[str, Tensor] | None = None,
    precision: Precisions | None = None,
    return_output: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One batch of incremental predictive coding: ``num_steps`` iterations, ``num_steps`` optimiser steps.

        loss = pcfast.incremental_step(model, x, y, optimizer, step_size=0.1, num_steps=20)

    v_l starts at the forward pass. Every iteration takes errors at the beliefs and parameters of the moment,

        eps_l = f_l(v_{l-1}; theta_l) - v_l      eps_L = dLoss/dmu_L

    and from these same beliefs, errors and parameters moves both:

        v_l <- v_l + step_size (eps_l - J_{l+1}^T eps_{l+1})
        theta_l <- what the optimiser makes of .grad = (df_l/dtheta_l)^T eps_l

    ``belief_optimizer`` moves the beliefs down that same gradient with momentum and weight decay, or by Adam
    (docs/method.md). What it remembers of past gradients begins and ends with the call.

    There is nothing to call ``backward`` on, and nothing for a GradScaler to scale. Random numbers and BatchNorm
    statistics behave as in :func:`pcfast.pc_loss`: one draw, one move a call. Runs under ``torch.no_grad()`` too.
    Under ``torch.compile`` it runs outside the graph.

    Args: as :func:`pcfast.pc_loss`, and
        method: "incremental" or "ipc": so that a preset's is taken.
        optimizer: of parameters of ``model``; any whose ``step()`` needs no closure. What it does not hold stays.

    Returns:
        The forward pass's loss, 0-dim and detached, from before anything moved; with ``return_output`` the pair
        ``(loss, output)``. ``.grad`` of the model's parameters holds the last iteration's updates afterwards (None
        where a parameter is not in use); what it held before is dropped.

    Raises:
        ArgumentError and its kinds, BackendError: before anything has moved.
        RelaxationDiverged: at once, the parameters stay as the iteration before left them; deferred, the failed
            iteration's updates are zero.
    """
    if canonical(method) != "incremental":
        raise ArgumentError(
            "method", repr(method), "'incremental' or 'ipc'", "Use pcfast.pc_loss for the others."
        )
    settings = Settings(
        loss, method, step_size, num_steps, belief_optimizer, backend=backend, reduction=reduction,
        update_scale=update_scale, normalizer=normalizer, check=check, precision=precision,
    )  # fmt: skip
    return step_with(settings, model, x, y, optimizer, return_output, clamp)


def step_with(
    settings: Settings,
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    return_output: bool = False,
    clamp: Mapping[str, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`incremental_step`."""
    on_graph = isinstance(model, Graph) or settings.beyond_chains or clamp is not None
    if not on_graph and torch.compiler.is_dynamo_compiling():
        from . import compiled  # here: it needs torch's compiler, which takes long to import

        return compiled.incremental_step(settings, model, x, y, optimizer, return_output)
    validation.check_trainable(model)
    validation.check_optimizer(optimizer, model.parameters())
    parameters = list(model.parameters())
    given = on_graphs.given_tensor(x, y, clamp) if on_graph else x
    share = reductions.share(settings.reduction, given, settings.normalizer)

    def move(updates: dict[nn.Parameter, Tensor]) -> None:
        scale = share * settings.update_scale
        if scale != 1.0:
            updates = dict(zip(updates, torch._foreach_mul(list(updates.values()), scale), strict=True))
        for parameter in parameters:
            differentiation.assign_gradient(parameter, updates.get(parameter))
        optimizer.step()
        torch.clear_autocast_cache()  # it would keep casts of the weights of before

    if on_graph:
        outcome, _ = on_graphs.solve(model, x, y, settings, clamp, move=move)
    else:
        outcome, _ = solve(model, x, y, settings, move=move)
    value = reductions.reduced(outcome.loss, share)
    return (value, outcome.output) if return_output else value


def rehearse(
    settings: Settings, model: nn.Sequential | Graph, x: Tensor, y: Tensor, optimizer: Optimizer
) -> None:
    """Raise what :func:`step_with` would raise before anything moves. Statistics move as in ``model(x)``."""
    validation.check_trainable(model)
    validation.check_optimizer(optimizer, model.parameters())
    with torch.no_grad():
        if isinstance(model, Graph) or settings.beyond_chains:
            on_graphs.prepare(model, x, y, settings, None, move=lambda updates: None)
            still = replace(settings, method="strict", num_steps=0, step_size=0.1)
            on_graphs.solve(model, x, y, still, None, Wanted(gradients=False))
            return
        loss_without_updates(prepare(model, x, y, settings, move=lambda updates: None)[0])
