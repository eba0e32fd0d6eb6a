"""mlp_relaxation against the two stages an iteration, per iteration: which of the two a network should have."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

import pcfast
from pcfast import networks
from pcfast.backends.chips import chip_of
from pcfast.backends.triton.launch_plan import CompileTarget, Design, design
from pcfast.backends.triton.loop import ForwardState, Loop, arena_of
from pcfast.checking.bounds import FACTOR, relative_error
from pcfast.deviation import layer_chain
from pcfast.deviation.affine import LinearStep
from pcfast.losses import describe_loss
from pcfast.model.describe import describe
from pcfast.precision import Precision, choose_precision, numerics, use_precision

from .case import PRODUCTS, Case, Way, described, normal, operand_bytes, torch_precision
from .rounding import TF32, Judgement

#: (batch, widths), what matters most first: loop weights below and above what one SM has of L1.
NETWORKS = (
    (32, (64, 128, 128, 10)),
    (300, (784, 256, 256, 10)),
    (128, (784, *[128] * 8, 10)),
    (300, (784, 600, 600, 10)),
    (32, (784, 600, 600, 10)),
    (300, (64, 128, 128, 10)),
    (2048, (64, 128, 128, 10)),
    (128, (784, *[128] * 32, 10)),
)
TINY = ((5, (9, 14, 12, 4)),)
WAYS = ("one launch", "two stages")
ITERATIONS = 20
STEP_SIZE = 0.05
# What operands lose in products of each precision; three TF32 products leave out about four roundings of fp32.
_LOST = {"bf16": 2.0**-8, "tf32": TF32, "tf32x3": 2.0**-21}
_LOSS = nn.CrossEntropyLoss(reduction="sum")
_EVERYTHING, _NOTHING = 2**62, 0


def cases(interpreted: bool) -> list[Case]:
    """Every precision of a network together."""
    return [
        _case(batch, widths, precision, interpreted)
        for batch, widths in (TINY if interpreted else NETWORKS)
        for precision in PRODUCTS
    ]


def _case(batch: int, widths: tuple[int, ...], precision: str, interpreted: bool) -> Case:
    loop = list(pairwise(widths[1:]))
    macs = sum(2 * batch * fan_in * fan_out for fan_in, fan_out in loop)
    # as of linear_predict and linear_feedback, every array once a stage
    operand = operand_bytes(precision)
    copied = 0 if precision == "tf32x3" else operand
    moved = sum(
        2 * operand * fan_in * fan_out
        + batch * (fan_in * (operand + 12 + copied) + fan_out * (2 * operand + 12))
        for fan_in, fan_out in loop
    )
    runs = [(width, len(list(equal))) for width, equal in groupby(widths)]
    words = "-".join(f"{width}x{count}" if count > 1 else str(width) for width, count in runs)
    size = f"batch {batch}, {words} tanh"
    ways = partial(_ways, batch, widths, precision, interpreted)
    return Case("mlp_relaxation", size, precision, macs, moved, WAYS, ways)


class _Relaxations:
    """A network, a batch, its forward pass in one precision, and what float64 and eager make of it."""

    def __init__(
        self, batch: int, widths: tuple[int, ...], precision: str, num_steps: int, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.model = networks.mlp(widths, nn.Tanh).to(device)
        self.x = normal((batch, widths[0]), device)
        self.y = (torch.arange(batch) % widths[-1]).to(device)
        self.device, self.precision, self.num_steps = device, precision, num_steps
        self.network = describe(self.model)
        self.shapes = self.network.shapes(tuple(self.x.shape))

    def loop(self, planned: Design) -> Loop:
        """At the forward pass."""
        with _as_the_backend(self.precision, self.device) as precision:
            chains = [None, *(layer_chain(spec, self.model, precision) for spec in self.network.layers)]
            vhat, products = [self.x], [None]
            arena = arena_of(planned, self.device, precision.operand)
            for l, chain in enumerate(chains[1:], start=1):
                value, product = vhat[-1], None
                for step in chain.steps:
                    value = step.forward(value)
                    product = value if isinstance(step, LinearStep) else product
                if f"uhat{l}" in arena:
                    product = arena.matrix(f"uhat{l}").copy_(product)
                vhat.append(value)
                products.append(product)
            loss = describe_loss(_LOSS)
            target = loss.prepare(vhat[-1], self.y, raise_now=True)
            inputs = ForwardState(
                chains, vhat, products, None, target, lambda mu: loss.gradient(target, mu), None
            )
            return Loop(planned, arena, inputs, STEP_SIZE)

    @cached_property
    def bound_and_truth(self) -> tuple[float, list[Tensor]]:
        """Bound on relative errors, three times the larger of eager's and what operands lose; and d_1..d_{L-1}."""
        truth = self._relaxed("reference", copy.deepcopy(self.model).double(), self.x.double())
        with use_precision(torch_precision(self.precision, self.device), self.device):
            eager = self._relaxed("eager", self.model, self.x)
        lost = max(map(relative_error, eager, truth))
        return FACTOR * max(lost, _LOST[self.precision]), truth

    def _relaxed(self, backend: str, model: nn.Sequential, x: Tensor) -> list[Tensor]:
        result = pcfast.relax(
            model, x, self.y, loss=_LOSS, step_size=STEP_SIZE, num_steps=self.num_steps, backend=backend, check="sync"
        )  # fmt: skip
        return [
            v.double() - a.double()
            for v, a in zip(result.beliefs[1:-1], result.activations[1:-1], strict=True)
        ]


@contextlib.contextmanager
def _as_the_backend(precision: str, device: torch.device) -> Iterator[Precision]:
    """The numeric switches under which the backend relaxes; gives the dtypes."""
    with use_precision(torch_precision(precision, device), device):
        dtypes = choose_precision(device.type, torch.float32)
        with numerics(device, dtypes):
            yield dtypes


def _ways(
    batch: int, widths: tuple[int, ...], precision: str, interpreted: bool, device: torch.device
) -> list[Way]:
    steps = 3 if interpreted else ITERATIONS
    relaxations = _Relaxations(batch, widths, precision, steps, device)
    sm_count = 3 if interpreted else chip_of(device).sm_count
    ways = []
    for name, l1_bytes_per_sm in zip(WAYS, (_EVERYTHING, _NOTHING), strict=True):
        target = CompileTarget(precision, sm_count, l1_bytes_per_sm, interpreted)
        # not fresh: all layers take part in every iteration
        planned = design(relaxations.network, relaxations.shapes, False, "cross_entropy", False, target)
        loop = relaxations.loop(planned)
        launches = [*planned.predicts, *([] if planned.fuse_loop else [planned.feedback])]
        tiles = "; ".join(dict.fromkeys(described(launch.tiles, launch.programs) for launch in launches))
        ways.append(Way(name, tiles, partial(loop.run, steps), partial(_judge, relaxations, planned), steps))
    return ways


def _judge(relaxations: _Relaxations, planned: Design) -> Judgement:
    bound, truth = relaxations.bound_and_truth
    loop = relaxations.loop(planned)
    loop.run(relaxations.num_steps)
    result = [loop.deviation(l) for l in range(1, planned.depth)]
    error = max(map(relative_error, result, truth))
    return Judgement(error, error / bound)
