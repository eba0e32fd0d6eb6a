"""The planner's counts against what torch really multiplies, and its choices against the rules."""

from itertools import islice, pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

import pcfast
from pcfast import networks
from pcfast.backends.eager.fixed_prediction import fixed_prediction_factors, scalar_chain
from pcfast.model.describe import describe
from pcfast.problem import plan as planning
from pcfast.problem.plan import strict_products


def mlp(*widths):
    layers = [nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in pairwise(widths[:-1])]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


NETS = {
    "wide_input": (lambda: mlp(20, 40, 12, 10, 3), (7, 20)),
    "no_gram": (lambda: mlp(20, 4, 33, 10, 3), (7, 20)),
    "two_layers": (lambda: mlp(9, 30, 3), (5, 9)),
    "one_layer": (lambda: nn.Sequential(nn.Linear(6, 4)), (5, 6)),
    "linear_chain": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 3)), (4, 6)),
    "two_maps_a_layer": (
        lambda: nn.Sequential(
            nn.Linear(6, 20),
            nn.Sequential(nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 8)),
            nn.Sequential(nn.ReLU(), nn.Linear(8, 3)),
        ),
        (4, 6),
    ),
    "normalised_first": (
        lambda: nn.Sequential(
            nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 20)),
            nn.Sequential(nn.BatchNorm1d(20, affine=False), nn.Linear(20, 7), nn.Tanh()),
            nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        ),
        (4, 6),
    ),
    "residual_layers": (
        lambda: nn.Sequential(
            pcfast.Residual(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)),
            nn.Linear(6, 5),
            pcfast.Residual(
                nn.BatchNorm1d(5), nn.Linear(5, 7), pcfast.Residual(nn.Linear(7, 7)), nn.Linear(7, 5)
            ),
            nn.Linear(5, 3),
        ),
        (4, 6),
    ),
    "residual_parts": (
        lambda: nn.Sequential(
            nn.Sequential(pcfast.Residual(nn.ReLU()), nn.Linear(6, 20)),
            nn.Sequential(nn.Linear(20, 7), nn.Tanh(), pcfast.Residual(nn.Linear(7, 8), nn.Linear(8, 7))),
            nn.Sequential(pcfast.Residual(nn.Linear(7, 7), nn.GELU()), nn.Linear(7, 3), pcfast.Residual()),
        ),
        (4, 6),
    ),
    "residual_cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.Sequential(
                pcfast.Residual(nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(2, 4, 1)), nn.ReLU(), nn.Flatten()
            ),
            nn.Linear(144, 3),
        ),
        (2, 1, 8, 8),
    ),
    "mnist_cnn": (networks.mnist_cnn, (2, 1, 28, 28)),
    "padded_cnn": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
            nn.Linear(48, 3),
        ),
        (2, 1, 8, 8),
    ),
}


def multiplied(model, x, y, **arguments) -> int:
    """Multiply-adds that torch performs in one step."""

    # torch's counter does not know the in-place form
    def addmm_in_place(into, a, b, out_shape=None, **_):
        return addmm_flop(into, a, b)

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place})
    with counter:
        pcfast.pc_loss(model, x, y, backend="eager", **arguments)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("method", planning.METHODS)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 5, 20])
@pytest.mark.parametrize("net", NETS)
def test_work_is_what_torch_multiplies(net, method, num_steps):
    build, shape = NETS[net]
    model, x = build(), torch.rand(*shape)
    y = torch.randint(0, 3, (shape[0],))
    result = multiplied(model, x, y, method=method, num_steps=num_steps)
    plan = pcfast.last_run().plan
    assert plan.work.total == result
    assert pcfast.explain(model, shape, method=method, num_steps=num_steps).plan.work == plan.work


def test_work_from_a_given_start():
    model, x = mlp(9, 30, 8, 3), torch.rand(5, 9)
    y = torch.randint(0, 3, (5,))
    vinit = [v + 0.1 if l else v for l, v in enumerate(pcfast.relax(model, x, y).activations)]
    result = multiplied(model, x, y, num_steps=6, vinit=vinit)
    plan = pcfast.last_run().plan
    assert not plan.gram and not plan.fresh
    assert plan.work.total == result


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "settings",
    [
        {"belief_optimizer": pcfast.GradientDescent(0.5)},
        {"belief_optimizer": pcfast.GradientDescent(0.5, 0.1)},
        {"belief_optimizer": pcfast.Adam()},
        {"nudging": pcfast.Nudging("positive", 0.1)},
        {"nudging": pcfast.Nudging("centred", 0.1)},
        {"nudging": pcfast.Nudging("centred", 0.1), "belief_optimizer": pcfast.GradientDescent(0.0, 0.1)},
    ],
    ids=["momentum", "decay", "adam", "positive", "centred", "centred with decay"],
)
def test_work_with_other_optimisers_and_targets(settings, net, num_steps):
    build, shape = NETS[net]
    model, x = build(), torch.rand(*shape)
    with torch.no_grad():
        y = torch.rand_like(model(x))
    result = multiplied(model, x, y, num_steps=num_steps, loss="mse", **settings)
    plan = pcfast.last_run().plan
    assert plan.work.total == result
    assert pcfast.explain(model, shape, num_steps=num_steps, **settings).plan.work == plan.work


@pytest.mark.parametrize(
    ("net", "gram"),
    [
        ("wide_input", True),
        ("no_gram", False),
        ("mnist_cnn", True),
        ("padded_cnn", False),
        ("residual_parts", True),
        ("residual_cnn", False),
    ],
)
def test_gram_form_is_chosen_where_it_multiplies_less(net, gram):
    build, shape = NETS[net]
    plan = pcfast.explain(build(), (64, *shape[1:]), num_steps=20).plan
    assert plan.gram == gram, plan.gram_reason


def test_gram_form_of_the_papers_networks():
    """Fact 7 pays for both; mlp_600 then needs one 600x600 product an iteration."""
    explanation = pcfast.explain(networks.mlp_600(), (300, 784), num_steps=20)
    assert explanation.plan.gram
    more = pcfast.explain(networks.mlp_600(), (300, 784), num_steps=21).plan.work.relaxation
    one_iteration = 300 * (600 * 600 + 2 * 600 * 10)
    assert more - explanation.plan.work.relaxation == one_iteration
    assert pcfast.explain(networks.mnist_cnn(), (300, 1, 28, 28), num_steps=20).plan.gram


def test_active_front_by_simulation():
    """Which products can be non-zero, found by pushing a non-zero mark through the iterations."""
    for depth in range(1, 7):
        for n in range(9):
            moved, counts = [False] * (depth + 1), [[0, 0] for _ in range(depth + 1)]
            errors = [False] * depth + [True]
            for _ in range(n):
                predictions = [l > 1 and moved[l - 1] for l in range(depth + 1)]
                errors = [l == depth or predictions[l] or moved[l] for l in range(depth + 1)]
                for l in range(2, depth + 1):
                    counts[l][0] += predictions[l]
                    counts[l][1] += errors[l]
                moved = [moved[l] or (0 < l < depth and errors[l + 1]) for l in range(depth)] + [False]
            for l in range(1, depth + 1):
                assert strict_products(depth, n, True, l) == tuple(counts[l]), (depth, n, l)


@pytest.mark.parametrize("step_size", [0.0, 0.1, 0.5, 1.0, 1.7])
def test_scalar_chain_is_a_matrix_power(step_size):
    """c(t) = A^t c(0) with the bidiagonal A of the recursion."""
    depth, n = 5, 17
    step = (1 - step_size) * torch.eye(depth + 1, dtype=torch.float64)
    step += step_size * torch.diag(torch.ones(depth, dtype=torch.float64), -1)
    step[0] = 0.0
    step[0, 0] = 1.0
    start = torch.eye(depth + 1, dtype=torch.float64)[0]
    for t, row in enumerate(islice(scalar_chain(depth, step_size), n)):
        truth = torch.linalg.matrix_power(step, t) @ start
        torch.testing.assert_close(torch.tensor(row, dtype=torch.float64), truth, rtol=1e-12, atol=1e-300)
    for steps in (0, 1, 2, n):
        factors = fixed_prediction_factors(depth, steps, step_size)
        for row, power in zip(factors, (max(steps - 1, 0), steps), strict=True):
            truth = torch.linalg.matrix_power(step, power) @ start
            torch.testing.assert_close(torch.tensor(row, dtype=torch.float64), truth, rtol=1e-12, atol=1e-300)


def test_plans_and_networks_are_plain_values():
    assert describe(mlp(5, 4, 3)) == describe(mlp(5, 4, 3))
    assert describe(mlp(5, 4, 3)) != describe(mlp(5, 6, 3))
    first, second = (pcfast.explain(mlp(5, 4, 3), (2, 5)).plan for _ in range(2))
    assert first == second and hash(first) == hash(second)
    with pytest.raises(AttributeError):
        first.gram = False
