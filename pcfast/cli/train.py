"""``pcfast train``: train a network by predictive coding, with a run folder that can be resumed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from torch import nn

from ..backends.qualification.automatic import local_rank
from ..datasets import Data
from ..errors import ArgumentError
from ..model.grouping import FORMS, flattened, group_layers
from ..precision import parameter_dtype
from ..presets.settings import BEFORE_ACTIVATION
from ..recipes import RECIPES
from ..support.files import checked_folder
from ..training import trainer as training
from ..training.checkpoints import read_run
from ..training.writers import WRITERS
from .building import (
    belief_optimizer_of,
    data_of,
    in_dtype_of,
    loaded,
    loss_of_preset,
    network_of,
    nudging_of,
    optimizer_of,
    preset_of,
    with_defaults,
)
from .launch import JOB, Launch, joined
from .logs import logged
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
    preset_option,
    relaxation_options,
    seed_option,
)
from .output import print_json
from .tasks import GENERATIVE, SAMPLES, TASK_DEFAULTS, check_task, draw_samples, of_task
from .user_model import digest_of

_OF_THE_CALL = ("out", "resume", "log", "as_json")  # options that say nothing about the run
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
@preset_option
@click.option(
    "--task",
    type=click.Choice(("classify", *GENERATIVE)),
    default="classify",
    show_default=True,
    help="reconstruct: a decoder whose latent variables are inferred from the images; generate: one that reads the "
    "class, too, and draws each (docs/graphs.md). Both write samples.png; --widths are the decoder's hidden layers, "
    "and relaxation and optimiser have other defaults.",
)
@click.option(
    "--latent",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Latent variables of --task reconstruct and generate.  [default: 16]",
)
@click.option(
    "--beliefs",
    type=click.Choice(FORMS),
    help="Where beliefs sit (docs/layers.md); nests the network anew.  [default: as --model has them; networks of "
    "--net behind activations, with --preset where its program has them]",
)
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
@click.option(
    "--log",
    type=click.Choice(list(WRITERS)),
    multiple=True,
    help="Write losses, scores, energies and convergence of every epoch there too (docs/commands/train.md).",
)
@json_option
@click.pass_context
def train(context: click.Context, **options) -> int:
    """Train a network by predictive coding.

    The run folder gets checkpoint.pt, config.json, log.csv (one line an epoch) and curves.png. Ctrl-C, SIGTERM and
    SIGHUP finish the batch and write the checkpoint; --resume continues from it, on a CPU bit for bit as if nothing
    had happened.

    Under torchrun its processes train together, each on its part of every batch of --batch-size rows.
    """
    with joined() as launch:
        return _train(launch, context, options)


def _train(launch: Launch, context: click.Context, options: dict) -> int:
    processes = launch.processes
    out, options, given = processes.first(lambda: _asked_for(launch, context, options))
    with processes.agreed():
        device = launch.device(options["device"])
    for turn in (local_rank() == 0, local_rank() != 0):  # one process on a machine fetches the data
        with processes.agreed():
            if turn:
                torch.manual_seed(options["seed"])
                if options["task"] in GENERATIVE:
                    made = of_task(options)
                else:
                    made = _of_recipe(options) if options["recipe"] else _of_options(options, given)
    model, data, settings = made
    backend = {"backend": options["backend"]}
    kinds = options["log"] if processes.leads else ()
    logs = logged(kinds, out, options["resume"], data, {**settings, **backend}, device)
    try:
        with contextlib.ExitStack() as opened:
            with processes.agreed():
                after_epoch = opened.enter_context(logs)
            history = training.train(
                model,
                data,
                **settings,
                **backend,
                **{name: options[name] for name in ("precision", "seed")},
                device=device,
                out=out,
                resume=options["resume"],
                progress=not options["as_json"],
                kept={**_kept(options), **({JOB: launch.job} if launch.job else {})},
                process_group=launch.group,
                after_epoch=after_epoch,
            )
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):
            raise
        raise KeyboardInterrupt(f"{interrupt}; go on with: pcfast train --out {out} --resume") from None
    if not processes.leads:
        return 0
    if options["task"] in GENERATIVE:
        draw_samples(model.to(device), data, settings, options, out / SAMPLES)
    files = [path for name in (*training.FILES, SAMPLES) if (path := out / name).exists()]
    if options["as_json"]:
        print_json({"history": asdict(history), "files": [str(file) for file in files]})
        return 0
    for file in files:
        click.echo(file)
    click.echo(f"test {history.score('test')}")
    return 0


def _asked_for(launch: Launch, context: click.Context, options: dict) -> tuple[Path, dict, list[str]]:
    """The run folder, the options of the run, and the names of those that the command line gives."""
    out = checked_folder("out", options["out"] or Path("runs") / (options["recipe"] or options["data"]))
    given = [name for name in options if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    if options["resume"] or launch.restarted(out, training.CHECKPOINT):
        options = {**options, "resume": True}
        options = _options_of_run(out, context, options, given)
    elif options["task"] in GENERATIVE:
        check_task(given)
        options |= {name: value for name, value in TASK_DEFAULTS.items() if name not in given}
    elif options["latent"] is not None:
        raise ArgumentError("latent", "--latent with --task classify", "--task reconstruct or generate")
    elif options["preset"] is not None and "loss" not in given:
        options["loss"] = loss_of_preset(options["preset"])
    if options["recipe"] is not None:
        _check_beside_recipe(given, options["recipe"])
    return out, options, given


def _check_beside_recipe(given: Collection[str], recipe: str) -> None:
    """Raise ArgumentError for an option that the command line names and the recipe fixes."""
    for name in given:
        if name not in _BESIDE_A_RECIPE:
            raise ArgumentError(name, f"{_option(name)} with recipe {recipe}", "none", "The recipe fixes it.")


def _of_recipe(options: dict) -> tuple[nn.Sequential, Data, dict]:
    """Network, data and settings of --recipe."""
    recipe = RECIPES[options["recipe"]]
    model = recipe.network().to(parameter_dtype(options["precision"]))
    data = loaded(recipe.data, options["data_dir"], recipe.shape, seed=options["seed"])
    return model, in_dtype_of(model, recipe.prepared(data)), recipe.settings(options["epochs"])


def _of_options(options: dict, given: Collection[str]) -> tuple[nn.Sequential, Data, dict]:
    """Network, data and settings of all other options; ``given``: those that the command line names."""
    chosen = with_defaults(options)
    model = network_of(
        chosen["net"], chosen["widths"], chosen["model"], data=chosen["data"], precision=chosen["precision"]
    )
    model = _with_beliefs(model, chosen)
    data = data_of(
        chosen["data"],
        chosen["data_dir"],
        model,
        seed=chosen["seed"],
        loss=chosen["loss"],
        spec=chosen["model"],
    )
    passed_on = ("epochs", "batch_size", "loss", "method", "step_size", "num_steps")
    beliefs = {"belief_optimizer": belief_optimizer_of(chosen), "nudging": nudging_of(chosen)}
    settings = {
        **{name: chosen[name] for name in passed_on},
        **(
            beliefs
            if chosen["preset"] is None
            else preset_of({**chosen, "step_size": options["step_size"]}, given)
        ),
        "nudging_growth": chosen["nudging_growth"] or 0.0,
        "optimizer": optimizer_of(chosen),
    }
    return model, data, settings


def _with_beliefs(model: nn.Sequential, options: dict) -> nn.Sequential:
    """``model`` with beliefs where --beliefs says; a network of the paper as --preset's program has it."""
    form = options["beliefs"]
    if form is None and options["model"] is None and options["preset"] in BEFORE_ACTIVATION:
        form = "before_activation"
    return model if form is None else group_layers(flattened(model), beliefs=form)


def _kept(options: dict) -> dict:
    """What a resumed run takes from its folder: the options, paths such that they hold from any folder."""
    said = _BESIDE_A_RECIPE if options["recipe"] else options
    kept = {name: value for name, value in options.items() if name in said and name not in _OF_THE_CALL}
    if kept["data_dir"] is not None:
        kept["data_dir"] = str(Path(kept["data_dir"]).resolve())
    if kept.get("model") is not None:
        file, _, function = kept["model"].rpartition(":")
        kept["model"] = f"{Path(file).resolve()}:{function}"
        kept[_MODEL_DIGEST] = digest_of(kept["model"])
    return kept


def _options_of_run(out: Path, context: click.Context, options: dict, given: Collection[str]) -> dict:
    """``options``, where not given on the command line those of the run in ``out``.

    The checkpoint says what they were, once its checksum is right. config.json, which it is written after, has to
    agree; where it is missing it will be written again. A model file runs only if it is the one of the run, or is
    named on the command line.

    Raises:
        ArgumentError: no run there, a damaged one, or one with other options than those that were given.
    """
    path = out / training.CONFIG
    if not (out / training.CHECKPOINT).exists() and not path.exists():
        needed = f"the folder of a run, with its {training.CONFIG}"
        raise ArgumentError("out", f"no run at {out}", needed, "Start it without --resume.")
    config = read_run(out / training.CHECKPOINT)["config"]
    _check_config(path, config)
    kept = config["kept"]
    digest = kept.pop(_MODEL_DIGEST, None)
    kept.pop(JOB, None)
    _check_kept(out, context, kept)
    now = {**options, **_kept(options)}
    now["widths"] = None if now["widths"] is None else list(now["widths"])
    there = {"recipe": None, **kept} if kept.get("recipe") else {"recipe": None, **with_defaults(kept)}
    others = [
        f"{_option(name)} {_shown(kept.get(name))}, not {_shown(now[name])}"
        for name in sorted(set(given) - {"epochs", "backend", "device", "data_dir"})
        if name in there and kept.get(name) != now[name] and there[name] != now[name]
    ]
    if others:
        needed = "the options of that run, or none"
        raise ArgumentError("resume", f"a run in {out} with {'; '.join(others)}", needed)
    if kept.get("model") is not None and "model" not in given and digest_of(kept["model"]) != digest:
        file = kept["model"].rpartition(":")[0]
        given_words = f"a run in {out} whose model file {file} is missing or has changed since"
        remedy = f"Or say that it is right: --model {kept['model']}"
        raise ArgumentError("resume", given_words, "the file that it began with", remedy)
    return {
        name: value if name in given or name not in kept else kept[name] for name, value in options.items()
    }


_MODEL_DIGEST = "model_sha256"
#: What a run may be resumed with anew: config.json of a run that was killed may be older there.
_ANEW = ("epochs", "backend", "device", "data_dir", _MODEL_DIGEST, JOB)
_MAX_BYTES = 16 << 20  # of config.json: a thousand times a large one


def _check_config(path: Path, config: dict) -> None:
    """Raise ArgumentError where the file config.json is there and is not that of the checkpoint's ``config``."""

    def described(whole) -> tuple:
        kept = whole["kept"]
        anew = {name: type(kept.get(name)) for name in _ANEW if kept.get(name) is not None}
        known = {name: type(value) for name, value in config["kept"].items()}
        for name, kind in anew.items():
            if known.get(name) not in (kind, type(None)):
                raise TypeError(f"{name} of another type")
        if not isinstance(whole.get("epochs"), int):
            raise TypeError("epochs of another type")
        return whole["settings"], {name: value for name, value in kept.items() if name not in _ANEW}

    if not path.exists() and not path.is_symlink():
        return
    needed, remedy = (
        f"the {training.CONFIG} of that run",
        "Remove it: it is written anew from the checkpoint.",
    )
    try:
        if not path.is_file():
            raise OSError("no regular file")
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES)
        there = described(json.loads(content))
    # RecursionError: nested without end; the others: no text, no JSON, or of another form
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArgumentError("out", f"{path}, which is none", needed, remedy) from error
    if there != described(config):
        raise ArgumentError("out", f"{path}, which is not the checkpoint's", needed, remedy)


def _check_kept(out: Path, context: click.Context, kept: dict) -> None:
    """Raise ArgumentError unless every option that a run kept has a value that the command line would take."""
    for parameter in context.command.params:
        value = kept.get(parameter.name)
        try:
            if value is not None:
                text = ",".join(map(str, value)) if isinstance(value, list) else value
                parameter.type_cast_value(context, text)
        except Exception as error:  # click's, or of a value of another type
            given = f"a run in {out} whose {_option(parameter.name)} is none"
            raise ArgumentError("out", given, "a run of train", "Start anew in another folder.") from error
    if kept.get("recipe") is None and kept.get("data") is None:
        needed = "a run of pcfast train"
        raise ArgumentError(
            "out", f"a run in {out} that another program began", needed, "Resume it from there."
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value) -> str:
    """A value of an option as it is typed."""
    if value is None:
        return "not given"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
