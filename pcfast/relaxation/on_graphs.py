"""The entry to relaxations on graphs: validate, describe, choose, run (docs/graphs.md)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..arguments import checked_number
from ..backends import BACKENDS
from ..backends.choice import requested
from ..errors import ArgumentError, ArgumentTypeError, ModelError, ShapeError
from ..graph import GraphOutcome, GraphPlan, GraphProblem, choose, run
from ..losses import Loss, describe_loss
from ..model import sharding
from ..model.graph import Graph, unknown
from ..model.graph_spec import GraphSpec, describe_graph
from ..model.placement import common_placement
from ..precision import choose_precision
from ..problem import nudging as nudges
from ..problem import per_layer, reductions, status, validation
from ..problem.plan import LOOPS
from ..problem.settings import Settings
from ..problem.types import NOTHING_BUT_UPDATES, Wanted
from .solve import Move, Run, ordinary, recorded

_TOKENS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def chain_of(model, settings: Settings, x, y, clamp) -> tuple[nn.Sequential, Tensor, object] | None:
    """A graph that is a chain, clamped at its input and with a loss at its end, as (Sequential, x, y); else None.

    Its relaxation is that of the Sequential of the same modules, which every backend runs.
    """
    if not isinstance(model, Graph) or settings.beyond_chains or y is None:
        return None
    spec = describe_graph(model)
    if not spec.is_chain():
        return None
    root, output = spec.names[0], spec.names[-1]
    x = {**(clamp or {}), **(x if isinstance(x, Mapping) else {} if x is None else {root: x})}
    y = y.get(output) if isinstance(y, Mapping) and set(y) == {output} else y
    if set(x) != {root} or isinstance(y, Mapping) or isinstance(settings.loss, Mapping):
        return None
    if isinstance(settings.vinit, Mapping):
        return None
    return sequential_of(model), x[root], y


def sequential_of(chain: Graph) -> nn.Sequential:
    """The Sequential of the modules of a graph that is a chain: the same one as long as they are the same."""
    kept = chain.__dict__.get("_pcfast_chain")
    modules = [chain._modules[name] for name in chain.names[1:]]
    if kept is None or list(map(id, kept)) != list(map(id, modules)):
        kept = chain.__dict__["_pcfast_chain"] = nn.Sequential(*modules)
    return kept


def prepare(
    model: Graph | nn.Sequential,
    x,
    y,
    settings: Settings,
    clamp: Mapping[str, Tensor] | None,
    wanted: Wanted = NOTHING_BUT_UPDATES,
    move: Move | None = None,
) -> tuple[GraphProblem, GraphPlan]:
    """Validate, describe and choose.

    Args:
        x: the value of the only root without a prior, or values by name.
        y: the target of the only output, or targets by name; None: no loss is taken.
        clamp: further nodes' values by name.

    Raises:
        ArgumentError and its kinds, BackendError; also what earlier, deferred work found.
    """
    status.raise_arrived()
    validation.check_no_transform()
    spec = describe_graph(model)
    chain = not isinstance(model, Graph)
    relaxing = settings.checked_on_graphs(moves=move is not None)
    method, num_steps, optimizer = relaxing.method, relaxing.num_steps, relaxing.belief_optimizer
    placement = common_placement(model)
    clamped = _clamped(spec, x, clamp)
    first = given_tensor(x, y, clamp)
    rows = len(first)
    dtype = _check_values(spec, clamped, placement, rows)
    losses = _losses(spec, y, settings, clamped, first)
    free = [k for k in range(len(spec.nodes)) if k not in clamped and k not in losses]
    vinit = _by_name(spec, settings.vinit, free, chain)
    start = _start(spec, vinit, free, rows, first, method)
    _check_reached(spec, free, start)
    sizes = [1.0] * len(spec.nodes)
    if method in LOOPS or method == "fixed_prediction":
        names_free = [spec.names[k] for k in free]
        sizes = per_layer.step_sizes(settings.step_size, spec.names, names_free, num_steps, chain)
    elif method == "zero_divergence":
        num_steps = _levels(spec)
    weights = _weights(spec, settings, method, free, losses, chain)
    temperature = _temperature(settings, method, optimizer)
    _check_nudging(spec, settings, method, losses, clamped)
    if settings.reduction != "sum":
        count = reductions.rows_of(first, settings.normalizer)
        before = optimizer
        moved = [reductions.of_beliefs(settings.reduction, count, before, size) for size in sizes]
        optimizer, sizes = moved[0][0], [size for _, size in moved]
    precision = choose_precision(first.device.type, dtype)
    if method in LOOPS:
        for size in sizes:
            validation.check_step_fits(size, precision.state)
    if method == "incremental":
        validation.check_moving_precision(first.device.type, dtype)
    spec.check_shapes(rows, {k: tuple(v.shape) for k, v in clamped.items()})
    weights = [w.to(first.device, precision.state) if isinstance(w, Tensor) else w for w in weights]
    deferred = settings.defers_checks(first)
    raise_now = (not first.is_cuda and not deferred) or method == "incremental"
    if settings.check != "off" and raise_now:
        for k, value in (*clamped.items(), *start.items()):
            if isinstance(value, Tensor):
                validation.check_finite(spec.names[k], value)
    asked = requested(settings.backend)
    if asked != "auto" and asked not in BACKENDS:
        raise ArgumentError("backend", repr(asked), f"one of {['auto', *BACKENDS]}")
    plan = choose(
        asked,
        GraphPlan(
            spec, tuple(spec.names[k] for k in clamped), tuple(spec.names[k] for k in losses), method, num_steps,
            optimizer, first.device, dtype, precision,
        ),
    )  # fmt: skip
    problem = GraphProblem(
        model, spec, rows, {k: v.detach() for k, v in clamped.items()}, losses, start, sizes, weights, wanted, method,
        num_steps, optimizer, temperature, settings.generator, raise_now or plan.backend == "reference", deferred,
        settings.check != "off", move, settings.nudging, relaxing.tolerance,
    )  # fmt: skip
    return problem, plan


def solve(
    model: Graph | nn.Sequential,
    x,
    y,
    settings: Settings,
    clamp,
    wanted: Wanted = NOTHING_BUT_UPDATES,
    move=None,
) -> tuple[GraphOutcome, Run]:
    """Prepare and run; arguments as for :func:`prepare`. The same inside ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            x, y, vinit, clamp = tree_map_only(Tensor, ordinary, (x, y, settings.vinit, clamp))
            return _solve(model, x, y, replace(settings, vinit=vinit), clamp, wanted, move)
    return _solve(model, x, y, settings, clamp, wanted, move)


def _solve(model, x, y, settings: Settings, clamp, wanted: Wanted, move) -> tuple[GraphOutcome, Run]:
    with sharding.gathered(model, for_backward=wanted.gradients):
        problem, plan = prepare(model, x, y, settings, clamp, wanted, move)
        outcome = run(problem, plan)
    if outcome.status is not None:
        status.defer(outcome.status, problem.step_size)
        if not problem.deferred:
            status.synchronize()
    return outcome, recorded(Run(plan, False, "relaxations on graphs are not captured in a CUDA graph"))


def given_tensor(x, y, clamp) -> Tensor:
    """One of the tensors that nodes are clamped to, or a target: it has the rows of the batch.

    Raises:
        ArgumentError: there is none.
    """
    values = []
    for given in (x, clamp, y):
        values += given.values() if isinstance(given, Mapping) else [] if given is None else [given]
    found = next((value for value in values if isinstance(value, Tensor) and value.dim()), None)
    if found is None:
        raise ArgumentError(
            "clamp", "no node", "the value of at least one, or a target", 'E.g. clamp={"y": y}.'
        )
    return found


def resolved(spec: GraphSpec, argument: str, name: str) -> int:
    """The index of a node by its name, or by "input" or "output" where there is one of them.

    Raises:
        ArgumentError: there is no such node.
    """
    if name in spec.index:
        return spec.index[name]
    roots = [k for k, node in enumerate(spec.nodes) if node.kind == "root"]
    only = {"input": roots, "output": list(spec.outputs)}.get(name, [])
    if len(only) != 1:
        raise unknown(argument, name, spec.names)
    return only[0]


def _clamped(spec: GraphSpec, x, clamp) -> dict[int, Tensor]:
    roots = [node.name for node in spec.nodes if node.kind == "root"]
    given: list[tuple[str, str, object]] = []
    if isinstance(x, Mapping):
        given += [("x", name, value) for name, value in x.items()]
    elif x is not None:
        if len(roots) != 1:
            raise ArgumentTypeError(
                "x", f"a {type(x).__name__} for {len(roots)} roots without a prior", "a mapping from nodes' names",
                f"The roots are {roots}.",
            )  # fmt: skip
        given.append(("x", roots[0], x))
    if clamp is not None and not isinstance(clamp, Mapping):
        raise ArgumentTypeError("clamp", f"a {type(clamp).__name__}", 'a mapping, e.g. {"x": x, "y": y}')
    given += [("clamp", name, value) for name, value in (clamp or {}).items()]
    result: dict[int, Tensor] = {}
    for argument, name, value in given:
        k = resolved(spec, argument, name)
        if k in result:
            raise ArgumentError(argument, f"a second value for {spec.names[k]!r}", "one value for each node")
        result[k] = value
    return dict(sorted(result.items()))


def _check_values(spec: GraphSpec, clamped: dict[int, Tensor], placement, rows: int) -> torch.dtype:
    """Check what nodes are clamped to; returns the dtype of the parameters, or of the values."""
    dtypes = []
    for k, value in clamped.items():
        name = f"clamp[{spec.names[k]!r}]"
        if isinstance(value, Tensor) and value.dtype in _TOKENS and spec.nodes[k].kind == "root":
            continue  # what reads them decides
        try:
            dtypes.append(validation.check_input(value, None, placement))
        except ArgumentError as error:
            needed = error.needed.replace("x ", f"{name} ") if error.argument == "x" else error.needed
            raise type(error)(name, error.given, needed, error.remedy) from None
        if len(value) != rows:
            raise ShapeError(
                name, f"{len(value)} rows", f"{rows} rows, as the others have", "Mismatched batch."
            )
    if placement is not None:
        return placement[1]
    return dtypes[0] if dtypes else torch.get_default_dtype()


def _losses(
    spec: GraphSpec, y, settings: Settings, clamped: dict[int, Tensor], given: Tensor
) -> dict[int, tuple[Loss, object]]:
    if y is None:
        return {}
    if not isinstance(y, Mapping):
        if len(spec.outputs) != 1:
            names = [spec.names[k] for k in spec.outputs]
            raise ArgumentTypeError(
                "y", f"a {type(y).__name__} for {len(names)} outputs", "a mapping from outputs' names",
                f"The outputs are {names}.",
            )  # fmt: skip
        y = {spec.names[spec.outputs[0]]: y}
    result = {}
    for name, target in y.items():
        k = resolved(spec, "y", name)
        if spec.children[k]:
            reader = spec.names[spec.children[k][0]]
            raise ArgumentError(
                "y", f"a target for {name!r}, from which {reader!r} predicts", "targets of nodes that nobody reads",
                "Clamp it: its beliefs are then the target, and its energy the squared error.",
            )  # fmt: skip
        if k in clamped:
            raise ArgumentError("y", f"a target for {name!r}, which is clamped", "one of the two")
        if spec.nodes[k].kind == "root":
            raise ArgumentError("y", f"a target for the root {name!r}", "targets of nodes that predict")
        losses = settings.loss
        if isinstance(losses, Mapping):
            if name not in losses:
                raise ArgumentError("loss", f"none for {name!r}", "one for each target")
            losses = losses[name]
        described = describe_loss(losses, settings.normalizer if settings.reduction == "sum" else None)
        reductions.check_loss(settings.reduction, described)
        validation.check_target_placement(given, target, by_rows=described.known)
        result[k] = described, target
    return result


def _by_name(spec: GraphSpec, vinit, free: Sequence[int], chain: bool) -> Mapping[str, Tensor | float]:
    """The starts by name: a number is that of all free nodes; a chain may have a list v_0..v_L."""
    if vinit is None:
        return {}
    if isinstance(vinit, Mapping):
        return vinit
    if isinstance(vinit, numbers.Real) and not isinstance(vinit, bool):
        return {spec.names[k]: float(vinit) for k in free}
    if chain and isinstance(vinit, list | tuple) and len(vinit) == len(spec.nodes):
        hidden = zip(spec.names[1:-1], vinit[1:-1], strict=True)
        return {name: value for name, value in hidden if value is not None}
    raise ArgumentTypeError(
        "vinit", f"a {type(vinit).__name__}", 'a number, or a mapping from names, e.g. {"z": encoder(x)}'
    )


def _start(
    spec: GraphSpec, vinit: Mapping, free: Sequence[int], rows: int, like: Tensor, method: str
) -> dict[int, Tensor | float]:
    """The beliefs that free nodes start at, where that is not their prediction."""
    result = {}
    for name, value in vinit.items():
        k, argument = resolved(spec, "vinit", name), f"vinit[{name!r}]"
        if k not in free:
            raise ArgumentError(argument, "beliefs of a node that does not move", "nodes that are free")
        if isinstance(value, float):
            checked_number(argument, value, math.isfinite, "a finite number")
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            raise ArgumentTypeError(argument, f"a {type(value).__name__}", "a floating tensor")
        elif value.device != like.device:
            raise ArgumentError(
                argument, f"a tensor on {value.device}", f"{like.device}, where the others are"
            )
        elif len(value) != rows:
            raise ShapeError(argument, f"shape {tuple(value.shape)}", f"{rows} rows, as the others have")
        if spec.nodes[k].inputs and method not in ("strict", "incremental"):
            raise ArgumentError(
                argument,
                f"beliefs of a hidden node with method {method!r}",
                'starts of roots, or method="strict"',
            )
        if method == "zero_divergence":
            raise ArgumentError(
                argument, "a start with method 'zero_divergence'", 'method="exact" or "strict"'
            )
        result[k] = value.detach() if isinstance(value, Tensor) else value
    return result


def _check_reached(spec: GraphSpec, free: Sequence[int], start: dict[int, Tensor]) -> None:
    """Raise ModelError for a root that nothing gives a value."""
    for k in free:
        node = spec.nodes[k]
        if node.kind == "root" and node.shape is None and not isinstance(start.get(k), Tensor):
            raise ModelError(
                "clamp", f"no value for {node.name!r}, which is neither clamped nor predicted by other nodes",
                "a value, a shape, a prior or a start",
                f'clamp={{"{node.name}": ...}}, vinit={{"{node.name}": ...}}, or make it pcfast.Root(SIZE) or '
                "pcfast.Prior(SIZE).",
            )  # fmt: skip


def _weights(spec: GraphSpec, settings: Settings, method: str, free, losses, chain: bool) -> list:
    """pi of every node; 0 for roots without a prior."""
    weights = per_layer.precisions(settings.precision, spec.names, chain)
    for k, node in enumerate(spec.nodes):
        if node.kind == "root":
            weights[k] = 0.0
            continue
        if k in losses and isinstance(weights[k], Tensor):
            raise ArgumentError(
                f"precision[{node.name!r}]", "a tensor, where a loss is taken", "a number",
                "Clamp the node to have squared errors weighed unit by unit.",
            )  # fmt: skip
        plain = not isinstance(weights[k], Tensor) and weights[k] == 1.0
        if method == "zero_divergence" and k in free and not plain:
            raise ArgumentError(
                "precision", f"{settings.precision!r} with method 'zero_divergence'", "1 for nodes that move",
                "Its steps of size 1 give backpropagation's errors with precision 1 alone.",
            )  # fmt: skip
    return weights


def _temperature(settings: Settings, method: str, optimizer) -> float:
    noise = settings.noise
    if noise is None:
        return 0.0
    noise = checked_number("noise", noise, lambda t: t >= 0, "a finite number >= 0: the temperature")
    if noise and method != "strict":
        raise ArgumentError("noise", f"{noise} with method {method!r}", 'method="strict", or None')
    if noise and not optimizer.plain:
        raise ArgumentError(
            "noise", f"{noise} with {optimizer}", "plain gradient descent of the beliefs",
            "Langevin dynamics samples the energy's distribution with plain steps.",
        )  # fmt: skip
    if noise and settings.tolerance is not None:
        raise ArgumentError(
            "tolerance", f"{settings.tolerance!r} with noise={noise!r}", "None",
            "With noise the energy never comes to rest.",
        )  # fmt: skip
    if settings.generator is not None and not isinstance(settings.generator, torch.Generator):
        raise ArgumentTypeError(
            "generator", f"a {type(settings.generator).__name__}", "a torch.Generator or None"
        )
    return noise


def _check_nudging(spec: GraphSpec, settings: Settings, method: str, losses, clamped) -> None:
    """Raise ArgumentError where not all errors begin at losses that nudging makes small."""
    nudging = settings.nudging
    for loss in (None, *(loss.kind for loss, _ in losses.values())):
        nudges.check(nudging, method, loss)
    if nudging is None:
        return
    if not losses:
        raise ArgumentError(
            "nudging", f"{nudging} without a target", "the target y of an output with loss=\"mse\"",
            "What a node is clamped to is not nudged.",
        )  # fmt: skip
    divided = "Updates are divided by beta, which makes the errors of the targets alone small."
    held = [spec.names[k] for k in clamped if spec.nodes[k].kind != "root"]
    if held:
        raise ArgumentError(
            "nudging",
            f"{nudging} with {held[0]!r} clamped",
            "no clamped nodes but roots without a prior",
            divided,
        )
    if settings.noise:
        raise ArgumentError("nudging", f"{nudging} with noise={settings.noise!r}", "one of the two", divided)


def _levels(spec: GraphSpec) -> int:
    """The nodes on the longest path: what "zero_divergence" takes as its iterations."""
    level = [0] * len(spec.nodes)
    for k, node in enumerate(spec.nodes):
        level[k] = max((level[i] + 1 for i in node.inputs), default=0)
    return max(level)
