"""Graphs against what JPC computed: hybrid amortised inference and bidirectional PC (tests/data/programs/graphs)."""

from __future__ import annotations

import pytest
import torch
from recorded_programs import FOLDER, Recorded, load
from torch import Tensor, nn

import pcfast
from pcfast import Graph, Root, Scale, Sum

FILES = sorted((FOLDER / "graphs").glob("*.npz"))
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "eager"])


def runs_of(method: str):
    """The files of a method, which are two."""
    files = [path for path in FILES if path.stem.startswith(f"{method}__")]
    assert len(files) == 2
    return pytest.mark.parametrize("path", files, ids=lambda path: path.stem)


def assert_agree(recorded: Recorded, result: dict[str | int, Tensor], prefix: str) -> None:
    """With all recorded arrays PREFIX.NAME, or PREFIX.l by the number of the generator's layer."""
    result, truth = {str(name): value for name, value in result.items()}, recorded.under(prefix)
    assert result.keys() == truth.keys()
    for name, value in result.items():
        torch.testing.assert_close(value.detach(), truth[name], rtol=1e-10, atol=1e-12, msg=f"{prefix}{name}")


def preset(recorded: Recorded) -> dict:
    return pcfast.presets.jpc(step_size=recorded.meta["step_size"], num_steps=recorded.meta["iterations"])


def gradients(**parts: nn.Module) -> dict[str, Tensor]:
    return {f"{part}.{name}": p.grad for part, m in parts.items() for name, p in m.named_parameters()}


@EVERY_BACKEND
@runs_of("jpc_hybrid")
def test_hybrid_amortised_inference(path, backend):
    """The amortiser starts all free nodes, and each of its layers learns what its guess relaxed to."""
    recorded = load(path)
    generator, amortiser = recorded.model("generator"), recorded.model("amortiser")
    depth, y = len(generator), recorded.arrays["y"]
    graph = Graph({"v0": Root(3)} | {f"v{l + 1}": (layer, f"v{l}") for l, layer in enumerate(generator)})
    guesses, guess = {}, y
    for l, layer in zip(reversed(range(depth)), amortiser, strict=True):
        guess = guesses[l] = layer(guess.detach())
    assert_agree(recorded, guesses, "guess.")

    clamp = {f"v{depth}": y} | ({"v0": recorded.arrays["x"]} if "x" in recorded.arrays else {})
    start = {f"v{l}": value.detach() for l, value in guesses.items() if f"v{l}" not in clamp}
    settings = {"clamp": clamp, "vinit": start, "backend": backend, **preset(recorded)}
    result = pcfast.relax(graph, energies=True, **settings)
    v = {l: result.beliefs[f"v{l}"] for l in guesses}
    assert_agree(recorded, {l: value for l, value in v.items() if f"v{l}" in start}, "v.")
    energies = {l: result.energies[f"v{l}"][-1] / len(y) for l in range(1, depth + 1)}
    assert_agree(recorded, energies, "energy.generator.")

    losses = {l: (guess - v[l]).square().sum() / len(y) for l, guess in guesses.items()}
    assert_agree(recorded, losses, "energy.amortiser.")
    sum(losses.values()).backward()
    pcfast.pc_loss(graph, **settings).backward()
    assert_agree(recorded, gradients(generator=generator, amortiser=amortiser), "grad.")


@EVERY_BACKEND
@runs_of("jpc_bidirectional")
def test_bidirectional(path, backend):
    """The amortiser predicts nodes; the generator's predictions of them are nodes of their own, clamped to zero."""
    recorded = load(path)
    generator, amortiser = recorded.model("generator"), recorded.model("amortiser")
    depth, x, y = len(generator), recorded.arrays["x"], recorded.arrays["y"]
    hidden, nodes = range(1, depth), {"x": Root(), f"v{depth}": Root()}
    for l, layer in zip(reversed(range(depth)), amortiser, strict=True):
        nodes[f"v{l}"] = (layer, f"v{l + 1}")
    for l in hidden:  # what the generator predicts, minus the belief
        nodes[f"down{l}"] = (Sum(generator[l - 1], Scale(-1.0)), "x" if l == 1 else f"v{l - 1}", f"v{l}")
    nodes[f"down{depth}"] = (generator[-1], f"v{depth - 1}")
    clamp = {"x": x, f"v{depth}": y, "v0": x, f"down{depth}": y}
    clamp |= {f"down{l}": torch.zeros_like(recorded.arrays[f"v.{l}"]) for l in hidden}
    precision = {f"v{l}": recorded.meta["backward_energy_weight"] for l in range(depth)}
    precision |= {f"down{l}": recorded.meta["forward_energy_weight"] for l in range(1, depth + 1)}

    graph = Graph(nodes)
    settings = {"clamp": clamp, "precision": precision, "backend": backend, **preset(recorded)}
    begun = pcfast.relax(graph, **{**settings, "num_steps": 0, "step_size": 0.0}).beliefs
    assert_agree(recorded, {l: begun[f"v{l}"] for l in hidden}, "start.")
    result = pcfast.relax(graph, energies=True, **settings)
    assert_agree(recorded, {l: result.beliefs[f"v{l}"] for l in hidden}, "v.")
    energies = {name: values / len(y) for name, values in result.energies.items()}
    torch.testing.assert_close(sum(energies.values()), recorded.arrays["energy"], rtol=1e-10, atol=1e-12)
    assert_agree(recorded, {l: energies[f"down{l}"][-1] for l in range(1, depth + 1)}, "energy.generator.")
    assert_agree(recorded, {l: energies[f"v{l}"][-1] for l in range(depth)}, "energy.amortiser.")
    pcfast.pc_loss(graph, **settings).backward()
    assert_agree(recorded, gradients(generator=generator, amortiser=amortiser), "grad.")
