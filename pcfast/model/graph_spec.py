"""A graph of predictive-coding nodes as plain values: what spec.py is for a chain."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ShapeError
from .describe import check_called_by_elements, describe, has_hooks, operations, patched, plain_sequential
from .graph import Graph, Prior, merge_of
from .merging import Concatenate, Sum, shapes_apart
from .spec import Op, Opaque, Shape, chain_label, leaves

#: The name of a chain's input among the nodes of a graph.
INPUT = "input"


@dataclass(frozen=True)
class NodeSpec:
    """One node.

    Attributes:
        name: as in the graph.
        inputs: indices of the nodes that it predicts from.
        kind: "root" without a prediction, "prior", "chain" of one input, "merge" of branches, or "module": one of
            several inputs that pcfast does not know.
        branches: the operations of each input's branch; of a chain those of the whole node.
        merge: how a "merge" merges.
        tail: a merge's operations after the branches are merged.
        shape: of one row, for a root or a prior that has one.
    """

    name: str
    inputs: tuple[int, ...]
    kind: str
    branches: tuple[tuple[Op, ...], ...] = ()
    merge: str = ""
    dim: int = 1
    tail: tuple[Op, ...] = ()
    shape: Shape | None = None

    @property
    def operations(self) -> tuple[Op, ...]:
        """All of them, those of residual branches in place of their block."""
        return tuple(leaves(tuple(op for ops in (*self.branches, self.tail) for op in ops)))

    @property
    def label(self) -> str:
        """In messages and in :func:`pcfast.explain`."""
        if self.kind != "merge":
            words = chain_label(self.branches[0]) if self.branches else self.kind
        else:
            branches = ", ".join(map(chain_label, self.branches))
            words = " - ".join((f"{self.merge}({branches})", *(op.label for op in self.tail)))
        return f"node {self.name} ({words})"


@dataclass(frozen=True)
class GraphSpec:
    """A graph described: ``nodes`` in topological order, inputs before what reads them."""

    nodes: tuple[NodeSpec, ...]
    outputs: tuple[int, ...]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Name -> index."""
        return {name: k for k, name in enumerate(self.names)}

    @functools.cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of every node those that predict from it, each once."""
        return tuple(
            tuple(c for c, node in enumerate(self.nodes) if k in node.inputs) for k in range(len(self.nodes))
        )

    @functools.cached_property
    def opaque(self) -> tuple[Opaque, ...]:
        return tuple(op for node in self.nodes for op in node.operations if isinstance(op, Opaque))

    @functools.cached_property
    def foreign(self) -> tuple[NodeSpec, ...]:
        """Nodes of several inputs whose modules pcfast does not know."""
        return tuple(node for node in self.nodes if node.kind == "module")

    def is_chain(self) -> bool:
        """One input, and every other node predicts from the one before it alone."""
        first, *others = self.nodes
        if first.kind != "root" or not others or self.outputs != (len(others),):
            return False
        return all(node.kind == "chain" and node.inputs == (k,) for k, node in enumerate(others))

    def check_shapes(self, rows: int, given: Mapping[int, Shape]) -> None:
        """Check the shapes of all values, batch of ``rows`` included, from those of ``given`` nodes.

        Raises:
            ShapeError: naming the node where they do not fit.
        """
        shapes: list[Shape | None] = []
        for k, node in enumerate(self.nodes):
            predicted = (
                (rows, *node.shape) if node.shape else _predicted(node, [shapes[i] for i in node.inputs])
            )
            shape = given.get(k)
            if None not in (shape, predicted) and shape != predicted:
                raise ShapeError(
                    f"clamp[{node.name!r}]", f"shape {shape}", f"{predicted}, that of the node's prediction"
                )
            shapes.append(predicted if shape is None else shape)


def _through(node: NodeSpec, ops: tuple[Op, ...], shape: Shape | None) -> Shape | None:
    for op in ops:
        if shape is None or any(isinstance(leaf, Opaque) for leaf in leaves((op,))):
            return None
        try:
            shape = op.output_shape(shape)
        except ValueError as needed:
            raise ShapeError(
                "model", f"shape {shape} at the input of {op.name} in {node.label}", str(needed),
                "Check the sizes of its inputs, and whether a Flatten is missing.",
            ) from None  # fmt: skip
    return shape


def _predicted(node: NodeSpec, inputs: Sequence[Shape | None]) -> Shape | None:
    """The shape of a prediction; None where a module hides it."""
    if node.kind in ("root", "prior", "module"):
        return None
    parts = [_through(node, ops, shape) for ops, shape in zip(node.branches, inputs, strict=True)]
    if node.kind == "chain":
        return parts[0]
    if None in parts:
        return None
    merge = Sum() if node.merge == "Sum" else Concatenate(dim=node.dim)
    try:
        shape = merge.merged_shape(parts)
    except ValueError as needed:
        raise shapes_apart(parts, str(needed), node.label) from None
    return _through(node, node.tail, shape)


def describe_graph(model: Graph | nn.Sequential) -> GraphSpec:
    """Describe a graph; a Sequential as the graph that it is, whose nodes are "input" and its layers by their names.

    Raises:
        ModelError: no graph, hooks on the graph itself, or as :func:`pcfast.model.describe.describe`.
    """
    if not isinstance(model, Graph):
        describe(model)
        names = tuple(model._modules)
        nodes = [NodeSpec(INPUT, (), "root")]
        nodes += [
            NodeSpec(name, (k,), "chain", (tuple(operations(name, model._modules[name])),))
            for k, name in enumerate(names)
        ]
        return GraphSpec(tuple(nodes), (len(names),))
    check_called_by_elements(model)
    index = {name: k for k, name in enumerate(model.names)}
    nodes = [_described(model, name, tuple(index[i] for i in model.inputs_of[name])) for name in model.names]
    return GraphSpec(tuple(nodes), tuple(index[name] for name in model.outputs))


def _described(graph: Graph, name: str, inputs: tuple[int, ...]) -> NodeSpec:
    if name in graph.roots:
        return NodeSpec(name, (), "root", shape=graph.roots[name].shape)
    module = graph._modules[name]
    if isinstance(module, Prior):
        return NodeSpec(name, (), "prior", shape=module.shape)
    merge = merge_of(module)
    if merge is None:
        if len(inputs) > 1:
            return NodeSpec(name, inputs, "module")
        return NodeSpec(name, inputs, "chain", (tuple(operations(name, module)),))
    merge.check_inputs(len(inputs), f" at node {name!r}")
    known = type(merge) in (Sum, Concatenate) and not any(has_hooks(m) or patched(m) for m in (merge, module))
    if not known or (module is not merge and not plain_sequential(module)):
        return NodeSpec(name, inputs, "module")
    members = list(module._modules) if module is not merge else []
    path = f"{name}.{members[0]}" if members else name
    branches = tuple(
        tuple(operations(f"{path}.{i}", merge._modules[str(i)])) if merge._modules else ()
        for i in range(len(inputs))
    )
    tail = tuple(
        op for member in members[1:] for op in operations(f"{name}.{member}", module._modules[member])
    )
    dim = merge.dim if isinstance(merge, Concatenate) else 1
    return NodeSpec(name, inputs, "merge", branches, type(merge).__name__, dim, tail)
