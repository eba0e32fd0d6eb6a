"""The resident kernel alone: relaxations of several lengths, so that one more iteration can be told from the rest.

A launch loads the weights, runs the forward pass, relaxes, and pulls the last errors back to the products. Times are
those of an iteration as a share of its launch; :func:`pcfast.bench.tables.growth` takes the launch away.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import pcfast
from pcfast import networks
from pcfast.backends import BACKENDS
from pcfast.backends.cuda import launch as loop
from pcfast.backends.cuda.relaxation import Relaxation
from pcfast.backends.forward import layer_chains
from pcfast.checking import checker as checking
from pcfast.checking.bounds import FACTOR, relative_error
from pcfast.model.describe import describe
from pcfast.model.spec import Network
from pcfast.precision import choose_precision, numerics
from pcfast.problem.plan import choose_gram, gram_macs, layer_macs, plan
from pcfast.problem.settings import Settings
from pcfast.relaxation.solve import prepare

from .case import Case, Way, normal, torch_precision
from .rounding import TF32, Judgement

KERNEL = "resident"
PRECISIONS = ("fp32", "tf32", "bf16")
STEP_SIZE = 0.1
#: Name -> (network, shape of x).
NETWORKS = {
    "mnist_cnn": (networks.mnist_cnn, (300, 1, 28, 28)),
    "784-128-128-10 relu": (partial(networks.mlp, (784, 128, 128, 10)), (128, 784)),
}
#: Iterations of a launch.
STEPS = (20, 50, 100, 200)
TINY, TINY_STEPS = {"9-14-12-4 relu": (partial(networks.mlp, (9, 14, 12, 4)), (5, 9))}, (3, 4, 6)
# What operands lose in products.
_LOST = {"bf16": 2.0**-8, "tf32": TF32, "fp32": 2.0**-24}


def cases(small: bool) -> list[Case]:
    """Every precision of a network together."""
    return [
        _case(name, make, shape, TINY_STEPS if small else STEPS, precision)
        for name, (make, shape) in (TINY if small else NETWORKS).items()
        for precision in PRECISIONS
    ]


def _case(
    name: str,
    make: Callable[[], nn.Sequential],
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    precision: str,
) -> Case:
    with torch.device("meta"):
        network = describe(make())
    shapes = network.shapes(shape)
    gram, _ = choose_gram(network, shapes, "strict", steps[0], True, False)
    macs = layer_macs(network, shapes)
    products = 2 * sum(macs[1:])
    if gram:
        products += gram_macs(network, shapes) - 2 * macs[1]
    # nothing moves through device memory but before and after the loop
    ways = partial(_ways, make, shape, steps, precision)
    ineligible_reason = partial(_ineligible_reason, network, shape, steps[0])
    labels = tuple(f"cuda, {_length(num_steps)}" for num_steps in steps)
    return Case(KERNEL, f"{name}, batch {shape[0]}", precision, products, 0, labels, ways, ineligible_reason)


def _length(num_steps: int) -> str:
    return f"n = {num_steps}"


def _ineligible_reason(network: Network, shape: tuple[int, ...], num_steps: int, device: torch.device) -> str:
    precision = choose_precision(device.type, torch.float32)
    planned = plan(network, device, torch.float32, shape, precision, num_steps=num_steps)
    return BACKENDS["cuda"].supports(planned)[1]


class _Relaxation:
    """A network and a batch, relaxed by the backend; and the launch of its kernel."""

    def __init__(
        self,
        make: Callable[[], nn.Sequential],
        shape: tuple[int, ...],
        num_steps: int,
        precision: str,
        device: torch.device,
    ) -> None:
        torch.manual_seed(0)
        self.model, self.x, self.num_steps = make().to(device), normal(shape, device), num_steps
        self.precision, self.lost = torch_precision(precision, device), _LOST[precision]
        with torch.no_grad():
            classes = self.model(self.x[:1]).shape[1]
        self.y = (torch.arange(shape[0]) % classes).to(device)
        settings = Settings(step_size=STEP_SIZE, num_steps=num_steps, backend="cuda", check="off")
        problem, planned = prepare(self.model, self.x, self.y, settings)
        with numerics(device, planned.precision):
            run = Relaxation(problem, planned, layer_chains(problem, planned))
            run.outcome()
            self.by_backend, self.first = run.outputs.beliefs, run.first
            self.placement, inputs = run.arguments()
            self.outputs, self.launch = loop.prepare(
                self.placement, inputs, num_steps, gradients=True, output_gradient=False
            )

    def words(self) -> str:
        placed = self.placement
        samples = f"{placed.samples} sample{'s' * (placed.samples > 1)} per block"
        return f"{samples}, {placed.blocks} blocks of {placed.threads} threads"

    def judge(self, by_the_rules: bool) -> Judgement:
        """Of the launch: the backend's bits, and norms as near float64's as eager's results are.

        Args:
            by_the_rules: also hold the backend to `pcfast check`. Of many iterations of relu, where a gate within
                rounding of its kink decides digits, norms are all that can be told.
        """
        self.launch()
        pairs = list(zip(self.outputs.beliefs, self.by_backend, strict=True))
        if not all(v is None or torch.equal(v, own) for v, own in pairs):
            return Judgement(math.nan, math.nan)
        result = [
            v.double() - vhat.double()
            for v, vhat in zip(self.outputs.beliefs, [None, self.first, *self.outputs.vhat[2:]], strict=True)
            if v is not None
        ]
        wide = copy.deepcopy(self.model).double()
        truth = self._relaxed(wide, self.x.double())[-len(result) :]
        eager = self._relaxed(self.model, self.x)[-len(result) :]
        error = max(map(relative_error, result, truth))
        bound = FACTOR * max(self.lost, *map(relative_error, eager, truth))
        excess = [
            abs(float(d.double().norm() / t.norm()) - 1) / bound for d, t in zip(result, truth, strict=True)
        ]
        if by_the_rules:
            batches = [(self.x + draw, self.y) for draw in (0.0, 0.1, -0.1)]
            report = checking.check(
                self.model, batches, step_size=STEP_SIZE, num_steps=self.num_steps, backends=["cuda"],
                precisions=[self.precision],
            )  # fmt: skip
            excess += [row.ratio for row in report.rows]
        return Judgement(error, max(excess) if all(map(math.isfinite, excess)) else math.nan)

    def _relaxed(self, model: nn.Sequential, x: Tensor) -> list[Tensor]:
        """Deviations of the hidden layers, by eager."""
        result = pcfast.relax(
            model, x, self.y, step_size=STEP_SIZE, num_steps=self.num_steps, backend="eager", check="sync"
        )
        pairs = zip(result.beliefs[1:-1], result.activations[1:-1], strict=True)
        return [v.double() - vhat.double() for v, vhat in pairs]


def _ways(
    make: Callable[[], nn.Sequential],
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    precision: str,
    device: torch.device,
) -> list[Way]:
    ways = []
    for num_steps in steps:
        relaxation = _Relaxation(make, shape, num_steps, precision, device)
        judge = partial(relaxation.judge, num_steps == steps[0])
        ways.append(Way("cuda", relaxation.words(), relaxation.launch, judge, num_steps, _length(num_steps)))
    return ways
