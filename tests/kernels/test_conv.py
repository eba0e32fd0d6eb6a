"""The convolution kernels in triton's interpreter against torch in float64.

The truth is never the kernels' own form: F.conv2d, F.conv_transpose2d, F.max_pool2d, plain differences of activations
and autograd, all in float64, on the operands as Tensor Cores read them. What is left is rounding in fp32, and the
bounds count it element by element, in units of 2^-23 of the sum of the absolute products.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pcfast.kernels.conv_feedback import feedback_tiles, launch_conv_feedback
from pcfast.kernels.conv_geometry import ConvGeometry
from pcfast.kernels.conv_predict import _window_maximum, launch_conv_predict, predict_tiles
from pcfast.kernels.tf32 import input_precision
from pcfast.kernels.tiles import Tiles
from pcfast.model import activations
from pcfast.model.activations import Gelu, GeluTanh, LeakyRelu, Relu, Silu, Tanh

EPS = 2.0**-23
SMALL = Tiles(block_m=16, block_n=16, block_k=16, warps=4, stages=1)  # many tiles of a small problem
PRECISIONS = ("tf32x3", "tf32", "bf16")
GUARD, UNTOUCHED = 24, 77


@dataclass(frozen=True)
class Case:
    geometry: ConvGeometry
    batch: int = 2
    before: activations.Activation | None = None
    after: activations.Activation | None = field(default_factory=Relu)
    tiles: Tiles = SMALL


def conv(height, width, channels, out_channels, kernel, stride=1, padding=0, pool=None, window=1):
    def pair(value):
        return value if isinstance(value, tuple) else (value, value)

    return ConvGeometry(
        height, width, channels, out_channels, pair(kernel), pair(stride), pair(padding), pool, pair(window)
    )


CASES = {
    "1x1": Case(conv(4, 5, 3, 5, 1)),
    "1x1-stride": Case(conv(5, 5, 1, 1, 1, stride=2), batch=3, after=None),
    "2x2-stride-avg": Case(conv(9, 10, 3, 5, 2, stride=2, pool="avg", window=2), after=Tanh()),
    "2x3-stride-pad": Case(conv(6, 7, 17, 5, (2, 3), stride=2, padding=1), after=Gelu()),
    "3x3": Case(conv(5, 5, 3, 33, 3), after=Tanh()),
    "3x3-pad-max": Case(conv(7, 6, 1, 5, 3, padding=1, pool="max", window=2)),
    "3x3-wide-max": Case(conv(4, 5, 17, 33, 3, pool="max", window=2), batch=1, after=Tanh()),
    "3x3-pad2-avg": Case(conv(5, 4, 3, 5, 3, padding=2, pool="avg", window=(3, 2))),
    "3x3-gelu-max": Case(conv(7, 7, 3, 5, 3, pool="max", window=2), before=Gelu(), after=None),
    "3x3-max-gelu": Case(conv(7, 7, 3, 5, 3, pool="max", window=2), after=GeluTanh()),
    "2x2-two-blocks-a-tap": Case(conv(3, 4, 32, 32, 2, padding=1), batch=1, after=LeakyRelu(0.1)),
    "3x3-runs-of-8": Case(conv(4, 4, 24, 5, 3, padding=1, stride=(1, 2)), after=Silu()),
    "5x5-max3": Case(conv(7, 8, 3, 1, 5, padding=2, pool="max", window=3)),
    "3x3-silu-max2x3": Case(conv(7, 7, 1, 5, 3, padding=(1, 2), pool="max", window=(2, 3)),
                            before=Silu(), after=None),
    "2x3-max1x2-both": Case(conv(5, 8, 3, 5, (2, 3), stride=(2, 1), padding=(1, 0), pool="max", window=(1, 2)),
                            before=LeakyRelu(-0.2), after=Tanh()),
    "one-tile": Case(conv(6, 6, 3, 5, 3, padding=1, pool="max", window=2), tiles=Tiles(64, 32, 32, 4, 1)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- tensors


def operand_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def stored(operand: Tensor, precision: str) -> Tensor:
    """An operand (fp32) as the kernels find and leave it: of TF32 11 significant bits, ties away from zero."""
    if precision == "tf32":
        mantissa, exponent = torch.frexp(operand.double())
        nearest = mantissa.sign() * (mantissa.abs() * 2**11 + 0.5).floor() / 2**11
        return torch.ldexp(nearest, exponent).float()
    return operand.to(operand_dtype(precision))


def first(channels_last: Tensor) -> Tensor:
    """Channels in front, as torch's functions take a map."""
    return channels_last.permute(0, 3, 1, 2)


def last(channels_first: Tensor) -> Tensor:
    return channels_first.permute(0, 2, 3, 1).contiguous()


class Guarded:
    """A tensor of NaN (255 for bytes) inside a longer one, whose ends a kernel must leave alone."""

    def __init__(self, shape, dtype, values: Tensor | None = None):
        size = torch.Size(shape).numel()
        self._whole = torch.full((size + 2 * GUARD,), UNTOUCHED, dtype=dtype)
        self.tensor = self._whole[GUARD : GUARD + size].view(shape)
        self.tensor.copy_(
            values if values is not None else torch.tensor(float("nan") if dtype.is_floating_point else 255)
        )

    def check(self) -> None:
        ends = torch.cat((self._whole[:GUARD], self._whole[-GUARD:]))
        assert bool((ends == UNTOUCHED).all()), "a kernel wrote past the ends of a tensor"


# ---------------------------------------------------------------------------------------------------- predict stage


@dataclass
class Predicted:
    error: Tensor
    delta: Tensor
    winner: Tensor | None


def predict_inputs(case: Case, precision: str, scale: float = 1.0) -> dict[str, Tensor]:
    g = case.geometry
    terms = g.taps * g.channels
    return dict(
        d=stored(scale * torch.randn(case.batch, g.height, g.width, g.channels), precision),
        weight=stored(torch.randn(g.out_channels, *g.kernel, g.channels) / terms**0.5, precision),
        uhat=torch.randn(case.batch, *g.out, g.out_channels),
        d_out=scale * torch.randn(case.batch, *g.pooled, g.out_channels),
    )


def predict(case: Case, precision: str, inputs: dict[str, Tensor]) -> Predicted:
    g = case.geometry
    shape = inputs["d_out"].shape
    error, delta = Guarded(shape, torch.float32), Guarded(shape, operand_dtype(precision))
    winner = Guarded(shape, torch.uint8)
    launch_conv_predict(
        g,
        **inputs,
        error=error.tensor,
        delta=delta.tensor,
        winner=winner.tensor if g.pool == "max" else None,
        before=case.before,
        after=case.after,
        precision=precision,
        tiles=case.tiles,
    )
    for tensor in (error, delta, winner):
        tensor.check()
    return Predicted(error.tensor, delta.tensor, winner.tensor if g.pool == "max" else None)


def act(activation: activations.Activation | None, u: Tensor) -> Tensor:
    return u if activation is None else activation.forward(u)


def pool(g: ConvGeometry, a: Tensor) -> Tensor:
    if g.pool == "max":
        return F.max_pool2d(a, g.window)
    return F.avg_pool2d(a, g.window) if g.pool == "avg" else a


def window_elements(g: ConvGeometry, a: Tensor) -> Tensor:
    """(batch, channels, PH, PW, elements of the window in row-major order)"""
    a = a[:, :, : g.pooled[0] * g.window[0], : g.pooled[1] * g.window[1]]
    tiles = a.unfold(2, g.window[0], g.window[0]).unfold(3, g.window[1], g.window[1])
    return tiles.flatten(4)


def unpool(g: ConvGeometry, delta: Tensor, winner: Tensor | None) -> Tensor:
    """The error of every output position that a pooled ``delta`` stands for, channels first, float64."""
    pooled = first(delta).double()
    shape = (*pooled.shape[:2], *g.out)
    if g.pool == "max":
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in g.pooled), indexing="ij")
        k = first(winner).long()
        flat = (rows * g.window[0] + k // g.window[1]) * g.out[1] + columns * g.window[1] + k % g.window[1]
        return (
            torch.zeros(shape).double().flatten(2).scatter_(2, flat.flatten(2), pooled.flatten(2)).view(shape)
        )
    if g.pool == "avg":
        at = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(F.avg_pool2d(at, g.window), at, pooled)[0]
    return pooled


def check_predict(case: Case, precision: str, inputs: dict[str, Tensor], result: Predicted) -> None:
    g = case.geometry
    d, weight = (first(inputs[name]).double() for name in ("d", "weight"))
    uhat, d_out = first(inputs["uhat"]).double(), first(inputs["d_out"]).double()
    s = F.conv2d(d, weight, None, g.stride, g.padding)
    u = (uhat + s).requires_grad_()
    mu = act(case.after, pool(g, act(case.before, u)))
    error = mu.detach() - act(case.after, pool(g, act(case.before, uhat))) - d_out
    pulled = torch.autograd.grad(mu, u, error)[0]

    # Bounds. Slopes and curvatures are below 1.2 (gelu's are the largest). Sums: one rounding a term, and ten for
    # what the three products of tf32x3 leave out.
    absolute = F.conv2d(d.abs(), weight.abs(), None, g.stride, g.padding)
    s_bound = EPS * (g.taps * g.channels + 16) * absolute
    s_bound, s_size, u_size = (window_elements(g, t.detach().abs()).amax(-1) for t in (s_bound, s, u))
    bound = 1.5 * s_bound + 32 * EPS * s_size + 2 * EPS * d_out.abs()
    decided = torch.ones_like(bound, dtype=torch.bool)
    if g.pool == "max":
        after_before, base = (window_elements(g, act(case.before, t)) for t in (u.detach(), uhat))
        # where the winner is another than in the forward pass, the two activations' own rounding counts
        switched = after_before.argmax(-1) != base.argmax(-1)
        if case.before is not None:
            bound += switched * 8 * EPS * u_size
        best = after_before.topk(2, -1).values
        decided &= best[..., 0] - best[..., 1] > 2 * bound
    if isinstance(case.after, Relu | LeakyRelu):
        decided &= pool(g, act(case.before, u.detach())).abs() > 2 * bound + EPS * u_size
    slope_bound = 16 * EPS + 1.5 * (EPS * u_size + s_bound)
    delta_bound = 1.5 * bound + slope_bound * error.abs()
    if g.pool == "avg":
        delta_bound /= g.window[0] * g.window[1]
    lost = {"bf16": 2.0**-8, "tf32": 2.0**-11, "tf32x3": 0.0}[precision]
    delta_bound += lost * (delta_bound + window_elements(g, pulled).abs().amax(-1))
    assert torch.equal(result.delta, stored(result.delta.float(), precision))

    assert_within(first(result.error), error, bound)
    assert decided.double().mean() > 0.97
    grown = window_elements(g, unpool(g, result.delta, result.winner) - pulled).abs().amax(-1)
    assert bool((grown[decided] <= delta_bound[decided]).all()), (grown / delta_bound)[decided].max()
    if result.winner is not None:
        assert torch.equal(first(result.winner)[decided].long(), after_before.argmax(-1)[decided])


def assert_within(result: Tensor, truth: Tensor, bound: Tensor) -> None:
    excess = (result.double() - truth).abs() / bound
    assert bool((excess <= 1).all()), f"{float(excess.max()):.3g} times the bound"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_predict(name, precision):
    case = CASES[name]
    inputs = predict_inputs(case, precision)
    check_predict(case, precision, inputs, predict(case, precision, inputs))


@pytest.mark.parametrize("name", ["3x3", "3x3-pad-max", "3x3-gelu-max", "2x2-stride-avg", "2x3-stride-pad"])
def test_predict_keeps_the_digits_of_tiny_deviations(name):
    """The bounds scale with the deviations; a plain difference of activations is 10^4 of these off."""
    case = CASES[name]
    inputs = predict_inputs(case, "tf32x3", scale=1e-6)
    check_predict(case, "tf32x3", inputs, predict(case, "tf32x3", inputs))


@pytest.mark.parametrize("name", ["3x3", "3x3-pad-max", "3x3-gelu-max", "2x2-stride-avg"])
@pytest.mark.parametrize("precision", ["tf32x3", "bf16"])
def test_predict_where_nothing_below_has_moved(name, precision):
    """Without d nothing is multiplied; the numbers are those of a d of zeros."""
    case = CASES[name]
    inputs = predict_inputs(case, precision)
    zero = predict(case, precision, {**inputs, "d": torch.zeros_like(inputs["d"])})
    result = predict(case, precision, {**inputs, "d": None})
    assert torch.equal(result.error, zero.error) and torch.equal(result.delta, zero.delta)
    assert torch.equal(result.error, -inputs["d_out"])
    assert result.winner is None or torch.equal(result.winner, zero.winner)


@triton.jit
def maximum_of_windows(
    values, largest, slots, WINDOW: tl.constexpr, SLOTS: tl.constexpr, COUNT: tl.constexpr
):
    slot, at = tl.arange(0, SLOTS)[:, None, None], tl.arange(0, COUNT)[None, :, None]
    value, first_slot = _window_maximum(tl.load(values + slot * COUNT + at), slot, WINDOW)
    at = tl.arange(0, COUNT)[:, None]
    tl.store(largest + at, value)
    tl.store(slots + at, first_slot)


def test_maximum_of_a_window():
    """Against torch, but for ties: zeros of both signs are equal, and of equal elements or NaN the first wins."""
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, float("inf"), -float("inf"), float("nan")])
    values = special[torch.randint(0, 9, (4, 512))]
    values[:, 256:][values[:, 256:].isnan()] = -3.0
    values[:, :4] = torch.tensor([[-0.0, 0.0, -1, -1], [0.0, -0.0, -1, -1], [0.0, -0.0, -2, 9], [9.0] * 4])
    largest, slots = torch.empty(512), torch.empty(512, dtype=torch.int32)
    maximum_of_windows[(1,)](values, largest, slots, WINDOW=3, SLOTS=4, COUNT=512)
    seen = values[:3]
    expected = seen.amax(0)  # NaN where one is
    wins = torch.where(expected.isnan(), seen.isnan(), seen == expected)
    assert torch.equal(largest.nan_to_num(77.0), expected.nan_to_num(77.0))
    assert torch.equal(slots.long(), wins.int().argmax(0))


@pytest.mark.parametrize("before", [None, Gelu()])
def test_the_first_of_equal_elements_wins(before):
    case = Case(conv(7, 7, 3, 5, 2, pool="max", window=3), before=before)
    inputs = predict_inputs(case, "tf32x3")
    inputs["d"] = torch.full_like(inputs["d"], 0.25)
    inputs["uhat"] = torch.randn(5).expand_as(inputs["uhat"]).contiguous()
    assert not predict(case, "tf32x3", inputs).winner.any()
    # zeros of both signs are equal
    inputs["d"] = torch.zeros_like(inputs["d"])
    inputs["uhat"] = torch.zeros_like(inputs["uhat"]).copysign(torch.randn_like(inputs["uhat"]))
    assert not predict(case, "tf32x3", inputs).winner.any()


def test_nan_wins_its_window_and_no_other():
    case = Case(conv(6, 6, 1, 5, 1, pool="max", window=2))
    inputs = predict_inputs(case, "tf32x3")
    clean = predict(case, "tf32x3", inputs)
    inputs["d"][0, 2, 2] = float("inf")  # element 0 of the window: either infinity, by the weight's sign
    inputs["d"][0, 3, 2] = float("nan")  # element 2
    result = predict(case, "tf32x3", inputs)
    hit = torch.zeros(clean.winner.shape, dtype=torch.bool)
    hit[0, 1, 1] = True
    assert bool((result.winner[hit] == 2).all())
    for name in ("error", "delta"):
        now, then = getattr(result, name), getattr(clean, name)
        assert bool(now[hit].isnan().all())
        assert torch.equal(now[~hit], then[~hit])


@pytest.mark.parametrize("pooled", ["max", "avg", None])
def test_nan_in_the_forward_pass_shows_in_error_and_delta(pooled):
    case = Case(conv(4, 4, 3, 5, 1, pool=pooled, window=2 if pooled else 1))
    inputs = predict_inputs(case, "tf32x3")
    inputs["uhat"][1, 1, 1] = float("nan")
    result = predict(case, "tf32x3", inputs)
    at = (1, 0, 0) if pooled else (1, 1, 1)
    for tensor in (result.error, result.delta):
        assert bool(tensor[at].isnan().all()) and int(tensor.isnan().sum()) == 5


# --------------------------------------------------------------------------------------------------- feedback stage

ETA = 0.3


@dataclass
class Fed:
    d: Tensor
    error: Tensor
    copy: Tensor | None
    velocity: Tensor | None
    first_bad: Tensor


def feedback_inputs(case: Case, precision: str) -> dict[str, Tensor]:
    g = case.geometry
    below, above = (case.batch, g.height, g.width, g.channels), (case.batch, *g.pooled, g.out_channels)
    inputs = dict(
        delta=stored(torch.randn(above), precision),
        weight=stored(torch.randn(g.out_channels, *g.kernel, g.channels), precision),
        d=torch.randn(below),
        error=torch.randn(below),
    )
    if g.pool == "max":
        inputs["winner"] = torch.randint(0, g.window[0] * g.window[1], above).to(torch.uint8)
    return inputs


def feedback(
    case: Case,
    precision: str,
    inputs: dict[str, Tensor],
    clamped: bool = False,
    layer: int = 1,
    iteration: int = 7,
    momentum: float = 0.0,
) -> Fed:
    shape = inputs["d"].shape
    d = Guarded(shape, torch.float32, inputs["d"])
    error = Guarded(shape, torch.float32, None if clamped else inputs["error"])
    copy = Guarded(shape, operand_dtype(precision))
    velocity = Guarded(shape, torch.float32, inputs.get("velocity"))
    first_bad = torch.full((3,), 1000, dtype=torch.int32)
    launch_conv_feedback(
        case.geometry,
        delta=inputs["delta"],
        winner=inputs.get("winner"),
        weight=inputs["weight"],
        d=d.tensor,
        error=error.tensor,
        copy=None if precision == "tf32x3" else copy.tensor,
        velocity=velocity.tensor if momentum else None,
        first_bad=first_bad,
        layer=layer,
        iteration=iteration,
        eta=ETA,
        momentum=momentum,
        clamped=clamped,
        precision=precision,
        tiles=case.tiles,
    )
    for tensor in (d, error, copy, velocity):
        tensor.check()
    return Fed(
        d.tensor,
        error.tensor,
        None if precision == "tf32x3" else copy.tensor,
        velocity.tensor if momentum else None,
        first_bad,
    )


def pulled_back(g: ConvGeometry, output_error: Tensor, weight: Tensor) -> Tensor:
    spans = zip((g.height, g.width), g.out, g.kernel, g.stride, g.padding, strict=True)
    missed = [size - ((out - 1) * stride - 2 * pad + kernel) for size, out, kernel, stride, pad in spans]
    # input rows and columns that no window of the kernel reaches; more than stride - 1 of them torch does not take
    return F.conv_transpose2d(output_error, weight, None, g.stride, g.padding, missed)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_feedback(name, precision):
    check_feedback(name, precision, clamped=False)


@pytest.mark.parametrize("name", ["1x1", "3x3-pad-max", "3x3-pad2-avg"])
def test_feedback_of_the_clamped_layer(name):
    check_feedback(name, "tf32x3", clamped=True)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["1x1", "3x3-pad-max", "3x3-pad2-avg"])
def test_feedback_with_momentum(name, precision, clamped):
    check_feedback(name, precision, clamped, momentum=0.7)


def test_a_velocity_is_there_exactly_where_there_is_momentum():
    case = CASES["1x1"]
    inputs = {**feedback_inputs(case, "tf32x3"), "first_bad": torch.zeros(2, dtype=torch.int32)}
    rest = dict(layer=1, iteration=1, eta=ETA, precision="tf32x3")
    for velocity, momentum in ((None, 0.5), (torch.zeros_like(inputs["d"]), 0.0)):
        with pytest.raises(ValueError, match="a velocity exactly where they have momentum"):
            launch_conv_feedback(case.geometry, **inputs, **rest, velocity=velocity, momentum=momentum)


def check_feedback(name: str, precision: str, clamped: bool, momentum: float = 0.0) -> None:
    case, g = CASES[name], CASES[name].geometry
    inputs = feedback_inputs(case, precision)
    if momentum:
        inputs["velocity"] = torch.randn_like(inputs["d"])
    result = feedback(case, precision, inputs, clamped, momentum=momentum)

    output_error = unpool(g, inputs["delta"], inputs.get("winner"))
    weight = first(inputs["weight"]).double()
    r = pulled_back(g, output_error, weight)
    absolute = pulled_back(g, output_error.abs(), weight.abs())
    d, error = first(inputs["d"]).double(), first(inputs["error"]).double()
    if clamped:
        error = -d
        assert torch.equal(result.error, -inputs["d"])
    else:
        assert torch.equal(result.error, inputs["error"])
    bound = ETA * EPS * (g.taps * g.out_channels + 16) * absolute
    bound += 2 * EPS * (d.abs() + ETA * (error.abs() + r.abs()))
    step = error - r
    if momentum:
        old = first(inputs["velocity"]).double()
        step = momentum * old + step
        bound += 2 * EPS * ETA * momentum * old.abs()
        lost = EPS * (g.taps * g.out_channels + 16) * absolute
        lost += 2 * EPS * (momentum * old.abs() + error.abs() + r.abs())
        assert_within(first(result.velocity), step, lost)
    assert_within(first(result.d), d + ETA * step, bound)
    if result.copy is not None:
        assert torch.equal(result.copy, stored(result.d, precision))
    assert result.first_bad.tolist() == [1000] * 3


def test_feedback_takes_the_winners_of_predict():
    """Both stages, with the arg-max as torch finds it: the pull-back of the whole layer is autograd's."""
    case = CASES["3x3-pad-max"]
    inputs = predict_inputs(case, "tf32x3")
    stage = predict(case, "tf32x3", inputs)
    v = inputs["d"].double().requires_grad_()
    u = first(inputs["uhat"]).double() + F.conv2d(
        first(v), first(inputs["weight"].double()), None, case.geometry.stride, case.geometry.padding
    )
    mu = act(case.after, pool(case.geometry, u))
    r = torch.autograd.grad(mu, v, first(stage.error).double())[0]
    start = torch.zeros_like(inputs["d"])
    result = feedback(
        case,
        "tf32x3",
        dict(delta=stage.delta, winner=stage.winner, weight=inputs["weight"], d=start, error=start),
    )
    assert torch.allclose(result.d.double(), -ETA * r, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("iteration", [3, 2000])
def test_feedback_notes_the_first_iteration_with_a_bad_belief(value, iteration):
    case = CASES["1x1"]
    inputs = feedback_inputs(case, "tf32x3")
    inputs["error"][1, 2, 3, 1] = value
    result = feedback(case, "tf32x3", inputs, layer=2, iteration=iteration)
    assert result.first_bad.tolist() == [1000, 1000, min(1000, iteration)]


# ------------------------------------------------------------------------------------------------------ both stages


@pytest.mark.parametrize("name", ["3x3-pad-max", "3x3-pad2-avg", "1x1-stride"])
def test_a_sample_does_not_depend_on_its_batch(name):
    case = replace(CASES[name], batch=3)
    inputs = predict_inputs(case, "tf32")
    whole = predict(case, "tf32", inputs)
    below = feedback_inputs(case, "tf32")
    fed = feedback(case, "tf32", below)
    for i in range(3):
        alone = {key: value if key == "weight" else value[i : i + 1] for key, value in inputs.items()}
        part = predict(case, "tf32", alone)
        assert torch.equal(part.error, whole.error[i : i + 1])
        assert torch.equal(part.delta, whole.delta[i : i + 1])
        alone = {key: value if key == "weight" else value[i : i + 1] for key, value in below.items()}
        assert torch.equal(feedback(case, "tf32", alone).d, fed.d[i : i + 1])


@pytest.mark.parametrize("name", ["3x3-pad-max", "2x3-stride-pad"])
def test_int64_addresses_give_the_same(name, monkeypatch):
    case = CASES[name]
    inputs, below = predict_inputs(case, "bf16"), feedback_inputs(case, "bf16")
    narrow, fed = predict(case, "bf16", inputs), feedback(case, "bf16", below)
    monkeypatch.setattr(ConvGeometry, "wide", lambda geometry, batch: True)
    wide, wide_fed = predict(case, "bf16", inputs), feedback(case, "bf16", below)
    assert torch.equal(wide.error, narrow.error) and torch.equal(wide.delta, narrow.delta)
    assert torch.equal(wide_fed.d, fed.d) and torch.equal(wide_fed.copy, fed.copy)


def test_int64_addresses_are_chosen_by_the_largest_tensor():
    g = conv(32, 32, 64, 128, 3, padding=1, pool="max", window=2)
    largest = 32 * 32 * 128  # of a sample
    assert not g.wide(2**31 // largest - 2)
    assert g.wide(2**31 // largest)
    # a window of 9 elements has 16 rows of the product: more than its map has elements
    assert conv(30, 30, 1, 1, 3, padding=1, pool="max", window=3).wide(2**31 // (10 * 10 * 16) + 1)


def test_an_empty_batch_is_no_launch():
    case = replace(CASES["3x3-pad-max"], batch=0)
    predict(case, "tf32", predict_inputs(case, "tf32"))
    feedback(case, "tf32", feedback_inputs(case, "tf32"))


GEOMETRIES = [case.geometry for case in CASES.values()] + [
    conv(16, 16, 128, 256, 3, padding=1, pool="max", window=2),
    conv(32, 32, 64, 64, 3, padding=1),
    conv(33, 33, 96, 48, 3, stride=2, padding=1),
    conv(7, 7, 256, 256, 1, pool="avg", window=7),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_tiles_fit_every_chip(geometry, precision):
    chosen = [feedback_tiles(geometry, precision)]
    chosen += [predict_tiles(geometry, precision, None, after) for after in (None, Relu(), Tanh(), Gelu())]
    for tiles in chosen:
        assert tiles.block_m >= 64 and tiles.block_m % geometry.slots == 0  # wgmma; windows in one tile
        assert 16 <= tiles.block_n <= 128 and 16 <= tiles.block_k <= 64
        assert tiles.warps in (4, 8)
        operands = (
            (tiles.block_m + tiles.block_n) * tiles.block_k * operand_dtype(precision).itemsize * tiles.stages
        )
        assert operands <= 101_376  # shared memory of sm_86, sm_89 and sm_120, the smallest


REFUSED = {
    "derivatives differ": (conv(6, 6, 3, 5, 3, pool="avg", window=2), Gelu()),
    "the one behind it": (conv(6, 6, 3, 5, 3), Relu()),
    "more than 64": (conv(20, 20, 3, 5, 3, pool="max", window=9), None),
    "smaller than": (conv(3, 3, 3, 5, 3, pool="max", window=2), None),
    "no pool that": (conv(6, 6, 3, 5, 3, pool="median", window=2), None),
    "without a pool": (conv(6, 6, 3, 5, 3, window=2), None),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_layer_that_the_kernels_cannot_run_is_refused_in_words(reason):
    geometry, before = REFUSED[reason]
    assert reason in geometry.refusal(before)
    nothing = torch.empty(0)
    tensors = dict(d=nothing, weight=nothing, uhat=nothing, d_out=nothing, error=nothing, delta=nothing)
    with pytest.raises(ValueError, match=reason):
        launch_conv_predict(geometry, **tensors, before=before, precision="tf32")


def test_tensors_that_do_not_fit_are_refused_in_words():
    case = CASES["3x3-pad-max"]
    inputs, below = predict_inputs(case, "tf32"), feedback_inputs(case, "tf32")
    with pytest.raises(ValueError, match=r"uhat is .* needed is"):
        predict(case, "tf32", {**inputs, "uhat": inputs["uhat"][:, 1:]})
    with pytest.raises(ValueError, match=r"weight is .* not contiguous"):
        predict(case, "tf32", {**inputs, "weight": inputs["weight"].permute(0, 2, 1, 3)})
    with pytest.raises(ValueError, match=r"delta is .* needed is .*bfloat16"):
        predict(case, "tf32", {**inputs, "d": inputs["d"].bfloat16(), "weight": inputs["weight"].bfloat16()})
    for precision, dtype in (("tf32", torch.bfloat16), ("bf16", torch.float32), ("fp16", torch.float32)):
        with pytest.raises(ValueError, match="bf16 reads bfloat16"):
            input_precision(precision, dtype)
    with pytest.raises(ValueError, match=r"delta is .* needed is"):
        feedback(case, "tf32", {**below, "delta": below["delta"][:1]})
    del below["winner"]
    with pytest.raises(ValueError, match="winners"):
        feedback(case, "tf32", below)
