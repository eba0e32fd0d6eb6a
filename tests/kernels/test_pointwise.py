"""The elementwise kernels, under triton's interpreter, against float64.

The truth is direct: act(uhat + s) - act(uhat) and torch's own pooling, losses and autograd, in float64, where
s = 1e-6 uhat still leaves ten digits of a difference. Outputs are views into storage filled with NaN, and so are
inputs: what lies between and around them has to stay as it is.
"""

import math
import mmap

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from pcfast import losses
from pcfast.kernels import activations as device_activations
from pcfast.kernels import output_error, pointwise_error, pointwise_gram, pointwise_update
from pcfast.kernels.codes import activation_code
from pcfast.kernels.pointwise_error import Tail
from pcfast.model import activations

EPS = torch.finfo(torch.float32).eps
BF16_EPS = torch.finfo(torch.bfloat16).eps

# name -> (activation, the same in float64)
ACTIVATIONS = {
    "identity": (None, lambda u: u * 1),
    "relu": (activations.Relu(), torch.relu),
    "leaky_relu": (activations.LeakyRelu(0.01), lambda u: F.leaky_relu(u, 0.01)),
    "falling_leaky_relu": (activations.LeakyRelu(-0.3), lambda u: F.leaky_relu(u, -0.3)),
    "tanh": (activations.Tanh(), torch.tanh),
    "sigmoid": (activations.Sigmoid(), torch.sigmoid),
    "silu": (activations.Silu(), lambda u: u * torch.sigmoid(u)),
    "gelu": (activations.Gelu(), lambda u: 0.5 * u * torch.erfc(-u / math.sqrt(2))),
    "gelu_tanh": (
        activations.GeluTanh(),
        lambda u: u * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)),
    ),
}
names = pytest.mark.parametrize("name", ACTIVATIONS)


def derivative(function, u):
    u = u.detach().requires_grad_()
    return torch.autograd.grad(function(u).sum(), u)[0]


# activations ------------------------------------------------------------------------------------------------


@triton.jit
def activation_kernel(
    uhat, s, a, bracket, slope, n, ACT: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    u = tl.load(uhat + at, mask=at < n, other=0.0)
    moved = tl.load(s + at, mask=at < n, other=0.0)
    tl.store(a + at, device_activations.act(u, ACT, NEGATIVE_SLOPE), mask=at < n)
    difference, gate = device_activations.act_diff_and_derivative(u, moved, ACT, NEGATIVE_SLOPE)
    tl.store(bracket + at, difference, mask=at < n)
    tl.store(slope + at, gate, mask=at < n)


def on_device(name, uhat, s):
    """act(uhat), bracket and slope by the kernel."""
    out = [torch.full_like(uhat, math.nan) for _ in range(3)]
    act, negative_slope = activation_code(ACTIVATIONS[name][0])
    activation_kernel[(1,)](
        uhat, s, *out, uhat.numel(), act, negative_slope, BLOCK=triton.next_power_of_2(uhat.numel())
    )
    return out


@names
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.199, 0.201, 0.5, 1.0, 6.0])
def test_activations_to_a_few_roundings(name, size):
    """Relative to the terms of the sum that the bracket is, and to how far rounding u moves a tail."""
    _, function = ACTIVATIONS[name]
    uhat = torch.linspace(-8, 8, 1003)
    s = size * torch.where(torch.rand(1003) < 0.5, -1.0, 1.0) * (uhat.abs() if size == 1e-6 else 1)
    a, bracket, slope = on_device(name, uhat, s)
    u, moved = uhat.double(), uhat.double() + s.double()
    terms = (function(moved) - function(u)).abs()
    if name in ("silu", "gelu", "gelu_tanh"):  # u P(u): s P(u + s) + u (P(u + s) - P(u)) may cancel
        gate, gate_moved = function(u) / u, function(moved) / moved
        gate, gate_moved = gate.nan_to_num(0.5), gate_moved.nan_to_num(0.5)
        terms = (s * gate_moved).abs() + (u * (gate_moved - gate)).abs()
    if name == "falling_leaky_relu":
        terms = terms + 0.3 * s.abs()
    roundings = 4 * EPS * (1 + u.abs() + s.abs()) ** 2
    truth_roundings = 4 * torch.finfo(torch.float64).eps * function(u).abs()  # it is a plain difference
    assert ((a - function(u)).abs() <= roundings * function(u).abs()).all()
    assert ((bracket - (function(moved) - function(u))).abs() <= roundings * terms + truth_roundings).all()
    assert ((slope - derivative(function, moved)).abs() <= 4 * EPS * (1 + s.abs())).all()


@names
def test_small_steps_keep_all_digits(name):
    """Median over ordinary pre-activations at s = 1e-6 uhat: rounding, where a plain difference loses five digits."""
    _, function = ACTIVATIONS[name]
    uhat = torch.randn(1000)
    s = 1e-6 * uhat
    _, bracket, _ = on_device(name, uhat, s)
    truth = function(uhat.double() + s.double()) - function(uhat.double())
    alive = truth != 0
    assert ((bracket - truth).abs() / truth.abs())[alive].median() <= 2 * EPS
    assert (bracket[~alive] == 0).all()


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_gate_opens_exactly_above_zero(name):
    uhat = torch.tensor([0.3, 0.3, 0.3, -0.3, -0.3, -0.3, 0.0, 0.0, 1e-38, -1e-38])
    above, below = torch.tensor([math.inf, -math.inf]).split(1)
    s = torch.cat([-uhat[:1], torch.nextafter(-uhat[:1], above), torch.nextafter(-uhat[:1], below)])
    s = torch.cat([s, -s, torch.tensor([1e-38, 0.0, -1e-38, 2e-38])])
    _, _, slope = on_device(name, uhat, s)
    assert torch.equal(slope == 1, uhat.double() + s.double() > 0)


@names
def test_nan_is_never_lost(name):
    uhat = torch.tensor([math.nan, math.nan, 0.5, -0.5, math.nan])
    s = torch.tensor([0.1, -0.1, math.nan, math.nan, math.nan])
    a, bracket, slope = on_device(name, uhat, s)
    assert torch.equal(a.isnan(), uhat.isnan())
    if name == "identity":  # its bracket is s, its slope 1, whatever uhat is
        assert torch.equal(bracket.isnan(), s.isnan()) and (slope == 1).all()
    else:
        assert bracket.isnan().all() and slope.isnan().all()


def test_every_activation_has_a_code():
    classes = [kind for kind in activations.Activation.__subclasses__() if kind.in_kernels]
    codes = {activation_code(cls())[0] for cls in classes} | {activation_code(None)[0]}
    assert len(codes) == len(classes) + 1
    assert activation_code(activations.LeakyRelu(0.2)) == (device_activations.LEAKY_RELU.value, 0.2)


# views ------------------------------------------------------------------------------------------------------


class Guarded:
    """A view of the wanted shape inside storage of NaN; channels lie side by side, nothing else does."""

    def __init__(self, shape, dtype=torch.float32, values=None):
        storage = torch.full([n + 2 for n in shape], math.nan, dtype=dtype)
        self.storage = storage
        self.inside = torch.zeros_like(storage, dtype=torch.bool)
        middle = tuple(slice(1, n + 1) for n in shape)
        self.view = storage[middle]
        self.inside[middle] = True
        if values is not None:
            self.view.copy_(values)

    def check_guards(self):
        assert self.storage[~self.inside].isnan().all()


def close(result, truth, roundings=16.0, scale=1.0, eps=EPS):
    bound = roundings * eps * (truth.abs() + scale)
    assert ((result.double() - truth).abs() <= bound).all(), ((result.double() - truth).abs() / bound).max()


# pointwise_error --------------------------------------------------------------------------------------------


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def pooled_size(shape, window):
    batch, rows, columns, channels = shape
    return batch, rows // window[0], columns // window[1], channels


class Truth:
    """A layer's tail in float64 at uhat and at uhat + s."""

    def __init__(self, tail, before, after):
        self.tail, self.before, self.after = tail, before, after

    def output(self, u):
        """The tail's output, by torch's own pooling."""
        a = self.before(u)
        if self.tail.pool == "max":
            a = nhwc(F.max_pool2d(nchw(a), self.tail.window))
        elif self.tail.pool == "average":
            a = nhwc(F.avg_pool2d(nchw(a), self.tail.window))
        return self.after(a)

    def bracket(self, uhat, s):
        return self.output(uhat + s) - self.output(uhat)

    def pull(self, uhat, s, e):
        u = (uhat + s).requires_grad_()
        return torch.autograd.grad(self.output(u), u, e)[0]

    def covered(self, shape):
        """Which elements of the map lie in a window."""
        mask = torch.zeros(shape, dtype=torch.bool)
        _, rows, columns, _ = pooled_size(shape, self.tail.window)
        mask[:, : rows * self.tail.window[0], : columns * self.tail.window[1]] = True
        return mask


def tail_of(before, pool, window, after):
    tail = Tail(ACTIVATIONS[before][0], pool, window, ACTIVATIONS[after][0])
    return tail, Truth(tail, ACTIVATIONS[before][1], ACTIVATIONS[after][1])


def run_all_modes(tail, truth, uhat, s, d, *, dtype=torch.float32, scale=1.0, out_dtype=torch.float32):
    """Every launcher on the same numbers, against the truth; ``s`` None is the product that has not moved.

    Returns the error, the delta and the bracket that the kernels wrote.
    """
    shape, pooled = tuple(uhat.shape), tuple(d.shape)
    u_view = Guarded(shape, values=uhat)
    d_view = Guarded(pooled, values=d)
    s_view = None if s is None else Guarded(shape, dtype, s)
    product = None if s is None else s_view.view
    exact_s = torch.zeros_like(uhat).double() if s is None else s_view.view.double()

    error, delta, pulled = Guarded(pooled), Guarded(shape, dtype), Guarded(shape, dtype)
    out = Guarded(pooled, out_dtype)
    given = dict(product=product, uhat=u_view.view, tail=tail)
    pointwise_error.error_and_delta(deviation=d_view.view, error=error.view, delta=delta.view, **given)
    pointwise_error.deviate(out=out.view, **given)
    pointwise_error.pull(error=error.view, delta=pulled.view, **given)

    bracket = truth.bracket(uhat.double(), exact_s)
    close(error.view, bracket - d.double(), scale=scale)
    close(out.view, bracket, scale=scale, eps=torch.finfo(out_dtype).eps)
    # pulled back from the error that the kernel found, so that its rounding is not counted twice
    covered = truth.covered(shape)
    expected = truth.pull(uhat.double(), exact_s, error.view.double())
    close(delta.view[covered], expected[covered], scale=scale, eps=torch.finfo(dtype).eps)
    assert delta.view[~covered].isnan().all()
    assert torch.equal(delta.view[covered], pulled.view[covered])
    for array in (u_view, d_view, s_view, error, delta, pulled, out):
        if array is not None:
            array.check_guards()
    assert torch.equal(u_view.view, uhat) and torch.equal(d_view.view, d)
    return error.view, delta.view, out.view


UNPOOLED = [
    (1, 1, 1, 1),
    (1, 1, 1, 129),  # one above a block of channels
    (3, 1, 1, 127),
    (7, 1, 1, 10),
    (2, 5, 3, 1),
    (2, 3, 7, 11),
    (33, 1, 1, 16),  # one above a block of positions
]


@pytest.mark.parametrize("shape", UNPOOLED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_unpooled_layers(shape, dtype):
    tail, truth = tail_of("relu", None, (1, 1), "identity")
    uhat, s, d = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    run_all_modes(tail, truth, uhat, s, d, dtype=dtype)


@names
@pytest.mark.parametrize("moved", [True, False])
def test_error_with_every_activation(name, moved):
    shape = (2, 3, 2, 5)
    uhat, d = torch.randn(shape), torch.randn(shape)
    tail, truth = tail_of(name, None, (1, 1), "identity")
    error, _, out = run_all_modes(tail, truth, uhat, torch.randn(shape) if moved else None, d)
    if not moved:
        assert torch.equal(error, -d) and (out == 0).all()


POOLED = [
    ((2, 4, 6, 5), (2, 2)),
    ((1, 5, 7, 3), (2, 2)),  # a row and a column in no window
    ((2, 7, 8, 3), (3, 3)),
    ((1, 5, 7, 130), (2, 3)),
    ((3, 2, 2, 1), (2, 2)),
    ((1, 3, 9, 2), (3, 2)),
    ((17, 2, 6, 8), (1, 3)),
    ((2, 4, 4, 3), (4, 4)),
]


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize(("shape", "window"), POOLED, ids=str)
def test_error_of_pooled_layers(shape, window, pool):
    tail, truth = tail_of("identity", pool, window, "relu")
    uhat, s = torch.randn(shape), torch.randn(shape)
    run_all_modes(tail, truth, uhat, s, torch.randn(pooled_size(shape, window)))


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize(
    ("before", "after"), [("tanh", "identity"), ("relu", "sigmoid"), ("gelu", "tanh"), ("silu", "silu")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_on_both_sides_of_a_pool(before, after, pool, dtype):
    shape, window = (2, 5, 4, 3), (2, 2)
    tail, truth = tail_of(before, pool, window, after)
    uhat, s, d = torch.randn(shape), torch.randn(shape), torch.randn(pooled_size(shape, window))
    run_all_modes(tail, truth, uhat, s, d, dtype=dtype, out_dtype=dtype)
    run_all_modes(tail, truth, uhat, None, d, dtype=dtype)


@pytest.mark.parametrize("before", ["identity", "tanh", "gelu"])
@pytest.mark.parametrize("after", ["identity", "relu", "silu"])
@pytest.mark.parametrize("pool", ["max", "average", None])
def test_small_steps_keep_their_digits_through_a_tail(before, pool, after):
    """s = 1e-6 uhat, which mu - v would round away: the bracket is right to rounding of the steps themselves."""
    shape, window = (4, 6, 6, 5), (1, 1) if pool is None else (2, 2)
    tail, truth = tail_of(before, pool, window, after)
    uhat = torch.randn(shape)
    s = 1e-6 * torch.randn(shape)
    d = 1e-6 * torch.randn(pooled_size(shape, window))
    run_all_modes(tail, truth, uhat, s, d, scale=1e-6)


def test_ties_go_to_the_first_of_a_window():
    """A constant image, with and without a step; then ties that the step makes."""
    shape, window = (1, 4, 6, 3), (2, 3)
    tail, truth = tail_of("identity", "max", window, "identity")
    uhat, d = torch.full(shape, 0.7), torch.randn(pooled_size(shape, window))
    for s in (None, torch.full(shape, -0.25)):
        _, delta, _ = run_all_modes(tail, truth, uhat, s, d)
        assert (delta[:, ::2, ::3] != 0).all() and (delta != 0).sum() == delta[:, ::2, ::3].numel()
    uhat = torch.randint(-2, 3, shape).float()
    run_all_modes(tail, truth, uhat, torch.randint(-2, 3, shape).float(), d)


def test_nan_wins_a_window():
    """As in torch, whose pullback goes to the NaN too."""
    shape, window = (1, 2, 6, 2), (2, 2)
    tail, truth = tail_of("identity", "max", window, "identity")
    uhat, s = torch.randn(shape), torch.randn(shape)
    s[0, 1, 2, 0] = s[0, 0, 4, 1] = s[0, 1, 5, 1] = math.nan  # one in a window; two in a window
    error, delta, out = (
        torch.full(size, math.nan) for size in (pooled_size(shape, window), shape, (1, 1, 3, 2))
    )
    pointwise_error.error_and_delta(
        product=s, uhat=uhat, deviation=torch.zeros_like(error), error=error, delta=delta, tail=tail
    )
    pointwise_error.deviate(product=s, uhat=uhat, out=out, tail=tail)
    bracket = truth.bracket(uhat.double(), s.double())
    assert torch.equal(out.isnan(), bracket.isnan()) and torch.equal(error.isnan(), bracket.isnan())
    assert torch.equal(delta.isnan(), truth.pull(uhat.double(), s.double(), bracket).isnan())


@pytest.mark.parametrize("pool", ["max", "average"])
def test_nan_of_the_forward_pass_reaches_the_error(pool):
    tail, _ = tail_of("relu", pool, (2, 2), "relu")
    uhat, error, delta = torch.randn(1, 2, 4, 1), torch.zeros(1, 1, 2, 1), torch.zeros(1, 2, 4, 1)
    uhat[0, 1, 1, 0] = math.nan
    d = torch.zeros_like(error)
    pointwise_error.error_and_delta(product=None, uhat=uhat, deviation=d, error=error, delta=delta, tail=tail)
    assert error.isnan().flatten().tolist() == [True, False]
    expected = torch.zeros_like(delta, dtype=torch.bool)
    expected[0, 1, 1, 0] = True
    if pool == "average":
        expected[:, :, :2] = True
    assert torch.equal(delta.isnan(), expected)


def test_offsets_past_two_to_the_31():
    """Three samples 2^30 elements apart, in memory that is only reserved."""
    stride, channels = 2**30, 5
    reserved = mmap.mmap(-1, 2 * (2 * stride + channels), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    storage = torch.frombuffer(reserved, dtype=torch.bfloat16)
    product = storage.as_strided((3, 1, 1, channels), (stride, stride, stride, 1))
    product.copy_(torch.randn(product.shape))
    uhat, out = torch.randn(product.shape), torch.full(product.shape, math.nan)
    tail, truth = tail_of("relu", None, (1, 1), "identity")
    pointwise_error.deviate(product=product, uhat=uhat, out=out, tail=tail)
    close(out, truth.bracket(uhat.double(), product.double()))


def test_nothing_to_do():
    tail, _ = tail_of("relu", "max", (2, 2), "identity")
    uhat, delta = torch.randn(2, 1, 3, 4), torch.full((2, 1, 3, 4), math.nan)
    error = torch.empty(2, 0, 1, 4)
    given = dict(product=None, uhat=uhat, tail=tail)
    pointwise_error.error_and_delta(deviation=error.clone(), error=error, delta=delta, **given)
    assert delta.isnan().all()


def test_what_has_no_kernel_is_refused():
    for pool, window in [(None, (2, 2)), ("max", (5, 5)), ("max", (0, 1)), ("sum", (2, 2))]:
        with pytest.raises(ValueError, match="no kernel"):
            Tail(pool=pool, window=window)
    channels_first = torch.randn(2, 3, 4, 5).permute(0, 2, 3, 1)
    with pytest.raises(ValueError, match="last stride of 1"):
        pointwise_error.strides(channels_first)


@pytest.mark.parametrize("window", [1, 4, 6, 16])
@pytest.mark.parametrize("channels", [1, 3, 16, 100, 128, 129, 4096])
@pytest.mark.parametrize("positions", [1, 5, 100, 70_000])
def test_tiles(positions, channels, window):
    block_positions, block_channels = pointwise_error.tile(positions, channels, window)
    for block in (block_positions, block_channels):
        assert block & (block - 1) == 0
    assert block_positions * block_channels <= 512
    assert block_channels < 2 * channels and block_positions < 2 * positions
    grid = triton.cdiv(positions, block_positions), triton.cdiv(channels, block_channels)
    assert grid[1] <= 65_535  # CUDA's limit


# pointwise_update -------------------------------------------------------------------------------------------

MANY = 2**31 - 1


@pytest.mark.parametrize("shape", [*UNPOOLED, (9, 1, 1, 257)], ids=str)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update(shape, clamped, dtype):
    d, e, r = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    deviation, pulled = Guarded(shape, values=d), Guarded(shape, dtype, r)
    error = Guarded(shape, values=None if clamped else e)
    operand = Guarded(shape, torch.bfloat16) if dtype == torch.bfloat16 else None
    first_bad = torch.full((3,), MANY, dtype=torch.int32)
    pointwise_update.update(
        deviation=deviation.view,
        error=error.view,
        pulled=pulled.view,
        step_size=0.3,
        first_bad=first_bad,
        layer=1,
        iteration=4,
        operand=None if operand is None else operand.view,
        clamped=clamped,
    )
    expected_error = -d if clamped else e
    assert torch.equal(error.view, expected_error)
    close(deviation.view, d.double() + 0.3 * (expected_error.double() - pulled.view.double()), roundings=2)
    for array in (deviation, error, pulled):
        array.check_guards()
    if operand is not None:
        assert torch.equal(operand.view, deviation.view.bfloat16())
        operand.check_guards()
    assert (first_bad == MANY).all()


@pytest.mark.parametrize("shape", [*UNPOOLED, (9, 1, 1, 257)], ids=str)
@pytest.mark.parametrize("clamped", [False, True])
def test_update_with_momentum(shape, clamped):
    d, e, r, m = (torch.randn(shape) for _ in range(4))
    deviation, velocity = Guarded(shape, values=d), Guarded(shape, values=m)
    error = Guarded(shape, values=None if clamped else e)
    first_bad = torch.full((3,), MANY, dtype=torch.int32)
    expected, moved = d.double(), m.double()
    for iteration, eta in ((4, 0.3), (5, 0.2)):
        pointwise_update.update(
            deviation=deviation.view, error=error.view, pulled=r, step_size=eta, first_bad=first_bad, layer=1,
            iteration=iteration, clamped=clamped, velocity=velocity.view, momentum=0.7,
        )  # fmt: skip
        moved = 0.7 * moved + (-expected if clamped else e.double()) - r.double()
        expected = expected + eta * moved
        close(velocity.view, moved, roundings=8)
        close(deviation.view, expected, roundings=8)
    for array in (deviation, velocity, error):
        array.check_guards()
    assert (first_bad == MANY).all()


def test_a_velocity_lies_as_the_deviation_does_and_exactly_where_there_is_momentum():
    arrays = {name: torch.randn(2, 3, 4, 5) for name in ("deviation", "error", "pulled")}
    first_bad = torch.full((2,), MANY, dtype=torch.int32)
    rest = dict(step_size=0.1, first_bad=first_bad, layer=1, iteration=1)
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 3, 4).permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"velocity .* does not lie as deviation"):
            pointwise_update.update(**arrays, **rest, velocity=wrong, momentum=0.5)
    for velocity, momentum in ((None, 0.5), (torch.zeros(2, 3, 4, 5), 0.0)):
        with pytest.raises(ValueError, match="a velocity exactly where they have momentum"):
            pointwise_update.update(**arrays, **rest, velocity=velocity, momentum=momentum)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["deviation", "error", "pulled", "velocity"])
def test_the_first_bad_iteration_is_noted(bad, where):
    """In the last of several programs, in this layer alone, and no later one replaces it."""
    shape = (9, 1, 1, 257)
    arrays = {name: torch.randn(shape) for name in ("deviation", "error", "pulled")}
    if where == "velocity":
        arrays |= dict(velocity=torch.randn(shape), momentum=0.5)
    first_bad = torch.full((3,), MANY, dtype=torch.int32)
    for iteration in range(1, 4):
        if iteration == 2:
            arrays[where][-1, 0, 0, -1] = bad
        pointwise_update.update(**arrays, step_size=0.1, first_bad=first_bad, layer=2, iteration=iteration)
    assert first_bad.tolist() == [MANY, MANY, 2]


def test_overflow_is_noted_where_the_operand_stays_finite():
    deviation, first_bad = torch.full((1, 1, 1, 3), 3e38), torch.tensor([MANY], dtype=torch.int32)
    error, pulled = torch.full_like(deviation, 3e38), torch.zeros_like(deviation)
    operand = torch.zeros_like(deviation, dtype=torch.bfloat16)
    pointwise_update.update(
        deviation=deviation,
        error=error,
        pulled=pulled,
        step_size=1,
        first_bad=first_bad,
        layer=0,
        iteration=1,
        operand=operand,
    )
    assert first_bad.item() == 1 and operand.isinf().all()


# pointwise_gram ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_update(shape, dtype):
    s, total = torch.randn(shape), torch.randn(shape)
    delta, pulled = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    expected_s = 0.7 * s.double() - 0.3 * pulled.double()
    expected_total = 0.7 * total.double() + 0.3 * delta.double()
    first_bad = torch.full((2,), MANY, dtype=torch.int32)
    arrays = dict(s=s, total=total, delta=delta, pulled=pulled)
    pointwise_gram.gram_update(**arrays, step_size=0.3, first_bad=first_bad, layer=1, iteration=4)
    close(s, expected_s, roundings=3)
    close(total, expected_total, roundings=3)
    assert (first_bad == MANY).all()
    s.view(-1)[-1] = math.inf
    pointwise_gram.gram_update(**arrays, step_size=0.3, first_bad=first_bad, layer=1, iteration=5)
    assert first_bad.tolist() == [MANY, 5]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_update_with_momentum(shape, dtype):
    state = {name: torch.randn(shape) for name in ("s", "total", "velocity", "total_velocity")}
    delta, pulled = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    s, total, m, total_m = (array.double() for array in state.values())
    first_bad = torch.full((2,), MANY, dtype=torch.int32)
    for iteration, eta in ((4, 0.3), (5, 0.2)):
        pointwise_gram.gram_update(
            **state, delta=delta, pulled=pulled, step_size=eta, first_bad=first_bad, layer=1, iteration=iteration,
            momentum=0.7,
        )  # fmt: skip
        m, total_m = 0.7 * m - s - pulled.double(), 0.7 * total_m + delta.double() - total
        s, total = s + eta * m, total + eta * total_m
        for result, truth in zip(state.values(), (s, total, m, total_m), strict=True):
            close(result, truth, roundings=8)
    assert (first_bad == MANY).all()
    state["velocity"].view(-1)[-1] = math.inf
    pointwise_gram.gram_update(
        **state, delta=delta, pulled=pulled, step_size=0.3, first_bad=first_bad, layer=1, iteration=6, momentum=0.7
    )  # fmt: skip
    assert first_bad.tolist() == [MANY, 6]


def test_gram_update_wants_arrays_that_lie_alike():
    right = dict.fromkeys(
        ("s", "total", "delta", "pulled", "velocity", "total_velocity"), torch.randn(2, 3, 4, 5)
    )
    right["momentum"] = 0.5
    first_bad = torch.full((2,), MANY, dtype=torch.int32)
    for missing in ("velocity", "total_velocity", "momentum"):
        with pytest.raises(ValueError, match="a velocity exactly where they have momentum"):
            pointwise_gram.gram_update(
                **{**right, missing: 0.0 if missing == "momentum" else None}, step_size=0.1, first_bad=first_bad,
                layer=1, iteration=1,
            )  # fmt: skip
    for name in ("total", "delta", "pulled", "velocity", "total_velocity"):
        for wrong in (torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3, 4).permute(0, 2, 3, 1)):
            with pytest.raises(ValueError, match=f"{name} .* does not lie as s"):
                pointwise_gram.gram_update(
                    **{**right, name: wrong}, step_size=0.1, first_bad=first_bad, layer=1, iteration=1
                )


# output_error -----------------------------------------------------------------------------------------------

LOSSES = {
    "cross_entropy": lambda mu, y: F.cross_entropy(mu, y),
    "smoothed_sum": lambda mu, y: F.cross_entropy(mu, y, label_smoothing=0.2, reduction="sum"),
    "probabilities": lambda mu, y: F.cross_entropy(mu, y),
    "mse": lambda mu, y: F.mse_loss(mu, y),
    "mse_sum": lambda mu, y: F.mse_loss(mu, y, reduction="sum"),
    "mse_half": lambda mu, y: 0.5 * (mu - y).square().sum(),
}


def target_of(kind, rows, columns):
    """The target, and ``dense``, ``mass``, ``scale`` as losses.Loss.prepare makes them."""
    if kind in ("cross_entropy", "smoothed_sum"):
        y = torch.randint(0, columns, (rows,))
    elif kind == "probabilities":
        y = torch.rand(rows, columns)
    else:
        y = torch.randn(rows, columns)
    options = {
        "smoothed_sum": torch.nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"),
        "mse_sum": torch.nn.MSELoss(reduction="sum"),
        "mse_half": losses.half_squared_error,
        "mse": "mse",
    }
    loss = losses.describe_loss(options.get(kind, "cross_entropy"))
    target = loss.prepare(torch.zeros(rows, columns), y, raise_now=True)
    return y, target


#: Of the dtype in which delta is stored; of TF32 the lowest 13 bits are zero, too.
ROUNDING = {"tf32x3": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7}


def check_output_error(kind, name, rows, columns, *, moved=True, precision="tf32x3", spread=1.0):
    activation, function = ACTIVATIONS[name]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    y, target = target_of(kind, rows, columns)
    uhat = Guarded((rows, columns), values=spread * torch.randn(rows, columns))
    vhat = Guarded((rows, columns), values=function(uhat.view.double()))
    s = Guarded((rows, columns), dtype, torch.randn(rows, columns)) if moved else None
    dense = Guarded((rows, columns), values=target.target)
    error, delta = Guarded((rows, columns)), Guarded((rows, columns), dtype)
    output_error.output_error(
        product=None if s is None else s.view,
        uhat=uhat.view,
        vhat=vhat.view,
        target=dense.view,
        error=error.view,
        delta=delta.view,
        target_sum=target.target_sum,
        scale=target.scale,
        activation=activation,
        precision=precision,
    )
    u = uhat.view.double() + (0 if s is None else s.view.double())
    mu = function(u).requires_grad_()
    y = y.double() if y.is_floating_point() else y
    (expected,) = torch.autograd.grad(LOSSES[kind](mu, y), mu)
    # softmax(mu) mass and dense are of the size of mass, mu and y of the size of themselves
    size = (
        target.scale * (1 + mu.abs() + target.target.abs())
        if target.target_sum is None
        else target.target_sum
    )
    close(error.view, expected, roundings=8, scale=size * (1 + u.abs().amax(1, keepdim=True)))
    pulled = derivative(function, u) * error.view.double()
    close(delta.view, pulled, roundings=8, scale=error.view.abs(), eps=ROUNDING[precision])
    assert precision != "tf32" or not (delta.view.contiguous().view(torch.int32) & 0x1FFF).any()
    for array in (uhat, vhat, s, dense, error, delta):
        if array is not None:
            array.check_guards()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 10), (17, 10), (33, 16), (5, 257), (3, 1024)])
def test_output_error(kind, rows, columns):
    check_output_error(kind, "identity", rows, columns)


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
@pytest.mark.parametrize("columns", [1025, 2048, 2501])
@pytest.mark.parametrize("moved", [True, False])
def test_output_error_of_rows_wider_than_a_tile(kind, columns, moved):
    check_output_error(kind, "identity", 2, columns, moved=moved, spread=4.0)


@names
@pytest.mark.parametrize("kind", ["smoothed_sum", "mse_sum", "mse_half"])
def test_output_error_with_every_activation(kind, name):
    check_output_error(kind, name, 6, 11)
    check_output_error(kind, name, 6, 11, moved=False, precision="bf16")
    check_output_error(kind, name, 6, 11, precision="bf16")
    check_output_error(kind, name, 6, 11, precision="tf32")


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_output_error_with_an_activation_on_wide_rows(precision):
    check_output_error("cross_entropy", "tanh", 2, 1100, precision=precision)


@pytest.mark.parametrize("columns", [7, 1500])
def test_output_error_of_large_logits(columns):
    """The maximum is taken off before exp; an entry of -inf, as of a masked class, has probability 0."""
    uhat = 1e4 * torch.randn(3, columns)
    uhat[1, ::2] = -math.inf
    uhat[2, -1] = math.nan
    labels = torch.tensor([0, 1, 2])
    target = losses.describe_loss("cross_entropy").prepare(torch.zeros(3, columns), labels, raise_now=True)
    error, delta = torch.full((3, columns), math.nan), torch.full((3, columns), math.nan)
    output_error.output_error(
        product=None,
        uhat=torch.zeros_like(uhat),
        vhat=uhat,
        target=target.target,
        error=error,
        delta=delta,
        target_sum=target.target_sum,
        precision="tf32x3",
    )
    expected = torch.softmax(uhat[:2].double(), 1) / 3 - target.target[:2]
    close(error[:2], expected)
    assert error[2].isnan().all()


@triton.jit
def tile_kernel(
    mu, dense, mass, scale, error, columns, LOSS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):
    row, column = tl.arange(0, BLOCK_B)[:, None], tl.arange(0, BLOCK_C)[None, :]
    at = row * BLOCK_C + column
    e = output_error.output_error_tile(
        tl.load(mu + at), tl.load(dense + at), tl.load(mass + row), scale, column < columns, LOSS
    )
    tl.store(error + at, e)


@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
def test_tile_function_looks_at_valid_columns_alone(kind):
    """What an epilogue calls: columns past the valid ones may hold anything and come out as zero."""
    y, target = target_of(kind, 4, 5)
    mu, dense, error = (torch.full((4, 8), math.nan) for _ in range(3))
    mu[:, :5], dense[:, :5] = torch.randn(4, 5), target.target
    mass = torch.ones(4, 1) if target.target_sum is None else target.target_sum
    loss = output_error.MSE if target.target_sum is None else output_error.CROSS_ENTROPY
    tile_kernel[(1,)](mu, dense, mass, target.scale, error, 5, LOSS=loss.value, BLOCK_B=4, BLOCK_C=8)
    truth = mu[:, :5].double().requires_grad_()
    y = y.double() if y.is_floating_point() else y
    (expected,) = torch.autograd.grad(LOSSES[kind](truth, y), truth)
    close(error[:, :5], expected, scale=1.0)
    assert (error[:, 5:] == 0).all()
