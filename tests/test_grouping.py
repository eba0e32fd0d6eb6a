"""group_layers with beliefs before the activation: where a PC layer ends, and a program that holds them there.

Beliefs behind the activation, the default: tests/test_modules.py.
"""

from __future__ import annotations

import pytest
import torch
from recorded_programs import load, of_kind, set_parameters, worst
from torch import nn

import pcfast
from pcfast import Residual, group_layers
from pcfast.losses import half_squared_error


def seq(*modules):
    return nn.Sequential(*modules)


def names(module):
    """Types as nested lists; a block's list begins with "x +"."""
    if not isinstance(module, nn.Sequential):
        return type(module).__name__
    return ["x +"] * isinstance(module, Residual) + [names(element) for element in module]


def square():
    return nn.Linear(6, 6)


ROWS, CLASSES = 4, 3
NETWORKS = {
    "mlp": (
        lambda: seq(square(), nn.ReLU(), square(), nn.Tanh(), square()),
        [["Linear"], ["ReLU", "Linear"], ["Tanh", "Linear"]],
    ),
    "before the first and behind the last map": (
        lambda: seq(nn.Tanh(), square(), nn.Tanh(), square(), nn.Sigmoid(), nn.Flatten()),
        [["Tanh", "Linear"], ["Tanh", "Linear", "Sigmoid", "Flatten"]],
    ),
    "maps in a row": (
        lambda: seq(square(), square(), nn.ReLU(), square()),
        [["Linear"], ["Linear"], ["ReLU", "Linear"]],
    ),
    "norms belong to the map before them": (
        lambda: seq(
            square(), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.0), square(), nn.LayerNorm(6), nn.RMSNorm(6),
            nn.PReLU(), square(), nn.BatchNorm1d(6, affine=False),
        ),
        [
            ["Linear", "BatchNorm1d"],
            ["ReLU", "Dropout", "Linear", "LayerNorm", "RMSNorm"],
            ["PReLU", "Linear", "BatchNorm1d"],
        ],
    ),
    "a norm behind an activation or in front": (
        lambda: seq(nn.LayerNorm(6), square(), nn.ReLU(), nn.LayerNorm(6), square()),
        [["LayerNorm", "Linear"], ["ReLU", "LayerNorm", "Linear"]],
    ),
    "blocks end a layer": (
        lambda: seq(
            square(), nn.ReLU(), Residual(square(), nn.ReLU()), nn.LayerNorm(6), nn.ReLU(), square(),
            Residual(nn.ReLU(), square()), nn.Tanh(),
        ),
        [
            ["Linear"],
            ["ReLU", ["x +", "Linear", "ReLU"]],
            ["LayerNorm", "ReLU", "Linear"],
            [["x +", "ReLU", "Linear"], "Tanh"],
        ],
    ),
    "nested already": (
        lambda: seq(seq(square()), seq(nn.ReLU(), square(), nn.BatchNorm1d(6)), seq(nn.ReLU(), square(), nn.Tanh())),
        [["Linear"], ["ReLU", "Linear", "BatchNorm1d"], ["ReLU", "Linear", "Tanh"]],
    ),
    "no map": (lambda: seq(nn.Flatten(), nn.ReLU()), [["Flatten", "ReLU"]]),
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_a_layer_ends_with_its_affine_map(network):
    make, expected = NETWORKS[network]
    model = make()
    grouped = group_layers(model, beliefs="before_activation")
    assert names(grouped) == expected
    assert names(group_layers(grouped, beliefs="before_activation")) == expected  # groups stay
    assert {id(p) for p in grouped.parameters()} == {id(p) for p in model.parameters()}
    x = torch.randn(ROWS, 6)
    assert torch.equal(grouped(x), model(x))


def test_pooling_and_reshaping_open_the_next_layer():
    model = seq(
        nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, CLASSES),
    )  # fmt: skip
    grouped = group_layers(model, beliefs="before_activation")
    assert names(grouped) == [
        ["Conv2d"],
        ["MaxPool2d", "ReLU", "Conv2d", "BatchNorm2d"],
        ["ReLU", "Flatten", "Linear"],
    ]
    result = pcfast.relax(
        grouped, torch.randn(ROWS, 2, 8, 8), torch.zeros(ROWS, dtype=torch.long), num_steps=3
    )
    assert [tuple(v.shape[1:]) for v in result.beliefs] == [(2, 8, 8), (4, 6, 6), (3, 2, 2), (CLASSES,)]


@pytest.mark.parametrize("inner", [[nn.ReLU()], [nn.ReLU(), nn.MaxPool2d(2)], [seq(nn.PReLU())]])
def test_an_element_that_ends_behind_its_activation_is_refused(inner):
    model = seq(seq(nn.Conv2d(1, 2, 3), *inner), nn.Conv2d(2, 2, 3))
    with pytest.raises(pcfast.ModelError, match=r"ends behind its P?ReLU.*Give the flat model") as caught:
        group_layers(model, beliefs="before_activation")
    assert caught.value.argument == "model"


@pytest.mark.parametrize("beliefs", ["before", True, None])
def test_other_places_are_refused(beliefs):
    with pytest.raises(pcfast.ArgumentError, match='"after_activation", "before_activation"') as caught:
        group_layers(seq(square()), beliefs=beliefs)
    assert caught.value.argument == "beliefs" and caught.value.given == repr(beliefs)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_pctrainer_holds_beliefs_before_the_activation(backend):
    """Its notebook's network with ReLU: the other form is another algorithm, 31 % off in the worst array."""
    meta, arrays = load("pctrainer__mlp_relu_mse").parts
    flat = seq(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 10), nn.ReLU(), nn.Linear(10, 5)).double()
    set_parameters(flat.parameters(), of_kind("param", arrays))
    moves = meta["iterations"] - 1
    errors = {}
    for beliefs in ("before_activation", "after_activation"):
        flat.zero_grad()
        pcfast.pc_loss(
            group_layers(flat, beliefs=beliefs),
            arrays["x"],
            arrays["y"],
            loss=half_squared_error,
            step_size=(meta["step_size"],) * moves + (0.0,),
            num_steps=moves + 1,
            backend=backend,
        ).backward()
        errors[beliefs] = worst([p.grad for p in flat.parameters()], of_kind("grad", arrays))
    assert errors["before_activation"] < 1e-12
    assert 0.30 < errors["after_activation"] < 0.32
