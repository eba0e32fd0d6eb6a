"""``pcfast which``: the program whose settings a recorded training step agrees with."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints import check_state, unfit_where_refused
from ..errors import ArgumentError
from ..identification import Match, identify
from ..presets import LOSSES
from .building import belief_optimizer_of, nudging_of
from .options import Count, belief_options, json_option
from .output import console, print_json, table
from .user_model import user_model

_MOST_ROWS = 12  # of those that do not meet the record
_MOST_BYTES = 1 << 30


@click.command()
@click.argument("record", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--model",
    metavar="FILE.py:FUNCTION",
    required=True,
    help="The network of the record: FUNCTION() returns an nn.Sequential.",
)
@click.option("--step-size", type=float, metavar="ETA", required=True, help="The program's, of its beliefs.")
@click.option("--num-steps", type=Count(0), required=True, help="The program's T.")
@click.option(
    "--loss", type=click.Choice(list(LOSSES)), help="mse is 0.5 |.|^2.  [default: those that take y]"
)
@belief_options
@json_option
def which(record: Path, as_json: bool, **options) -> int:
    """Find the preset that computes what another program computed in one training step.

    RECORD is a file of numpy.savez: x and y, the batch; param.NAME, the weights before; grad.NAME, the gradients that
    the program handed to its weight optimiser; NAME as in the model's state_dict. Start at zero, or anywhere, is
    vinit.L for each hidden layer. Every preset is tried in float64. Exit status 1: none agrees.
    """
    if options["nudging_growth"] is not None:
        raise ArgumentError(
            "nudging_growth", str(options["nudging_growth"]), "none: the record is of one step"
        )
    arrays = _read(record)
    model = user_model(options["model"]).double()
    weights = _under(arrays, "param.")
    check_state(record, "record", model, {**_others(model, weights), **weights})
    with unfit_where_refused(record, "record", "param"):
        model.load_state_dict(weights, strict=False)
    matches = identify(
        model, arrays["x"], arrays["y"], _under(arrays, "grad."),
        **{name: options[name] for name in ("step_size", "num_steps", "loss")},
        belief_optimizer=belief_optimizer_of(options), nudging=nudging_of(options),
        vinit=_start(arrays, len(model)),
    )  # fmt: skip
    met = [match for match in matches if match.meets]
    if as_json:
        print_json(
            {"meets": [_plain(match) for match in met], "others": [_plain(m) for m in matches if not m.meets]}
        )
    else:
        _print(matches)
    return 0 if met else 1


def _read(path: Path) -> dict[str, Tensor]:
    """The arrays of a record; ArgumentError where they are not there."""
    needed = "a file of numpy.savez with x, y, param.NAME and grad.NAME"
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("more than a gigabyte")
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "iuf"
            }
    except (OSError, ValueError, TypeError, EOFError, KeyError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ArgumentError("record", f"{path}, which cannot be read ({reason})", needed) from error
    for name in ("x", "y"):
        if name not in arrays:
            raise ArgumentError("record", f"{path} without {name}", needed)
    for prefix in ("param.", "grad."):
        if not _under(arrays, prefix):
            raise ArgumentError("record", f"{path} without any {prefix}NAME", needed)
    return arrays


def _under(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _others(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the record need not hold: buffers, and parameters that are not trained."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in trained | set(weights)}


def _start(arrays: dict[str, Tensor], depth: int) -> list[Tensor | None] | None:
    """Beliefs v_0..v_L to start from; None where the record has none."""
    given = [arrays.get(f"vinit.{layer}") for layer in range(1, depth)]
    if all(value is None for value in given):
        return None
    return [None, *(None if value is None else value.double() for value in given), None]


def _plain(match: Match) -> dict:
    values = {name: value for name, value in asdict(match).items() if name != "settings"}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def _print(matches: list[Match]) -> None:
    met = [match for match in matches if match.meets]
    others = [match for match in matches if not match.meets]
    shown = table("", "preset", "loss", "layers", ">off by", ">nearest times")
    for match in [*met, *others[:_MOST_ROWS]]:
        shown.add_row(
            match.preset, match.loss, match.layers, f"{match.difference:.1e}", f"{match.factor:.4g}"
        )
    console().print(shown)
    if met:
        click.echo(f"agrees: {', '.join(dict.fromkeys(match.preset for match in met))}")
    else:
        click.echo(
            "none agrees: is T, the step size, the optimiser of the beliefs, or where they start another?"
        )
