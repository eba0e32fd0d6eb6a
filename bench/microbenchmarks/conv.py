"""conv_predict and conv_feedback against cuDNN's convolution and an elementwise launch, which do the same."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pcfast.kernels.conv_feedback import feedback_tiles, launch_conv_feedback
from pcfast.kernels.conv_geometry import ConvGeometry
from pcfast.kernels.conv_predict import launch_conv_predict, predict_tiles
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

_aten = torch.ops.aten
PREDICT, FEEDBACK = ("triton", "cuDNN + pointwise_error"), ("triton", "cuDNN + pointwise_update")


def _layer(
    size: int, channels: int, out: int, kernel: int = 3, stride: int = 1, padding: int = 1, window: int = 1
):
    pool = "max" if window > 1 else None
    pairs = ((kernel, kernel), (stride, stride), (padding, padding))
    return ConvGeometry(size, size, channels, out, *pairs, pool, (window, window))


#: (batch, layer with a relu behind it), what matters most first: the layers of the workloads, then other kinds.
LAYERS = (
    (256, _layer(32, 64, 128, window=2)),  # cifar_cnn
    (300, _layer(13, 10, 5, padding=0)),  # mnist_cnn
    (256, _layer(16, 128, 256, window=2)),  # cifar_cnn
    (128, _layer(16, 128, 256, window=2)),  # vgg5
    (128, _layer(8, 256, 512, window=2)),
    (128, _layer(4, 512, 512, padding=0, window=2)),
    (2, _layer(56, 256, 256)),  # vgg19
    (64, _layer(32, 64, 64)),
    (128, _layer(32, 64, 128, stride=2)),
    (128, _layer(16, 256, 256, kernel=1, padding=0)),
    (128, _layer(32, 32, 32, kernel=5, padding=2, window=2)),
    (16, _layer(112, 64, 64)),
)
TINY = ((2, _layer(7, 3, 5, window=2)), (2, _layer(5, 2, 3, kernel=2, stride=2, padding=0)))


def cases(interpreted: bool) -> list[Case]:
    """conv_predict and conv_feedback in turn, every precision of a layer together."""
    return [
        make(batch, layer, precision)
        for batch, layer in (TINY if interpreted else LAYERS)
        for make in (_predict, _feedback)
        for precision in PRODUCTS
    ]


def _size(batch: int, g: ConvGeometry) -> str:
    words = f"batch {batch}, {g.height} x {g.width} x {g.channels} -> {g.out_channels}, {g.kernel[0]} x {g.kernel[1]}"
    words += f", stride {g.stride[0]}" * (g.stride[0] > 1) + f", padding {g.padding[0]}" * (g.padding[0] > 0)
    return words + f", max-pool {g.window[0]} x {g.window[1]}" * (g.pool is not None)


def _macs(batch: int, g: ConvGeometry) -> int:
    return batch * math.prod(g.out) * g.out_channels * g.taps * g.channels


def _predict(batch: int, g: ConvGeometry, precision: str) -> Case:
    operand = operand_bytes(precision)
    below, map = g.height * g.width * g.channels, math.prod(g.out) * g.out_channels
    pooled = math.prod(g.pooled) * g.out_channels
    # uhat and d are read, eps, delta and winners written
    moved = operand * (batch * below + g.taps * g.channels * g.out_channels)
    moved += batch * (4 * map + pooled * (8 + operand + (g.pool is not None)))
    ways = partial(_predict_ways, batch, g, precision)
    return Case("conv_predict", _size(batch, g), precision, _macs(batch, g), moved, PREDICT, ways)


def _feedback(batch: int, g: ConvGeometry, precision: str) -> Case:
    operand = operand_bytes(precision)
    below, pooled = g.height * g.width * g.channels, math.prod(g.pooled) * g.out_channels
    # d is read and written, eps read; d is also written as an operand, unless products read it itself
    moved = operand * g.taps * g.channels * g.out_channels + batch * pooled * (operand + (g.pool is not None))
    moved += batch * below * (12 + (0 if precision == "tf32x3" else operand))
    ways = partial(_feedback_ways, batch, g, precision)
    return Case("conv_feedback", _size(batch, g), precision, _macs(batch, g), moved, FEEDBACK, ways)


def _weights(g: ConvGeometry, precision: str, device: torch.device) -> Tensor:
    """(Cout, KH, KW, Cin), as the kernels find them."""
    scale = (g.taps * g.channels) ** -0.5
    weight = normal((g.out_channels, *g.kernel, g.channels), device, scale).to(operand_dtype(precision))
    return as_read(weight, precision)


def _map(t: Tensor, samples: Tensor) -> Tensor:
    """Samples of a channels-last map in float64, channels first."""
    return t[samples.to(t.device)].double().permute(0, 3, 1, 2)


def _on_the_map(pooled: Tensor, winner: Tensor | None, g: ConvGeometry) -> Tensor:
    """One number a window (batch, channels, PH, PW) at its winner, zeros elsewhere; whole windows alone."""
    if winner is None:
        return pooled
    (ph, pw), (rows, columns) = g.pooled, g.window
    spread = pooled.new_zeros(*pooled.shape[:2], ph * rows, pw * columns)
    for k in range(rows * columns):
        spread[:, :, k // columns :: rows, k % columns :: columns] = pooled.where(winner == k, 0.0)
    return spread


def _predict_ways(batch: int, g: ConvGeometry, precision: str, device: torch.device) -> list[Way]:
    dtype = operand_dtype(precision)
    below = as_read(normal((batch, g.height, g.width, g.channels), device, 0.1).to(dtype), precision)
    weight = _weights(g, precision, device)
    uhat = normal((batch, *g.out, g.out_channels), device)
    d = normal((batch, *g.pooled, g.out_channels), device, 0.1)
    error = torch.empty_like(d)
    delta = torch.empty_like(d, dtype=dtype)
    winner = None if g.pool is None else torch.empty_like(d, dtype=torch.uint8)
    whole_delta = torch.empty_like(uhat, dtype=dtype)
    tail = Tail(None, g.pool, g.window, Relu())
    rows, columns = (size * window for size, window in zip(g.pooled, g.window, strict=True))

    def fused() -> None:
        launch_conv_predict(
            g, d=below, weight=weight, uhat=uhat, d_out=d, error=error, delta=delta, winner=winner, after=Relu(),
            precision=precision,
        )  # fmt: skip

    def composed() -> None:
        product = F.conv2d(below.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), None, g.stride, g.padding)
        error_and_delta(
            product=product.permute(0, 2, 3, 1).contiguous(), uhat=uhat, deviation=d, error=error, delta=whole_delta,
            tail=tail,
        )  # fmt: skip

    def judge(run, rounded: bool) -> Judgement:
        """``rounded``: the product goes through memory."""
        run()
        samples = ends(batch, 4)
        a, w = _map(below, samples), weight.double().permute(0, 3, 1, 2)
        s = F.conv2d(a, w, None, g.stride, g.padding)
        absolute = F.conv2d(a.abs(), w.abs(), None, g.stride, g.padding)
        bound = product_bound(precision, g.taps * g.channels, absolute)
        if rounded:
            bound = through_memory(bound, absolute, dtype)
        s, bound, base = (t[:, :, :rows, :columns] for t in (s, bound, _map(uhat, samples)))
        truth = predict_truth(s, bound, base, _map(d, samples), g.window, True, OPERAND[precision])
        if rounded:
            result = _map(whole_delta, samples)[:, :, :rows, :columns]
        else:
            won = None if winner is None else _map(winner, samples)
            result = _on_the_map(_map(delta, samples), won, g)
        return judged(
            (_map(error, samples), truth.error, truth.error_bound), (result, truth.delta, truth.delta_bound)
        )

    tiles = described(predict_tiles(g, precision, None, Relu()))
    return [
        Way(PREDICT[0], tiles, fused, partial(judge, fused, False)),
        Way(PREDICT[1], "", composed, partial(judge, composed, True)),
    ]


def _feedback_ways(batch: int, g: ConvGeometry, precision: str, device: torch.device) -> list[Way]:
    dtype, below = operand_dtype(precision), (batch, g.height, g.width, g.channels)
    start, error = normal(below, device, BEFORE, seed=1), normal(below, device, 0.1, seed=2)
    d, weight = start.clone(), _weights(g, precision, device)
    delta = as_read(normal((batch, *g.pooled, g.out_channels), device, 0.1).to(dtype), precision)
    winner = None
    if g.pool is not None:
        winner = (
            normal(tuple(delta.shape), device, seed=3).mul(97).long().remainder(math.prod(g.window)).byte()
        )
    # what cuDNN reads: delta on the map, zeros where no window or another element won
    whole = torch.zeros(batch, *g.out, g.out_channels, dtype=dtype, device=device)
    spread = _on_the_map(delta.permute(0, 3, 1, 2), None if winner is None else winner.permute(0, 3, 1, 2), g)
    whole[:, : spread.shape[2], : spread.shape[3]] = spread.permute(0, 2, 3, 1)
    copy = None if precision == "tf32x3" else torch.empty(below, dtype=dtype, device=device)
    like = torch.zeros(below, dtype=dtype, device=device).permute(
        0, 3, 1, 2
    )  # shape and layout of the map below
    first_bad = torch.full((1,), 2**31 - 1, dtype=torch.int32, device=device)

    def fused() -> None:
        launch_conv_feedback(
            g, delta=delta, winner=winner, weight=weight, d=d, error=error, copy=copy, first_bad=first_bad, layer=0,
            iteration=1, eta=ETA, precision=precision,
        )  # fmt: skip

    def composed() -> None:
        pulled = _aten.convolution_backward(
            whole.permute(0, 3, 1, 2), like, weight.permute(0, 3, 1, 2), None, g.stride, g.padding, (1, 1), False,
            [0, 0], 1, [True, False, False],
        )[0]  # fmt: skip
        update(
            deviation=d, error=error, pulled=pulled.permute(0, 2, 3, 1).contiguous(), step_size=ETA,
            first_bad=first_bad, layer=0, iteration=1, operand=copy,
        )  # fmt: skip

    def judge(run, rounded: bool) -> Judgement:
        d.copy_(start)
        run()
        samples = ends(batch, 4)
        e, w = _map(whole, samples), weight.double().permute(0, 3, 1, 2)
        shape = (len(samples), g.channels, g.height, g.width)
        r = torch.nn.grad.conv2d_input(shape, w, e, g.stride, g.padding)
        absolute = torch.nn.grad.conv2d_input(shape, w.abs(), e.abs(), g.stride, g.padding)
        bound = product_bound(precision, g.taps * g.out_channels, absolute)
        if rounded:
            bound = through_memory(bound, absolute, dtype)
        old = _map(start, samples)
        moved = old + ETA * (_map(error, samples) - r)
        bound = update_bound(old, moved, ETA, bound)
        results = [(_map(d, samples), moved, bound)]
        if copy is not None:
            results.append((_map(copy, samples), moved, copied(moved, bound, OPERAND[precision])))
        return judged(*results)

    return [
        Way(FEEDBACK[0], described(feedback_tiles(g, precision)), fused, partial(judge, fused, False)),
        Way(FEEDBACK[1], "", composed, partial(judge, composed, True)),
    ]
