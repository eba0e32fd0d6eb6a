"""One launch of the resident kernel: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..errors import BackendError
from ..losses import Target
from .placement import Placement
from .program import NO_POOL, Program, Run, Tensors

# larger than any number of iterations
_NEVER = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Inputs:
    """What the forward pass left for the loop. Lists run over l = 0..L; entries that do not apply are None.

    Attributes:
        weights: of layers that begin with a product; layer 2's G in its place in Gram form.
        uhat: what comes out of a layer's product, or what a layer without one reads.
        vhat: activations.
        starts: beliefs to start from, as deviations; None from the forward pass.
        target: of the loss.
    """

    weights: Sequence[Tensor | None]
    uhat: Sequence[Tensor | None]
    vhat: Sequence[Tensor]
    starts: Sequence[Tensor] | None
    target: Target


@dataclass(frozen=True)
class Found:
    """What the loop found. Lists run over l = 0..L.

    Attributes:
        d: deviations after the last iteration; None where they are not in the loop.
        errors: eps_l of the last iteration; entries of layers that it has not reached say nothing.
        local_errors: eps_l pulled back to the layer's product at the last beliefs, for l >= 2; None unless asked for.
        gram_sum, gram_sum_before: S after and before the last iteration (docs/method.md fact 7), or None.
        first_bad: (L,) int32, the iteration whose update left a layer's state NaN or infinite.
    """

    d: list[Tensor | None]
    errors: list[Tensor | None]
    local_errors: list[Tensor | None] | None
    gram_sum: Tensor | None
    gram_sum_before: Tensor | None
    first_bad: Tensor


def relax(
    placement: Placement, inputs: Inputs, num_steps: int, step_size: float, *, gradients: bool
) -> Found:
    """Relax on the current stream of the inputs' device.

    Args:
        gradients: whether local errors are wanted.

    Raises:
        BackendError: the launch failed; CUDA's reason is in it.
    """
    found, launch = prepare(placement, inputs, num_steps, step_size, gradients=gradients)
    launch()
    return found


def prepare(
    placement: Placement, inputs: Inputs, num_steps: int, step_size: float, *, gradients: bool
) -> tuple[Found, Callable[[], None]]:
    """What :func:`relax` will have found, and the launch that fills it; each launch relaxes anew, to the same."""
    program = Program.from_buffer_copy(placement.program)
    depth, device = program.depth, inputs.vhat[0].device
    like = dict(dtype=inputs.vhat[0].dtype, device=device)
    batch = inputs.vhat[0].shape[0]
    kept: list[Tensor] = []  # until the last launch is in the stream

    def pointer(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        kept.append(tensor)
        return tensor.data_ptr()

    def new(tensor: Tensor, zeroed: bool = False) -> Tensor:
        return (torch.zeros if zeroed else torch.empty)(tensor.shape, **like)

    d: list[Tensor | None] = [None] * (depth + 1)
    errors: list[Tensor | None] = [None] * (depth + 1)
    local: list[Tensor | None] = [None] * (depth + 1)
    for l in range(1, depth + 1):
        if program.first_in_loop <= l < depth:
            d[l] = new(inputs.vhat[l])
        if l >= program.first_in_loop:
            errors[l] = new(inputs.vhat[l])
        if gradients and l > 1:
            # elements in no pooling window get no error
            local[l] = new(inputs.uhat[l], zeroed=program.layers[l - 1].pool != NO_POOL)
    sums = [new(inputs.uhat[2]) for _ in range(2)] if placement.gram else [None, None]
    first_bad = torch.full((depth,), _NEVER, dtype=torch.int32, device=device)

    tensors = Tensors()
    for l in range(1, depth + 1):
        at = l - 1
        tensors.weight[at] = pointer(inputs.weights[l])
        tensors.uhat[at] = pointer(inputs.uhat[l])
        tensors.start[at] = pointer(inputs.starts[l]) if inputs.starts is not None and l < depth else None
        tensors.d[at], tensors.error[at] = pointer(d[l]), pointer(errors[l])
        tensors.local_error[at] = pointer(local[l])
    tensors.vhat, tensors.dense = pointer(inputs.vhat[depth]), pointer(inputs.target.dense)
    mass = inputs.target.mass
    tensors.mass = None if mass is None else pointer(mass.reshape(-1).expand(batch))
    tensors.gram_sum, tensors.gram_sum_before = map(pointer, sums)
    tensors.first_bad = pointer(first_bad)

    found = Found(d, errors, local if gradients else None, *sums, first_bad)
    module = native.load()
    run = Run(batch, num_steps, inputs.starts is None, step_size, inputs.target.scale)
    arguments = placement.program, bytes(tensors), bytes(run), placement.scalar_bytes, placement.threads

    def launch(_alive: tuple = tuple(kept)) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        status = module.resident(*arguments, stream)
        if status:
            raise BackendError(
                f"the resident kernel could not be launched on {device}: {module.error_text(status)}. If an earlier "
                'error has broken the CUDA context, restart Python; otherwise report it, and use backend="eager".'
            )

    return found, launch
