"""Random graphs, and their energy in plain torch, independent of what relaxes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import pcfast

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Identity)


@dataclass
class Case:
    """A graph with what it is relaxed from; arguments of pc_loss and relax."""

    graph: pcfast.Graph
    x: dict[str, Tensor]
    y: dict[str, Tensor] | None
    settings: dict = field(default_factory=dict)

    def updates(self, **settings) -> dict[str, Tensor]:
        """The loss, and the updates by parameter."""
        self.graph.zero_grad()
        loss = pcfast.pc_loss(self.graph, self.x, self.y, **{**self.settings, **settings})
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in self.graph.named_parameters()}}

    def states(self, **settings) -> dict[str, Tensor]:
        result = pcfast.relax(self.graph, self.x, self.y, **{**self.settings, **settings})
        errors = {f"error.{n}": e for n, e in result.errors.items() if e is not None}
        energies = {f"energy.{n}": e for n, e in (result.energies or {}).items()}
        return {
            "loss": result.loss,
            **{f"belief.{n}": v for n, v in result.beliefs.items()},
            **errors,
            **energies,
        }


def energy(graph: pcfast.Graph, values: dict[str, Tensor], losses=(), precision=None) -> Tensor:
    """sum of pi |mu - v|^2 / 2, and the losses: (name, loss, target) of nodes that have no values."""
    total, precision = 0.0, precision or {}
    targets = {name: (loss, y) for name, loss, y in losses}
    for name in graph.names:
        if name in graph.roots:
            continue
        mu = graph.values({n: v for n, v in values.items() if n != name})[name]
        pi = precision.get(name, 1.0)
        if name in targets:
            loss, y = targets[name]
            total = total + pi * loss(mu, y)
        else:
            total = total + 0.5 * (pi * (mu - values[name]).square()).sum()
    return total


def _branch(draw, fan_in: int, fan_out: int) -> nn.Module:
    if fan_in == fan_out and draw(st.booleans()):
        return draw(st.sampled_from((None, pcfast.Residual(nn.Tanh(), nn.Linear(fan_in, fan_out)))))
    return nn.Sequential(nn.Linear(fan_in, fan_out), draw(st.sampled_from(ACTIVATIONS))())


def _node(draw, fan_ins: list[int], width: int) -> nn.Module:
    if len(fan_ins) == 1:
        return _branch(draw, fan_ins[0], width) or nn.Identity()
    if draw(st.booleans()):
        merged = pcfast.Sum(*(_branch(draw, fan_in, width) for fan_in in fan_ins))
        return nn.Sequential(merged, draw(st.sampled_from(ACTIVATIONS))()) if draw(st.booleans()) else merged
    return nn.Sequential(pcfast.Concatenate(), nn.Linear(sum(fan_ins), width), nn.Tanh())


@st.composite
def cases(
    draw, *, losses: bool = True, clamps: bool = True, free_roots: bool = True, precisions: bool = True
):
    """A float64 graph of 2 to 7 nodes in which any node may read any before it."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rows, count = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    nodes: dict[str, object] = {"x": pcfast.Root(3)}
    widths = {"x": 3}
    if free_roots and draw(st.booleans()):
        nodes["z"] = pcfast.Prior(2, mean=0.3, trainable=True) if draw(st.booleans()) else pcfast.Root(2)
        widths["z"] = 2
    for k in range(count):
        name, width = f"h{k}", draw(st.sampled_from((2, 3, 4)))
        known = list(widths)
        inputs = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        inputs[0] = known[-1] if draw(st.booleans()) else inputs[0]
        nodes[name] = (_node(draw, [widths[i] for i in inputs], width), *inputs)
        widths[name] = width
    graph = pcfast.Graph(nodes).double()
    sinks = [name for name in graph.outputs if name not in ("x", "z")]
    y = {n: torch.randn(rows, widths[n]).double() for n in sinks} if losses else {}
    x = {"x": torch.randn(rows, 3).double()}
    if clamps:
        for name in widths:
            if name not in x and name not in y and draw(st.integers(0, 3)) == 0:
                x[name] = torch.randn(rows, widths[name]).double()
    settings: dict = {"loss": pcfast.losses.half_squared_error}
    if precisions:
        values = st.sampled_from((0.5, 1.0, 2.0))
        settings["precision"] = {n: draw(values) for n in widths}
        hidden = [n for n in widths if n not in y and n not in graph.roots]
        if hidden and draw(st.booleans()):
            name = draw(st.sampled_from(hidden))
            settings["precision"][name] = torch.rand(widths[name]).double() + 0.5
        settings["step_size"] = {n: draw(st.sampled_from((0.02, 0.05))) for n in widths}
    return Case(graph, x, y or None, settings)
