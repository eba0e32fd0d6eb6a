"""What is executed: networks and settings of the kernels' tests, on a chip, in a precision.

``QUICK`` runs scenarios once, their chip and precision by turns; ``FULL`` runs each on every chip in every
precision (``make ptx``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from against_reference import MOVING, in_double, updates
from implicit_convolutions import EveryConvolution
from kernel_networks import (
    GRAM_TAILS,
    IMPLICIT,
    RESIDENT,
    STREAMED,
    clamped,
    drawn,
    mlp,
    narrowing_conv_net,
)
from networks_for_tests import IN_KERNELS, LOSSES, loss_and_target
from torch import nn

import pcfast
from pcfast.backends.cuda import shared_memory as placement
from pcfast.backends.triton import backend, designs, launch_plan
from pcfast.backends.triton.arena import Arena, LayoutBuilder
from pcfast.checking.bounds import relative_error
from pcfast.checking.copies import loss_in
from pcfast.precision import switched, use_precision

__all__ = [
    "CHIPS",
    "FULL",
    "IMPLICIT_KERNELS",
    "POINTWISE_KERNELS",
    "PRECISIONS",
    "QUICK",
    "SCENARIOS",
    "STAGES",
    "Case",
    "Scenario",
    "device_of",
    "in_precision",
    "kernels_run",
    "random_mlp",
    "run",
    "settings_of",
]

CHIPS = (80, 90)
PRECISIONS = ("ieee", "tf32", "bf16")
_GAP = 1024  # elements between the matrices of an arena, which no access may touch

Problem = tuple[nn.Sequential, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Scenario:
    """A network and how it is relaxed.

    Attributes:
        make: network, input and target. kernels: that must run.
        close: weights of the loop count as close to a program, so that one launch runs all iterations.
        implicit: convolutions run as implicit products where they can.
        sm_count: of the chip: with few, tiles are large and a program has several.
        loss: a name of networks_for_tests.LOSSES; "" for cross-entropy. way: of MOVING, or "".
        samples: of a block of the resident kernel; None where its placement decides.
        starts: beliefs are given instead of the forward pass's.
    """

    name: str
    make: Callable[[], Problem]
    kernels: tuple[str, ...]
    num_steps: int = 4
    close: bool = True
    implicit: bool = False
    sm_count: int = 4
    loss: str = ""
    way: str = ""
    samples: int | None = None
    starts: bool = False


@dataclass(frozen=True)
class Case:
    """A scenario on a chip, in a precision. contract: sums of products are fused wherever ptxas may."""

    scenario: Scenario
    chip: int
    precision: str
    contract: bool = False

    @property
    def resident(self) -> bool:
        return self.scenario.kernels == ("resident",)

    @property
    def id(self) -> str:
        return f"{self.scenario.name}, sm_{self.chip}, {self.precision}" + (
            ", fused" if self.contract else ""
        )


# scenarios -------------------------------------------------------------------------------------------------------

STAGES = ("linear_predict", "linear_feedback")
POINTWISE_KERNELS = ("pointwise_error_kernel", "pointwise_update_kernel")
IMPLICIT_KERNELS = ("conv_predict", "conv_feedback")


def random_mlp(*widths: int, batch: int = 9, activation=nn.Tanh) -> Problem:
    torch.manual_seed(2)
    model = mlp(*widths, activation=activation)
    return model, torch.randn(batch, widths[0]), torch.randint(0, widths[-1], (batch,))


def _with_loss(name: str, width: int) -> Problem:
    model, x, _ = random_mlp(8, 12, 9, width)
    return model, x, loss_and_target(name, len(x), width)[1].to(torch.float32 if "mse" in name else None)


def _pooled(activation: str, pool: type[nn.Module]) -> Problem:
    """An activation in front of a pool, and another one behind it."""
    torch.manual_seed(1)
    return (
        nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()),
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), IN_KERNELS[activation](), pool(2), nn.Flatten()),
            nn.Sequential(nn.Linear(36, 9), nn.Sigmoid()),
            nn.Linear(9, 4),
        ),
        torch.randn(5, 2, 6, 6),
        torch.randint(0, 4, (5,)),
    )


def _wide_maps() -> Problem:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 20, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(20, 40, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(40 * 9, 4),
    )
    return model, torch.randn(3, 2, 6, 6), torch.tensor([0, 3, 1])


def _streamed() -> Iterator[Scenario]:
    for name, (_, _, forms) in STREAMED.items():
        problem = lambda name=name: drawn(STREAMED, name)  # noqa: E731
        linear = set(forms) == {"l"}
        if linear and name != "wide output":
            yield Scenario(f"{name}, one launch", problem, ("mlp_relaxation",))
        kernels = STAGES * ("l" in forms) + POINTWISE_KERNELS * ("p" in forms)
        if kernels:
            yield Scenario(name, problem, kernels, close=False)
    for name, (_, _, forms) in IMPLICIT.items():
        problem = lambda name=name: drawn(IMPLICIT, name, 5)  # noqa: E731
        kernels = STAGES + IMPLICIT_KERNELS * ("c" in forms)
        yield Scenario(f"{name}, implicit", problem, kernels, close=False, implicit=True)
        if "c" in forms and name in ("3x3 relu max", "stride", "convolutions one after another"):
            for way in MOVING:
                yield Scenario(f"{name}, implicit, {way}", problem, kernels, 3, False, True, way=way)
    for activation, pool in itertools.product(IN_KERNELS, (nn.MaxPool2d, nn.AvgPool2d)):
        problem = lambda a=activation, p=pool: _pooled(a, p)  # noqa: E731
        name = f"{activation} before {'max' if pool is nn.MaxPool2d else 'average'}"
        yield Scenario(name, problem, ("pointwise_error_kernel",), 3, close=False)
        if pool is nn.MaxPool2d or activation == "identity":
            yield Scenario(f"{name}, implicit", problem, IMPLICIT_KERNELS, 3, close=False, implicit=True)
    for tail in GRAM_TAILS:
        kernels = () if "torch" in tail else ("pointwise_gram_kernel",)
        yield Scenario(
            f"Gram form, {tail}", lambda t=tail: narrowing_conv_net(t), (*STAGES, *kernels), 5, False
        )
    gram = lambda: random_mlp(12, 60, 7, 5, 4)  # noqa: E731
    for way in ("", *MOVING):
        behind = f", {way}" if way else ""
        yield Scenario(f"Gram form{behind}", gram, STAGES, 5, close=False, way=way)
        yield Scenario(f"Gram form, one launch{behind}", gram, ("mlp_relaxation",), 5, way=way)
        if way:
            plain = lambda: drawn(STREAMED, "mlp")  # noqa: E731
            yield Scenario(f"mlp, {way}", plain, STAGES, close=False, way=way)
            yield Scenario(f"mlp, one launch, {way}", plain, ("mlp_relaxation",), way=way)
            conv = lambda: drawn(STREAMED, "conv")  # noqa: E731
            yield Scenario(f"conv, {way}", conv, POINTWISE_KERNELS, close=False, way=way)
    for name in ("mlp", "conv"):
        problem = lambda name=name: drawn(STREAMED, name)  # noqa: E731
        yield Scenario(f"{name}, given beliefs", problem, STAGES, 3, close=False, starts=True)
    problem = lambda: drawn(STREAMED, "mlp")  # noqa: E731
    yield Scenario("mlp, one launch, given beliefs", problem, ("mlp_relaxation",), 3, starts=True)
    problem = lambda: drawn(IMPLICIT, "3x3 tanh max", 5)  # noqa: E731
    yield Scenario(
        "implicit, given beliefs", problem, IMPLICIT_KERNELS, 3, close=False, implicit=True, starts=True
    )
    for loss in LOSSES:
        if loss != "custom":
            problem = lambda loss=loss: _with_loss(loss, 10)  # noqa: E731
            yield Scenario(f"loss {loss}", problem, STAGES, 3, close=False, loss=loss)
    wide = lambda: _with_loss("mse_mean", 70)  # noqa: E731
    yield Scenario("wide mse", wide, (*STAGES, "output_error_kernel"), 3, close=False, loss="mse_mean")
    wide = lambda: random_mlp(8, 12, 1100, batch=5)  # noqa: E731
    yield Scenario("wide cross-entropy", wide, ("wide_cross_entropy_kernel",), 2, close=False)
    # sums of six steps in loops of four stages, over several tiles
    sums = lambda: random_mlp(12, 330, 70, 330, 5)  # noqa: E731
    yield Scenario("long sums", sums, STAGES, 3, close=False, sm_count=1)
    yield Scenario("long sums, one launch", lambda: random_mlp(12, 330, 70, 5), ("mlp_relaxation",), 3)
    yield Scenario(
        "maps wider than a tile, implicit", _wide_maps, IMPLICIT_KERNELS, 3, close=False, implicit=True
    )
    # around tiles of 16 samples in one launch, of 64 and 128 in stages
    for batch in (1, 15, 16, 17):
        problem = lambda batch=batch: random_mlp(12, 20, 33, 5, batch=batch)  # noqa: E731
        yield Scenario(f"batch of {batch}, one launch", problem, ("mlp_relaxation",), 3)
    for batch in (1, 63, 64, 65):
        problem = lambda batch=batch: random_mlp(12, 20, 65, 5, batch=batch)  # noqa: E731
        yield Scenario(f"batch of {batch}", problem, STAGES, 3, close=False, sm_count=2)
    for batch in (127, 128, 129):
        problem = lambda batch=batch: random_mlp(20, 140, 150, 10, batch=batch, activation=nn.ReLU)  # noqa: E731
        yield Scenario(f"batch of {batch}, large tiles", problem, STAGES, 2, close=False, sm_count=1)


def _resident() -> Iterator[Scenario]:
    kernels = ("resident",)
    for name, samples in zip(RESIDENT, itertools.cycle((1, 2, 3, 4, 8)), strict=False):
        problem = lambda name=name: drawn(RESIDENT, name)  # noqa: E731
        if name == "one class":
            problem = lambda: (*drawn(RESIDENT, "one class")[:2], torch.randn(9, 1))  # noqa: E731
        loss = "mse_sum" if name == "one class" else ""
        yield Scenario(f"resident {name}", problem, kernels, samples=samples, loss=loss)
    for name in ("mlp", "conv"):
        problem = lambda name=name: clamped(name)  # noqa: E731
        yield Scenario(f"resident Gram form, {name}", problem, kernels, 9, samples=4)
        given = lambda name=name: drawn(RESIDENT, name, 5)  # noqa: E731
        yield Scenario(f"resident {name}, given beliefs", given, kernels, 3, samples=3, starts=True)
        for way in MOVING:
            plain = lambda name=name: drawn(RESIDENT, name, 5)  # noqa: E731
            yield Scenario(f"resident {name}, {way}", plain, kernels, samples=3, way=way)
            yield Scenario(f"resident Gram form, {name}, {way}", problem, kernels, 9, samples=4, way=way)
    for loss in LOSSES:
        if loss != "custom":
            problem = lambda loss=loss: _with_loss(loss, 10)  # noqa: E731
            yield Scenario(f"resident loss {loss}", problem, kernels, 3, samples=3, loss=loss)
    for activation in IN_KERNELS:
        problem = lambda a=activation: _pooled(a, nn.MaxPool2d)  # noqa: E731
        yield Scenario(f"resident {activation} before max", problem, kernels, 3, samples=2)
    for batch, samples in ((1, 4), (3, 4), (4, 4), (5, 4), (16, 16)):
        problem = lambda batch=batch: random_mlp(12, 20, 33, 5, batch=batch)  # noqa: E731
        yield Scenario(f"resident batch of {batch}, {samples} a block", problem, kernels, 3, samples=samples)


STREAMED_SCENARIOS = tuple(_streamed())
RESIDENT_SCENARIOS = tuple(_resident())
SCENARIOS = STREAMED_SCENARIOS + RESIDENT_SCENARIOS


def _quick() -> Iterator[Case]:
    turns = itertools.cycle([(chip, precision) for precision in PRECISIONS for chip in reversed(CHIPS)])
    for number, (scenario, (chip, precision)) in enumerate(zip(SCENARIOS, turns, strict=False)):
        # both at once compile what one of them does, but in launches of all iterations
        alone = scenario.way in ("momentum", "schedule")
        if alone and not scenario.name.startswith(("mlp, one launch", "resident mlp")):
            continue
        if spoiled := "before max" in scenario.name:  # a fused product spoils a difference: float32 shows it
            precision = "ieee"
        case = Case(scenario, chip, precision, contract=precision == "ieee" and (spoiled or number % 4 != 0))
        if case.resident:  # one large kernel for all precisions: two translations of it are enough
            chip = 80 if case.contract else chip
            case = dataclasses.replace(case, chip=chip, contract=chip == 80)
        yield case


FULL = tuple(
    Case(scenario, chip, precision, contract)
    for scenario in SCENARIOS
    for chip in CHIPS
    for precision in PRECISIONS
    for contract in ((False, True) if precision == "ieee" else (False,))
)
QUICK = tuple(_quick())

# running one -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_precision(name: str) -> Iterator[None]:
    """Torch's switches for a precision, also on the CPU, where TF32 is the executor's alone."""
    products = "tf32" if name == "tf32" else "ieee"
    with (
        switched(torch.backends.cuda.matmul, "fp32_precision", products),
        switched(torch.backends.cudnn.conv, "fp32_precision", products),
        use_precision("bf16", torch.device("cpu")) if name == "bf16" else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def streamed_device(scenario: Scenario, chip: int, **settings):
    """``backend="triton"`` runs compiled kernels on CPU tensors until the end."""
    from executor.triton_driver import virtual_device

    find_target, place, make_arena = designs.target_of, LayoutBuilder.add, Arena.__init__

    def target(plan):
        changes = dict(interpreted=False, sm_count=scenario.sm_count)
        if not scenario.close:
            changes["l1_bytes_per_sm"] = 0
        if scenario.implicit:
            changes["choices"] = EveryConvolution()
        return dataclasses.replace(find_target(plan), **changes)

    def add_with_gap(self, *arguments, operand=False, **keywords):
        matrix = place(self, *arguments, operand=operand, **keywords)
        self._sizes[matrix.operand] += _GAP
        return matrix

    launch_plan.design.cache_clear()
    with pytest.MonkeyPatch.context() as patch, virtual_device(chip, **settings) as device:

        def with_extents(self, layout, *arguments):
            make_arena(self, layout, *arguments)
            for arena, operand in ((self.state, False), (self.operand, True)):
                size = arena.element_size()
                parts = sorted(
                    (m.first * size, m.elements * size) for _, m in layout.matrices if m.operand == operand
                )
                if parts:
                    device.extents[arena.untyped_storage().data_ptr()] = parts

        patch.setattr(designs, "target_of", target)
        patch.setattr(backend, "_unavailable", lambda *arguments: "")
        patch.setattr(LayoutBuilder, "add", add_with_gap)
        patch.setattr(Arena, "__init__", with_extents)
        yield device
    launch_plan.design.cache_clear()


@contextlib.contextmanager
def device_of(case: Case, resident_ptx: Callable | None = None, **settings):
    """The device that runs a case. resident_ptx: of an architecture the path of the resident kernel's PTX."""
    if not case.resident:
        with streamed_device(case.scenario, case.chip, contract=case.contract, **settings) as device:
            yield device
        return
    from executor.resident_module import resident_device

    path = resident_ptx({80: "80", 90: "90a"}[case.chip])
    placement.place.cache_clear()
    with (
        pytest.MonkeyPatch.context() as patch,
        resident_device(path, contract=case.contract, **settings) as device,
    ):
        if case.scenario.samples:
            patch.setattr(placement, "SAMPLES", (case.scenario.samples,))
        yield device
    placement.place.cache_clear()


def settings_of(scenario: Scenario) -> dict:
    """Keywords of pcfast.relax."""
    result = dict(
        num_steps=scenario.num_steps, **(MOVING[scenario.way](scenario.num_steps) if scenario.way else {})
    )
    if scenario.loss:
        result["loss"] = loss_and_target(scenario.loss, 1, 10)[0]
    return result


def _in(dtype: torch.dtype, settings: dict) -> dict:
    loss = settings.get("loss", "cross_entropy")
    starts = settings.get("vinit") and [v if v is None else v.to(dtype) for v in settings["vinit"]]
    return dict(settings, loss=loss_in(loss, torch.device("cpu"), dtype), vinit=starts)


def found_by(case: Case, model, x, y, **settings) -> list[torch.Tensor]:
    """eps from layer 1 on; of the resident kernel, which leaves the local errors too, the updates as well."""
    errors = [e for e in pcfast.relax(model, x, y, **settings).errors[1:] if e is not None]
    return errors + (updates(model, x, y, **settings) if case.resident else [])


def allowed(case: Case, model, x, y, truth: list[torch.Tensor], settings: dict) -> float:
    """Bound on relative errors: in float32 that of the kernels' tests, else three times what the precision loses.

    That is what eager loses in bfloat16; TF32 has three bits more, and no eager on a CPU.
    """
    if case.precision == "ieee":
        return 3e-6
    with in_precision("bf16"):
        eager = found_by(case, model, x, y, backend="eager", **_in(torch.float32, settings))
    return 3 * _worst(eager, truth) / (8 if case.precision == "tf32" else 1)


def _worst(result: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The largest relative error; a gradient that is zero but for rounding has none."""
    return max(relative_error(f, t) for f, t in zip(result, truth, strict=True) if float(t.norm()) > 1e-12)


def run(case: Case, resident_ptx: Callable | None = None, **device_settings):
    """Relax a case on the executor; its device, the largest relative error, and what is allowed."""
    scenario = case.scenario
    model, x, y = scenario.make()
    settings = settings_of(scenario)
    if scenario.starts:
        values = pcfast.relax(model, x, y, num_steps=0, backend="reference").beliefs
        settings["vinit"] = [None, *(torch.randn_like(value) for value in values[1:])]
    truth = found_by(case, *in_double(model, x, y), backend="reference", **_in(torch.float64, settings))
    name = "cuda" if case.resident else "triton"
    with in_precision(case.precision), device_of(case, resident_ptx, **device_settings) as device:
        result = found_by(case, model, x, y, backend=name, **_in(torch.float32, settings))
        assert pcfast.last_run().plan.backend == name
    return device, _worst(result, truth), allowed(case, model, x, y, truth, settings)


def kernels_run(device) -> Counter:
    """Launches by kernel."""
    return Counter(getattr(ran, "name", "resident") for ran in device.launches)
