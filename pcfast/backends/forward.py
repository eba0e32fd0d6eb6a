"""What every relaxation in deviation form starts from: the forward pass, the loss there and its gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..deviation import Chain, layer_chain
from ..losses import PreparedTarget
from ..problem import status
from ..problem.plan import Plan
from ..problem.types import Outcome, Problem
from ..support.replay import recorded_buffers

Chains = list[Chain | None]


@dataclass(eq=False)
class ForwardPass:
    """The values of the forward pass. Lists run over l = 0..L.

    Attributes:
        chains: the layers at work; None for l = 0.
        vhat: vhat_l.
        loss: Loss(vhat_L, y), 0-dim; None where the gradient at the output was given instead.
        output_gradient: dLoss/dvhat_L.
        loss_at, gradient_at: the loss and its gradient at another output mu_L; None as for ``loss``.
        target: of a loss that pcfast knows, prepared; else None.
        loss_updates: of parameters that the loss itself uses.
        invalid_labels: 0-dim bool, or None where labels were checked already.
    """

    chains: Chains
    vhat: list[Tensor]
    loss: Tensor | None
    output_gradient: Tensor
    loss_at: Callable[[Tensor], Tensor] | None = None
    gradient_at: Callable[[Tensor], Tensor] | None = None
    target: PreparedTarget | None = None
    loss_updates: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    invalid_labels: Tensor | None = None

    @property
    def depth(self) -> int:
        """L."""
        return len(self.vhat) - 1

    @property
    def loss_values(self) -> list[Tensor]:
        """What has to be finite of the loss."""
        return [self.output_gradient] if self.loss is None else [self.loss, self.output_gradient]

    def outcome(self, plan: Plan) -> Outcome:
        """An outcome that holds what the forward pass gives."""
        out = Outcome(self.loss, self.vhat[-1])
        out.add_gradients(self.loss_updates, self.depth)
        if plan.wanted.states or plan.wanted.activations:
            out.activations, out.output_gradient = self.vhat, self.output_gradient
        return out

    def add_updates(self, out: Outcome, errors: list[Tensor | None], share: float = 1.0) -> None:
        """Add ``share`` of (df_l/dtheta_l)^T eps_l at the chains' current points; an error that is None is zero."""
        for l in range(1, self.depth + 1):
            chain = self.chains[l]
            result = chain.zero_gradients() if errors[l] is None else chain.gradients(errors[l])
            out.add_gradients([(p, g if share == 1 else g * share) for p, g in result], l)

    def filled(self, errors: list[Tensor | None]) -> list[Tensor | None]:
        """The errors of layers 1..L, zeros for None; eps_0 is None."""
        result = zip(errors[1:], self.vhat[1:], strict=True)
        return [None, *(torch.zeros_like(v) if e is None else e for e, v in result)]

    def update_statistics(self, problem: Problem, out: Outcome) -> None:
        """Move statistics by what the forward pass found; not where the step failed, nor for given activations."""
        if problem.activations is None:
            failed = None if out.status is None else status.failed(out.status)
            for chain in self.chains[1:]:
                chain.update_statistics(failed)


def layer_chains(problem: Problem, plan: Plan) -> Chains:
    """The layers at work, by index."""
    return [None, *(layer_chain(spec, problem.model, plan.precision) for spec in plan.network.layers)]


@contextlib.contextmanager
def undone_on_failure(chains: Chains) -> Iterator[None]:
    """Where this raises, statistics and other buffers are as they were."""
    try:
        yield
    except BaseException:
        for chain in chains[1:]:
            chain.undo()
        raise


def forward_pass(problem: Problem, plan: Plan, chains: Chains) -> ForwardPass:
    """Run it, or take the activations that were given; then the loss."""
    to_state = plan.precision.to_state
    if problem.activations is not None:
        vhat = [to_state(a) if a.is_floating_point() else a for a in problem.activations]
        with recorded_buffers(problem.model)():  # their forward pass has moved the statistics
            for chain, below in zip(chains[1:], vhat, strict=False):
                chain.forward(below)
    else:
        x = problem.x  # integers stay what they are: layer 1 embeds them
        vhat = [to_state(x) if x.is_floating_point() else x]
        for chain in chains[1:]:
            vhat.append(chain.forward(vhat[-1]))
    return with_loss(problem, plan, chains, vhat)


def with_loss(problem: Problem, plan: Plan, chains: Chains, vhat: list[Tensor]) -> ForwardPass:
    """The forward pass that gave ``vhat``, with the loss and its gradient there."""
    loss, y, output = problem.loss, problem.y, vhat[-1]
    if loss is None:
        return ForwardPass(chains, vhat, None, plan.precision.to_state(problem.output_gradient))
    loss.check_target(tuple(output.shape), y)
    if loss.known:
        target = loss.prepare(output, y, raise_now=problem.raise_now)
        value = loss.value_prepared(target, output)
        return ForwardPass(
            chains, vhat, value, loss.gradient(target, output),
            loss_at=lambda mu: loss.value_prepared(target, mu), gradient_at=lambda mu: loss.gradient(target, mu),
            target=target, invalid_labels=target.invalid_labels,
        )  # fmt: skip
    value = loss.value(output, y)
    updates: list[tuple[nn.Parameter, Tensor]] = []
    if plan.wanted.gradients:
        gradient, updates = loss.gradients_by_autograd(output, y)
        problem.check_loss_updates(updates)
    else:
        gradient = loss.gradient_by_autograd(output, y)
    return ForwardPass(
        chains, vhat, value, gradient,
        loss_at=lambda mu: loss.value(mu, y), gradient_at=lambda mu: loss.gradient_by_autograd(mu, y),
        loss_updates=updates,
    )  # fmt: skip
