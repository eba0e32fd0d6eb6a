"""The one entry to every relaxation: validate, describe, plan, run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..backends import Backend, choose_backend, say_passed_over
from ..errors import ArgumentError
from ..losses import LossLike, describe_loss
from ..model import sharding
from ..model.spec import describe
from ..precision import choose_precision
from ..problem import belief_optimizers, early_exit, reductions, status, validation
from ..problem.belief_optimizers import BeliefOptimizer
from ..problem.nudging import Nudging
from ..problem.nudging import check as check_nudging
from ..problem.plan import LOOPS, Plan, canonical, plan
from ..problem.types import Outcome, Problem, Request, Wanted
from . import cuda_graphs


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


@dataclass(frozen=True)
class Relaxation:
    """Result of :func:`relax`. Lists run over l = 0..L.

    Attributes:
        activations: forward-pass values vhat_0..vhat_L; vhat_0 equals x.
        loss: Loss(vhat_L, y), 0-dim.
        output_gradient: dLoss/dvhat_L, as vhat_L.
        beliefs: v_l after the last iteration, as vhat_l.
        errors: eps_l of the last iteration, prediction minus belief; eps_L = dLoss/dmu_L. eps_0 is None
            except for fixed prediction of a floating x. "error_based": at the beliefs, after the last iteration;
            "zero_divergence": errors and beliefs of layer l as they are when its error arrives, t = L - l.
        energies: (n, L) on request: 0.5 |eps_l|^2 summed over batch and units for l < L, and the loss at mu_L
            (a nudged one to its target) in the last column, as each iteration found them before its update; rows
            after an early exit repeat the last; else None.
        run: which backend ran, and how.
        iterations: with a tolerance how many iterations moved beliefs, 0-dim int64 on the device; else None.
    """

    activations: list[Tensor]
    loss: Tensor
    output_gradient: Tensor
    beliefs: list[Tensor]
    errors: list[Tensor | None]
    energies: Tensor | None
    run: Run
    iterations: Tensor | None = None


def relax(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossLike = "cross_entropy",
    method: str = "strict",
    step_size: float | Sequence[float] = 0.1,
    num_steps: int = 20,
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | None = None,
    backend: str = "auto",
    vinit: list[Tensor | None] | float | None = None,
    reduction: str = "sum",
    update_scale: float = 1.0,
    normalizer: int | None = None,
    energies: bool = False,
    tolerance: float | None = None,
    check: str = "auto",
) -> Relaxation:
    """Relax beliefs and errors; parameters and their ``.grad`` stay as they are.

    Rosenbaum (2022), algorithms 1 to 3; docs/method.md. The other methods: docs/methods.md.

    Args:
        model: ``nn.Sequential`` of PC layers.
        x: input (B, ...), the model's dtype and device.
        y: target, as ``loss`` needs it: int64 class indices (B,) or probabilities (B, C) for cross-entropy, the
            output's shape for mse, anything for a callable.
        loss: "cross_entropy", "mse" or a callable ``loss(output, y) -> scalar``.
        method: "exact", "fixed_prediction", "strict", "error_based" or "zero_divergence". The field's other words
            for them are understood: "bp", "pc" or "spc" (strict), "epc" (error_based).
        step_size: eta >= 0, or a sequence of ``num_steps`` of them: iteration t uses step_size[t-1]. Of the
            beliefs, of the errors for "error_based".
        num_steps: n >= 0. "exact" has no iterations and ignores both; "zero_divergence" fixes both: 1 and L.
        belief_optimizer: :class:`pcfast.GradientDescent` or :class:`pcfast.Adam`; None is plain gradient descent.
        nudging: strict with mse: :class:`pcfast.Nudging` of the target, not centred (which is two relaxations).
        backend: "auto", or a backend by name.
        vinit: strict only: beliefs v_0..v_L to start from (v_0 must be x or None; None entries start at the
            forward pass), or a number that all hidden beliefs start at.
        reduction: "sum": beliefs descend the energy summed over rows, updates are of the loss as it is given;
            "mean": both are of the mean over rows, as in programs whose energy is a mean;
            "sum_beliefs_mean_weights": a sum for the beliefs, the mean for the weights. The last two want a loss
            that sums. Here it says what ``step_size``, Adam's eps and the weight decay refer to; results are
            sums whatever it is.
        update_scale: of the weights' updates, of which there are none here: taken so that a preset fits.
        normalizer: rows of the global batch, for a mean loss, or the mean of ``reduction``, over a shard or
            micro-batch.
        energies: also record the energies of every iteration.
        tolerance: strict only: the first iteration t >= max(2, L) that finds the energy, summed over layers, changed
            by no more than this part of it is the last; results are those of num_steps = t. Decided on the device:
            on CUDA nothing waits, and later iterations change nothing. None runs all. In float32 the energy itself
            is known to about 1e-7 of it.
        check: when bad values are reported: "sync" at once, "deferred" by a later call or
            :func:`pcfast.synchronize`, "auto" (sync on CPU, deferred on CUDA), "off". The reference backend
            never defers.

    Returns:
        :class:`Relaxation`. State tensors are float32 for float32, bfloat16 and float16 models and under
        autocast, float64 for float64 models (the reference backend keeps the model's own dtype).

    Raises:
        ArgumentError and its kinds, BackendError, RelaxationDiverged.
    """
    method = canonical(method)
    if energies and method == "exact":
        raise ArgumentError("energies", "True with method 'exact'", "a method with iterations")
    if energies and method == "zero_divergence":
        raise ArgumentError(
            "energies",
            "True with method 'zero_divergence', which reads every layer in another iteration",
            "a method that reads all layers at once",
            "Its loop is method='strict' with step_size=1.",
        )
    if isinstance(nudging, Nudging) and len(nudging.pushes) > 1:
        raise ArgumentError(
            "nudging", f"{nudging}", 'kind "positive" or "negative"',
            "Centred nudging is two relaxations: ask for one after the other.",
        )  # fmt: skip
    outcome, run = solve(
        model, x, y, loss=loss, method=method, step_size=step_size, num_steps=num_steps, backend=backend,
        vinit=vinit, normalizer=normalizer, check=check, belief_optimizer=belief_optimizer, nudging=nudging,
        tolerance=tolerance, reduction=reduction, update_scale=update_scale,
        wanted=Wanted(
            gradients=False, states=True, input_error=method == "fixed_prediction", energies=energies
        ),
    )  # fmt: skip
    return Relaxation(
        _apart(outcome.activations, x),
        outcome.loss,
        outcome.output_gradient,
        _apart(outcome.beliefs, x),
        outcome.errors,
        outcome.energies,
        run,
        outcome.iterations,
    )


def _apart(values: list[Tensor], x: Tensor) -> list[Tensor]:
    """``values``, copied where they lie in the caller's ``x`` (v_0, and what reshapes it)."""
    memory = x.untyped_storage().data_ptr()
    return [value.clone() if value.untyped_storage().data_ptr() == memory else value for value in values]


@dataclass(frozen=True)
class Prepared:
    """A validated and planned problem, and the backend that will run it."""

    backend: Backend
    problem: Problem
    plan: Plan
    deferred: bool  # bad values are reported by a later call


def prepare(
    model: nn.Sequential,
    x: Tensor,
    y,
    *,
    loss: LossLike | None,
    method: str,
    step_size: float | Sequence[float],
    num_steps: int,
    wanted: Wanted,
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | None = None,
    backend: str = "auto",
    vinit: list[Tensor | None] | float | None = None,
    reduction: str = "sum",
    update_scale: float = 1.0,
    normalizer: int | None = None,
    tolerance: float | None = None,
    check: str = "auto",
    activations: list[Tensor] | None = None,
    output_gradient: Tensor | None = None,
    move: Callable[[dict[nn.Parameter, Tensor]], None] | None = None,
) -> Prepared:
    """Validate and plan; arguments as in :func:`relax` and :class:`pcfast.problem.types.Problem`.

    ``move`` goes with method "incremental" and with no other.

    Also raises what earlier, deferred work found.
    """
    status.raise_arrived()
    validation.check_no_transform()
    if method != "incremental" or move is None:
        method = validation.checked_method(method)
    validation.check_choice(check)
    num_steps = validation.checked_steps(num_steps)
    step_size = validation.checked_step_sizes(step_size, num_steps)
    if isinstance(step_size, tuple) and len(set(step_size)) <= 1:
        step_size = step_size[0] if step_size else 0.0
    belief_optimizer = belief_optimizers.checked(belief_optimizer, method)
    reductions.checked(reduction, method)
    reductions.checked_scale(update_scale)
    tolerance = early_exit.checked(tolerance, method)
    network = describe(model)
    step_size, num_steps = validation.fixed_settings(method, network.depth, step_size, num_steps)
    dtype = validation.check_input(model, x, network)
    if not (x.is_floating_point() or x.is_complex()):
        wanted = replace(wanted, input_error=False)  # integers do not move
    if method == "incremental":
        validation.check_moving_precision(x.device.type, dtype)
    if reduction != "sum":
        rows, normalizer = reductions.rows_of(x, normalizer), None
        belief_optimizer, step_size = reductions.of_beliefs(reduction, rows, belief_optimizer, step_size)
    described = None if output_gradient is not None else describe_loss(loss, normalizer)
    reductions.check_loss(reduction, described)
    check_nudging(nudging, method, described and described.kind)
    if described is not None and described.known and dtype.is_complex and not network.opaque:
        raise ArgumentError(
            "loss", f"{described.kind} of a complex output", "a loss of your own with a real value",
            "E.g. loss=lambda output, y: (output - y).abs().square().sum().",
        )  # fmt: skip
    if described is not None:
        validation.check_target_placement(x, y, by_rows=described.known)
    start = validation.checked_start(vinit, network.depth, x, method)
    fresh = start is None and (belief_optimizer.rests or num_steps == 0)
    deferred = check == "deferred" or (check == "auto" and x.is_cuda)
    if check != "off" and not x.is_cuda and not deferred:
        validation.check_finite("x", x)
        for index, belief in enumerate(start or [None]):
            if index and isinstance(belief, Tensor):
                validation.check_finite(f"vinit[{index}]", belief)

    request = Request(
        network,
        x.device,
        dtype,
        tuple(x.shape),
        method,
        num_steps,
        fresh,
        wanted.energies,
        described and described.kind,
        belief_optimizer,
        nudging,
        wanted.belief_gradients,
        tolerance,
    )
    chosen, refusals = choose_backend(backend, request)
    precision = choose_precision(x.device.type, dtype)
    if method in LOOPS:
        validation.check_step_fits(step_size, precision.state)
    planned = plan(
        network,
        tuple(x.shape),
        method,
        num_steps,
        fresh,
        wanted.energies or tolerance is not None,
        precision,
        chosen.name,
        refusals,
        chosen.literal,
        belief_optimizer,
        1 if nudging is None else len(nudging.pushes),
    )
    problem = Problem(
        model=model,
        network=network,
        x=x.detach(),
        y=y,
        loss=described,
        method=method,
        step_size=step_size,
        num_steps=num_steps,
        start=start,
        activations=activations,
        output_gradient=output_gradient,
        wanted=wanted,
        raise_now=not x.is_cuda and not deferred,
        check=check != "off",
        move=move,
        may_fall_back=backend == "auto",
        belief_optimizer=belief_optimizer,
        nudging=nudging,
        tolerance=tolerance,
    )
    return Prepared(chosen, problem, planned, deferred)


def solve(*arguments, **settings) -> tuple[Outcome, Run]:
    """Validate, plan and run; arguments as in :func:`prepare`. The same inside ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _solve(
                *tree_map_only(Tensor, _ordinary, arguments), **tree_map_only(Tensor, _ordinary, settings)
            )
    return _solve(*arguments, **settings)


def _ordinary(tensor: Tensor) -> Tensor:
    """``tensor``, copied where it was made in inference mode: autograd cannot keep such a one."""
    return tensor.clone() if tensor.is_inference() else tensor


def _solve(*arguments, **settings) -> tuple[Outcome, Run]:
    with sharding.gathered(arguments[0], for_backward=settings["wanted"].gradients):
        ready = prepare(*arguments, **settings)
        outcome, reason = cuda_graphs.run(ready.backend, ready.problem, ready.plan)
    if outcome.status is not None:
        status.defer(outcome.status, ready.problem.step_size)
        if not ready.deferred:
            status.synchronize()
    planned = ready.plan
    if outcome.fell_back is not None:
        ran, why = outcome.fell_back
        planned = replace(planned, backend=ran, refusals=(*planned.refusals, (planned.backend, why)))
        say_passed_over(ran, planned.refusals)
    run = _last.run = Run(planned, not reason, reason)
    return outcome, run


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
    network = describe(model)
    dtype = validation.check_input(model, x, network)
    network.shapes(tuple(x.shape))
    chosen, _ = choose_backend(backend, Request(network, x.device, dtype))
    return chosen.updates(model, network, choose_precision(x.device.type, dtype), x, beliefs, errors)
