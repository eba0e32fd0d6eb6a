"""The one entry to every relaxation: validate, describe, plan, choose a backend, run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..backends import BACKENDS, choose_backend, log_fallback
from ..model import sharding
from ..model.snapshot import snapshot
from ..precision import choose_precision
from ..problem import reductions, status, validation
from ..problem.plan import Plan, plan
from ..problem.settings import Settings
from ..problem.types import NOTHING_BUT_UPDATES, Outcome, Problem, Wanted
from . import calls, contest, cuda_graphs

Move = Callable[[dict[nn.Parameter, Tensor]], None]


@dataclass(frozen=True)
class Run:
    """What ran in a relaxation.

    Attributes:
        plan: the plan; ``plan.backend`` is the backend that ran.
        replayed: a recorded CUDA graph was replayed.
        not_replayed_because: why it was not; "" where it was.
    """

    plan: Plan
    replayed: bool
    not_replayed_because: str


_last = threading.local()


def last_run() -> Run | None:
    """What this thread's last relaxation ran on, or None before the first."""
    return getattr(_last, "run", None)


def recorded(run: Run) -> Run:
    """Remember ``run`` as this thread's last; returns it."""
    _last.run = run
    return run


def prepare(
    model: nn.Sequential,
    x: Tensor,
    y,
    settings: Settings,
    wanted: Wanted = NOTHING_BUT_UPDATES,
    *,
    activations: list[Tensor] | None = None,
    output_gradient: Tensor | None = None,
    move: Move | None = None,
) -> tuple[Problem, Plan]:
    """Validate, describe, plan, and choose the backend, whose name is in the plan.

    Args:
        wanted: what the caller will read.
        activations, output_gradient, move: as in :class:`pcfast.problem.types.Problem`. ``move`` goes with method
            "incremental" and with no other.

    Raises:
        ArgumentError and its kinds, BackendError; also what earlier, deferred work found.
    """
    status.raise_arrived()
    validation.check_no_transform()
    known = snapshot(model)
    loss = None
    if output_gradient is None and type(settings.loss) is not str:
        loss = settings.described_loss()
    kind = x, y, settings, loss, wanted, output_gradient, move
    key = calls.key_of(*kind)
    call = known.calls.get(key)
    if call is None:
        call = calls.understood(known, *kind)
        calls.remember(known, key, call)
    start = None
    if settings.vinit is not None:
        start = validation.checked_start(settings.vinit, known.network.depth, x, call.planned.method)
    if settings.check != "off" and call.raise_now:
        validation.check_finite("x", x)
        for index, belief in enumerate(start or [None]):
            if index and isinstance(belief, Tensor):
                validation.check_finite(f"vinit[{index}]", belief)
    asked, planned = call.on_backend()
    problem = Problem(
        model, known, x.detach(), y, loss or call.loss, call.step_size, start, activations, output_gradient,
        call.raise_now, call.deferred, settings.check != "off", move, asked == "auto",
    )  # fmt: skip
    return problem, planned


def solve(
    model: nn.Sequential,
    x: Tensor,
    y,
    settings: Settings,
    wanted: Wanted = NOTHING_BUT_UPDATES,
    *,
    activations: list[Tensor] | None = None,
    output_gradient: Tensor | None = None,
    move: Move | None = None,
) -> tuple[Outcome, Run]:
    """Prepare and run; arguments as for :func:`prepare`. The same inside ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            x, y, vinit, activations, output_gradient = tree_map_only(
                Tensor, ordinary, (x, y, settings.vinit, activations, output_gradient)
            )
            settings = replace(settings, vinit=vinit)
            return _solve(model, x, y, settings, wanted, activations, output_gradient, move)
    return _solve(model, x, y, settings, wanted, activations, output_gradient, move)


def ordinary(tensor: Tensor) -> Tensor:
    """``tensor``, copied where it was made in inference mode: autograd cannot keep such a one."""
    return tensor.clone() if tensor.is_inference() else tensor


def _solve(model, x, y, settings, wanted, activations, output_gradient, move) -> tuple[Outcome, Run]:
    sharding.check_whole(model, settings.tolerance)
    with sharding.gathered(model, for_backward=wanted.gradients):
        problem, planned = prepare(
            model, x, y, settings, wanted, activations=activations, output_gradient=output_gradient, move=move
        )
        planned = contest.decided(problem, planned)
        outcome, reason = cuda_graphs.run(BACKENDS[planned.backend], problem, planned)
    if outcome.status is not None:
        status.defer(outcome.status, problem.step_size)
        if not problem.deferred:
            status.synchronize()
    if outcome.fell_back is not None:
        ran, why = outcome.fell_back
        planned = replace(planned, backend=ran, refusals=(*planned.refusals, (planned.backend, why)))
        log_fallback(ran, planned.refusals)
    return outcome, recorded(Run(planned, not reason, reason))


def forward_loss(model: nn.Sequential, x: Tensor, y: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Loss and output of the forward pass alone. Call it under no_grad.

    Raises:
        what :func:`prepare` does.
    """
    with sharding.gathered(model, for_backward=False):
        value, output = loss_without_updates(prepare(model, x, y, settings)[0])
    share = reductions.share(settings.reduction, x, settings.normalizer)
    return reductions.reduced(value, share), output


def loss_without_updates(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss and output of a problem's forward pass. Call it under no_grad."""
    model, x, y, described = problem.model, problem.x, problem.y, problem.loss
    output = model(x.clone())  # a clone, so that in-place modules leave x alone
    described.check_target(tuple(output.shape), y)
    if described.known and not x.is_cuda:
        described.prepare(output, y, raise_now=True)  # labels in range?
    return described.value(output, y), output


def updates(
    model: nn.Sequential,
    x: Tensor,
    beliefs: list[Tensor] | None,
    errors: list[Tensor],
    *,
    backend: str = "auto",
) -> dict[nn.Parameter, Tensor]:
    """dtheta_l = (df_l(v_{l-1})/dtheta_l)^T eps_l for every parameter in use that requires it.

    Args:
        beliefs: v_0..v_L; None for a forward pass from x. errors: eps_0..eps_L (eps_0 is not read).
    """
    known = snapshot(model)
    dtype = validation.check_input(x, known.network, known.placement)
    precision = choose_precision(x.device.type, dtype)
    chosen, _ = choose_backend(backend, plan(known.network, x.device, dtype, tuple(x.shape), precision))
    return chosen.updates(model, known.network, precision, x, beliefs, errors)
