"""The settings with which pcfast computes what other programs compute (docs/conventions.md).

    preset = pcfast.presets.jpc(step_size=0.5, num_steps=10)
    pcfast.pc_loss(model, x, y, **preset).backward()   # .grad is that program's gradient of its energy

Settings alone do not make the same network: where a belief sits is said by the model (docs/layers.md).

Programs that take the weights' errors at the last beliefs get one more iteration, of step size 0: it evaluates the
errors that the updates use, and moves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import torch.nn.functional as F

from ..errors import ArgumentError
from ..losses import LossLike, half_squared_error
from ..problem import belief_optimizers, reductions, validation
from ..problem import nudging as nudges
from ..problem.belief_optimizers import BeliefOptimizer, StepSize
from ..problem.nudging import Nudging
from ..problem.settings import Precisions

#: Losses as the programs with an energy sum them over a batch.
LOSSES = {"mse": half_squared_error, "cross_entropy": functools.partial(F.cross_entropy, reduction="sum")}


@dataclass(frozen=True)
class Preset:
    """``pc_loss(model, x, y, **preset)``, and so for every function that relaxes; what is None is left out.

    Attributes:
        loss, method, step_size, num_steps, belief_optimizer, nudging, vinit, reduction, update_scale, precision: as
            for :func:`pcfast.pc_loss`; method "incremental" is for :func:`pcfast.incremental_step`.
    """

    loss: LossLike
    method: str
    step_size: StepSize
    num_steps: int
    reduction: str = "sum"
    update_scale: float = 1.0
    belief_optimizer: BeliefOptimizer | None = None
    nudging: Nudging | None = None
    vinit: float | None = None
    precision: Precisions | None = None

    def keys(self) -> Iterator[str]:
        """The names of the keyword arguments."""
        return (field.name for field in fields(self) if getattr(self, field.name) is not None)

    def __getitem__(self, name: str):
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


def torch2pc(
    *,
    loss: LossLike = "cross_entropy",
    method: str = "strict",
    step_size: float = 0.1,
    num_steps: int = 20,
) -> Preset:
    """``PCInfer`` of Torch2PC: any loss with the reduction that it has, updates from the last iteration's errors.

    Args:
        loss, step_size, num_steps: its LossFun, eta and n.
        method: "strict", "fixed_prediction" or "exact".

    Raises:
        ArgumentError and its kinds.
    """
    if method not in ("strict", "fixed_prediction", "exact"):
        raise ArgumentError("method", repr(method), 'one of "strict", "fixed_prediction", "exact"')
    num_steps = validation.checked_steps(num_steps)
    return Preset(loss, method, validation.checked_step_size(step_size), num_steps)


def pcx(
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    reduction: str = "sum_beliefs_mean_weights",
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | None = None,
) -> Preset:
    """PCX: ``se_energy`` at hidden vodes, an optax optimiser on the beliefs; its examples and its PC.py.

    Args:
        step_size: of the beliefs' optimiser per row, or one an iteration: of a program that multiplies its learning
            rate by the batch size beside lax.pmean, the rate before that.
        num_steps: T.
        loss: of the last vode: "mse" (``se_energy``) or "cross_entropy" (``ce_energy``).
        reduction: "sum_beliefs_mean_weights" where beliefs descend a sum over the batch (lax.psum; lax.pmean with a
            learning rate times the batch size) and weights its mean; "mean" where both descend a mean (lax.pmean
            alone); "sum" where both descend a sum.
        belief_optimizer: optax.sgd's momentum, Nesterov's too; :class:`pcfast.Adam` for optax.adam.
        nudging: ``Nudging("positive", beta)`` where the output is clamped to u - beta (u - y), beta > 0;
            "negative" with -beta for beta < 0. Its updates are times 1 / beta, as theirs.

    Raises:
        ArgumentError and its kinds.
    """
    return _fresh(loss, step_size, num_steps, reduction, belief_optimizer, nudging=nudging)


def pcx_ipc(
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    belief_optimizer: BeliefOptimizer | None = None,
) -> Preset:
    """PCX's incremental examples: beliefs and weights take one gradient each in every iteration, at the same point.

    Arguments and errors as for :func:`pcx`; for :func:`pcfast.incremental_step`.
    """
    return _incremental(loss, step_size, num_steps, "sum_beliefs_mean_weights", belief_optimizer)


def jpc(
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    belief_optimizer: BeliefOptimizer | None = None,
) -> Preset:
    """JPC, discrete updates: ``update_pc_activities`` with an optax optimiser, then ``update_pc_params``.

    Its energy is a mean over the batch. Its make_mlp holds pre-activations.

    Args:
        step_size: of the activities' optimiser, or one an iteration.
        num_steps: calls of ``update_pc_activities``.
        loss: loss_id: "mse", or "cross_entropy" for its "ce".
        belief_optimizer: the optimiser's momentum, or :class:`pcfast.Adam` with the eps that it has there.

    Raises:
        ArgumentError and its kinds.
    """
    return _fresh(loss, step_size, num_steps, "mean", belief_optimizer)


def jpc_mupc(
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    belief_optimizer: BeliefOptimizer | None = None,
) -> Preset:
    """JPC with param_type="mupc": :func:`jpc`. The scales of its layers belong to the model (docs/examples.md)."""
    return jpc(step_size=step_size, num_steps=num_steps, loss=loss, belief_optimizer=belief_optimizer)


def epc(*, step_size: float, num_steps: int, loss: str = "mse") -> Preset:
    """The program of Goemaere et al., branch cifar, class PCE: errors descend the summed energy, weights its mean.

    The mean is divided by min(1, e_lr iters) once more, as that branch does.

    Args:
        step_size, num_steps: e_lr > 0 and iters >= 1.
        loss: its output_loss: "mse", or "cross_entropy" for its "ce".

    Raises:
        ArgumentError and its kinds.
    """
    validation.check_count("num_steps", num_steps)
    step_size = validation.checked_step_size(step_size)
    if step_size == 0:
        raise ArgumentError("step_size", "0", "a finite number > 0", "Updates are divided by it.")
    return _errors(loss, step_size, num_steps, 1 / min(1.0, step_size * num_steps))


def epc_master(*, step_size: float, num_steps: int, loss: str = "mse") -> Preset:
    """As :func:`epc`, of the branch master, which divides by nothing but the rows."""
    validation.check_count("num_steps", num_steps)
    return _errors(loss, validation.checked_step_size(step_size), num_steps)


def spc(
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    belief_optimizer: BeliefOptimizer | None = None,
) -> Preset:
    """The program of Goemaere et al., class PC (sPC): states descend the summed energy, weights its mean.

    Args:
        step_size, num_steps: s_lr and iters. loss: as for :func:`epc`.
        belief_optimizer: ``GradientDescent(s_momentum)``.

    Raises:
        ArgumentError and its kinds.
    """
    return _fresh(loss, step_size, num_steps, "sum_beliefs_mean_weights", belief_optimizer)


def pctrainer(
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    belief_optimizer: BeliefOptimizer | None = None,
) -> Preset:
    """Bogacz-Group's PCTrainer with update_p_at="last": T - 1 moves of the beliefs, then the weights' errors.

    Energies and gradients are sums over the batch. Its notebooks hold pre-activations.

    Args:
        step_size: of optimizer_x_fn, or one an iteration, the last of which moves nothing that is read.
        num_steps: T >= 1.
        loss: loss_fn: "mse" for 0.5 |.|^2 summed, or "cross_entropy" summed.
        belief_optimizer: optimizer_x_fn's momentum, or :class:`pcfast.Adam`.

    Raises:
        ArgumentError and its kinds.
    """
    return _fresh(loss, *_one_less(step_size, num_steps), "sum", belief_optimizer)


def pctrainer_ipc(
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    belief_optimizer: BeliefOptimizer | None = None,
) -> Preset:
    """PCTrainer with update_p_at="all": incremental, sums over the batch; arguments as for :func:`pctrainer`."""
    return _incremental(loss, step_size, num_steps, "sum", belief_optimizer)


def preco(*, step_size: float, num_steps: int, loss: str = "mse") -> Preset:
    """PRECO's PCnet: sums over the batch for beliefs and weights. Its form AMB holds pre-activations, MBA does not.

    Args:
        step_size, num_steps: lr_x and T_train. loss: "mse", its 0.5 |.|^2.

    Raises:
        ArgumentError and its kinds.
    """
    _sum_of(loss, ("mse",))
    return _fresh(loss, step_size, num_steps, "sum", None)


def deepity(*, step_size: float, num_steps: int, loss: str = "mse", start: str = "zeros") -> Preset:
    """Deepity: T - 1 moves on the summed energy, weights by its mean. It holds pre-activations.

    Args:
        step_size, num_steps: its inference rate and T >= 1. loss: "mse", its 0.5 |.|^2.
        start: of the beliefs: "zeros" or "projection", the forward pass.

    Raises:
        ArgumentError and its kinds.
    """
    if start not in ("zeros", "projection"):
        raise ArgumentError("start", repr(start), '"zeros" or "projection"')
    _sum_of(loss, ("mse",))
    vinit = 0.0 if start == "zeros" else None
    return _fresh(loss, *_one_less(step_size, num_steps), "sum_beliefs_mean_weights", None, vinit=vinit)


def fabricpc(
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    precision: Precisions | None = None,
) -> Preset:
    """FabricPC, inference by gradient descent: summed energy for beliefs, mean for weights.

    Args:
        step_size, num_steps: eta_infer and infer_steps. loss: "mse" (Gaussian, 0.5 |.|^2) or "cross_entropy".
        precision: of its nodes' Gaussian energies: a number, or one for each layer, the output's last.

    Raises:
        ArgumentError and its kinds.
    """
    return _fresh(loss, step_size, num_steps, "sum_beliefs_mean_weights", None, precision=precision)


def fabricpc_epc(*, step_size: float, num_steps: int, loss: str = "mse") -> Preset:
    """FabricPC, inference of errors; arguments as for :func:`fabricpc`."""
    return _errors(loss, validation.checked_step_size(step_size), num_steps)


#: Those of programs whose networks hold beliefs before the activation (docs/layers.md); the others behind it.
BEFORE_ACTIVATION = ("jpc", "jpc_mupc", "pctrainer", "pctrainer_ipc", "deepity")
#: By name, as ``pcfast train --preset`` and ``pcfast which`` take them.
PRESETS: dict[str, Callable[..., Preset]] = {
    preset.__name__: preset
    for preset in (
        torch2pc, pcx, pcx_ipc, jpc, jpc_mupc, epc, epc_master, spc, pctrainer, pctrainer_ipc, preco, deepity,
        fabricpc, fabricpc_epc,
    )
}  # fmt: skip


def _sum_of(loss: str, known: Collection[str] = tuple(LOSSES)) -> LossLike:
    if not isinstance(loss, str) or loss not in known:
        raise ArgumentError("loss", repr(loss), f"one of {sorted(known)}", "This program knows no others.")
    return LOSSES[loss]


def _sizes(step_size, num_steps: int) -> tuple[float, ...]:
    """One step size an iteration."""
    num_steps = validation.checked_steps(num_steps)
    sizes = validation.checked_step_sizes(step_size, num_steps)
    return sizes if isinstance(sizes, tuple) else (sizes,) * num_steps


def _one_less(step_size, num_steps: int) -> tuple[tuple[float, ...], int]:
    """Step sizes and number of moves of programs whose last iteration moves weights alone."""
    validation.check_count("num_steps", num_steps)
    return _sizes(step_size, num_steps)[:-1], num_steps - 1


def _fresh(loss: str, step_size, num_steps: int, reduction: str, optimizer, **settings) -> Preset:
    """Strict relaxation, updates from errors at the last beliefs."""
    reductions.checked(reduction, "strict")
    belief_optimizers.checked(optimizer, "strict")
    nudges.check(settings.get("nudging"), "strict", loss)
    sizes = _sizes(step_size, num_steps)
    return Preset(
        _sum_of(loss),
        "strict",
        (*sizes, 0.0),
        len(sizes) + 1,
        reduction,
        belief_optimizer=optimizer,
        **settings,
    )


def _incremental(loss: str, step_size, num_steps: int, reduction: str, optimizer) -> Preset:
    belief_optimizers.checked(optimizer, "incremental")
    num_steps = validation.checked_steps(num_steps)
    sizes = validation.checked_step_sizes(step_size, num_steps)
    return Preset(_sum_of(loss), "incremental", sizes, num_steps, reduction, belief_optimizer=optimizer)


def _errors(loss: str, step_size: float, num_steps: int, update_scale: float = 1.0) -> Preset:
    """Errors descend the summed energy, weights its mean."""
    num_steps = validation.checked_steps(num_steps)
    return Preset(
        _sum_of(loss), "error_based", step_size, num_steps, "sum_beliefs_mean_weights", update_scale
    )
