"""``pcfast explain``: what would run a network and why, on a device that is here or a chip that is not."""

from __future__ import annotations

from dataclasses import asdict

import click
import torch

from ..backends import chips
from ..explanation import Explanation, device_or_chip
from ..explanation import explain as explain_model
from ..precision import use_precision
from .building import belief_optimizer_of, in_precision, network_and_sample_of, nudging_of
from .defaults import DEFAULTS, STEP_SIZE
from .options import (
    Count,
    backend_option,
    belief_optimizer_options,
    json_option,
    method_option,
    network_options,
    nudging_options,
    precision_option,
    relaxation_options,
    shape_options,
)
from .output import print_json

_BATCH_SIZE = 64  # for --model without --data


@click.command()
@network_options
@shape_options
@method_option
@relaxation_options
@belief_optimizer_options
@nudging_options
@backend_option
@precision_option
@click.option(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, ...; auto: a GPU if any; or a chip that need not be here: "
    f"{', '.join(chip.alias for chip in chips.TABLE)}, or an architecture, e.g. sm_90a.",
)
@click.option(
    "--batch-size",
    metavar="N",
    type=Count(),
    help="Samples of a batch.  [default: the data set's; 64 for --model]",
)
@json_option
def explain(net, widths, model, data, input_shape, device, batch_size, precision, as_json, **options) -> int:
    """Say which backend would run a network, with which kernels, and how fast it can be at most.

    Nothing runs. For a chip that is not here backends, tiles, the placement in shared memory, waves and floors come
    from its published figures; which backend is the fastest there only a measurement on the device can say.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    where, _ = device_or_chip(device)
    network, sample, source = network_and_sample_of(net, widths, model, data, input_shape)
    defaults = DEFAULTS.get(source)
    batch_size = batch_size or (defaults.batch_size if defaults else _BATCH_SIZE)
    step_size = options["step_size"]
    if step_size is None:
        step_size = defaults.step_size if defaults else STEP_SIZE
    with use_precision(precision, where):
        told = explain_model(
            in_precision(network, precision), (batch_size, *sample), device,
            method=options["method"], num_steps=options["num_steps"], step_size=step_size, loss=options["loss"],
            backend=options["backend"], belief_optimizer=belief_optimizer_of(options), nudging=nudging_of(options),
        )  # fmt: skip
    if as_json:
        print_json(_as_json(told))
    else:
        click.echo(str(told))
    return 0


def _as_json(told: Explanation) -> dict:
    plan, chip = told.plan, told.chip
    kernels = told.candidates or {plan.backend: told.kernels}
    return {
        "device": str(plan.device) if chip is None else None,
        "chip": None if chip is None else asdict(chip),
        "method": plan.method,
        "num_steps": plan.num_steps,
        "backend": plan.backend or None,
        "candidates": list(told.candidates),
        "refused": told.refused,
        "precision": {name: str(getattr(plan.precision, name)) for name in ("state", "operand")},
        "gram": plan.gram,
        "gram_reason": plan.gram_reason,
        "multiply_adds": None if plan.work is None else {**asdict(plan.work), "total": plan.work.total},
        "layers": [
            {"layer": layer.label, "input": shapes and shapes[0], "output": shapes and shapes[-1]}
            for layer, shapes in zip(told.network.layers, plan.shapes, strict=True)
        ],
        "kernels": {name: list(lines) for name, lines in kernels.items()},
    }
