"""``pcfast train``: train a network by predictive coding, with a run folder that can be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from torch import nn

from .. import training
from ..datasets import Data
from ..errors import ArgumentError
from ..precision import parameter_dtype
from ..recipes import RECIPES
from .building import (
    belief_optimizer_of,
    data_of,
    device_of,
    in_dtype_of,
    loaded,
    network_of,
    nudging_of,
    optimizer_of,
    with_defaults,
)
from .options import (
    Folder,
    RecipeName,
    belief_options,
    data_options,
    epochs_option,
    json_option,
    machine_options,
    method_option,
    network_options,
    optimizer_options,
    relaxation_options,
    seed_option,
)
from .output import print_json

_OF_THE_CALL = ("out", "resume", "as_json")  # options that say nothing about the run
#: Options that may stand beside --recipe, which fixes the others.
_BESIDE_A_RECIPE = (
    "recipe", "data_dir", "epochs", "backend", "precision", "device", "seed", *_OF_THE_CALL
)  # fmt: skip


@click.command()
@click.option(
    "--recipe",
    type=RecipeName(),
    metavar="NAME",
    help="A published recipe, which fixes network, data set, preprocessing, relaxation, optimiser and schedule; "
    "docs/recipes.md has them all. E.g. pcx-mlp-mnist-se.",
)
@data_options
@network_options
@method_option
@relaxation_options
@belief_options
@optimizer_options
@epochs_option
@machine_options
@seed_option
@click.option("--out", type=Folder(), help="Run folder.  [default: runs/<recipe> or runs/<data>]")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the checkpoint in --out, with the options of that run. --epochs, --backend and --device may be "
    "given anew.",
)
@json_option
@click.pass_context
def train(context: click.Context, **options) -> int:
    """Train a network by predictive coding.

    The run folder gets checkpoint.pt, config.json, log.csv (one line an epoch) and curves.png. Ctrl-C finishes the
    batch and writes the checkpoint; --resume goes on from it, on a CPU bit for bit as if nothing had happened.
    """
    out = options["out"] or Path("runs") / (options["recipe"] or options["data"])
    if options["resume"]:
        options = _options_of_run(out, context, options)
    if options["recipe"] is not None:
        _check_beside_recipe(context, options["recipe"])
    device = device_of(options["device"])
    torch.manual_seed(options["seed"])
    model, data, settings = _of_recipe(options) if options["recipe"] else _of_options(options)
    try:
        history = training.train(
            model,
            data,
            **settings,
            **{name: options[name] for name in ("backend", "precision", "seed")},
            device=device,
            out=out,
            resume=options["resume"],
            progress=not options["as_json"],
            kept=_kept(options),
        )
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):
            raise
        raise KeyboardInterrupt(f"{interrupt}; go on with: pcfast train --out {out} --resume") from None
    files = [out / name for name in training.FILES]
    if options["as_json"]:
        print_json({"history": asdict(history), "files": [str(file) for file in files]})
        return 0
    for file in files:
        click.echo(file)
    click.echo(f"test accuracy {history.test_accuracy[-1]:.2%}")
    return 0


def _check_beside_recipe(context: click.Context, recipe: str) -> None:
    """Raise ArgumentError for an option that the recipe fixes."""
    for name in context.params:
        given = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if given and name not in _BESIDE_A_RECIPE:
            raise ArgumentError(name, f"{_option(name)} with recipe {recipe}", "none", "The recipe fixes it.")


def _of_recipe(options: dict) -> tuple[nn.Sequential, Data, dict]:
    """Network, data and settings of --recipe."""
    recipe = RECIPES[options["recipe"]]
    model = recipe.network().to(parameter_dtype(options["precision"]))
    data = loaded(recipe.data, options["data_dir"], recipe.shape, seed=options["seed"])
    return model, in_dtype_of(model, recipe.prepared(data)), recipe.settings(options["epochs"])


def _of_options(options: dict) -> tuple[nn.Sequential, Data, dict]:
    """Network, data and settings of all other options."""
    chosen = with_defaults(options)
    model = network_of(
        chosen["net"], chosen["widths"], chosen["model"], data=chosen["data"], precision=chosen["precision"]
    )
    data = data_of(
        chosen["data"],
        chosen["data_dir"],
        model,
        seed=chosen["seed"],
        loss=chosen["loss"],
        spec=chosen["model"],
    )
    passed_on = ("epochs", "batch_size", "loss", "method", "step_size", "num_steps")
    settings = {
        **{name: chosen[name] for name in passed_on},
        "belief_optimizer": belief_optimizer_of(chosen),
        "nudging": nudging_of(chosen),
        "nudging_growth": chosen["nudging_growth"] or 0.0,
        "optimizer": optimizer_of(chosen),
    }
    return model, data, settings


def _kept(options: dict) -> dict:
    """What a resumed run takes from its folder: the options, paths such that they hold from any folder."""
    said = _BESIDE_A_RECIPE if options["recipe"] else options
    kept = {name: value for name, value in options.items() if name in said and name not in _OF_THE_CALL}
    if kept["data_dir"] is not None:
        kept["data_dir"] = str(Path(kept["data_dir"]).resolve())
    if kept.get("model") is not None:
        file, _, function = kept["model"].rpartition(":")
        kept["model"] = f"{Path(file).resolve()}:{function}"
    return kept


def _options_of_run(out: Path, context: click.Context, options: dict) -> dict:
    """``options``, where not given on the command line those of the run in ``out``.

    Raises:
        ArgumentError: no run there, or one with other options than those that were given.
    """
    path = out / training.CONFIG
    try:
        kept = json.loads(path.read_text())["kept"]
    except FileNotFoundError:
        needed = f"the folder of a run, with its {training.CONFIG}"
        raise ArgumentError("out", f"no run at {out}", needed, "Start it without --resume.") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        needed = f"a {training.CONFIG} of pcfast train"
        raise ArgumentError(
            "out", f"{path}, which is none", needed, "Start anew in another folder."
        ) from error
    given = {name for name in options if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    now = {**options, **_kept(options)}
    now["widths"] = None if now["widths"] is None else list(now["widths"])
    there = {"recipe": None, **kept} if kept.get("recipe") else {"recipe": None, **with_defaults(kept)}
    others = [
        f"{_option(name)} {_shown(kept.get(name))}, not {_shown(now[name])}"
        for name in sorted(given - {"epochs", "backend", "device", "data_dir"})
        if name in there and kept.get(name) != now[name] and there[name] != now[name]
    ]
    if others:
        needed = "the options of that run, or none"
        raise ArgumentError("resume", f"a run in {out} with {'; '.join(others)}", needed)
    return {
        name: value if name in given or name not in kept else kept[name] for name, value in options.items()
    }


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value) -> str:
    """A value of an option as it is typed."""
    if value is None:
        return "not given"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
