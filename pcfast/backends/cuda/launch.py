"""One launch of the resident kernel: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ...errors import BackendError
from ...losses import Loss
from ...support.memory import address
from . import native
from .geometry import NO_POOL, differences
from .kernel_params import Program, RunParams, Tensors, sizes
from .shared_memory import Placement

# larger than any number of iterations
_NEVER = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Inputs:
    """What the kernel reads. Lists run over l = 0..L; entries that do not apply are None.

    Attributes:
        weights, biases: of layers that begin with a product; in Gram form layer 2's G, and no bias.
        below: vhat_1, or in Gram form layer 2's pre-activations.
        starts: beliefs to start from; None from the forward pass.
        loss, y: a known loss, and its target.
        step_size: eta of all iterations; or of each, (num_steps,).
        momentum: the beliefs' momentum, in [0, 1).
        shapes: the shapes of vhat_l.
        inner_shapes: the shapes of what layer l's product gives, or what a layer without one reads.
    """

    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]
    below: Tensor
    starts: Sequence[Tensor | None] | None
    loss: Loss
    y: Tensor
    step_size: float | Tensor
    momentum: float
    shapes: Sequence[tuple[int, ...]]
    inner_shapes: Sequence[tuple[int, ...] | None]


@dataclass(frozen=True)
class ResidentOutputs:
    """What the kernel writes. Lists run over l = 0..L.

    Attributes:
        vhat: of the forward pass, from layer 2 on.
        loss_rows: (B,), every sample's share of the loss at vhat_L.
        output_gradient: the loss's gradient there, or None.
        beliefs: after the last iteration; None where they are not in the loop.
        errors: eps_l of the last iteration; entries of layers that it has not reached say nothing.
        local_errors: eps_l pulled back to the layer's product at the last beliefs, for l >= 2; None unless asked for.
        gram_sum, gram_sum_before: S after and before the last iteration, or None: Gram form (docs/method.md fact 7).
        first_bad: (L,) int32, the iteration whose update left a layer's state NaN or infinite; for the output layer
            0 where a label was out of range.
    """

    vhat: list[Tensor | None]
    loss_rows: Tensor
    output_gradient: Tensor | None
    beliefs: list[Tensor | None]
    errors: list[Tensor | None]
    local_errors: list[Tensor | None] | None
    gram_sum: Tensor | None
    gram_sum_before: Tensor | None
    first_bad: Tensor


def relax(
    placement: Placement,
    inputs: Inputs,
    num_steps: int,
    *,
    gradients: bool,
    output_gradient: bool,
) -> ResidentOutputs:
    """Forward pass and relaxation on the current stream of the inputs' device.

    Args:
        gradients, output_gradient: whether local errors, and the loss's gradient at vhat_L, are wanted.

    Raises:
        BackendError: the launch failed; CUDA's reason is in it. Or the module reads other structs.
    """
    outputs, launch = prepare(
        placement, inputs, num_steps, gradients=gradients, output_gradient=output_gradient
    )
    launch()
    return outputs


def prepare(
    placement: Placement,
    inputs: Inputs,
    num_steps: int,
    *,
    gradients: bool,
    output_gradient: bool,
) -> tuple[ResidentOutputs, Callable[[], None]]:
    """Returns what :func:`relax` returns, and the launch that fills it; each launch relaxes anew, to the same."""
    module = native.load()
    _check_sources(module)
    program = Program.from_buffer_copy(placement.program)
    depth, device, batch = program.depth, inputs.below.device, inputs.below.shape[0]
    like = dict(dtype=inputs.below.dtype, device=device)
    kept: list[Tensor] = []  # until the last launch is in the stream

    def pointer(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        here = address(tensor)
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            here = tensor.data_ptr()
        kept.append(tensor)
        return here

    def of_layers(layers: range, shapes: Sequence) -> list[Tensor | None]:
        return [torch.empty(shapes[l], **like) if l in layers else None for l in range(depth + 1)]

    lowest = program.first_in_loop
    vhat = of_layers(range(2, depth + 1), inputs.shapes)
    beliefs = of_layers(range(lowest, depth), inputs.shapes)
    errors = of_layers(range(lowest, depth + 1), inputs.shapes)
    local = of_layers(range(2, depth + 1) if gradients else range(0), inputs.inner_shapes)
    sums = [torch.empty(inputs.below.shape, **like) for _ in range(2)] if placement.gram else [None, None]
    # elements in no pooling window get no error
    for l, tensor in [*enumerate(local), (2, sums[1])]:
        if tensor is not None and program.layers[l - 1].pool != NO_POOL:
            tensor.zero_()
    rows = torch.empty(batch, **like)
    at_output = torch.empty(inputs.shapes[depth], **like) if output_gradient else None
    first_bad = torch.full((depth,), _NEVER, dtype=torch.int32, device=device)

    tensors, run = Tensors(), RunParams(batch, num_steps, inputs.starts is None)
    lists = dict(
        weight=inputs.weights, bias=inputs.biases, start=inputs.starts, vhat=vhat, belief=beliefs, error=errors,
        local_error=local,
    )  # fmt: skip
    for name, values in lists.items():
        for l in range(1, depth + 1):
            getattr(tensors, name)[l - 1] = pointer(values[l]) if values is not None else None
    tensors.start[depth - 1] = None  # the output is not relaxed
    setattr(tensors, "uhat_2" if placement.gram else "vhat_1", pointer(inputs.below))
    tensors.loss_rows, tensors.output_gradient = pointer(rows), pointer(at_output)
    tensors.gram_sum, tensors.gram_sum_before = map(pointer, sums)
    tensors.first_bad, run.momentum = pointer(first_bad), inputs.momentum
    if isinstance(inputs.step_size, Tensor):
        tensors.step_sizes = pointer(inputs.step_size)
    else:
        run.eta = inputs.step_size
    _describe_loss(inputs, like, tensors, run, pointer)

    arguments = placement.program, bytes(tensors), bytes(run), placement.scalar_bytes, placement.threads

    def launch(_alive: tuple = tuple(kept)) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        status = module.resident(*arguments, stream)
        if status:
            raise BackendError(
                f"the resident kernel could not be launched on {device}: {module.error_text(status)}. If an earlier "
                'error has broken the CUDA context, restart Python; otherwise report it, and use backend="eager".'
            )

    local = local if gradients else None
    return ResidentOutputs(vhat, rows, at_output, beliefs, errors, local, *sums, first_bad), launch


def _check_sources(module: ModuleType) -> None:
    """Raises where the module reads other structs, or counts with other sizes and codes, than Python writes."""
    remedy = "install pcfast again, from the same sources (in a checkout: make native)"
    if module.resident_sizes() != sizes():
        raise BackendError(
            f"the CUDA kernels were built from other sources: they read {module.resident_sizes()} bytes, this pcfast "
            f"gives {sizes()}; {remedy}"
        )
    if other := differences(module.resident_constants()):
        raise BackendError(f"the CUDA kernels were built from other sources: {'; '.join(other)}; {remedy}")


def _describe_loss(inputs: Inputs, like: dict, tensors: Tensors, run: RunParams, pointer) -> None:
    loss, y, batch = inputs.loss, inputs.y, inputs.below.shape[0]
    run.share = loss.share(batch)
    if loss.kind == "mse":
        tensors.target = pointer(y.to(**like))
        run.loss_scale = loss.mse_scale(y)
        return
    reduction, run.ignored_label, run.smoothing = loss.settings
    run.mean, run.every_row = reduction == "mean", loss.normalizer is not None
    if y.is_floating_point():
        tensors.target = pointer(y.to(**like))
    else:
        tensors.labels = pointer(y.long())
    tensors.class_weight = None if loss.weight is None else pointer(loss.weight.to(**like))
