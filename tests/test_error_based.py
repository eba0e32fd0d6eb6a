"""error_based (ePC) against its energy, closed forms of linear nets, strict's fixed point, and its wrong variants."""

from __future__ import annotations

from itertools import count, pairwise

import pytest
import torch
import torch.nn.functional as F
from literal import evaluate, output_error, perturbed_energy
from torch import Tensor, nn

import pcfast
from pcfast.checking.bounds import allowed_error, relative_error

BACKENDS = ["reference", "eager"]
ETA = 0.2
SUM_OF_SQUARES = nn.MSELoss(reduction="sum")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def tanh_net() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in pairwise((5, 8, 7, 6))]
    model = nn.Sequential(*layers, nn.Linear(6, 4)).double()
    return model, torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 3, 1])


def linear_net(*widths: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(widths)))
    return model, *(torch.randn(6, size, dtype=torch.float64) for size in (widths[0], widths[-1]))


def updates(model, x, y, **settings) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, method="error_based", **settings).backward()
    return [p.grad for p in model.parameters()]


def relax(model, x, y, **settings):
    return pcfast.relax(model, x, y, method="error_based", **settings)


def worst(result: list[Tensor], truth: list[Tensor]) -> float:
    return max(relative_error(f, t) for f, t in zip(result, truth, strict=True))


# The energy -----------------------------------------------------------------------------------------------------


def test_an_iteration_is_a_step_down_the_finite_differences_of_the_energy(backend):
    """(eps(n) - eps(n+1)) / eta is dE/deps at eps(n), each component by a central difference."""
    model, x, y = tanh_net()
    settings = dict(step_size=ETA, backend=backend)
    before, after = (relax(model, x, y, num_steps=n, **settings).errors for n in (2, 3))
    f, h = [None, *model], 1e-5
    for l in range(1, len(model)):
        for index in ((0, 0), (1, 3), (2, 5)):
            energies = []
            for sign in (1, -1):
                moved = [None, *(e.clone() for e in before[1:-1]), None]
                moved[l][index] += sign * h
                energies.append(float(perturbed_energy(f, x, y, F.cross_entropy, moved)[0].detach()))
            slope = (before[l][index] - after[l][index]) / ETA
            # a central difference errs by h^2 / 6 of the third derivative and 2^-52 |E| / h
            assert float(slope) == pytest.approx((energies[0] - energies[1]) / (2 * h), rel=1e-7, abs=1e-9)


def test_updates_descend_the_local_energies_at_the_final_states(backend):
    """dtheta = dE/dtheta of E = sum |f_l(v_{l-1}) - v_l|^2 / 2 + Loss(f_L(v_{L-1})), the states held."""
    model, x, y = tanh_net()
    settings = dict(step_size=ETA, num_steps=4, backend=backend)
    v = relax(model, x, y, **settings).beliefs
    predictions = [layer(below) for layer, below in zip(model, v, strict=False)]
    local = sum(0.5 * (mu - held).square().sum() for mu, held in zip(predictions[:-1], v[1:], strict=False))
    energy = local + F.cross_entropy(predictions[-1], y)
    truth = torch.autograd.grad(energy, list(model.parameters()))
    # mu - v is formed from beliefs here: it carries their rounding
    assert worst(updates(model, x, y, **settings), truth) < 1e-12


def test_energies_are_those_of_every_iteration_and_fall(backend):
    model, x, y = tanh_net()
    result = relax(model, x, y, step_size=ETA, num_steps=6, backend=backend, energies=True).energies
    errors = [relax(model, x, y, step_size=ETA, num_steps=n, backend=backend).errors for n in range(6)]
    f = [None, *model]
    for row, eps in zip(result, errors, strict=True):
        total = perturbed_energy(f, x, y, F.cross_entropy, [None, *eps[1:-1], None])[0].detach()
        assert float(row.sum()) == pytest.approx(float(total), rel=1e-13)
        for value, e in zip(row[:-1], eps[1:-1], strict=True):
            assert float(value) == pytest.approx(0.5 * float(e.square().sum()), rel=1e-13)
    totals = result.sum(1)
    assert bool((totals[1:] < totals[:-1]).all())


# Linear nets ----------------------------------------------------------------------------------------------------


def closed_form(model, x, y, num_steps: int | None, eta: float = ETA) -> list[Tensor]:
    """eps_1..eps_{L-1} under the loss sum (mu - y)^2 after n iterations from 0; None for the fixed point.

    mu_L = vhat_L - sum_l A_l eps_l with A_l = W_L ... W_{l+1}, so that with A = (A_1 ... A_{L-1}) the energy is
    quadratic with Hessian H = 1 + 2 A^T A, and eps(n) = (1 - (1 - eta H)^n) H^-1 2 A^T (vhat_L - y).
    """
    weights = [layer.weight.detach() for layer in model]
    products = [weights[-1]]
    for weight in reversed(weights[1:-1]):
        products.insert(0, products[0] @ weight)
    stacked = torch.cat(products, 1)
    size = stacked.shape[1]
    hessian = torch.eye(size, dtype=torch.float64) + 2 * stacked.T @ stacked
    fixed = torch.linalg.solve(hessian, 2 * stacked.T @ (model(x).detach() - y).T)
    if num_steps is not None:
        shrink = torch.linalg.matrix_power(torch.eye(size, dtype=torch.float64) - eta * hessian, num_steps)
        fixed = fixed - shrink @ fixed
    return list(fixed.T.split([p.shape[1] for p in products], 1))


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
@pytest.mark.parametrize("widths", [(4, 5, 3), (4, 6, 5, 3), (3, 2, 9, 2, 4)], ids=str)
def test_linear_nets_in_closed_form(widths, num_steps, backend):
    model, x, y = linear_net(*widths)
    settings = dict(loss=SUM_OF_SQUARES, step_size=ETA, num_steps=num_steps, backend=backend)
    result = relax(model, x, y, **settings)
    eps = closed_form(model, x, y, num_steps)
    v = [x]
    for layer, e in zip(model, eps, strict=False):
        v.append(layer(v[-1]).detach() - e)
    eps.append(2 * (model[-1](v[-1]).detach() - y))
    v.append(model(x).detach())  # the output is not relaxed
    for l in range(1, len(model) + 1):
        # of the largest error: where the truth is small it is a sum of such terms
        bound = allowed_error(max(eps, key=Tensor.norm), v[l], num_steps)
        assert float((result.errors[l] - eps[l - 1]).norm()) <= bound
        assert float((result.beliefs[l] - v[l]).norm()) <= bound
    truth = [g for e, below in zip(eps, v, strict=False) for g in (e.T @ below, e.sum(0))]
    scale = max(float(t.norm()) for t in truth)
    for f, t in zip(updates(model, x, y, **settings), truth, strict=True):
        assert float((f - t).norm()) <= 1e-10 * scale


def converged(method: str, model, x, y, **settings):
    return pcfast.relax(model, x, y, method=method, loss=SUM_OF_SQUARES, **settings)


@pytest.mark.parametrize("widths", [(4, 5, 3), (4, 6, 5, 3)], ids=str)
def test_the_fixed_point_is_strict_s(widths, backend):
    model, x, y = linear_net(*widths)
    truth = closed_form(model, x, y, None)
    for method, step_size in (("error_based", ETA), ("strict", 0.1)):
        result = converged(method, model, x, y, step_size=step_size, num_steps=1500, backend=backend)
        # the loops' own rounding, 2^-53 |v|, times the condition number of the Hessian, < 100
        for e, t, v in zip(result.errors[1:], truth, result.beliefs[1:], strict=False):
            assert float((e - t).norm()) <= 100 * 2**-52 * float(v.norm()) + 1e-12 * float(t.norm())


def test_the_fixed_point_of_a_tanh_net_is_strict_s(backend):
    model, x, y = tanh_net()
    strict, free = (
        pcfast.relax(model, x, y, method=m, step_size=ETA, num_steps=1500, backend=backend)
        for m in ("strict", "error_based")
    )
    for e, t, v in zip(free.errors[1:], strict.errors[1:], strict.beliefs[1:], strict=True):
        assert float((e - t).norm()) <= 100 * 2**-52 * float(v.norm()) + 1e-12 * float(t.norm())


# Wrong variants -------------------------------------------------------------------------------------------------


def backpropagated_through_the_perturbed_net(model, x, y, errors) -> list[Tensor]:
    """dE/dtheta with the errors held: every layer sees lambda_l instead of eps_l. Not what the method does."""
    energy = perturbed_energy([None, *model], x, y, F.cross_entropy, [None, *errors[1:-1], None])[0]
    return list(torch.autograd.grad(energy, list(model.parameters())))


def with_a_free_output_error(model, x, y, num_steps: int) -> list[Tensor]:
    """eps_1..eps_L where eps_L is free too: E = sum_{l<=L} |eps_l|^2 / 2 + Loss(mu_L - eps_L). Not the method."""
    errors = [
        torch.zeros_like(layer(x)) for layer in [nn.Sequential(*model[: l + 1]) for l in range(len(model))]
    ]
    for _ in range(num_steps):
        errors = [e.detach().requires_grad_(True) for e in errors]
        v = x
        for layer, e in zip(model, errors, strict=True):
            v = layer(v) - e
        energy = sum(0.5 * e.square().sum() for e in errors) + F.cross_entropy(v, y)
        errors = [
            e.detach() - ETA * g for e, g in zip(errors, torch.autograd.grad(energy, errors), strict=True)
        ]
    return errors


def test_updates_are_not_those_of_backpropagation_through_the_perturbed_net(backend):
    model, x, y = tanh_net()
    for num_steps, least, most in ((2, 0.3, 1.0), (400, 0.0, 1e-11)):
        settings = dict(step_size=ETA, num_steps=num_steps, backend=backend)
        errors = relax(model, x, y, **settings).errors
        wrong = backpropagated_through_the_perturbed_net(model, x, y, errors)
        result = updates(model, x, y, **settings)
        # eps_l(2) = (1 - 0.8^2) lambda_l, nearly: 64 % off below the last layer, which has its own error; at the
        # fixed point eps_l = lambda_l and the two agree
        distances = [relative_error(f, w) for f, w in zip(result[:-2], wrong[:-2], strict=True)]
        assert least <= min(distances) and max(distances) <= most
        assert worst(result[-2:], wrong[-2:]) < 1e-12


def test_the_output_error_is_not_a_free_variable(backend):
    model, x, y = tanh_net()
    for num_steps in (3, 400):
        result = relax(model, x, y, step_size=ETA, num_steps=num_steps, backend=backend)
        mu = evaluate(model[-1], result.beliefs[-2]).detach()
        # the gradient of the loss at the output itself, whatever the number of iterations
        assert relative_error(result.errors[-1], output_error(F.cross_entropy, mu, y)) < 1e-14
        wrong = with_a_free_output_error(model, x, y, num_steps)
        assert relative_error(wrong[-1], result.errors[-1]) > 0.01
        assert relative_error(wrong[0], result.errors[1]) > 0.01


# Around it ------------------------------------------------------------------------------------------------------


def test_one_layer_is_backpropagation(backend):
    model, x, y = nn.Sequential(nn.Linear(5, 4)).double(), *tanh_net()[1:]
    truth = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert worst(updates(model, x, y, backend=backend), truth) < 1e-14


def test_without_iterations_only_the_last_layer_learns(backend):
    model, x, y = tanh_net()
    result = updates(model, x, y, num_steps=0, backend=backend)
    truth = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert not any(bool(g.any()) for g in result[:-2])
    assert worst(result[-2:], truth[-2:]) < 1e-14


def test_given_beliefs_are_refused(backend):
    model, x, y = tanh_net()
    start = pcfast.relax(model, x, y).activations
    with pytest.raises(pcfast.ArgumentError, match=r"^vinit: got beliefs with method 'error_based'"):
        relax(model, x, y, vinit=start, backend=backend)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernel_backends_refuse_it_and_auto_goes_on(name, monkeypatch):
    """As on a machine where the kernels could run."""
    from pcfast.backends.cuda import backend as cuda
    from pcfast.backends.triton import backend as triton

    monkeypatch.setattr(cuda, "_unavailable", lambda device: "")
    monkeypatch.setattr(triton, "_unavailable", lambda kind, index: "")
    model, x, y = tanh_net()
    model, x = model.float(), x.float()
    words = "its kernels relax strict predictive coding, not error_based: use eager"
    with pytest.raises(pcfast.BackendError, match=words):
        relax(model, x, y, backend=name)
    monkeypatch.setattr(pcfast.backends.BACKENDS[name], "automatic", lambda device: (True, ""))
    assert relax(model, x, y).run.plan.backend == "eager"
    assert dict(pcfast.last_run().plan.refusals)[name] == words


@pytest.mark.parametrize("check", ["sync", "deferred"])
def test_divergence_is_located(check, backend):
    """Of a linear net: |1 - eta H| > 1 by far, so float32 overflows in the layer with the largest error first."""
    model, x, y = linear_net(4, 6, 5, 3)
    largest = (max(float(e.abs().max()) for e in closed_form(model, x, y, n, 30.0)) for n in count(1))
    eps_overflows = next(n for n, value in enumerate(largest, 1) if value > torch.finfo(torch.float32).max)
    model, x, y = model.float(), x.float(), y.float()
    with pytest.raises(pcfast.RelaxationDiverged) as caught:
        relax(model, x, y, loss=SUM_OF_SQUARES, step_size=30.0, num_steps=60, backend=backend, check=check)
        pcfast.synchronize()
    assert caught.value.step_size == 30.0
    # a product on the way to mu_L or down again may overflow an iteration before the errors do
    assert eps_overflows - 1 <= caught.value.iteration <= eps_overflows


def test_deviations_keep_float32_s_digits_where_errors_are_tiny():
    """A mean over many rows makes errors of 1e-6 of the beliefs; eager in float32 keeps 5 digits of them."""
    model, x, y = tanh_net()
    x, y = x.repeat(400, 1) + 3 * torch.randn(1200, 5, dtype=torch.float64), y.repeat(400)
    settings = dict(step_size=ETA, num_steps=20)
    truth = relax(model, x, y, backend="reference", **settings)
    result = relax(model.float(), x.float(), y, backend="eager", **settings)
    for e, t in zip(result.errors[1:], truth.errors[1:], strict=True):
        assert relative_error(e, t) < 1e-5


def test_a_schedule_of_step_sizes(backend):
    """eta_t of every iteration, as the linear net's closed form has it: eps(t) - eps* shrinks by 1 - eta_t H."""
    model, x, y = linear_net(4, 6, 5, 3)
    sizes = [0.3, 0.1, 0.05]
    result = relax(model, x, y, loss=SUM_OF_SQUARES, step_size=sizes, num_steps=3, backend=backend).errors
    middle, top = (layer.weight.detach() for layer in model[1:])
    stacked = torch.cat([top @ middle, top], 1)
    fixed = torch.cat(closed_form(model, x, y, None), 1)
    away = -fixed
    for eta in sizes:
        away = away - eta * (away + 2 * away @ stacked.T @ stacked)
    for e, t in zip(result[1:-1], (fixed + away).split([6, 5], 1), strict=True):
        assert relative_error(e, t) < 1e-11


@pytest.mark.parametrize("method", ["error_based", "zero_divergence"])
def test_belief_optimisers_and_nudging_are_refused(method, backend):
    model, x, y = tanh_net()
    settings = dict(method=method, backend=backend)
    for optimizer in (pcfast.GradientDescent(momentum=0.5), pcfast.Adam()):
        with pytest.raises(pcfast.ArgumentError, match=rf"^belief_optimizer: got .* with method '{method}'"):
            pcfast.relax(model, x, y, belief_optimizer=optimizer, **settings)
    with pytest.raises(pcfast.ArgumentError, match=rf"^nudging: got .* with method '{method}'"):
        pcfast.relax(model, x, torch.rand(3, 4).double(), loss="mse", nudging=pcfast.Nudging(), **settings)


# JPC's ePC ------------------------------------------------------------------------------------------------------


def jpc_outputs(model, x, errors, held: bool) -> list[Tensor]:
    """f_l(z_{l-1}) of z_l = f_l(z_{l-1}) + e_l, which is JPC's sign; ``held``: states pass no gradient on."""
    z, predictions = x, []
    for layer, e in zip(model, errors, strict=True):
        predictions.append(layer(z))
        z = (predictions[-1] + e).detach() if held else predictions[-1] + e
    return predictions


def jpc_updates(model, x, y, step_size, num_steps, *, output_error=True, held=False) -> list[Tensor]:
    """Its ePC: the loss of z_L = f_L(z_{L-1}) - e_L, hidden 0.5 |e_l|^2, means over rows, errors from 0."""
    errors = [torch.zeros_like(mu) for mu in jpc_outputs(model, x, [0.0] * len(model), False)]
    for _ in range(num_steps):
        errors = [e.detach().requires_grad_() for e in errors]
        loss = 0.5 * (y - jpc_outputs(model, x, errors, False)[-1] + errors[-1]).square().sum()
        energy = (sum(0.5 * e.square().sum() for e in errors[:-1]) + loss) / len(x)
        slopes = list(torch.autograd.grad(energy, errors))
        if not output_error:
            slopes[-1] = torch.zeros_like(y)
        errors = [(e - step_size * slope).detach() for e, slope in zip(errors, slopes, strict=True)]
    predictions = jpc_outputs(model, x, errors, held)
    energy = 0.5 * (y - predictions[-1] + errors[-1]).square().sum()
    if held:
        for mu, e in zip(predictions[:-1], errors[:-1], strict=True):
            energy = energy + 0.5 * ((mu + e).detach() - mu).square().sum()
    return list(torch.autograd.grad(energy / len(x), list(model.parameters())))


def test_jpcs_epc_is_another_algorithm(backend):
    """Its weights get the perturbed net's backpropagation, and its output's error takes the loss over."""
    (model, x, _), n = tanh_net(), 6
    y = torch.randn(3, 4, dtype=torch.float64)
    loss = pcfast.losses.half_squared_error
    gradient = torch.autograd.grad(loss(model(x), y) / len(x), list(model.parameters()))

    def ours(rate):
        settings = dict(loss=loss, step_size=rate / len(x), num_steps=n, backend=backend)
        return [update / len(x) for update in updates(model, x, y, **settings)]

    def ratios(result, truth):
        return [float(f.norm() / t.norm()) for f, t in zip(result, truth, strict=True)]

    for rate in (0.05, 1.5):
        assert worst(ours(rate), jpc_updates(model, x, y, rate, n, output_error=False, held=True)) < 1e-13
    *hidden, weight, bias = ratios(ours(0.05), jpc_updates(model, x, y, 0.05, n))
    assert all(0.09 < ratio < 0.12 for ratio in hidden) and 1.08 < weight < 1.14 and 1.08 < bias < 1.14
    *hidden, weight, bias = ratios(ours(1.5), jpc_updates(model, x, y, 1.5, n))
    assert min(*hidden, weight, bias) > 10
    for f, t in zip(jpc_updates(model, x, y, 0.05, n), gradient, strict=True):
        assert relative_error(f, t) < 0.2  # backpropagation's, while errors are small
