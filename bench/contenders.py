"""Who takes part: pcfast's backends, and what a user would otherwise run.

A contender prepares a step, a call without arguments that does one whole training step but for the optimiser, and
reads the updates that its last step computed. Baselines compute in the same precision as what they are compared with.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcfast
from pcfast.backends import BACKENDS
from pcfast.model.describe import describe
from pcfast.precision import choose_precision, parameter_dtype, use_precision
from pcfast.problem.plan import plan
from pcfast.relaxation.cuda_graphs import record_cuda

from .energy_loop import energy_step, incremental_energy_step
from .literal import literal_step
from .loops import iterate, plain_incremental_step, plain_step, unknown
from .workloads import Workload


@dataclass(frozen=True)
class PreparedStep:
    """A prepared contender.

    Attributes:
        run: one training step; on a GPU it may return before the device is done.
        updates: those of the last run, in the order of ``model.parameters()``.
        wait: until the device is done.
        off_stream: its work on a GPU is not on torch's current stream, so that torch's events do not see it.
    """

    run: Callable[[], None]
    updates: Callable[[], list[Tensor]]
    wait: Callable[[], None]
    off_stream: bool = False


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: as on the command line.
        ours: a backend of pcfast.
        about: what it is, in a few words.
        ineligible_reason: (workload, precision, device) -> why it cannot run there, "" where it can.
        prepare: (workload, model, x, y, precision) -> :class:`PreparedStep`; runs inside the precision's switches.
        passes: its arithmetic in forward passes an iteration, roughly; a guess before timing, never reported.
        exact: it computes the gradient, whatever the workload's method; not a rival in predictive coding.
        quick: also part of a quick run.
    """

    name: str
    ours: bool
    about: str
    ineligible_reason: Callable[[Workload, str, torch.device], str]
    prepare: Callable[[Workload, nn.Sequential, Tensor, Tensor, str], PreparedStep]
    passes: float
    exact: bool = False
    quick: bool = True


def _waiting(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _by_grad(model: nn.Sequential, device: torch.device, run: Callable[[], None]) -> PreparedStep:
    """A step that leaves its updates in ``.grad``."""

    def fresh() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        run()

    return PreparedStep(fresh, lambda: [p.grad for p in model.parameters()], _waiting(device))


def _returning(device: torch.device, run: Callable[[], list[Tensor]]) -> PreparedStep:
    """A step that returns its updates."""
    last: list[list[Tensor]] = [[]]

    def step() -> None:
        last[0] = run()

    return PreparedStep(step, lambda: last[0], _waiting(device))


def from_the_start(model: nn.Sequential, step: PreparedStep) -> PreparedStep:
    """``step``, which moves the parameters, from the same ones each time; putting them back is part of its time."""
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]

    def run() -> None:
        with torch.no_grad():
            torch._foreach_copy_(parameters, start)
        step.run()

    return replace(step, run=run)


def graphed(device: torch.device, run: Callable[[], list[Tensor]]) -> PreparedStep:
    """``run`` recorded once in a CUDA graph, then replayed."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries set themselves up, the allocator finds its sizes
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.clear_autocast_cache()  # casts made outside the graph would not be repeated in it
    with torch.cuda.device(device):
        updates, replay = record_cuda(run)
    torch.clear_autocast_cache()
    return PreparedStep(replay, lambda: updates, _waiting(device))


# pcfast's backends


def _backend(name: str) -> Contender:
    def ineligible_reason(workload: Workload, precision: str, device: torch.device) -> str:
        with torch.device("meta"):
            network = describe(workload.make())
        dtype, x_shape = parameter_dtype(precision), (workload.batch, *workload.sample)
        planned = plan(
            network, device, dtype, x_shape, choose_precision(device.type, dtype), workload.method,
            workload.num_steps,
        )  # fmt: skip
        if workload.method == "incremental" and precision == "bf16":
            return "incremental needs float32 or float64"
        return BACKENDS[name].supports(planned)[1]

    def prepare(workload, model, x, y, precision) -> PreparedStep:
        how = dict(step_size=workload.step_size, num_steps=workload.num_steps, backend=name)
        if workload.method == "incremental":
            optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)
            return from_the_start(
                model,
                _by_grad(model, x.device, lambda: pcfast.incremental_step(model, x, y, optimizer, **how)),
            )
        return _by_grad(
            model, x.device, lambda: pcfast.pc_loss(model, x, y, method=workload.method, **how).backward()
        )

    return Contender(name, True, f"pcfast, backend {name}", ineligible_reason, prepare, passes=2)


# what others run


def _literal(workload, model, x, y, precision) -> PreparedStep:
    def run() -> None:
        literal_step(model, F.cross_entropy, x, y, workload.method, workload.step_size, workload.num_steps)

    return _by_grad(model, x.device, run)


def _energy(workload, model, x, y, precision) -> PreparedStep:
    how = workload.step_size, workload.num_steps
    if workload.method == "incremental":
        step = _by_grad(model, x.device, lambda: incremental_energy_step(model, x, y, *how, workload.lr))
        return from_the_start(model, step)
    return _by_grad(model, x.device, lambda: energy_step(model, x, y, *how))


def _plain(workload, model, x, y, body=None) -> Callable[[], list[Tensor]]:
    @torch.no_grad()
    def run() -> list[Tensor]:
        return plain_step(model, x, y, workload.method, workload.step_size, workload.num_steps, body)

    return run


def _plain_eager(workload, model, x, y, precision) -> PreparedStep:
    if workload.method == "incremental":
        how = workload.step_size, workload.num_steps, workload.lr
        run = torch.no_grad()(lambda: plain_incremental_step(model, x, y, *how))
        return from_the_start(model, _returning(x.device, run))
    return _returning(x.device, _plain(workload, model, x, y))


def _plain_graph(workload, model, x, y, precision) -> PreparedStep:
    return graphed(x.device, _plain(workload, model, x, y))


def _plain_compiled(workload, model, x, y, precision) -> PreparedStep:
    torch.compiler.reset()  # nothing of another workload's shapes
    run = _plain(workload, model, x, y, torch.compile(iterate, fullgraph=True, dynamic=False))
    return graphed(x.device, run) if x.is_cuda else _returning(x.device, run)


def _backpropagation(workload, model, x, y, precision) -> PreparedStep:
    def run() -> None:
        F.cross_entropy(model(x), y).backward()

    return _by_grad(model, x.device, run)


def _backpropagation_graph(workload, model, x, y, precision) -> PreparedStep:
    parameters = list(model.parameters())
    return graphed(x.device, lambda: list(torch.autograd.grad(F.cross_entropy(model(x), y), parameters)))


def _jax(workload, model, x, y, precision) -> PreparedStep:
    from . import jax_loop

    step = jax_loop.prepare(model, x, y, workload.method, workload.step_size, workload.num_steps, precision)
    last: list = [None]

    def run() -> None:
        last[0] = step()

    def updates() -> list[Tensor]:
        return [torch.from_numpy(array.copy()).to(x.device) for array in jax_loop.as_arrays(last[0])]

    return PreparedStep(run, updates, lambda: jax_loop.wait(last[0]), off_stream=True)


def _a_loop(workload: Workload, precision: str, device: torch.device) -> str:
    return "there is no loop in exact" if workload.method == "exact" else ""


def _parameters_stay(workload: Workload, precision: str, device: torch.device) -> str:
    return "it keeps the parameters" if workload.method == "incremental" else ""


def _descends(workload: Workload, precision: str, device: torch.device) -> str:
    return (
        ""
        if workload.method in ("strict", "incremental")
        else f"{workload.method} does not descend one energy"
    )


def _known_layers(workload: Workload, precision: str, device: torch.device) -> str:
    with torch.device("meta"):
        module = unknown(workload.make())
    return f"it does not know {module}" if module else ""


def _on_cuda(workload: Workload, precision: str, device: torch.device) -> str:
    return "" if device.type == "cuda" else "CUDA graphs need a CUDA device"


def _jax_here(workload: Workload, precision: str, device: torch.device) -> str:
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed"
    import jax

    if precision == "fp64":
        return "jax computes in float32 here"
    platform = jax.default_backend()
    wanted = "gpu" if device.type == "cuda" else "cpu"
    if platform != wanted:
        return f"jax runs on {platform} here, the others on {device.type}"
    return "the CPU has no bfloat16 products in jax" if (wanted, precision) == ("cpu", "bf16") else ""


def _all(*checks):
    """The first reason that any of ``checks`` gives."""
    return lambda *case: next((reason for check in checks if (reason := check(*case))), "")


#: By name; pcfast's backends first.
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        *(_backend(name) for name, backend in BACKENDS.items() if not backend.literal),
        Contender(
            "literal", False, "per-layer vjp loop, as published", _all(_a_loop, _parameters_stay), _literal,
            passes=5,
        ),
        Contender(
            "autograd", False, "loop over one energy's gradient by autograd", _descends, _energy, passes=3
        ),
        Contender(
            "plain", False, "loop without autograd", _all(_a_loop, _known_layers), _plain_eager, passes=3
        ),
        Contender(
            "plain_graph", False, "that loop in a CUDA graph",
            _all(_a_loop, _parameters_stay, _known_layers, _on_cuda), _plain_graph, passes=3,
        ),
        Contender(
            "plain_compiled", False, "that loop under torch.compile, in a CUDA graph on CUDA",
            _all(_a_loop, _parameters_stay, _known_layers), _plain_compiled, passes=3, quick=False,
        ),
        Contender(
            "jax", False, "one jitted fori_loop in JAX", _all(_parameters_stay, _known_layers, _jax_here), _jax,
            passes=3,
        ),
        Contender(
            "backpropagation", False, "model(x), loss.backward()", lambda *_: "", _backpropagation, passes=0,
            exact=True,
        ),
        Contender(
            "backpropagation_graph", False, "that in a CUDA graph", _on_cuda, _backpropagation_graph, passes=0,
            exact=True,
        ),
    )
}  # fmt: skip


@contextlib.contextmanager
def switches(precision: str, device: torch.device):
    """The precision's switches for a contender's whole time: preparing, running, reading."""
    torch.clear_autocast_cache()
    with use_precision(precision, device):
        yield
    torch.clear_autocast_cache()
