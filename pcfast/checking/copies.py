"""Copies of a model and of batches, of one dtype each, on which backends are compared."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError, ShapeError
from ..losses import LossLike, describe_loss
from ..model.describe import describe
from ..model.placement import common_placement
from ..problem import validation

Batch = tuple[Tensor, object]  # x and y


def random_batches(
    model: nn.Sequential,
    x_shape: Sequence[int],
    *,
    loss: LossLike = "cross_entropy",
    draws: int = 5,
    seed: int = 0,
) -> list[Batch]:
    """``draws`` batches: x float32 of shape ``x_shape`` (B, ...), uniform in [0, 1), on the CPU.

    y: for cross-entropy class indices (B, ...), uniform over the output's dimension 1; for mse as the output,
    uniform in [0, 1).

    Raises:
        ArgumentError and its kinds: a loss of the caller's own, whose targets only the caller knows; a shape that
            does not fit the model.
    """
    kind = describe_loss(loss).kind
    if kind == "callable":
        raise ArgumentError(
            "loss", "a callable of your own with random data", "its targets", "Pass batches (x, y) as data."
        )
    validation.check_count("draws", draws)
    try:
        shape = tuple(int(size) for size in x_shape)
    except (TypeError, ValueError):
        raise ArgumentError(
            "data", repr(x_shape), "the shape of x, batch included, or batches (x, y)"
        ) from None
    if len(shape) < 2 or min(shape) < 1:
        raise ShapeError("data", f"shape {shape}", "(batch, ...) with positive sizes")
    generator = torch.Generator().manual_seed(seed)
    output = output_shape(model, shape)
    batches = []
    for _ in range(draws):
        x = torch.rand(shape, generator=generator)
        if kind == "mse":
            y = torch.rand(output, generator=generator)
        elif len(output) < 2:
            raise ShapeError(
                "model", f"an output of shape {output}", "(batch, classes, ...) for cross-entropy"
            )
        else:
            y = torch.randint(0, output[1], (output[0], *output[2:]), generator=generator)
        batches.append((x, y))
    return batches


def output_shape(model: nn.Sequential, x_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of ``model(x)`` for x of shape ``x_shape``, batch included; runs a copy once where it is not known.

    Raises:
        ArgumentError and its kinds: the shape does not fit, or the model fails.
    """
    inner = describe(model).shapes(tuple(x_shape))[-1]
    if inner is not None:
        return inner[-1]
    placement = common_placement(model)
    device = torch.device("cpu") if placement is None else placement[0]
    runnable = copied(model, device).float()
    with forked(device):
        return tuple(forward(runnable, torch.zeros(tuple(x_shape), device=device)).shape)


def forked(device: torch.device):
    """The caller's random state stays, whatever is drawn or seeded in between."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def copied(model: nn.Sequential, device: torch.device) -> nn.Sequential:
    """A copy on ``device``, dropout off.

    Raises:
        ModelError: it cannot be copied.
    """
    try:
        made = copy.deepcopy(model).to(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            "model",
            f"a network that cannot be copied ({type(error).__name__}: {error})",
            "one that copy.deepcopy takes",
        ) from error
    for module in dropout_modules(made):
        module.eval()
    return made


def dropout_modules(model: nn.Module) -> list[nn.Module]:
    """The dropout modules that would draw masks."""
    kind = nn.modules.dropout._DropoutNd
    return [m for m in model.modules() if isinstance(m, kind) and m.training and m.p > 0]


def forward(model: nn.Sequential, x: Tensor) -> Tensor:
    """``model(x)``, so that whatever goes wrong in a module has one line that says so."""
    try:
        with torch.no_grad(), buffers_kept(model):
            output = model(x.clone())
    except Exception as error:
        raise ModelError(
            "model",
            f"a network that fails in {str(x.dtype).removeprefix('torch.')} on x of shape {tuple(x.shape)} "
            f"({type(error).__name__}: {error})",
            "one that runs on it in float32 and in float64",
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(
            "model", f"a network that returns a {type(output).__name__}", "one that returns a tensor"
        )
    return output


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Statistics are afterwards what they were, at the same addresses: CUDA graphs are recorded by those."""
    held = [
        (owner, name, buffer, buffer.clone())
        for owner in model.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in held:
                owner._buffers[name] = buffer
                buffer.copy_(value)


def is_shape(data) -> bool:
    return len(data) > 0 and all(isinstance(size, int) for size in data)


def in_dtype(value, device: torch.device, dtype: torch.dtype):
    """``value`` on ``device``, in ``dtype`` where it is a floating tensor."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def loss_in(loss: LossLike, device: torch.device, dtype: torch.dtype) -> LossLike:
    """``loss`` with its own tensors (class weights) on ``device``, in ``dtype``."""
    if isinstance(loss, nn.Module):
        return copy.deepcopy(loss).to(device, dtype)
    if isinstance(loss, functools.partial):
        keywords = {name: in_dtype(value, device, dtype) for name, value in loss.keywords.items()}
        return functools.partial(loss.func, *loss.args, **keywords)
    return loss


class Side:
    """Model, batches and loss in one dtype."""

    def __init__(
        self, model: nn.Sequential, batches: Sequence[Batch], loss: LossLike, dtype: torch.dtype
    ) -> None:
        """``model``: on the device where everything is to run; it becomes this side's own."""
        self.model = model.to(dtype)
        placement = common_placement(model)
        self.device = placement[0]
        self.batches = [tuple(in_dtype(value, self.device, dtype) for value in batch) for batch in batches]
        self.loss = loss_in(loss, self.device, dtype)
        for x, _ in self.batches:
            validation.check_input(x, None, placement)  # no tokens

    def backpropagate(self, draw: int) -> tuple[list[Tensor], list[Tensor], dict[nn.Parameter, Tensor]]:
        """Backpropagation by torch in the ambient precision: vhat_0..vhat_L, g_0..g_L, parameter -> gradient.

        g_0 is zero; parameters that the loss does not depend on are left out.
        """
        x, y = self.batches[draw]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        values = [x]
        with torch.enable_grad(), buffers_kept(self.model):
            for layer in self.model:
                value = layer(values[-1].clone())  # a clone, for in-place modules
                values.append(value if value.requires_grad else value.detach().requires_grad_())
            loss = describe_loss(self.loss).value(values[-1].to(x.dtype), y)
            of_parameters = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            of_values = torch.autograd.grad(loss, values[1:], allow_unused=True)
        g = [torch.zeros_like(v) if e is None else e for e, v in zip(of_values, values[1:], strict=True)]
        updates = {
            p: result for p, result in zip(parameters, of_parameters, strict=True) if result is not None
        }
        return [v.detach() for v in values], [torch.zeros_like(x), *g], updates
