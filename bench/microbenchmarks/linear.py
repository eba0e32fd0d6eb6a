"""linear_predict and linear_feedback over a grid of sizes, beside cuBLAS's product and an elementwise launch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pcfast.backends.chips import chip_of
from pcfast.backends.triton.arena import Arena, Layout, LayoutBuilder
from pcfast.backends.triton.loop import table
from pcfast.backends.triton.tensor_layout import padded
from pcfast.backends.triton.tiles import LinearTiles, linear_tiles
from pcfast.kernels.grouped_gemm import Gemm
from pcfast.kernels.linear_feedback import launch_linear_feedback
from pcfast.kernels.linear_predict import Epilogue, launch_linear_predict
from pcfast.kernels.linear_problems import HIDDEN, UPDATE, FeedbackProblem, PredictProblem
from pcfast.kernels.pointwise_error import Tail, error_and_delta
from pcfast.kernels.pointwise_update import update
from pcfast.kernels.tf32 import as_read
from pcfast.model.activations import Relu

from .case import BEFORE, ETA, PRODUCTS, Case, Way, described, ends, normal, operand_bytes, operand_dtype
from .rounding import (
    OPERAND,
    Judgement,
    copied,
    judged,
    predict_truth,
    product_bound,
    through_memory,
    update_bound,
)

PREDICT, FEEDBACK = ("triton", "cuBLAS + pointwise_error"), ("triton", "cuBLAS + pointwise_update")
#: (layers of one launch, batch, in, out), what matters most first.
GRID = (
    (1, 300, 600, 600),
    (1, 1024, 4096, 4096),
    (8, 128, 128, 128),
    (1, 32, 600, 600),
    (32, 128, 128, 128),
    (1, 300, 600, 10),
    (1, 512, 600, 600),
    (1, 256, 1024, 1024),
    (1, 4096, 1024, 1024),
    (1, 32, 4096, 4096),
)
#: For the interpreter: more than a tile each way, and nothing that a tile divides.
TINY = ((2, 5, 20, 24),)


def cases(interpreted: bool) -> list[Case]:
    """linear_predict and linear_feedback in turn, every precision of a size together."""
    return [
        make(*sizes, precision, interpreted)
        for sizes in (TINY if interpreted else GRID)
        for make in (_predict, _feedback)
        for precision in PRODUCTS
    ]


def _size(layers: int, batch: int, fan_in: int, fan_out: int) -> str:
    return f"batch {batch}, {fan_in} -> {fan_out}" + (f", {layers} layers" if layers > 1 else "")


def _predict(layers: int, batch: int, fan_in: int, fan_out: int, precision: str, interpreted: bool) -> Case:
    operand = operand_bytes(precision)
    # uhat and d are read, eps and delta written
    moved = operand * (batch * fan_in + fan_in * fan_out) + batch * fan_out * (12 + operand)
    ways = partial(_predict_ways, layers, batch, fan_in, fan_out, precision, interpreted)
    macs = layers * batch * fan_in * fan_out
    return Case(
        "linear_predict",
        _size(layers, batch, fan_in, fan_out),
        precision,
        macs,
        layers * moved,
        PREDICT,
        ways,
    )


def _feedback(layers: int, batch: int, fan_in: int, fan_out: int, precision: str, interpreted: bool) -> Case:
    operand = operand_bytes(precision)
    copy = 0 if precision == "tf32x3" else operand
    # d is read and written, eps read
    moved = operand * (batch * fan_out + fan_in * fan_out) + batch * fan_in * (12 + copy)
    ways = partial(_feedback_ways, layers, batch, fan_in, fan_out, precision, interpreted)
    macs = layers * batch * fan_in * fan_out
    return Case(
        "linear_feedback",
        _size(layers, batch, fan_in, fan_out),
        precision,
        macs,
        layers * moved,
        FEEDBACK,
        ways,
    )


class _Launch:
    """Layers of one size in an arena, and how a launch works on them."""

    def __init__(
        self,
        layers: int,
        products: tuple[int, int, int],
        precision: str,
        interpreted: bool,
        device: torch.device,
    ) -> None:
        self.layers, self.precision, self.device = layers, precision, device
        self.interpreted = interpreted
        self.builder = LayoutBuilder()
        self.copies = precision != "tf32x3"  # three TF32 products read the state
        sm_count = 3 if interpreted else chip_of(device).sm_count
        all_products = [products] * layers
        self.tiles: LinearTiles = linear_tiles(all_products, precision, sm_count, interpreted)
        self.programs = min(self.tiles.count(all_products), sm_count)
        self.gemm = Gemm(self.tiles, precision, aligned=True)

    def add(self, name: str, rows: int, columns: int, *, operand: bool = False) -> None:
        """A matrix of every layer, its rows padded as the backend pads them."""
        for layer in range(self.layers):
            self.builder.add(
                f"{name}{layer}", rows, columns, padded(columns), operand=operand and self.copies
            )

    def first(self, name: str, layer: int) -> int:
        return self.builder.matrices[f"{name}{layer}"].first

    def fill(self, layout: Layout, **scales: float) -> None:
        """The arena, with normal numbers in the matrices that ``scales`` names, operands rounded."""
        self.arena = Arena(layout, self.device, torch.float32, operand_dtype(self.precision))
        for layer in range(self.layers):
            for name, scale in scales.items():
                matrix = self.matrix(name, layer)
                numbers = normal(tuple(matrix.shape), self.device, scale, seed=layer)
                operand = self.builder.matrices[f"{name}{layer}"].operand
                matrix.copy_(as_read(numbers, self.precision) if operand else numbers)

    def matrix(self, name: str, layer: int) -> Tensor:
        return self.arena.matrix(f"{name}{layer}")

    def map(self, name: str, layer: int) -> Tensor:
        """As elementwise kernels take features: (batch, 1, 1, columns)."""
        return self.matrix(name, layer)[:, None, None, :]

    def some(self, name: str, layer: int, rows: Tensor) -> Tensor:
        """Rows of a matrix in float64, (rows, columns, 1, 1)."""
        return self.matrix(name, layer)[rows.to(self.device)].double()[:, :, None, None]


def _flat(t: Tensor) -> Tensor:
    return t[:, :, 0, 0]


def _predict_ways(
    layers: int,
    batch: int,
    fan_in: int,
    fan_out: int,
    precision: str,
    interpreted: bool,
    device: torch.device,
) -> list[Way]:
    launch = _Launch(layers, (batch, fan_out, fan_in), precision, interpreted, device)
    for name, columns, operand in (
        ("below", fan_in, True), ("uhat", fan_out, False), ("d", fan_out, False), ("error", fan_out, False),
        ("delta", fan_out, True),
    ):  # fmt: skip
        launch.add(name, batch, columns, operand=operand)
    launch.add("weight", padded(fan_out), fan_in, operand=True)
    launch.fill(launch.builder.layout(), below=0.1, uhat=1.0, d=0.1)
    for layer in range(layers):
        weight = launch.matrix("weight", layer)
        numbers = normal((fan_out, fan_in), device, fan_in**-0.5, seed=layer)
        weight[:fan_out].copy_(as_read(numbers, precision))
    problems = tuple(
        PredictProblem(
            kind=HIDDEN.value, m=batch, n=fan_out, k=padded(fan_in),
            a=launch.first("below", layer), lda=padded(fan_in),
            b=launch.first("weight", layer), ldb=padded(fan_in), ldc=padded(fan_out),
            uhat=launch.first("uhat", layer), d=launch.first("d", layer), error=launch.first("error", layer),
            delta=launch.first("delta", layer), s=0, vhat=0, target=0, target_sum=0, s_given=0,
        )
        for layer in range(layers)
    )  # fmt: skip
    uploaded = table(problems, device)

    def fused() -> None:
        launch_linear_predict(
            launch.arena.state, launch.arena.operand, uploaded, products=layers, front=-1, loss_scale=1.0,
            programs=launch.programs, gemm=launch.gemm, epilogue=Epilogue(Relu()),
        )  # fmt: skip

    def composed() -> None:
        for layer in range(layers):
            product = launch.matrix("below", layer) @ launch.matrix("weight", layer)[:fan_out].t()
            error_and_delta(
                product=product[:, None, None, :], uhat=launch.map("uhat", layer), deviation=launch.map("d", layer),
                error=launch.map("error", layer), delta=launch.map("delta", layer), tail=Tail(after=Relu()),
            )  # fmt: skip

    def judge(run, rounded: bool) -> Judgement:
        """``rounded``: the product goes through memory."""
        run()
        looked_at, results = ends(batch), []
        for layer in {0, layers - 1}:
            below, uhat, d = (launch.some(name, layer, looked_at) for name in ("below", "uhat", "d"))
            weight = launch.matrix("weight", layer)[:fan_out].double()
            s = (_flat(below) @ weight.t())[:, :, None, None]
            absolute = (_flat(below).abs() @ weight.abs().t())[:, :, None, None]
            bound = product_bound(precision, fan_in, absolute)
            if rounded:
                bound = through_memory(bound, absolute, operand_dtype(precision))
            truth = predict_truth(s, bound, uhat, d, (1, 1), True, OPERAND[precision])
            results += [
                (launch.some("error", layer, looked_at), truth.error, truth.error_bound),
                (launch.some("delta", layer, looked_at), truth.delta, truth.delta_bound),
            ]
        return judged(*results)

    return [
        Way(PREDICT[0], described(launch.tiles, launch.programs), fused, partial(judge, fused, False)),
        Way(PREDICT[1], "", composed, partial(judge, composed, True)),
    ]


def _feedback_ways(
    layers: int,
    batch: int,
    fan_in: int,
    fan_out: int,
    precision: str,
    interpreted: bool,
    device: torch.device,
) -> list[Way]:
    launch = _Launch(layers, (batch, fan_in, fan_out), precision, interpreted, device)
    launch.add("delta", batch, fan_out, operand=True)
    launch.add("d", batch, fan_in)
    launch.add("error", batch, fan_in)
    copy = "copy" if launch.copies else "d"
    if launch.copies:
        launch.add("copy", batch, fan_in, operand=True)
    launch.add("weight", padded(fan_out), fan_in, operand=True)
    launch.fill(launch.builder.layout(), delta=0.1, error=0.1)
    for layer in range(layers):
        weight = launch.matrix("weight", layer)
        numbers = normal((fan_out, fan_in), device, fan_in**-0.5, seed=layer)
        weight[:fan_out].copy_(as_read(numbers, precision))
    problems = tuple(
        FeedbackProblem(
            kind=UPDATE.value, m=batch, n=fan_in, k=padded(fan_out),
            a=launch.first("delta", layer), lda=padded(fan_out), b=launch.first("weight", layer),
            ldb=padded(fan_in), ldc=padded(fan_in), d=launch.first("d", layer),
            d_operand=launch.first(copy, layer), error=launch.first("error", layer), s=0, sum=0, layer=layer,
            velocity=0, sum_velocity=0,
        )
        for layer in range(layers)
    )  # fmt: skip
    uploaded = table(problems, device)
    first_bad = torch.full((layers,), 2**31 - 1, dtype=torch.int32, device=device)

    def fused() -> None:
        launch_linear_feedback(
            launch.arena.state, launch.arena.operand, uploaded, first_bad, count=layers, iteration=1, eta=ETA,
            programs=launch.programs, gemm=launch.gemm,
        )  # fmt: skip

    def composed() -> None:
        for layer in range(layers):
            pulled = launch.matrix("delta", layer) @ launch.matrix("weight", layer)[:fan_out]
            update(
                deviation=launch.map("d", layer), error=launch.map("error", layer), pulled=pulled[:, None, None, :],
                step_size=ETA, first_bad=first_bad, layer=layer, iteration=1,
                operand=launch.map("copy", layer) if launch.copies else None,
            )  # fmt: skip

    def judge(run, rounded: bool) -> Judgement:
        for layer in range(layers):
            launch.matrix("d", layer).copy_(normal((batch, fan_in), device, BEFORE, seed=layer))
        looked_at = ends(batch)
        before = {layer: launch.some("d", layer, looked_at) for layer in (0, layers - 1)}
        run()
        results = []
        for layer, old in before.items():
            delta, error = (launch.some(name, layer, looked_at) for name in ("delta", "error"))
            weight = launch.matrix("weight", layer)[:fan_out].double()
            r = (_flat(delta) @ weight)[:, :, None, None]
            absolute = (_flat(delta).abs() @ weight.abs())[:, :, None, None]
            bound = product_bound(precision, fan_out, absolute)
            if rounded:
                bound = through_memory(bound, absolute, operand_dtype(precision))
            moved = old + ETA * (error - r)
            bound = update_bound(old, moved, ETA, bound)
            results.append((launch.some("d", layer, looked_at), moved, bound))
            if launch.copies:
                results.append(
                    (launch.some("copy", layer, looked_at), moved, copied(moved, bound, OPERAND[precision]))
                )
        return judged(*results)

    return [
        Way(FEEDBACK[0], described(launch.tiles, launch.programs), fused, partial(judge, fused, False)),
        Way(FEEDBACK[1], "", composed, partial(judge, composed, True)),
    ]
