"""One native call: strict relaxation, or the one backward pass of the methods that have no loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from ...errors import PcfastError, RelaxationDiverged
from ...kernels.codes import LOSSES
from ...problem import status
from ...problem.plan import Plan
from ...problem.types import Outcome, Problem, check_start
from ..eager.one_backward import factors_of
from .program import Layer, layers_of, program_of

# stages of csrc/cpu/program.h
_FORWARD, _LOSS, _FIRST_ITERATION = range(3)


class Call:
    """One call; make it, and call :meth:`outcome`, under no_grad.

    Attributes:
        relaxes: the loop runs; else one backward pass.
        bad: (stage, layer) of what first was not finite, or None.
    """

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.plan = problem, plan
        self.layers: tuple[Layer, ...] = layers_of(plan.network, plan.shapes)
        self.relaxes = plan.method == "strict" and plan.depth > 1
        self.bad: tuple[int, int] | None = None
        self._kept: list[Tensor] = []  # what the call reads and nothing else may hold

    def _pointer(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.is_neg() or not tensor.is_contiguous():
            tensor = tensor.resolve_neg().contiguous()
            self._kept.append(tensor)
        return tensor.data_ptr()

    def _empty(self, shape: tuple[int, ...], wanted: bool) -> Tensor | None:
        return torch.empty(shape, dtype=self.plan.dtype) if wanted else None

    def outcome(self) -> Outcome:
        """Run it. Where :attr:`bad` says so, and nothing was raised, the outcome means nothing."""
        problem, plan, layers, relaxes = self.problem, self.plan, self.layers, self.relaxes
        shapes = [plan.shapes[0][0], *(inner[-1] for inner in plan.shapes)]  # of v_0..v_L
        batch, depth, wanted = shapes[0][0], plan.depth, plan.wanted
        problem.loss.check_target(shapes[-1], problem.y)
        starts = self._starts(shapes)

        heads = [_module(problem.model, layer.head) for layer in layers]
        trained: list[list[nn.Parameter]] = [[] for _ in layers]
        if wanted.gradients:
            trained = [[p for p in _parameters(head) if p.requires_grad] for head in heads]
        parameters = [p for own in trained for p in own]
        flat = torch.empty(sum(p.numel() for p in parameters), dtype=plan.dtype)
        address, size = flat.data_ptr(), flat.element_size()

        states = wanted.states and relaxes
        vhat, beliefs, errors = ([None] * (depth + 1) for _ in range(3))
        vhat[0] = beliefs[0] = problem.x
        pointers: list[int] = []
        for l, head in enumerate(heads, start=1):
            vhat[l] = self._empty(shapes[l], wanted.states or wanted.activations or l == depth)
            beliefs[l] = self._empty(shapes[l], states and l < depth)
            errors[l] = self._empty(shapes[l], states)
            updates = [0, 0]  # of weight and bias
            for i, p in enumerate(_parameters(head)):
                if wanted.gradients and p.requires_grad:
                    updates[i] = address
                    address += p.numel() * size
            pointers += (
                *(map(self._pointer, (head.weight, head.bias)) if head is not None else (0, 0)),
                0 if starts is None else self._pointer(starts[l]),
                *map(self._pointer, (vhat[l], beliefs[l], errors[l])), *updates,
            )  # fmt: skip
        value = torch.empty((), dtype=plan.dtype)
        output_gradient = self._empty(shapes[-1], wanted.states or wanted.activations)
        loss, others = self._loss(batch)
        pointers += map(self._pointer, (problem.x, *others, value, output_gradient))
        self.bad, invalid_label = program_of(plan).run(
            size, torch.get_num_threads(), batch, plan.num_steps if relaxes else 0, relaxes, plan.fresh,
            relaxes and plan.gram, wanted.gradients, self._scalars(), plan.belief_optimizer.momentum, *loss, pointers,
        )  # fmt: skip
        if invalid_label and problem.raise_now:
            problem.loss.prepare(vhat[-1], problem.y, raise_now=True)

        out = Outcome(value, vhat[-1])
        updates = iter(_unflatten_dense_tensors(flat, parameters) if parameters else ())
        for l, own in enumerate(trained, start=1):
            out.add_gradients([(p, next(updates)) for p in own], l)
        if output_gradient is not None:
            out.activations, out.output_gradient = vhat, output_gradient
        if states:
            top = vhat[-1] if starts is None or starts[depth] is None else starts[depth]
            out.beliefs, out.errors = [problem.x.clone(), *beliefs[1:depth], top.clone()], errors
        self._report(out, invalid_label)
        return out

    def _starts(self, shapes: list[tuple[int, ...]]) -> list[Tensor | None] | None:
        """Beliefs to start from; None from the forward pass."""
        problem, dtype = self.problem, self.plan.dtype
        if problem.start is None:
            return None
        check_start(problem.start, shapes)
        result = [
            torch.full(shape, v, dtype=dtype) if isinstance(v, float) else v if v is None else v.to(dtype)
            for v, shape in zip(problem.start, shapes, strict=True)
        ]
        self._kept += [v for v in result if v is not None]
        return result

    def _scalars(self) -> list[float]:
        """Step sizes: one, or one an iteration; or what each layer's errors count in a backward pass."""
        if not self.relaxes:
            return list(reversed(factors_of(self.problem, self.plan)[0][: self.plan.depth]))
        step_size = self.problem.step_size
        return list(step_size) or [0.0] if isinstance(step_size, tuple) else [step_size]

    def _loss(self, batch: int) -> tuple[tuple, tuple[Tensor | None, ...]]:
        """The loss's settings; and labels, target and class weights."""
        loss, y, dtype = self.problem.loss, self.problem.y, self.plan.dtype
        code, share = LOSSES[loss.kind], loss.share(batch)
        if loss.kind == "mse":
            target = y.to(dtype)
            self._kept.append(target)
            return (code, False, False, -1, 0.0, share, loss.mse_scale(y)), (None, target, None)
        reduction, ignored, smoothing = loss.settings
        floating = y.is_floating_point()
        target, weight = y.to(dtype if floating else torch.int64), loss.weight
        weight = None if weight is None else weight.to(dtype)
        self._kept += (target,) if weight is None else (target, weight)
        settings = (code, reduction == "mean", loss.normalizer is not None, ignored, smoothing, share, 1.0)
        return settings, (None, target, weight) if floating else (target, None, weight)

    def _report(self, out: Outcome, invalid_label: bool) -> None:
        """Raise for what was not finite, or leave word of it, and of labels out of range."""
        problem = self.problem
        if not problem.check or (self.bad is None and not invalid_label):
            return
        if not problem.raise_now:
            cause = status.bad_labels if invalid_label else self._cause
            out.status = status.Status(torch.zeros((), dtype=torch.int64), (cause,))
            zeroed = status.zeroed_if_bad(out.status, list(out.gradients.values()))
            out.gradients = dict(zip(out.gradients, zeroed, strict=True))
        elif self.relaxes:
            raise self._cause(problem.step_size)

    def _cause(self, step_size) -> PcfastError:
        stage, layer = self.bad
        if stage == _FORWARD:
            if not status.all_finite([self.problem.x]):
                return status.bad_input(step_size)
            return RelaxationDiverged(0, layer, step_size)
        if stage == _LOSS:
            return status.bad_loss(step_size)
        iteration = stage - _FIRST_ITERATION + 1
        within = self.relaxes and iteration <= self.plan.num_steps
        return RelaxationDiverged(iteration if within else None, layer, step_size)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    if not path:
        return None
    for name in path.split("."):
        model = model._modules[name]
    return model


def _parameters(head: nn.Module | None) -> tuple[nn.Parameter, ...]:
    """Weight and, where there is one, bias."""
    if head is None:
        return ()
    return (head.weight,) if head.bias is None else (head.weight, head.bias)
