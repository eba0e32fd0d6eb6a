"""What the tests on a CUDA device share: networks to check, updates and their truth, bounds, and what ran.

The truth is the literal reference in float64 on the CPU. Allowed error in float32, TF32 and bfloat16: three times the
larger of backpropagation's in the same precision on the same device, and the eager backend's on the CPU, whose
arithmetic is another. A whole network is judged by pcfast.checking instead. Rows are compared bit for bit in the loop
alone: the forward pass before it is cuBLAS's, which picks its kernels by the batch.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcfast
from pcfast import networks
from pcfast.backends.cuda import relaxation as cuda
from pcfast.backends.forward import layer_chains
from pcfast.backends.triton import relaxation as triton
from pcfast.precision import numerics, use_precision
from pcfast.problem.settings import Settings
from pcfast.problem.types import Wanted
from pcfast.relaxation.solve import prepare

DEVICE = torch.device("cuda")
PRECISIONS = ("ieee", "tf32", "bf16")
STEPS = {"step_size": 0.1, "num_steps": 8}
ROWS, CLASSES = 33, 10
FIRST = "first call of its kind: recorded from the next on"
TOO_FAST = {"loss": nn.MSELoss(reduction="sum"), "step_size": 1e3, "num_steps": 100}


def updates(model: nn.Sequential, x: Tensor, y: Tensor, **settings) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, **{**STEPS, **settings}).backward()
    result = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return result


def backpropagation(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))


def in_float64(model: nn.Sequential, x: Tensor, y: Tensor, **settings) -> list[Tensor]:
    model, x, y = copy.deepcopy(model).cpu().double(), x.cpu().double(), y.cpu()
    return updates(model, x, y, backend="reference", **settings)


def distance(result: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative Frobenius distance of a tensor from its truth, in float64 on the CPU."""
    assert len(result) == len(truth)
    pairs = [
        (f.detach().double().cpu(), t.detach().double().cpu()) for f, t in zip(result, truth, strict=True)
    ]
    return max(float((f - t).norm() / t.norm()) for f, t in pairs)


def allowed(
    model: nn.Sequential, x: Tensor, y: Tensor, truth: list[Tensor], autocast=None, **settings
) -> float:
    """Bound on the error of ``model`` on CUDA, see above; TF32 as torch's switches have it."""
    on_cpu = copy.deepcopy(model).cpu()
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        by_backpropagation = backpropagation(model, x, y)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        by_cpu = updates(on_cpu, x.cpu(), y.cpu(), backend="eager", **settings)
    exact = in_float64(model, x, y, method="exact")
    return 3 * max(distance(by_backpropagation, exact), distance(by_cpu, truth))


def bound_of(model: nn.Sequential, x: Tensor, y: Tensor, truth: list[Tensor], precision: str, **settings):
    """As `allowed`, in a precision."""
    with use_precision("tf32" if precision == "tf32" else "ieee", DEVICE):
        return allowed(model, x, y, truth, torch.bfloat16 if precision == "bf16" else None, **settings)


def same_bits(result: list[Tensor], truth: list[Tensor]) -> bool:
    return len(result) == len(truth) > 0 and all(map(torch.equal, result, truth))


def last() -> tuple[str, bool, str]:
    run = pcfast.last_run()
    return run.plan.backend, run.replayed, run.not_replayed_because


@contextlib.contextmanager
def no_waiting():
    """Operations that wait for the device raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Case:
    """A network to check.

    Attributes:
        make: a fresh one. sample: shape of one input. batch: rows.
        says: what explain has to say of it, in any precision.
        loss, num_steps, precisions: of the check.
    """

    make: Callable[[], nn.Sequential]
    sample: tuple[int, ...]
    says: str
    batch: int = ROWS
    loss: str = "cross_entropy"
    num_steps: int = 12
    precisions: tuple[str, ...] = PRECISIONS


def problem(make: Callable[[], nn.Sequential], sample: Sequence[int], rows: int = ROWS):
    """A network, x and y on the device, float32."""
    x, y = torch.randn(rows, *sample), torch.randint(0, CLASSES, (rows,))
    return make().to(DEVICE), x.to(DEVICE), y.to(DEVICE)


def bare_layers() -> nn.Sequential:
    """As Torch2PC has them: activations are PC layers of their own."""
    return nn.Sequential(nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, CLASSES))


def smooth_mlp() -> nn.Sequential:
    return networks.mlp([37, 64, 53, CLASSES], nn.Tanh)


def smooth_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh()),
        nn.Sequential(nn.Conv2d(8, 12, 3), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.GELU(), nn.Flatten()),
        nn.Linear(16 * 4 * 4, CLASSES),
    )


def smooth_staged() -> nn.Sequential:
    """Its loop weights, 1.1 MB in bfloat16, are more than one SM has of L1."""
    return networks.mlp([64, 600, 600, 600, CLASSES], nn.Tanh)


MLP, CNN = (smooth_mlp, (37,)), (smooth_cnn, (3, 12, 12))
#: Networks without kinks but a max-pool's, by backend: one step of them can be judged without medians.
SMOOTH = {
    "cuda": {"mlp": MLP, "cnn": CNN},
    "triton": {"one_launch": MLP, "two_stages": (smooth_staged, (64,)), "convolutions": CNN},
}


def views_of(x: Tensor) -> dict[str, Tensor]:
    """Inputs of x's shape at odd addresses and with odd strides."""
    rows, size, sample = len(x), x[0].numel(), x.shape[1:]
    large = torch.randn(rows + 3, 2 * size + 5, device=x.device)
    views = {
        "sliced": large[:rows, 5 : 5 + size],
        "offset": large.flatten()[1 : 1 + rows * size].view(rows, size),
        "strided": large[:rows, 1 : 1 + 2 * size : 2],
        "transposed": torch.randn(size, rows, device=x.device).t(),
    }
    return {
        **{name: view.unflatten(1, sample) for name, view in views.items()},
        "expanded": x[:1].expand_as(x),
    }


class _Streamed(triton.Relaxation):
    """A relaxation of the triton backend; ``given``: another and rows of it, whose forward pass it takes."""

    given: tuple | None = None

    def values(self):
        self.vhat = super().values()
        if self.given is None:
            return self.vhat
        whole, rows = self.given
        self.pre_activations = [u if u is None else u[rows] for u in whole.pre_activations]
        for l, u in enumerate(self.pre_activations):
            if f"uhat{l}" in self.arena:  # where the loop reads linear layers'
                self.arena.matrix(f"uhat{l}").copy_(u)
        return [value[rows] for value in whole.vhat]


class _Resident(cuda.Relaxation):
    """A relaxation of the cuda backend, whose kernel runs the forward pass but for the lowest product, torch's."""

    given: tuple | None = None

    def arguments(self):
        placed, self.inputs = super().arguments()
        if self.given is not None:
            whole, rows = self.given
            self.inputs = replace(self.inputs, below=whole.inputs.below[rows])
        return placed, self.inputs


class Batch:
    """A batch relaxed as a whole, and parts of it relaxed alone from the same forward pass."""

    def __init__(self, backend: str, make, sample, rows: int, gram: bool, num_steps: int = 8) -> None:
        self.backend, (self.model, self.x, self.y) = backend, problem(make, sample, rows)
        self.gram, self.num_steps = gram, num_steps
        self.run = self.relaxed(slice(0, rows))

    def relaxed(self, rows: slice, whole=None):
        # a sum: every row's loss is its own
        loss = nn.CrossEntropyLoss(reduction="sum")
        settings = Settings(loss, num_steps=self.num_steps, backend=self.backend, check="off")
        problem, plan = prepare(self.model, self.x[rows], self.y[rows], settings, Wanted(gradients=False))
        plan = replace(plan, gram=self.gram)
        with numerics(self.x.device, plan.precision):
            kind = {"triton": _Streamed, "cuda": _Resident}[self.backend]
            run = kind(problem, plan, layer_chains(problem, plan))
            run.given = None if whole is None else (whole, rows)
            run.outcome()
        return run

    def values(self, run) -> list[Tensor]:
        """Beliefs, or their deviations, and the output's error. Layer 1's in Gram form is a product of torch's."""
        return [value for l, value in run.results if l >= (2 if self.gram else 1)]

    def assert_alone_as_in_the_batch(self, rows: slice) -> None:
        alone = self.values(self.relaxed(rows, self.run))
        together = [value[rows] for value in self.values(self.run)]
        assert all(bool(value.any()) for value in together)
        assert same_bits(alone, together), rows


def in_threads(works: Sequence[Callable[[], object]]) -> list:
    """What ``works`` give, all at the same time, each in a thread of its own."""
    result, failures = [None] * len(works), []

    def run(index: int) -> None:
        try:
            result[index] = works[index]()
            torch.cuda.current_stream().synchronize()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return result
