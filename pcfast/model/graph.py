"""Networks beyond chains: a directed acyclic graph of predictive-coding nodes (docs/graphs.md)."""

from __future__ import annotations

import graphlib
import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError, ModelError, ShapeError
from .merging import Merge


class Root:
    """A node without a prediction: an input, or a latent variable without a prior.

    Args:
        shape: of one row; without it the root takes whatever it is clamped to, and cannot be left free unless a
            start is given.

    Raises:
        ArgumentError: a size that is no int >= 1.
    """

    def __init__(self, *shape: int) -> None:
        self.shape = checked_shape(shape) or None

    def __repr__(self) -> str:
        return f"Root({', '.join(map(str, self.shape or ()))})"


class Prior(nn.Module):
    """A root with a Gaussian prior: it predicts the same mean for every row, with the node's precision.

    Args:
        shape: of one row.
        mean: a number, or a tensor of ``shape``, that the prediction starts at.
        trainable: the mean is a parameter, which learns as any other; otherwise it is a buffer.

    Raises:
        ArgumentError and its kinds: no shape, or a mean of another.
    """

    def __init__(self, *shape: int, mean: float | Tensor = 0.0, trainable: bool = False) -> None:
        super().__init__()
        self.shape = checked_shape(shape)
        if not self.shape:
            raise ArgumentError("shape", "none", "the shape of one row", "E.g. pcfast.Prior(20).")
        if isinstance(mean, Tensor) and tuple(mean.shape) != self.shape:
            raise ShapeError("mean", f"shape {tuple(mean.shape)}", f"{self.shape}, that of one row")
        value = mean.detach().clone() if isinstance(mean, Tensor) else torch.full(self.shape, float(mean))
        if trainable:
            self.mean = nn.Parameter(value)
        else:
            self.register_buffer("mean", value)

    def forward(self, rows: int) -> Tensor:
        """The mean for ``rows`` rows: (rows, *shape)."""
        return self.mean.expand(rows, *self.shape)

    def extra_repr(self) -> str:
        trainable = ", trainable=True" if isinstance(self.mean, nn.Parameter) else ""
        return f"{', '.join(map(str, self.shape))}{trainable}"


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
        raise ArgumentError("shape", repr(tuple(shape)), "ints >= 1: the shape of one row, without the batch")
    return tuple(shape)


class Graph(nn.Module):
    """A network whose PC layers form a directed acyclic graph.

        graph = pcfast.Graph({
            "x": pcfast.Root(),
            "h1": (nn.Sequential(nn.Linear(64, 128), nn.Tanh()), "x"),
            "h2": (nn.Sequential(nn.Linear(128, 128), nn.Tanh()), "h1"),
            "y": (pcfast.Sum(nn.Linear(128, 10), nn.Linear(64, 10)), "h2", "x"),
        })

    Node k has beliefs v_k and predicts mu_k = f_k(v of its inputs). A node of several inputs has a module that begins
    with :class:`pcfast.Sum` or :class:`pcfast.Concatenate`, or any module that takes as many tensors (which only the
    reference backend runs). A node's module is registered under the node's name: ``h1.0.weight``.

    Args:
        nodes: name -> :class:`pcfast.Root`, :class:`pcfast.Prior`, or ``(module, name of an input, ...)``. A node may
            stand before its inputs.
        outputs: names of the nodes that ``graph(x)`` returns and a loss is taken at; None: those that are nobody's
            input, in their order.

    Raises:
        ModelError and ArgumentError: a cycle, an unknown name, a name that a module cannot have, a node that is no
            module, inputs that do not fit the module.
    """

    def __init__(self, nodes: Mapping[str, object], *, outputs: Sequence[str] | str | None = None) -> None:
        super().__init__()
        if not isinstance(nodes, Mapping) or not nodes:
            given = "an empty mapping" if isinstance(nodes, Mapping) else f"a {type(nodes).__name__}"
            raise ModelError(
                "nodes", given, "a mapping from names to nodes", 'E.g. {"x": pcfast.Root(), ...}.'
            )
        self.inputs_of: dict[str, tuple[str, ...]] = {}
        self.roots: dict[str, Root] = {}
        made = {name: self._checked(name, entry) for name, entry in nodes.items()}
        for name in _ordered({name: inputs for name, (_, inputs) in made.items()}):
            module, self.inputs_of[name] = made[name]
            if isinstance(module, Root):
                self.roots[name] = module
            else:
                self.add_module(name, module)
        self.outputs = self._checked_outputs(outputs)

    def _checked(self, name: str, entry) -> tuple[nn.Module | Root, tuple[str, ...]]:
        """The node's module, or its root, and the names of its inputs."""
        if not isinstance(name, str) or not name.isidentifier():
            raise ModelError("nodes", f"the name {name!r}", "names that are Python identifiers", 'E.g. "h1".')
        if hasattr(Graph, name) or name in self.__dict__ or name in ("inputs_of", "outputs", "roots"):
            raise ModelError(
                "nodes", f"the name {name!r}, which a module has already", "another name", f'E.g. "{name}_1".'
            )
        if isinstance(entry, Root | Prior):
            return entry, ()
        if isinstance(entry, nn.Module):
            raise ModelError(
                "nodes", f"{name!r}: a {type(entry).__name__} without inputs", "(module, name of an input, ...)",
                "A node without inputs is a pcfast.Root or a pcfast.Prior.",
            )  # fmt: skip
        if not isinstance(entry, tuple | list) or len(entry) < 2 or not isinstance(entry[0], nn.Module):
            raise ArgumentTypeError(
                "nodes", f"{name!r}: {entry!r}"[:200], "pcfast.Root, pcfast.Prior, or (module, name of an input, ...)"
            )  # fmt: skip
        module, inputs = entry[0], tuple(entry[1:])
        for source in inputs:
            if not isinstance(source, str):
                raise ArgumentTypeError(
                    "nodes", f"{name!r}: the input {source!r}"[:200], "names of nodes",
                    'Several follow one another: (module, "h1", "h2").',
                )  # fmt: skip
        if isinstance(module, Prior):
            raise ModelError(
                "nodes", f"{name!r}: a Prior with inputs", "a Prior alone", "It predicts from nothing."
            )
        merge = merge_of(module)
        if merge is not None:
            merge.check_inputs(len(inputs), f" at node {name!r}")
        elif len(inputs) > 1 and isinstance(module, nn.Sequential):
            raise ModelError(
                "nodes", f"{name!r}: {len(inputs)} inputs for a Sequential, which takes one tensor",
                "a Sequential that begins with pcfast.Sum or pcfast.Concatenate",
                "E.g. nn.Sequential(pcfast.Sum(branch_1, branch_2), nn.ReLU()).",
            )  # fmt: skip
        elif not _takes(module, len(inputs)):
            raise ModelError(
                "nodes",
                f"{name!r}: {len(inputs)} inputs for a {type(module).__name__}, whose forward does not take them",
                "a module that takes the values of all inputs",
                "E.g. pcfast.Sum(branch_1, branch_2), pcfast.Concatenate(), or a module of your own.",
            )  # fmt: skip
        return module, inputs

    def _checked_outputs(self, outputs) -> tuple[str, ...]:
        used = {name for inputs in self.inputs_of.values() for name in inputs}
        if outputs is None:
            return tuple(name for name in self.inputs_of if name not in used)
        outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        for name in outputs:
            if name not in self.inputs_of:
                raise unknown("outputs", name, self.inputs_of)
        if not outputs or len(set(outputs)) != len(outputs):
            raise ModelError("outputs", repr(outputs), "at least one name, none twice")
        return outputs

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names, inputs before what reads them."""
        return tuple(self.inputs_of)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The roots without a prior: what ``graph(x)`` takes, in order."""
        return tuple(self.roots)

    def values(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every node's value in a forward pass in which ``given`` nodes have the values given.

        Raises:
            ArgumentError: an unknown name, or a root that has neither a value nor a prior.
        """
        for name in given:
            if name not in self.inputs_of:
                raise unknown("inputs", name, self.inputs_of)
        rows = next((len(value) for value in given.values()), 1)
        result: dict[str, Tensor] = {}
        for name, inputs in self.inputs_of.items():
            if name in given:
                result[name] = given[name]
            elif name in self.roots:
                raise ArgumentError(
                    "inputs", f"no value for the root {name!r}", "one for each root without a prior",
                    f"graph({name}=...).",
                )  # fmt: skip
            elif not inputs:
                result[name] = self._modules[name](rows)
            else:
                result[name] = call(self._modules[name], [result[i] for i in inputs])
        return result

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs of a forward pass: a tensor, or a tuple of several in the order of ``outputs``.

        Args:
            inputs: values of the roots without a prior, in order.
            named: values of any nodes by name.
        """
        if len(inputs) > len(self.roots):
            raise ArgumentError(
                "inputs", f"{len(inputs)} tensors", f"at most {len(self.roots)}: {list(self.roots)}",
                "Other nodes' values are given by name.",
            )  # fmt: skip
        values = self.values({**dict(zip(self.roots, inputs, strict=False)), **named})
        result = tuple(values[name] for name in self.outputs)
        return result[0] if len(result) == 1 else result

    def __repr__(self) -> str:
        """One line a node: name, module, inputs."""
        width = max(map(len, self.inputs_of))
        lines = []
        for name, inputs in self.inputs_of.items():
            module = self.roots.get(name, self._modules.get(name))
            arrow = f" <- {', '.join(inputs)}" if inputs else ""
            output = "  (output)" if name in self.outputs else ""
            lines.append(f"  {name:<{width}}  {_one_line(module)}{arrow}{output}")
        return "\n".join(("Graph(", *lines, ")"))


def _takes(module: nn.Module, count: int) -> bool:
    """Whether ``module`` can be called with ``count`` tensors, as far as its signature says."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # it has none
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _one_line(module) -> str:
    """A module in one line, the members of Sequentials in order."""
    if type(module) is nn.Sequential:
        return " - ".join(map(_one_line, module)) or "Identity"
    if isinstance(module, nn.Sequential | Merge):
        return f"{type(module).__name__}({', '.join(map(_one_line, module._modules.values()))})"
    return " ".join(repr(module).split())


def unknown(argument: str, name: object, names: Sequence[str] | Mapping[str, object]) -> ArgumentError:
    """The error of a name that no node has."""
    return ArgumentError(argument, f"the name {name!r}", f"names of nodes: {', '.join(names)}")


def _ordered(inputs_of: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """The names, inputs first, otherwise in their order."""
    for name, inputs in inputs_of.items():
        for source in inputs:
            if source not in inputs_of:
                raise ModelError(
                    "nodes", f"{name!r} with the unknown input {source!r}", f"one of {', '.join(inputs_of)}",
                    f'An input of the network is a root: "{source}": pcfast.Root().',
                )  # fmt: skip
    try:
        graphlib.TopologicalSorter(inputs_of).prepare()
    except graphlib.CycleError as error:
        raise ModelError(
            "nodes", f"the cycle {' -> '.join(error.args[1])}", "a directed graph without cycles",
            "A prediction would depend on itself. Unroll a recurrent network over its steps.",
        ) from None  # fmt: skip
    done: dict[str, None] = {}
    while len(done) < len(inputs_of):
        for name, inputs in inputs_of.items():
            if name not in done and all(source in done for source in inputs):
                done[name] = None
    return iter(done)


def merge_of(module: nn.Module) -> Merge | None:
    """The merging module that a node's module is, or begins with."""
    if isinstance(module, nn.Sequential) and len(module):
        module = next(iter(module._modules.values()))
    return module if isinstance(module, Merge) else None


def call(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """A node's prediction from the values of its inputs."""
    merge = merge_of(module)
    if merge is None or merge is module or len(inputs) == 1:
        return module(*inputs)
    value = merge(*inputs)
    for member in list(module._modules.values())[1:]:
        value = member(value)
    return value
