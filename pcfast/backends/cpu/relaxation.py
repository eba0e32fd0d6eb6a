"""One native call: strict relaxation, or the one backward pass of the methods that have no loop."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from ...errors import PcfastError, RelaxationDiverged
from ...kernels.codes import LOSSES
from ...problem import status
from ...problem.plan import Plan
from ...problem.types import Outcome, Problem, check_start
from ...support import cpu_module
from ...support.memory import address
from ..eager.one_backward import factors_of
from .program import layers_of, program_of
from .speed import ROWS, natively

# stages of csrc/cpu/program.h
_FORWARD, _LOSS, _FIRST_ITERATION = range(3)


@dataclass(frozen=True)
class _Fixed:
    """What calls of one plan have in common.

    Attributes:
        program: the network, as the module reads it.
        heads: of each layer the names on the way to its product's module.
        shapes: of v_0..v_L.
        relaxes: the loop runs; else one backward pass.
        settings: of Program.run, up to the scalars.
        gemm: of torch's BLAS, where it computes the products; else 0.
        activations, states: whether vhat_l and the output's gradient, and whether beliefs and errors are wanted.
    """

    program: object
    heads: tuple[tuple[str, ...] | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    relaxes: bool
    settings: tuple
    gemm: int
    activations: bool
    states: bool


@functools.lru_cache(maxsize=256)
def _fixed(plan: Plan) -> _Fixed:
    layers, wanted = layers_of(plan.network, plan.shapes), plan.wanted
    relaxes = plan.method == "strict" and plan.depth > 1
    settings = (
        plan.x_shape[0], plan.num_steps if relaxes else 0, relaxes, plan.fresh, relaxes and plan.gram,
        wanted.gradients,
    )  # fmt: skip
    gemm = cpu_module.gemm(plan.dtype) if natively(plan) == ROWS else 0
    return _Fixed(
        program_of(plan), tuple(tuple(layer.head.split(".")) if layer.head else None for layer in layers),
        (plan.shapes[0][0], *(inner[-1] for inner in plan.shapes)), relaxes, settings, gemm,
        wanted.states or wanted.activations, wanted.states and relaxes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Parameters:
    """A model's parameters, as calls read and write them.

    Attributes:
        pairs: of each layer weight and bias.
        owners: of each layer with a product its index, and those of them that are trained.
        trained: these of all layers.
        offsets: of each layer, where in a flat tensor the updates of its weight and bias begin; -1 for none.
        total: elements of that tensor.
    """

    pairs: list[tuple[Tensor | None, Tensor | None]]
    owners: list[tuple[int, list[nn.Parameter]]]
    trained: list[nn.Parameter]
    offsets: list[int]
    total: int

    @classmethod
    def of(cls, model: nn.Module, heads: tuple[tuple[str, ...] | None, ...], with_updates: bool):
        """Those of ``model``; ``heads`` as of :class:`_Fixed`. Without updates none is trained."""
        pairs, owners, offsets, total = [], [], [], 0
        for l, names in enumerate(heads, start=1):
            pair = (None, None)
            if names is not None:
                head = model
                for name in names:
                    head = head._modules[name]
                pair = head.weight, head.bias
                owners.append((l, [p for p in pair if with_updates and p is not None and p.requires_grad]))
            pairs.append(pair)
            for p in pair:
                trained = with_updates and p is not None and p.requires_grad
                offsets.append(total if trained else -1)
                total += p.numel() if trained else 0
        return cls(pairs, owners, [p for _, own in owners for p in own], offsets, total)


class Call:
    """One call; make it, and call :meth:`outcome`, under no_grad.

    Attributes:
        relaxes: the loop runs; else one backward pass.
        bad: (stage, layer) of what first was not finite, or None.
    """

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.plan, self._fixed = problem, plan, _fixed(plan)
        self.relaxes = self._fixed.relaxes
        self.bad: tuple[int, int] | None = None
        self._kept: list[Tensor] = []  # what the call reads and nothing else may hold

    def _pointer(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        here = address(tensor)
        if tensor.is_contiguous() and not tensor.is_neg():
            return here
        self._kept.append(tensor.resolve_neg().contiguous())
        return self._kept[-1].data_ptr()

    def outcome(self) -> Outcome:
        """Run it. Where :attr:`bad` says so, and nothing was raised, the outcome means nothing."""
        problem, plan, fixed, pointer = self.problem, self.plan, self._fixed, self._pointer
        dtype, x, shapes, with_updates = plan.dtype, problem.x, fixed.shapes, plan.wanted.gradients
        problem.loss.check_target(shapes[-1], problem.y)
        starts = self._starts(shapes)

        key = fixed.heads, with_updates
        parts = problem.known.parts.get(key)
        if parts is None:
            parts = problem.known.parts[key] = _Parameters.of(problem.model, *key)
        pairs, owners, parameters = parts.pairs, parts.owners, parts.trained
        flat = torch.empty(parts.total, dtype=dtype)
        base, size = flat.data_ptr(), flat.element_size()
        updates = [0 if offset < 0 else base + size * offset for offset in parts.offsets]

        output = torch.empty(shapes[-1], dtype=dtype)
        value = torch.empty((), dtype=dtype)
        vhat, beliefs, errors = [x], [x], [None]
        pointers: list[int] = []
        depth = len(pairs)
        for l, (weight, bias) in enumerate(pairs, start=1):
            last = l == depth
            vhat.append(
                output if last else torch.empty(shapes[l], dtype=dtype) if fixed.activations else None
            )
            beliefs.append(torch.empty(shapes[l], dtype=dtype) if fixed.states and not last else None)
            errors.append(torch.empty(shapes[l], dtype=dtype) if fixed.states else None)
            pointers += (
                pointer(weight), pointer(bias), 0 if starts is None else pointer(starts[l]),
                pointer(vhat[l]), pointer(beliefs[l]), pointer(errors[l]), updates[2 * l - 2], updates[2 * l - 1],
            )  # fmt: skip
        output_gradient = torch.empty(shapes[-1], dtype=dtype) if fixed.activations else None
        loss, labels, target, weight = self._loss()
        pointers += (
            pointer(x), pointer(labels), pointer(target), pointer(weight), pointer(value), pointer(output_gradient)
        )  # fmt: skip
        self.bad, invalid_label = fixed.program.run(
            size, torch.get_num_threads(), *fixed.settings, self._scalars(), plan.belief_optimizer.momentum, *loss,
            fixed.gemm, pointers,
        )  # fmt: skip
        if invalid_label and problem.raise_now:
            problem.loss.prepare(output, problem.y, raise_now=True)

        out = Outcome(value, output)
        if parameters:
            result = _unflatten_dense_tensors(flat, parameters)
            out.gradients, out.owners = dict(zip(parameters, result, strict=True)), list(owners)
            if len(out.gradients) < len(parameters):  # one in several layers: its updates add up
                out.gradients, out.owners, result = {}, [], iter(result)
                for l, own in owners:
                    out.add_gradients([(p, next(result)) for p in own], l)
        if output_gradient is not None:
            out.activations, out.output_gradient = vhat, output_gradient
        if fixed.states:
            top = output if starts is None or starts[depth] is None else starts[depth]
            out.beliefs, out.errors = [x.clone(), *beliefs[1:depth], top.clone()], errors
        if self.bad is not None or invalid_label:
            self._report(out, invalid_label)
        return out

    def _starts(self, shapes: tuple[tuple[int, ...], ...]) -> list[Tensor | None] | None:
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

    def _loss(self) -> tuple[tuple, Tensor | None, Tensor | None, Tensor | None]:
        """The loss's settings; labels, target and class weights."""
        loss, y, dtype = self.problem.loss, self.problem.y, self.plan.dtype
        code, share = LOSSES[loss.kind], loss.share(self.plan.x_shape[0])
        if loss.kind == "mse":
            return (code, False, False, -1, 0.0, share, loss.mse_scale(y)), None, self._cast(y, dtype), None
        reduction, ignored, smoothing = loss.settings
        floating = y.is_floating_point()
        target = self._cast(y, dtype if floating else torch.int64)
        weight = None if loss.weight is None else self._cast(loss.weight, dtype)
        settings = (code, reduction == "mean", loss.normalizer is not None, ignored, smoothing, share, 1.0)
        return (settings, None, target, weight) if floating else (settings, target, None, weight)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype != dtype:
            tensor = tensor.to(dtype)
            self._kept.append(tensor)
        return tensor

    def _report(self, out: Outcome, invalid_label: bool) -> None:
        """Raise for what was not finite, or leave word of it, and of labels out of range."""
        problem = self.problem
        if not problem.check:
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
