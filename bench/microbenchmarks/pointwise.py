"""pointwise_error, _update and _gram over maps, output_error over batches and classes: bound by memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pcfast.kernels.output_error import output_error, output_tile
from pcfast.kernels.pointwise_error import Tail, error_and_delta, tile
from pcfast.kernels.pointwise_gram import BLOCK, gram_update
from pcfast.kernels.pointwise_update import update
from pcfast.model.activations import Relu

from .case import BEFORE, ELEMENTWISE, ETA, Case, Way, ends, normal, operand_bytes, operand_dtype
from .rounding import EPS, STORED, Judgement, copied, judged, predict_truth, update_bound

#: (batch, height, width, channels, window of the max-pool), what matters most first. Features are maps of one pixel.
MAPS = (
    (256, 32, 32, 128, 2),
    (300, 11, 11, 5, 1),
    (300, 1, 1, 600, 1),
    (256, 16, 16, 256, 2),
    (128, 8, 8, 512, 2),
    (1024, 1, 1, 4096, 1),
    (2, 56, 56, 256, 1),
    (32, 1, 1, 600, 1),
)
TINY_MAPS = ((3, 5, 4, 5, 2),)
#: As MAPS without the pool: layer 2's products of convolutions in Gram form.
GRAM_MAPS = ((300, 11, 11, 5), (256, 30, 30, 64))
TINY_GRAM_MAPS = ((3, 5, 4, 5),)
#: (batch, classes)
OUTPUTS = ((300, 10), (1024, 4096), (256, 1000), (128, 50257), (32, 10))
TINY_OUTPUTS = ((5, 7), (3, 1030))
LOSSES = ("cross_entropy", "mse")
WAYS = ("triton",)


def cases(interpreted: bool) -> list[Case]:
    """By kernel, every precision of a size together."""
    result = [
        make(*sizes, precision)
        for sizes in (TINY_MAPS if interpreted else MAPS)
        for make in (_error, _update)
        for precision in ELEMENTWISE
    ]
    result += [
        _gram(*sizes, precision)
        for sizes in (TINY_GRAM_MAPS if interpreted else GRAM_MAPS)
        for precision in ELEMENTWISE
    ]
    return result + [
        _output(*sizes, loss, precision)
        for sizes in (TINY_OUTPUTS if interpreted else OUTPUTS)
        for loss in LOSSES
        for precision in ELEMENTWISE
    ]


def _size(batch: int, height: int, width: int, channels: int, window: int = 1) -> str:
    pool = f", max-pool {window} x {window}" if window > 1 else ""
    return f"batch {batch}, {height} x {width} x {channels}{pool}"


def _blocks(positions: int, channels: int, window: int = 1) -> str:
    rows, columns = tile(positions, channels, window)
    return f"{rows} x {columns}"


def _map(t: Tensor, samples: Tensor) -> Tensor:
    """Samples of a channels-last map in float64, channels first."""
    return t[samples.to(t.device)].double().permute(0, 3, 1, 2)


def _error(batch: int, height: int, width: int, channels: int, window: int, precision: str) -> Case:
    operand = operand_bytes(precision)
    pooled = batch * (height // window) * (width // window) * channels
    # the product is read in the operands' dtype, delta is written in it; uhat is read; d read and eps written pooled
    moved = batch * height * width * channels * (4 + 2 * operand) + 8 * pooled
    size = _size(batch, height, width, channels, window)
    ways = partial(_error_ways, batch, height, width, channels, window, precision)
    return Case("pointwise_error", size, precision, 0, moved, WAYS, ways)


def _error_ways(batch, height, width, channels, window, precision, device) -> list[Way]:
    rows, columns = height // window, width // window
    dtype = operand_dtype(precision)
    product = normal((batch, height, width, channels), device, 0.1, seed=1).to(dtype)
    uhat = normal((batch, height, width, channels), device)
    d = normal((batch, rows, columns, channels), device, 0.1)
    error, delta = torch.empty_like(d), torch.empty_like(product)
    tail = Tail(None, "max" if window > 1 else None, (window, window), Relu())

    def launch() -> None:
        error_and_delta(product=product, uhat=uhat, deviation=d, error=error, delta=delta, tail=tail)

    def judge() -> Judgement:
        launch()
        samples = ends(batch)
        s, base, result = (
            _map(t, samples)[:, :, : rows * window, : columns * window] for t in (product, uhat, delta)
        )
        truth = predict_truth(
            s, torch.zeros_like(s), base, _map(d, samples), (window, window), True, STORED[dtype]
        )
        return judged(
            (_map(error, samples), truth.error, truth.error_bound), (result, truth.delta, truth.delta_bound)
        )

    return [Way(WAYS[0], _blocks(batch * rows * columns, channels, window**2), launch, judge)]


def _update(batch: int, height: int, width: int, channels: int, window: int, precision: str) -> Case:
    operand, numbers = operand_bytes(precision), batch * height * width * channels
    # d is read and written, eps and the product read; in bf16 d is also written as an operand
    moved = numbers * (12 + operand + (2 if precision == "bf16" else 0))
    ways = partial(_update_ways, batch, height, width, channels, precision)
    return Case("pointwise_update", _size(batch, height, width, channels), precision, 0, moved, WAYS, ways)


def _update_ways(batch, height, width, channels, precision, device) -> list[Way]:
    shape, dtype = (batch, height, width, channels), operand_dtype(precision)
    start = normal(shape, device, BEFORE)
    d, error = start.clone(), normal(shape, device, 0.1, seed=1)
    pulled = normal(shape, device, 0.1, seed=2).to(dtype)
    operand = torch.empty_like(pulled) if precision == "bf16" else None
    first_bad = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)

    def launch() -> None:
        update(
            deviation=d, error=error, pulled=pulled, step_size=ETA, first_bad=first_bad, layer=0, iteration=1,
            operand=operand,
        )  # fmt: skip

    def judge() -> Judgement:
        launch()
        samples = ends(batch)
        old, eps, r = (_map(t, samples) for t in (start, error, pulled))
        moved = old + ETA * (eps - r)
        bound = update_bound(old, moved, ETA, torch.zeros_like(r))
        results = [(_map(d, samples), moved, bound)]
        if operand is not None:
            results.append((_map(operand, samples), moved, copied(moved, bound, STORED[dtype])))
        return judged(*results)

    return [Way(WAYS[0], _blocks(batch * height * width, channels), launch, judge)]


def _gram(batch: int, height: int, width: int, channels: int, precision: str) -> Case:
    # s and its sum are read and written, delta and the product read
    moved = batch * height * width * channels * (16 + 2 * operand_bytes(precision))
    ways = partial(_gram_ways, batch, height, width, channels, precision)
    return Case("pointwise_gram", _size(batch, height, width, channels), precision, 0, moved, WAYS, ways)


def _gram_ways(batch, height, width, channels, precision, device) -> list[Way]:
    shape, dtype = (batch, height, width, channels), operand_dtype(precision)
    start, begun = normal(shape, device, BEFORE), normal(shape, device, BEFORE, seed=1)
    s, total = start.clone(), begun.clone()
    delta = normal(shape, device, 0.1, seed=2).to(dtype)
    pulled = normal(shape, device, 0.1, seed=3).to(dtype)
    first_bad = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)

    def launch() -> None:
        gram_update(
            s=s,
            total=total,
            delta=delta,
            pulled=pulled,
            step_size=ETA,
            first_bad=first_bad,
            layer=0,
            iteration=1,
        )

    def judge() -> Judgement:
        launch()
        samples = ends(batch)
        results = []
        for result, old, step in ((s, start, -pulled), (total, begun, delta)):
            before, move = _map(old, samples), _map(step, samples)
            truth = (1 - ETA) * before + ETA * move
            # 1 - eta, the two products and their sum
            results.append((_map(result, samples), truth, 4 * EPS * (before.abs() + ETA * move.abs())))
        return judged(*results)

    return [Way(WAYS[0], f"{BLOCK} elements", launch, judge)]


def _output(batch: int, classes: int, loss: str, precision: str) -> Case:
    # s, uhat, vhat and the target are read, eps and delta written
    moved = batch * classes * (20 + operand_bytes(precision))
    ways = partial(_output_ways, batch, classes, loss, precision)
    return Case("output_error", f"batch {batch}, {classes} classes, {loss}", precision, 0, moved, WAYS, ways)


def _output_ways(batch, classes, loss, precision, device) -> list[Way]:
    product = normal((batch, classes), device, 0.1, seed=1)
    uhat = normal((batch, classes), device)
    if loss == "cross_entropy":
        target, scale = torch.zeros(batch, classes, device=device), 1.0
        target[torch.arange(batch), torch.arange(batch) % classes] = 1.0
        target_sum = torch.ones(batch, 1, device=device)
    else:
        target, target_sum, scale = normal((batch, classes), device, seed=2), None, 0.5
    error = torch.empty_like(uhat)
    delta = torch.empty(batch, classes, dtype=operand_dtype(precision), device=device)

    def launch() -> None:
        # without an activation vhat is uhat
        output_error(
            product=product,
            uhat=uhat,
            vhat=uhat,
            target=target,
            error=error,
            delta=delta,
            target_sum=target_sum,
            scale=scale,
            precision="bf16" if precision == "bf16" else "tf32x3",
        )

    def judge() -> Judgement:
        launch()
        rows = ends(batch).to(device)
        base, s, y = (t[rows].double() for t in (uhat, product, target))
        mu = base + s
        mu_bound = 2 * EPS * (base.abs() + s.abs())
        if target_sum is None:
            truth = (mu - y) * scale
            bound = scale * mu_bound + 4 * EPS * truth.abs()
        else:
            # the exponentials' arguments, their sum, and a handful of roundings
            share = mu.softmax(1)
            lost = (
                2 * mu_bound.amax(1, keepdim=True)
                + 8 * EPS * mu.abs().amax(1, keepdim=True)
                + (classes + 32) * EPS
            )
            truth = share - y
            bound = share * lost + 4 * EPS * truth.abs()
        return judged(
            (error[rows].double(), truth, bound),
            (delta[rows].double(), truth, copied(truth, bound, STORED[delta.dtype])),
        )

    rows, columns, warps = output_tile(batch, classes)
    return [Way(WAYS[0], f"{rows} x {columns}, {warps} warps", launch, judge)]
