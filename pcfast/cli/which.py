"""``pcfast which``: the program whose settings a recorded training step agrees with."""

from __future__ import annotations

import math
import zipfile
from dataclasses import fields
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..presets.identification import Match, identify
from ..presets.settings import LOSSES
from ..training.checkpoints import check_state, unfit_where_refused
from .building import belief_optimizer_of, nudging_of, optimizer_of
from .options import OPTIMIZERS, Count, Finite, belief_optimizer_options, json_option, nudging_options
from .output import console, print_json, table
from .user_model import user_model

_MAX_ROWS = 12  # of those that do not meet the record
_MAX_BYTES = 1 << 30


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
@belief_optimizer_options
@nudging_options
@click.option(
    "--optimizer",
    type=click.Choice(list(OPTIMIZERS)),
    help="Of an incremental program's weights, beside grad_last.NAME in RECORD.",
)
@click.option("--lr", metavar="X", type=Finite(min=0, min_open=True), help="Its learning rate.")
@click.option(
    "--momentum", metavar="X", type=Finite(0, 1, max_open=True), help="Of --optimizer sgd.  [default: 0]"
)
@click.option("--weight-decay", metavar="X", type=Finite(min=0), help="Of --optimizer.  [default: 0]")
@json_option
def which(record: Path, as_json: bool, **options) -> int:
    """Find the preset that computes what another program computed in one training step.

    RECORD is a file of numpy.savez: x and y, the batch; param.NAME, the weights before; grad.NAME, the gradients that
    the program handed to its weight optimiser; NAME as in the model's state_dict. vinit.1, vinit.2, ...: where hidden
    beliefs start, if neither at the forward pass nor at zero. Every preset is tried in float64. Exit status 1: none
    agrees.
    """
    arrays = _read(record)
    model = user_model(options["model"]).double()
    weights = _under(arrays, "param.")
    check_state(record, "record", model, {**_others(model, weights), **weights})
    with unfit_where_refused(record, "record", "param"):
        model.load_state_dict(weights, strict=False)
    last = _under(arrays, "grad_last.")
    optimizer = _optimizer_of(options)
    matches = identify(
        model, arrays["x"], arrays["y"], _under(arrays, "grad."),
        **{name: options[name] for name in ("step_size", "num_steps", "loss")},
        belief_optimizer=belief_optimizer_of(options), nudging=nudging_of(options), vinit=_start(arrays),
        last_updates=last if last and optimizer else None, optimizer=optimizer if last else None,
    )  # fmt: skip
    met = [match for match in matches if match.meets]
    if as_json:
        print_json(
            {"meets": [_plain(match) for match in met], "others": [_plain(m) for m in matches if not m.meets]}
        )
    else:
        _print(matches, rows=len(arrays["x"]))
    return 0 if met else 1


def _read(path: Path) -> dict[str, Tensor]:
    """The arrays of a record; ArgumentError where they are not there."""
    needed = "a file of numpy.savez with x, y, param.NAME and grad.NAME"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("more than a gigabyte")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    # a file of torch's is a zip of other things
    except (OSError, ValueError, TypeError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ArgumentError("record", f"{path}, which cannot be read ({reason})", needed) from error
    if not all(isinstance(value, np.ndarray) for value in arrays.values()):
        raise ArgumentError(
            "record", f"{path}, which holds other things than arrays, as torch.save writes", needed
        )
    arrays = {name: torch.from_numpy(v) for name, v in arrays.items() if v.dtype.kind in "iuf"}
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


def _start(arrays: dict[str, Tensor]) -> list[Tensor | None] | None:
    """Beliefs v_0..v_L to start from, L as the record has it; None where it has none."""
    given = _under(arrays, "vinit.")
    if not given:
        return None
    names = [str(layer) for layer in range(1, len(given) + 1)]
    if set(given) != set(names):
        wrong = ", ".join(f"vinit.{name}" for name in sorted(set(given) - set(names)))
        raise ArgumentError(
            "record", f"{wrong} without the others", "vinit.1, vinit.2, ... of all hidden layers"
        )
    return [None, *(given[name].double() for name in names), None]


def _optimizer_of(options: dict):
    """What makes an incremental program's weight optimiser; None without --optimizer."""
    if options["optimizer"] is None:
        for name in ("lr", "momentum", "weight_decay"):
            if options[name] is not None:
                raise ArgumentError(name, f"{options[name]} without --optimizer", "--optimizer, too")
        return None
    if options["lr"] is None:
        raise ArgumentError("lr", "none with --optimizer", "the program's learning rate")
    return optimizer_of({**options, "weight_decay": options["weight_decay"] or 0.0})


def _call(match: Match) -> str:
    """What to write in a program, but for its step size and T."""
    name, _, rest = match.preset.partition("(")
    loss = match.loss if name != "torch2pc" else match.loss.partition(" ")[2]
    beside = ", ".join(part for part in (rest.removesuffix(")"), f"loss={loss!r}") if part)
    return f"presets.{name}(step_size=..., num_steps=..., {beside})"


def _plain(match: Match) -> dict:
    values = {field.name: getattr(match, field.name) for field in fields(match) if field.name != "settings"}
    shown = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    return {**shown, "call": _call(match)}


def _print(matches: list[Match], rows: int) -> None:
    met = [match for match in matches if match.meets]
    others = [match for match in matches if not match.meets]
    shown = table("", "preset", "loss", "layers", ">off by", ">times", ">then off by")
    for m in [*met, *others[:_MAX_ROWS]]:
        shown.add_row(
            m.preset, m.loss, m.layers, f"{m.difference:.1e}", f"{m.factor:.4g}", f"{m.after_factor:.1e}"
        )
    console().print(shown)
    whole = [match for match in met if not match.only_output]
    if whole:
        click.echo(f"agrees: {', '.join(dict.fromkeys(match.preset for match in whole))}")
        click.echo(f"e.g. {_call(whole[0])}")
        kinds = {(m.settings["method"], m.settings["num_steps"], m.settings["reduction"], m.settings["update_scale"],
                  m.settings.get("vinit") is None) for m in whole}  # fmt: skip
        if len(kinds) > 1:
            click.echo(
                "these are different algorithms, which this record cannot tell apart: record "
                + ("more rows than one" if rows == 1 else "fewer iterations, or another step size")
            )
    elif met:
        names = ", ".join(dict.fromkeys(match.preset for match in met))
        click.echo(f"agrees in loss and reduction: {names}")
        click.echo(
            "the first gradient of an incremental program says no more: add grad_last.NAME, the last iteration's, "
            "and --optimizer and --lr"
        )
    elif others and others[0].same_but_for_a_factor:
        same = [f"{m.preset} times {m.factor:.4g}" for m in others if m.same_but_for_a_factor]
        click.echo(f"agrees but for a factor: {', '.join(dict.fromkeys(same))}; the batch has {rows} rows")
    else:
        click.echo(
            "none agrees: are T, the step size, the optimiser of the beliefs and their start the program's? Are "
            "the weights those from before the step, the rows of x samples, the weights (out, in)?"
        )
