"""Recipes against the published configurations, and one update of each against the program's step.

tests/data/published_recipes.json holds the values of the programs' configuration files, entered from the files apart
from pcfast's tables. The steps below are written from the programs' equations, in their own signs, means and
optimisers: hidden energies 0.5 |belief - prediction|^2, the batch's mean, one optimiser step.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcfast
from pcfast import ArgumentError, datasets
from pcfast.cli import main
from pcfast.recipes import RECIPES
from pcfast.recipes.pcx import Beta, Pcx
from pcfast.training import trainer as training

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_recipes.json").read_text())
PCX = [name for name in RECIPES if name.startswith("pcx-")]
EPC = [name for name in RECIPES if name.startswith(("epc-", "spc-"))]


# The configurations ----------------------------------------------------------------------------------------------


def test_the_recipes_are_the_published_ones_but_those_left_out():
    assert set(PCX + EPC) == set(PUBLISHED) - {"pcx-vgg5-cifar10-cn"}
    signs = PUBLISHED["pcx-vgg5-cifar10-cn"]["betas"]
    assert len(signs) < PUBLISHED["pcx-vgg5-cifar10-cn"]["epochs"]  # why
    assert all(name == recipe.name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", PCX)
def test_pcx_configurations(name):
    recipe, there = RECIPES[name], PUBLISHED[name]
    same = {"w_lr": "w_lr", "w_wd": "w_decay", "x_lr": "x_lr", "x_momentum": "x_momentum"}
    for key, field in same.items():
        assert getattr(recipe, field) == there[key], key
    for key in ("T", "act_fn", "batch_size", "epochs"):
        assert getattr(recipe, key) == there[key], key
    if "se_flag" in there:
        assert (recipe.loss == "mse") == there["se_flag"]
    result = [recipe.beta(epoch) for epoch in range(recipe.epochs)]
    for epoch, nudging in enumerate(result):
        factor, size = there["beta_factor"], there["beta"] + there["beta_ir"] * epoch
        if factor == 0:
            beta = there["betas"][epoch]
        else:
            beta = factor * size
            if abs(beta) >= 1:
                beta = 1.0
        assert pushed(nudging) == pytest.approx(beta, rel=1e-12), epoch


def pushed(nudging) -> float:
    """The program's beta."""
    if nudging is None:
        return 1.0
    ((push, share),) = nudging.pushes
    assert share == 1 / push
    return push


@pytest.mark.parametrize("name", EPC)
def test_epc_configurations(name):
    recipe, there = RECIPES[name], PUBLISHED[name]
    assert recipe.lr == there["e_lr" if name.startswith("epc") else "s_lr"]
    assert recipe.momentum == (0 if name.startswith("epc") else there["s_momentum"])
    same = {
        "iters": "iters",
        "w_lr": "w_lr",
        "w_decay": "w_decay",
        "act_fn": "act_fn",
        "nm_epochs": "epochs",
        "batch_size": "batch_size",
    }
    for key, field in same.items():
        assert getattr(recipe, field) == there[key], key
    assert recipe.net.upper() == there["model"] and recipe.data.upper() == there["dataset"]
    assert recipe.loss == {"mse": "mse", "ce": "cross_entropy"}[there["output_loss"]]


PARAMETERS = {
    "mlp": 784 * 128 + 128 + 2 * (128 * 128 + 128) + 128 * 10 + 10,
    "vgg5": 9 * (3 * 128 + 128 * 256 + 256 * 512 + 512 * 512) + 128 + 256 + 2 * 512,
    "vgg7": 9 * (3 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512) + 2 * 896,
    "vgg9": 9 * (3 * 128 + 128**2 + 128 * 256 + 256**2 + 256 * 512 + 3 * 512**2) + 2 * 384 + 4 * 512,
}
FEATURES = {"vgg5": 2048, "vgg7": 512, "vgg9": 2048}
BELIEFS = {  # of the programs' vodes
    "mlp": [(128,)] * 3,
    "vgg5": [(128, 16, 16), (256, 8, 8), (512, 4, 4), (2048,)],
    "vgg7": [(128, 16, 16), (128, 16, 16), (256, 8, 8), (256, 6, 6), (512, 3, 3), (512,)],
    "vgg9": [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2 + [(512, 2, 2), (2048,)],
}


@pytest.mark.parametrize("name", PCX + EPC)
def test_networks(name):
    recipe = RECIPES[name]
    with torch.device("meta"):
        model = recipe.network()
        classes = datasets.SOURCES[recipe.data].classes
        x = torch.empty(2, 784) if recipe.net == "mlp" else torch.empty(2, 3, 32, 32)
        shapes = []
        for layer in model:
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [*BELIEFS[recipe.net], (classes,)]
    expected = PARAMETERS[recipe.net]
    if recipe.net != "mlp":
        expected += FEATURES[recipe.net] * classes + classes
    assert sum(p.numel() for p in model.parameters()) == expected
    kinds = {"gelu": nn.GELU, "tanh": nn.Tanh, "leaky_relu": nn.LeakyReLU, "hard_tanh": nn.Hardtanh}
    activations = [m for m in model.modules() if isinstance(m, tuple(kinds.values()))]
    assert len(activations) == len(model) - 1
    for activation in activations:
        assert type(activation) is kinds[recipe.act_fn]
        if recipe.act_fn == "gelu":
            assert activation.approximate == ("tanh" if isinstance(recipe, Pcx) else "none")
        if recipe.act_fn == "leaky_relu":
            assert activation.negative_slope == 0.01


@pytest.mark.parametrize("name", ["pcx-mlp-mnist-se", "epc-vgg5-cifar10-ce", "pcx-vgg7-cifar100-pn"])
def test_inputs_are_normalised_and_padded_with_black(name):
    recipe = RECIPES[name]
    mean, std = {
        "mnist": ([0.5], [0.5]),
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
        "cifar100": ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    }[recipe.data]
    source = datasets.SOURCES[recipe.data]
    shape = source.image_shape if recipe.shape == "image" else (source.pixels,)
    black, y = torch.zeros(3, *shape), torch.arange(3)
    data = recipe.prepared(datasets.Data(black, y, black + 1, y))
    channels = data.x_train.reshape(3, len(mean), -1)
    expected = -torch.tensor(mean) / torch.tensor(std)
    torch.testing.assert_close(channels, expected[None, :, None].expand_as(channels))
    channels = data.x_test.reshape(3, len(mean), -1)
    expected = (1 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(channels, expected[None, :, None].expand_as(channels))
    if recipe.loss == "mse":
        assert torch.equal(data.y_train, torch.eye(source.classes)[:3])
    else:
        assert torch.equal(data.y_train, y)
    augment = recipe.settings()["augment"]
    if recipe.net == "mlp":
        assert augment is None
    else:
        torch.testing.assert_close(augment(data.x_train), data.x_train)  # black around black
        assert augment.padding == 4


def test_rosenbaums():
    """Numbers of its notebooks."""
    mnist = RECIPES["rosenbaum-mnist-strict"]
    settings = mnist.settings()
    expected = dict(epochs=2, batch_size=300, loss="mse", method="strict", step_size=0.1, num_steps=20)
    assert {key: settings[key] for key in expected} == expected
    optimizer = settings["optimizer"](mnist.network().parameters())
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["lr"] == 0.002
    assert sum(p.numel() for p in mnist.network().parameters()) == 32_695
    cifar = RECIPES["rosenbaum-cifar10-fixed"]
    settings = cifar.settings()
    assert (settings["method"], settings["loss"]) == ("fixed_prediction", "cross_entropy")
    assert (settings["batch_size"], settings["epochs"], settings["drop_last"]) == (256, 5, True)
    assert settings["optimizer"](cifar.network().parameters()).defaults["lr"] == 0.01
    assert sum(p.numel() for p in cifar.network().parameters()) == 4_633_738
    for name in ("rosenbaum-mnist-fixed-eta1", "rosenbaum-cifar10-fixed-eta1"):
        recipe = RECIPES[name]
        assert recipe.settings()["step_size"] == 1
        assert recipe.settings()["num_steps"] == len(recipe.network())


def test_beta_by_epoch():
    assert [pushed(Beta(0.9, 0.05, -1.0)(e)) for e in range(4)] == pytest.approx([-0.9, -0.95, 1.0, 1.0])
    assert [pushed(Beta(0.9, 0.05, 0, "+--+")(e)) for e in range(4)] == pytest.approx([0.9, -0.95, -1.0, 1.0])
    assert [pushed(Beta(0.9, 0.05, 1.0)(e)) for e in range(3)] == pytest.approx([0.9, 0.95, 1.0])


# One update ------------------------------------------------------------------------------------------------------


def output_energy(recipe, u: Tensor, h: Tensor) -> Tensor:
    if recipe.loss == "mse":
        return 0.5 * (h - u).square().sum()
    return -(h * torch.log_softmax(u, 1)).sum()


def state_energy(recipe, model, x, states, h) -> Tensor:
    total, below = 0.0, x
    for layer, state in zip(model[:-1], states, strict=True):
        total = total + 0.5 * (state - layer(below)).square().sum()
        below = state
    return total + output_energy(recipe, model[-1](below), h)


def forward_states(model, x) -> list[Tensor]:
    states = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            states.append(x.clone())
    return states


def rate_at(recipe, step: int, steps: int) -> float:
    """The programs' learning rate: from w_lr to 1.1 w_lr in the first tenth, then half a cosine to 0.1 w_lr."""
    warmup = 0.1 * steps if isinstance(recipe, Pcx) else int(0.1 * steps)
    if step < warmup:
        return recipe.w_lr * (1 + 0.1 * step / warmup)
    done = (step - warmup) / (steps - warmup)
    return recipe.w_lr * (0.1 + 0.5 * (1 + math.cos(math.pi * done)))


def program_of(recipe) -> str:
    return recipe.name.split("-")[0]


class Program:
    """A program's training, update by update."""

    def __init__(self, recipe, model, steps):
        self.recipe, self.model, self.steps, self.step = recipe, model, steps, 0
        kind = torch.optim.Adam if program_of(recipe) == "epc" else torch.optim.AdamW
        self.optimizer = kind(model.parameters(), lr=recipe.w_lr, weight_decay=recipe.w_decay)

    def move(self, gradients) -> None:
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.recipe, self.step, self.steps)
        self.optimizer.step()
        self.step += 1

    def learn(self, x, h, epoch) -> None:
        """One batch; h: targets, one-hot."""
        if program_of(self.recipe) == "epc":
            self.descend_errors(x, h)
        else:
            self.descend_states(x, h, epoch)

    def descend_states(self, x, h, epoch) -> None:
        recipe, model, rows = self.recipe, self.model, len(x)
        beta, incremental = 1.0, False
        *states, u = forward_states(model, x)
        if isinstance(recipe, Pcx):
            rate, momentum, count = recipe.x_lr, recipe.x_momentum, recipe.T
            beta, incremental = pushed(recipe.beta(epoch)), recipe.variant == "ipc"
        else:
            rate, momentum, count = recipe.lr, recipe.momentum, recipe.iters
        h = u - beta * (u - h)
        weights = list(model.parameters())
        states = [state.requires_grad_() for state in states]
        descent = torch.optim.SGD(states, lr=rate, momentum=momentum)
        for _ in range(count):
            energy = state_energy(recipe, model, x, states, h) / rows
            result = torch.autograd.grad(energy, states + weights)
            for state, gradient in zip(states, result, strict=False):
                state.grad = gradient * rows
            descent.step()
            if incremental:
                self.move([g / beta for g in result[len(states) :]])
        if not incremental:
            energy = state_energy(recipe, model, x, [state.detach() for state in states], h) / rows
            self.move([g / beta for g in torch.autograd.grad(energy, weights)])

    def descend_errors(self, x, h) -> None:
        recipe, model = self.recipe, self.model
        errors = [torch.zeros_like(state) for state in forward_states(model, x)[:-1]]
        for _ in range(recipe.iters):
            errors = [error.requires_grad_() for error in errors]
            state = x
            for layer, error in zip(model[:-1], errors, strict=True):
                state = layer(state) + error
            energy = sum(0.5 * e.square().sum() for e in errors) + output_energy(recipe, model[-1](state), h)
            result = torch.autograd.grad(energy, errors)
            errors = [(e - recipe.lr * g).detach() for e, g in zip(errors, result, strict=True)]
        state, states = x, []
        with torch.no_grad():
            for layer, error in zip(model[:-1], errors, strict=True):
                state = layer(state) + error
                states.append(state)
        energy = state_energy(recipe, model, x, states, h)
        divisor = len(x) * min(1.0, recipe.lr * recipe.iters)
        self.move(torch.autograd.grad(energy / divisor, list(model.parameters())))


def drawn_data(recipe, rows: int) -> datasets.Data:
    source = datasets.SOURCES[recipe.data]
    shape = source.image_shape if recipe.shape == "image" else (source.pixels,)
    x = torch.rand(rows, *shape, dtype=torch.float64)
    return datasets.Data(x, torch.randint(source.classes, (rows,)), x[:1], torch.zeros(1, dtype=torch.int64))


# every MLP, and of the others each kind of update, activation and network once
STEPPED = [name for name in PCX if "-mlp-" in name] + [
    "pcx-vgg5-cifar10-se", "pcx-vgg5-cifar10-nn", "pcx-vgg5-cifar100-ipc", "pcx-vgg7-cifar100-ce",
    "pcx-vgg7-cifar100-pn", "spc-vgg5-cifar10-mse", "spc-vgg7-cifar100-ce", "epc-vgg5-cifar10-mse",
    "epc-vgg7-cifar100-ce", "epc-vgg9-cifar10-ce",
]  # fmt: skip


@pytest.mark.parametrize("name", STEPPED)
def test_updates_are_the_programs(name):
    """training.train with the recipe's settings against the program: parameters after the first updates.

    By the reference, which rounds as the program's loop: Adam turns the rounding of gradients near zero into steps.
    """
    batch, batches, epochs = (5, 2, 2) if "-mlp-" in name else (2, 1, 1)
    recipe = dataclasses.replace(RECIPES[name], batch_size=batch)
    torch.manual_seed(3)
    model = recipe.network().double()
    other = recipe.network().double()
    other.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    data = recipe.prepared(drawn_data(recipe, batch * batches + 1))  # one row more, which is dropped
    settings, seen = recipe.settings(epochs), []
    augment = settings["augment"] or (lambda x: x)

    def kept(x):
        seen.append(augment(x))
        return seen[-1]

    settings.update(augment=kept, backend="reference")
    training.train(model, data, **settings, seed=9, progress=False)
    iterations = recipe.T if isinstance(recipe, Pcx) and recipe.variant == "ipc" else 1
    program = Program(recipe, other, steps=batches * epochs * iterations)
    one_hot = data.y_train
    if one_hot.dim() == 1:
        one_hot = F.one_hot(one_hot, datasets.SOURCES[recipe.data].classes).double()
    inputs = iter(seen[1:])  # the first was the rehearsal
    for epoch in range(epochs):
        order = np.random.default_rng((9, epoch)).permutation(len(data.x_train))
        for k in range(batches):
            rows = torch.from_numpy(order[k * batch : (k + 1) * batch])
            program.learn(next(inputs), one_hot[rows], epoch)
    assert program.step == program.steps
    for old, result, true in zip(before, model.parameters(), other.parameters(), strict=True):
        moved = float((true.detach() - old).norm())
        assert moved > 0
        assert float((result - true).detach().norm()) <= 1e-6 * moved


# Use -------------------------------------------------------------------------------------------------------------


def test_recipes_cover_so_many_epochs():
    recipe = RECIPES["pcx-mlp-mnist-cn"]
    assert recipe.settings(3)["epochs"] == 3 and recipe.settings()["epochs"] == 25
    for epochs in (26, 0, True, "3"):
        with pytest.raises(ArgumentError, match=r"epochs"):
            recipe.settings(epochs)


@pytest.mark.parametrize("name", RECIPES)
def test_relaxations_run_on_eager(name):
    recipe = RECIPES[name]
    settings = recipe.settings(1)
    if settings["method"] == "incremental":
        return  # a step of its own, not one of explain's; stepped above
    with torch.device("meta"):
        model = recipe.network()
    x = (2, 784) if recipe.shape == "flat" else (2, *datasets.SOURCES[recipe.data].image_shape)
    names = ("method", "step_size", "num_steps", "belief_optimizer")
    result = pcfast.explain(model, x, "cpu", **{key: settings[key] for key in names if key in settings})
    assert "eager" in str(result)


def idx(kind: int, content: np.ndarray) -> bytes:
    return b"".join(n.to_bytes(4, "big") for n in (kind, *content.shape)) + content.tobytes()


def write_mnist(folder: Path, rows: int = 260) -> Path:
    """Stripes by class."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", rows), ("t10k", 20)):
        labels = generator.integers(0, 10, count).astype(np.uint8)
        images = (generator.random((count, 28, 28)) * 60).astype(np.uint8)
        for row, label in enumerate(labels):
            images[row, 2 * label : 2 * label + 5] = 255
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(0x803, images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(0x801, labels))
    return folder


def test_on_the_command_line(tmp_path, capsys):
    data, out = write_mnist(tmp_path / "mnist"), tmp_path / "run"
    common = ["train", "--recipe", "pcx-mlp-mnist-pn", "--data-dir", str(data), "--out", str(out)]
    assert main([*common, "--epochs", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["history"]["test_accuracy"]) == 2
    config = json.loads((out / "config.json").read_text())
    settings = config["settings"]
    assert settings["method"] == "strict" and settings["batch_size"] == 128 and settings["num_steps"] == 6
    assert settings["optimizer"]["name"] == "AdamW" and settings["scheduler"]["steps"] == 4
    assert settings["drop_last"] and "0.55" in settings["nudging"] and "0.7" in settings["belief_optimizer"]
    assert config["kept"]["recipe"] == "pcx-mlp-mnist-pn"
    assert (
        not {"data", "method", "loss", "num_steps"} & config["kept"].keys()
    )  # the recipe's, not the options'
    # the run is over, and its schedule does not grow
    assert main(["train", "--out", str(out), "--resume", "--epochs", "3"]) == 2
    assert "scheduler.steps" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert "its schedule ends there" in capsys.readouterr().out
    assert main(["train", "--out", str(out), "--resume", "--method", "strict"]) == 2
    assert "--method with recipe pcx-mlp-mnist-pn" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume", "--recipe", "pcx-mlp-mnist-se"]) == 2
    assert "--recipe pcx-mlp-mnist-pn, not pcx-mlp-mnist-se" in capsys.readouterr().err


def test_a_run_without_a_recipe_is_not_resumed_with_one(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", "--epochs", "1", "--num-steps", "1", "--out", out]) == 0
    assert main(["train", "--out", out, "--resume", "--recipe", "pcx-mlp-mnist-se"]) == 2
    assert "--recipe not given, not pcx-mlp-mnist-se" in capsys.readouterr().err


def test_a_name_that_is_none(capsys):
    assert main(["train", "--recipe", "pcx-mlp-minst-se"]) == 2
    assert "pcx-mlp-mnist-se" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--net", "mlp"], ["--step-size", "0.1"], ["--data", "mnist"], ["--lr", "1"]]
)
def test_options_that_the_recipe_fixes(option, capsys):
    assert main(["train", "--recipe", "pcx-mlp-mnist-se", *option]) == 2
    assert f"{option[0]} with recipe pcx-mlp-mnist-se" in capsys.readouterr().err


def test_data_that_is_not_there(tmp_path, capsys):
    assert main(["train", "--recipe", "pcx-vgg7-cifar100-se", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "--data-dir" in said and "cifar-100" in said
    assert not (tmp_path / "run").exists()
